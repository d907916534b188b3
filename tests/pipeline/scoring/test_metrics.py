"""Agreement against a slow reference and scipy.stats, and its behaviour where a figure does not exist."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaclip.pipeline.scoring.agreement import (
    Agreement,
    agreement,
    agreement_by,
    average_ranks,
    fit_logistic,
    krocc,
    pearson,
    srocc,
)
from deltaclip.tests import reference

# Sums of up to 60 terms of size 1 in float64 differ by some 1e-14 between orders of summation.
CLOSE = pytest.approx


def draw(seed, num_rows, levels, dtype=np.float64):
    """Labels and noisy predictions, rounded to few levels so that both have ties."""
    rng = np.random.default_rng(seed)
    label = np.round(rng.random(num_rows) * levels) / levels
    predicted = np.round((label + 0.5 * rng.normal(size=num_rows)) * 3 * levels) / (3 * levels)
    return predicted.astype(dtype), label


rows = st.tuples(st.integers(0, 2**32), st.integers(3, 60), st.sampled_from([1, 2, 7, 1000]))


@settings(deadline=None)  # the first example pays for importing scipy
@given(rows, st.sampled_from([np.float64, np.float32, np.float16]))
def test_rank_correlations_match_the_reference_and_scipy(case, dtype):
    from scipy import stats

    x, y = draw(*case, dtype=dtype)
    if np.unique(x).size == 1 or np.unique(y).size == 1:
        assert math.isnan(srocc(x, y))
        assert math.isnan(krocc(x, y))
        return
    assert srocc(x, y) == CLOSE(reference.spearman(x, y), abs=1e-12)
    assert srocc(x, y) == CLOSE(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert krocc(x, y) == CLOSE(reference.kendall_tau_b(x, y), abs=1e-12)
    assert krocc(x, y) == CLOSE(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert pearson(x, y) == CLOSE(reference.pearson(x, y), abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.5, 0.0, 2.0, 2.5, 1e9]), max_size=20))
def test_ranks_share_the_mean_of_their_places(values):
    assert average_ranks(values).tolist() == reference.ranks(values)


# Block sizes of the count of discordant pairs are powers of two: sizes around them.
@pytest.mark.parametrize("num_rows", [3, 4, 5, 7, 8, 9, 31, 32, 33, 1023, 1024, 1025, 30_000])
@pytest.mark.parametrize("levels", [5, 10**9])
def test_kendall_at_block_sizes(num_rows, levels):
    from scipy import stats

    x, y = draw(num_rows, num_rows, levels)
    assert krocc(x, y) == CLOSE(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert krocc(-x, y) == CLOSE(-krocc(x, y), abs=1e-12)


def test_perfect_orders_are_exactly_one():
    y = np.random.default_rng(0).random(1000)
    for x, sign in ((np.exp(5 * y), 1), (-y, -1)):
        assert (srocc(x, y), krocc(x, y)) == (CLOSE(sign, abs=1e-12), CLOSE(sign, abs=1e-12))
        assert abs(srocc(x, y)) <= 1
    assert pearson(3 * y + 1, y) == CLOSE(1, abs=1e-12)


@pytest.mark.parametrize(("scale", "offset"), [(1e-200, 0.0), (1e200, 0.0), (1.0, 1e6), (2.0**-52, 1.0)])
def test_pearson_holds_at_extreme_scales(scale, offset):
    x = np.array([0.0, 1.0, 2.0, 4.0, 8.0, 3.0])
    y = np.array([0.1, 0.3, 0.2, 0.9, 0.8, 0.5])
    assert pearson(scale * x + offset, y) == CLOSE(reference.pearson(x, y), abs=1e-9)


@pytest.mark.parametrize("shape", ["steep", "flat", "falling"])
@pytest.mark.parametrize("num_rows", [30, 300])
def test_mapped_figures_match_another_solver(shape, num_rows):
    rng = np.random.default_rng(num_rows)
    x = rng.normal(0.25, 0.04, num_rows)  # the range of CLIP cosines
    slope = {"steep": 120.0, "flat": 30.0, "falling": -60.0}[shape]
    y = 0.1 + 0.8 / (1 + np.exp(-slope * (x - 0.26))) + 0.05 * rng.normal(size=num_rows)
    found, mapped = agreement(x, y), reference.logistic_map(x, y)
    assert found.note == ""
    # Both solvers stop at a relative change of 1e-8 or less in the sum of squares, which is flat there.
    assert found.rmse == CLOSE(reference.rmse(mapped, y), rel=1e-6)
    assert found.plcc_mapped == CLOSE(reference.pearson(mapped, y), abs=1e-6)
    assert found.main == CLOSE((reference.spearman(x, y) + reference.pearson(x, y)) / 2, abs=1e-12)
    assert found.n == num_rows


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_the_mapping_never_does_worse_than_its_start(seed):
    x, y = draw(seed, 40, 1000)
    start = (y.max() - y.min()) / (1 + np.exp(-(x - x.mean()) / (x.std() / 4))) + y.min()
    found = agreement(x, y)
    assert found.note or found.rmse <= reference.rmse(start, y) + 1e-12


@pytest.mark.parametrize("seed", range(24))
def test_the_mapping_is_monotone_and_no_worse_than_random_restarts(seed):
    """At n up to 20 the usual start alone ends in a local minimum, or in a curve against the order of the data."""
    from scipy.optimize import leastsq
    from scipy.special import expit

    rng = np.random.default_rng(seed)
    x = rng.random(int(rng.integers(5, 21)))
    noise = rng.normal(size=x.size)
    y = [rng.random(x.size), x + 0.3 * noise, 0.5 * noise - x, (x > 0.6) + 0.1 * noise][seed % 4]
    sign, z = -1 if srocc(x, y) < 0 else 1, (x - x.mean()) / x.std()

    def curve(b):
        return (b[0] - b[1]) * expit((z - b[2]) / max(abs(b[3]), 1e-9)) + b[1]

    errors = []
    for _ in range(20):
        ends = sorted((y.min(), y.max()), reverse=sign > 0)
        start = np.array([*ends, 1.5 * rng.normal(), 10 ** rng.uniform(-2, 0.7)])
        b, _, _, _, status = leastsq(lambda b: curve(b) - y, start, full_output=True, maxfev=2000)
        if status in (1, 2, 3, 4) and sign * (b[0] - b[1]) > 0:
            errors.append(np.square(curve(b) - y).sum())
    mapped = fit_logistic(x, y)
    assert mapped is not None
    assert (sign * np.diff(mapped[np.argsort(x)]) >= -1e-12).all()
    # What is left where a minimum lies at infinity and both stop on the way.
    assert np.square(mapped - y).sum() <= min(errors) + 1e-3 * np.square(y - y.mean()).sum()


def test_mapped_figures_do_not_depend_on_the_scale_of_predictions():
    x, y = draw(5, 200, 1000)
    plain, moved = agreement(x, y), agreement(1e-4 * x + 1000.0, y)
    assert moved.plcc_mapped == CLOSE(plain.plcc_mapped, abs=1e-6)
    assert moved.rmse == CLOSE(plain.rmse, rel=1e-6)


def test_rows_without_a_label_are_left_out_whatever_they_predict():
    x, y = draw(1, 50, 1000)
    y_gaps, x_gaps = y.copy(), x.copy()
    y_gaps[::3], x_gaps[::3] = np.nan, np.nan
    kept = np.arange(50) % 3 != 0
    assert agreement(x_gaps, y_gaps) == agreement(x[kept], y[kept])
    assert agreement(x_gaps, y_gaps).n == kept.sum()
    assert srocc(x_gaps, y_gaps) == srocc(x[kept], y[kept])


NOTHING = dict.fromkeys(("srocc", "krocc", "plcc", "plcc_mapped", "rmse", "main"))


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_fewer_than_three_rows_have_no_figures(num_rows):
    found = agreement(np.arange(num_rows), np.arange(num_rows))
    assert found.to_json() == NOTHING | {"n": num_rows, "note": f"{num_rows} labelled rows, 3 are needed"}
    assert math.isnan(srocc(np.arange(num_rows), np.arange(num_rows)))
    assert math.isnan(krocc(np.arange(num_rows), np.arange(num_rows)))


def test_three_and_four_rows_are_scored_but_not_mapped():
    found = agreement([0.1, 0.2, 0.4], [0.0, 0.2, 0.1])
    assert (found.srocc, found.krocc) == (CLOSE(0.5), CLOSE(1 / 3))
    assert found.plcc_mapped == found.plcc
    assert found.rmse == CLOSE(math.sqrt((0.1**2 + 0.3**2) / 3))
    assert found.note == "3 rows, too few for the logistic: not mapped"
    assert agreement([1, 2, 3, 4], [1, 2, 3, 5]).note == "4 rows, too few for the logistic: not mapped"
    assert agreement([1, 2, 3, 4, 5.5], [1, 2, 3, 5, 5.2]).note == ""


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e300])
def test_a_constant_side_has_an_error_but_no_correlation(constant):
    y = np.linspace(0, 1, 7)
    expected = NOTHING | {"n": 7, "rmse": None}
    found = agreement(np.full(7, 0.1), y).to_json()
    assert found == expected | {
        "rmse": CLOSE(reference.rmse(np.full(7, 0.1), y)),
        "note": "constant predictions: no correlation, not mapped",
    }
    assert math.isnan(srocc(np.full(7, constant), y))
    assert math.isnan(pearson(y, np.full(7, constant)))
    assert agreement(y, np.full(7, 0.3)).note == "constant labels: no correlation, not mapped"


# Agreements of some sets, eight times, with the numbers of freed arrays lying about.
EIGHT_TIMES = """
import json, numpy as np
from deltaclip.pipeline.scoring.agreement import agreement
draws, heap, lying, sets = np.random.default_rng(0), np.random.default_rng(85), [], []
for _ in range(60):
    num_rows = int(draws.integers(5, 60))
    label = draws.random(num_rows).astype(np.float32)
    sets.append((np.clip(label / 2 + draws.normal(0, 0.2, num_rows), 0, 1).astype(np.float32), label))
found = [set() for _ in sets]
for _ in range(8):
    for number in (8, 29, 32, 34, 40, 56):
        lying += [np.full(int(heap.integers(1, 300)), heap.random()) for _ in range(40)]
        for _ in range(20):
            lying.pop(int(heap.integers(len(lying))))
        found[number].add(json.dumps(agreement(*sets[number]).to_json()))
assert max(map(len, found)) == 1, found
"""


def test_equal_numbers_give_equal_digits_wherever_they_lie():
    # glibc fills what it hands out with this byte: a fit that reads it, or hangs on the place, differs (MINPACK's did).
    env = {**os.environ, "MALLOC_PERTURB_": "85"}
    subprocess.run([sys.executable, "-c", EIGHT_TIMES], check=True, env=env)


def test_a_fit_that_does_not_converge_falls_back_to_raw(monkeypatch):
    x, y = draw(3, 30, 1000)
    monkeypatch.setattr("deltaclip.pipeline.scoring.agreement.FOLLOWED_STEPS", 0)
    found = agreement(x, y)
    assert found.plcc_mapped == found.plcc
    assert found.rmse == CLOSE(reference.rmse(x, y))
    assert found.note == "the logistic did not converge: not mapped"


@pytest.mark.parametrize(
    ("predicted", "label", "line"),
    [
        ([1.0, np.nan, np.inf], [1, 2, 3], "prediction of row 1 is nan (2 such rows)"),
        ([1.0, 2.0, 3.0], [1, 2, -np.inf], "label of row 2 is -inf (1 such rows)"),
        ([1.0, 2.0], [1, 2, 3], "predictions (2,) and labels (3,) must be 1-D and of one length"),
        ([[1.0], [2.0]], [[1], [2]], "predictions (2, 1) and labels (2, 1) must be 1-D and of one length"),
    ],
)
@pytest.mark.parametrize("function", [agreement, srocc, krocc])
def test_wrong_arrays_are_named(function, predicted, label, line):
    with pytest.raises(ValueError, match=r".") as error:
        function(predicted, label)
    assert str(error.value) == line


def test_every_source_is_scored_on_its_own_rows():
    x, y = draw(2, 90, 1000)
    names = np.array(["glide", "DALLE2", "sd 1.5"])[np.random.default_rng(0).integers(3, size=90)]
    found = agreement_by(x, y, groups_N=names)
    assert list(found) == ["DALLE2", "glide", "sd 1.5"]
    for name, one in found.items():
        assert one == agreement(x[names == name], y[names == name])
    assert agreement_by([], [], groups_N=[]) == {}
    with pytest.raises(ValueError, match="differ in length"):
        agreement_by(x, y, groups_N=names[1:])


def test_shuffled_labels_score_about_zero():
    rng = np.random.default_rng(7)
    x = rng.random(5000)
    scores = [srocc(x, rng.permutation(x)) for _ in range(20)]
    # The SD of SROCC without agreement is 1 / sqrt(N - 1) = 0.014: five of them, and their mean.
    assert max(map(abs, scores)) < 0.07
    assert abs(np.mean(scores)) < 0.016


def test_json_is_strict_and_keeps_zero():
    found = Agreement(srocc=0.0, krocc=math.inf, plcc=math.nan, plcc_mapped=0.5, rmse=0.1, main=-1.0, n=4)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["srocc"] == 0.0
    assert json.loads(text)["krocc"] is json.loads(text)["plcc"] is None


def test_scoring_an_epoch_imports_no_scipy():
    code = (
        "import sys; from deltaclip.pipeline.scoring import "
        "agreement, diagnostics, floors, groups, intervals, splits; "
        "agreement.srocc([1, 2, 3], [1, 2, 4]); agreement.krocc([1, 2, 3], [1, 2, 4]); "
        "print([m for m in ('scipy', 'torch', 'sklearn', 'deltaclip.features') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
