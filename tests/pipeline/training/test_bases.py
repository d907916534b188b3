"""Bases that are chosen and fitted: left-out figures against fits that never saw the group, labels of every kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import CONSISTENCY, QUALITY
from deltaclip.pipeline.model.heads import HeadSpec, TargetSpec, build_heads
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.pair_rows import RowPairs
from deltaclip.pipeline.runs.prediction_table import base_terms
from deltaclip.pipeline.scoring.splits import Split
from deltaclip.pipeline.training import bases as bases_module
from deltaclip.pipeline.training.bases import fit_bases

LABELS = ("quality", "consistency")


@pytest.fixture(scope="module")
def rows(demo_cache):
    """The demo cache with a further view, of which the labels of most tests are made."""
    found = load_rows(demo_cache, "cpu")
    view_IW = np.random.default_rng(0).standard_normal((len(found.image_key_I), 12)).astype(np.float32)
    return replace(found, views={"stages": torch.from_numpy(view_IW)})


@pytest.fixture(scope="module")
def view(rows):
    return rows.views["stages"].numpy()[rows.rows.image]


def labelled(rows, **labels):
    """The cache with other labels, (N,) each."""
    numbers = {name: np.asarray(values, dtype=np.float32) for name, values in labels.items()}
    return replace(rows, rows=replace(rows.rows, numbers=rows.rows.numbers | numbers))


def split_of(rows, *, train=range(24), val=range(24, 28)):
    """Sides by prompt: 40 prompts of six rows each."""
    group = rows.rows.text["group"].codes
    sides = [np.flatnonzero(np.isin(group, list(side))) for side in (train, val)]
    test = np.setdiff1d(np.arange(len(group)), np.concatenate(sides))
    return Split(kind="grouped", leaks_groups=False, seeds=(0,), train=sides[0], val=sides[1], test=test)


def fitted(rows, split, *, labels=LABELS, **settings):
    return fit_bases(rows, split, **{"labels": labels, "seed": 0} | settings)


def whole(rows, found, name):
    """What a base says of all rows, in [0, 1]."""
    slope, offset = found.lines.get(name, (0.0, 0.0))
    line = slope * (rows.cosine() + 1) / 2 + offset
    return np.clip(line + found.columns[name].numpy(), 0, 1)


def in_range(values):
    return np.clip(0.5 + 0.15 * np.asarray(values), 0, 1)


def made_of(view, seed, *, noise=1.0):
    """Quality and consistency that follow the view, with noise that they share: no view tells it."""
    rng = np.random.default_rng(seed)
    shared = noise * rng.standard_normal(len(view))
    told = np.sin(2 * view[:, 0]) + view[:, 1]
    own = 0.3 * rng.standard_normal(len(view))
    return {"quality": in_range(told + shared), "consistency": in_range(told + shared + own)}


@pytest.mark.slow
def test_left_out_figures_are_those_of_fits_that_never_saw_the_group(rows, view):
    """Every group is really taken out and all is done anew: screening, strengths, shares, scaling and level."""
    rows, split = labelled(rows, **made_of(view, 1, noise=0.5)), split_of(rows, train=range(16), val=range(16, 18))
    found = fitted(rows, split)
    group = rows.rows.text["group"].codes
    for name in LABELS:
        seen = np.concatenate([split.train, split.val])
        assert np.flatnonzero(~np.isnan(found.left_out[name])).tolist() == sorted(seen)
        honest = np.full(len(group), np.nan)
        for out in range(18):
            sides = {
                "train": [one for one in range(16) if one != out],
                "val": [one for one in range(16, 18) if one != out],
            }
            of_out = group == out
            honest[of_out] = whole(rows, fitted(rows, split_of(rows, **sides)), name)[of_out]
        label, told = rows.label(name)[seen], found.left_out[name][seen]
        errors = [np.sqrt(np.mean(np.square(said - label))) for said in (told, honest[seen])]
        # Pairs are left out by fifths of the groups here, and one at a time there: less is seen here.
        assert errors[0] == pytest.approx(errors[1], rel=0.06 if name == "quality" else 0.12)
        assert np.corrcoef(told, honest[seen])[0, 1] > 0.9
        own = np.clip(base_of(rows, found)[name], 0, 1)[seen]
        assert np.sqrt(np.mean(np.square(own - label))) < 0.9 * errors[1]  # what a fit says of rows that it saw


def base_of(rows, found):
    """What heads with these bases say of all rows, also of those that were fitted to."""
    targets = tuple(TargetSpec(each.name, each.sees) for each in rows.targets)
    heads = build_heads(HeadSpec(dim=rows.dim, targets=targets, bases=found.shape)).eval()
    found.put_into(heads)
    terms = base_terms(heads, rows)
    columns = {"fitted_B": terms}
    scored = [
        heads(batch.v_BD, batch.t_BD, batch.fitted_B)
        for batch in rows.batches(None, batch_size=1, columns=columns).in_order(512)
    ]
    return {name: torch.cat([each.targets[name].base_N for each in scored]).detach().numpy() for name in found.columns}


@pytest.mark.parametrize("view_name", [None, "stages", "center"])
def test_heads_say_of_new_rows_what_the_columns_have(rows, view, view_name):
    rows, split = labelled(rows, **made_of(view, 2)), split_of(rows)
    found = fitted(rows, split, view=view_name)
    for name, base in base_of(rows, found).items():
        expected = whole(rows, found, name)
        # Float32 sums, of the kernels' distances above all.
        assert base[split.test] == pytest.approx(expected[split.test], abs=1e-4), name
        seen = np.concatenate([split.train, split.val])
        assert np.abs(base - expected)[seen].max() > 0.01  # of these the columns have what left-out fits say
        # A pair's is level on scores that did not see the row, which heads do not have.
        close = 1e-4 if name == "quality" else 5e-3
        assert base[seen].mean() == pytest.approx(float(rows.label(name)[seen].mean()), abs=close)
        assert expected[split.train].mean() == pytest.approx(float(rows.label(name)[split.train].mean()), abs=1e-4)
        assert found.left_out[name][seen] == pytest.approx(expected[seen])
        shares = [member.share for member in found.shape.members[name]]
        assert sum(shares) == pytest.approx(1) or name == "consistency"  # a cosine line has no member


def test_what_is_told_of_the_choice(rows, view):
    rows, split = labelled(rows, **made_of(view, 3, noise=0.2)), split_of(rows)
    about = fitted(rows, split).about
    for name in LABELS:
        choice = about["choice"][name]
        assert sum(choice["shares"].values()) == pytest.approx(1)
        assert set(choice["shares"]) <= set(choice["left_out"])
        assert choice["by"] == "rmse"
        assert len(about["members"][name]) == len(choice["shares"])
        assert {each["num_rows"] for each in about["members"][name]} == {len(split.train) + len(split.val)}
    # What the view alone tells is found in it.
    assert any("stages" in one for one in about["choice"]["quality"]["shares"])
    assert "ridge on center" in about["choice"]["quality"]["left_out"]


def test_labels_of_test_rows_do_not_matter(rows, view):
    labels, split = made_of(view, 4), split_of(rows)
    turned = {name: np.where(np.isin(np.arange(240), split.test), 1 - label, label) for name, label in labels.items()}
    missing = {name: np.where(np.isin(np.arange(240), split.test), np.nan, label) for name, label in labels.items()}
    first, *others = (fitted(labelled(rows, **one), split) for one in (labels, turned, missing))
    for other in others:
        assert first.shape == other.shape
        assert first.about == other.about
        assert all(torch.equal(value, other.state[name]) for name, value in first.state.items())
        assert all(torch.equal(value, other.columns[name]) for name, value in first.columns.items())
    # The same change in training rows does reach them, so that the comparison can fail.
    moved = {name: np.where(np.isin(np.arange(240), split.val), 1 - label, label) for name, label in labels.items()}
    assert fitted(labelled(rows, **moved), split).about != first.about


def test_noise_looks_like_noise_and_so_does_a_pair_that_shares_it(rows):
    """No input tells anything, and consistency is quality and a little more: each could be read off the other's labels.

    With a score left out group by group, left-out figures of consistency came out at .5 and more.
    """
    left_out, new = {name: [] for name in LABELS}, {name: [] for name in LABELS}
    split = split_of(rows)
    seen = np.concatenate([split.train, split.val])
    for seed in range(8):
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal(240)
        labels = {"quality": in_range(noise), "consistency": in_range(noise + 0.3 * rng.standard_normal(240))}
        other = labelled(rows, **labels)
        found = fitted(other, split, seed=seed)
        for name in LABELS:
            said, label = whole(other, found, name), labels[name]
            for kept, chosen in ((left_out, seen), (new, split.test)):
                flat = np.ptp(said[chosen]) == 0
                kept[name].append(0.0 if flat else spearmanr(said[chosen], label[chosen])[0])
    for name in LABELS:
        # 1 / sqrt(n - 1) is the SD of one; the best of ten candidates is taken, whose mean is above 0 by an SD.
        assert np.mean(left_out[name]) < (1 + 4 / np.sqrt(8)) / np.sqrt(len(seen) - 1), left_out
        assert abs(np.mean(new[name])) < 4 / np.sqrt(8 * (len(split.test) - 1))


@pytest.mark.slow
def test_a_pair_reads_no_noise_off_a_score_that_is_a_mixture(rows, view):
    """What a view tells, both labels have; what they share besides must not show, also where two members say it."""
    split, errors, mixtures = split_of(rows), [], 0
    seen = np.concatenate([split.train, split.val])
    for seed in range(24):
        labels = made_of(view, seed, noise=0.7)
        other = labelled(rows, **labels)
        found = fitted(other, split, seed=seed)
        if len(found.shape.members["quality"]) < 2:
            continue
        mixtures += 1
        assert any("score" in member.inputs for member in found.shape.members["consistency"])
        error = np.square(whole(other, found, "consistency") - labels["consistency"])
        errors.append(error[seen].mean() - error[split.test].mean())
    assert mixtures > 3
    # Left-out rows are not better off than new ones: the mean difference is within two of its standard errors.
    assert np.mean(errors) > -2 * np.std(errors, ddof=1) / np.sqrt(mixtures)


KINDS = {
    "quality alone": lambda label, _: {"quality": label},
    "consistency alone": lambda label, _: {"consistency": label},
    "labels in turn": lambda label, n: {
        "quality": np.where(n % 2, label, np.nan),
        "consistency": np.where(n % 2, np.nan, label),
    },
    "few of one": lambda label, n: {"quality": label, "consistency": np.where(n < 20, label, np.nan)},
    "one group of one": lambda label, n: {"quality": label, "consistency": np.where(n < 6, label, np.nan)},
    "two groups": lambda label, n: {name: np.where(n < 12, label, np.nan) for name in LABELS},
    "a group of one row": lambda label, n: {name: np.where((n < 36) | (n == 40), label, np.nan) for name in LABELS},
    "one row": lambda label, n: {name: np.where(n == 3, label, np.nan) for name in LABELS},
    "all alike": lambda label, _: dict.fromkeys(LABELS, np.full(len(label), 0.5)),
    "all at the end": lambda label, _: dict.fromkeys(LABELS, np.ones(len(label))),
    "none": lambda label, _: dict.fromkeys(LABELS, np.full(len(label), np.nan)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_view", [True, False])
def test_labels_of_every_kind(rows, view, kind, *, with_view):
    labels = {name: np.full(240, np.nan) for name in LABELS}
    labels |= KINDS[kind](made_of(view, 5)["quality"], np.arange(240))
    other = labelled(rows if with_view else replace(rows, views={}), **labels)
    split = split_of(rows)
    found = fitted(other, split)
    bases = base_of(other, found)
    for name in LABELS:
        said = whole(other, found, name)
        assert np.isfinite(said).all()
        assert bases[name][split.test] == pytest.approx(said[split.test], abs=1e-4)
        seen = np.concatenate([split.train, split.val])
        known = seen[~np.isnan(np.asarray(labels[name]))[seen]]
        if len(known):
            mean = float(np.mean(labels[name][known]))
            assert bases[name][known].mean() == pytest.approx(mean, abs=1e-4 if name == "quality" else 5e-3)
        if kind.startswith("all"):
            assert said == pytest.approx(np.full(240, labels[name][0]), abs=1e-3)


def test_a_base_of_pairs_and_few_ratings_has_the_mean_of_these(rows, view):
    split, group = split_of(rows), rows.rows.text["group"].codes
    truth = np.clip(0.7 + 0.4 * view[:, 0], 0, 1)  # they pile up at an end, which clamping moves
    label_N = np.where(np.arange(240) % 4, np.nan, truth)
    other = labelled(rows, quality=label_N, consistency=np.full(240, np.nan))
    seen = np.concatenate([split.train, split.val])
    a_P, b_P = seen[:-1], seen[1:]
    kept = group[a_P] == group[b_P]
    pairs = RowPairs(a_P[kept], b_P[kept], (truth[a_P] > truth[b_P])[kept].astype(np.float64))
    found = fitted(other, split, labels=("quality",), pairs={"quality": pairs})
    assert found.pairs
    base, known = base_of(other, found)["quality"], seen[~np.isnan(label_N[seen])]
    assert base[known].mean() == pytest.approx(label_N[known].mean(), abs=1e-4)


def test_a_target_that_is_not_trained_is_as_if_missing(rows, view):
    labels, split = made_of(view, 6), split_of(rows)
    found = fitted(labelled(rows, **labels), split, labels=("consistency",))
    without = fitted(labelled(rows, **labels | {"quality": np.full(240, np.nan)}), split)
    assert torch.equal(found.columns["consistency"], without.columns["consistency"])
    assert found.about["choice"]["quality"] is None
    assert not any("score" in one for one in found.about["choice"]["consistency"]["left_out"])


def test_many_rows_are_screened_on_some_and_judged_on_all(rows, view, monkeypatch):
    rows, split = labelled(rows, **made_of(view, 7, noise=0.3)), split_of(rows)
    exact = fitted(rows, split)
    monkeypatch.setattr(bases_module, "SCREEN_ROWS", 60)
    found = fitted(rows, split)
    for name in LABELS:
        members = found.about["members"][name]
        assert {each["num_rows"] for each in members} == {168}
        seen = ~np.isnan(found.left_out[name])
        error, other = (
            np.sqrt(np.mean(np.square(one.left_out[name] - rows.label(name))[seen])) for one in (found, exact)
        )
        # Strengths are those of 60 rows, which is all that is lost.
        assert error < 1.1 * other
        choice = found.about["choice"][name]
        if len(choice["shares"]) == 1:  # told of all rows, not of those that were screened
            assert choice["left_out"][next(iter(choice["shares"]))]["rmse"] == pytest.approx(error, rel=0.02)


def test_without_pairs_and_without_images(rows, view):
    labels, split = made_of(view, 8), split_of(rows)
    other = labelled(rows, **labels)
    for target in (QUALITY, CONSISTENCY):
        found = fitted(replace(other, targets=(target,)), split)
        assert list(found.columns) == [target.name]
        base = base_of(replace(other, targets=(target,)), found)[target.name]
        assert base[split.test] == pytest.approx(whole(other, found, target.name)[split.test], abs=1e-4)


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_view_that_is_not_finite_is_refused_in_one_line(rows, view, side):
    split = split_of(rows)
    spoiled = rows.views["stages"].clone()
    spoiled[rows.rows.image[getattr(split, side)[0]], 3] = torch.nan
    other = labelled(replace(rows, views={"stages": spoiled}), **made_of(view, 9))
    with pytest.raises(UserError) as error:
        fitted(other, split)
    line = "--base: view 'stages' holds values that are not finite; extract it again, or give calibrated"
    assert str(error.value) == line
