"""The scikit-learn estimator: its conventions, and that it is the head of `train`."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from deltaclip import DeltaclipRegressor
from deltaclip.pipeline.api.estimator import _sides


def unit_rows(seed, rows, width):
    found = np.random.default_rng(seed).standard_normal((rows, width))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def quality():
    """Embeddings and labels of a quality that is a logistic function of one direction."""
    v = unit_rows(0, 300, 16)
    return v, 1 / (1 + np.exp(-8 * v[:, 0]))


def test_scikit_learn_accepts_it():
    # One epoch: the checks ask for conventions, and for R2 > 0.5 on data that the base alone fits.
    results = check_estimator(DeltaclipRegressor(epochs=1), on_skip=None)
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert {result["status"] for result in results} <= {"passed", "skipped"}
    assert skipped <= {"check_array_api_input", "check_regressor_data_not_an_array"}  # opt-in; needs pandas
    assert len(results) >= 50


def test_quality_is_learned_within_the_bound(quality):
    v, y = quality
    model = DeltaclipRegressor(scale=0.1).fit(v[:200], y[:200])
    assert model.label_range_ == (0.0, 1.0)
    predicted = model.predict(v[200:])
    assert np.corrcoef(predicted, y[200:])[0, 1] > 0.97
    assert predicted.min() >= 0
    assert predicted.max() <= 1
    base = DeltaclipRegressor(scale=0).fit(v[:200], y[:200]).predict(v[200:])
    assert np.abs(predicted - base).max() <= 0.1 + 1e-6


def test_the_base_is_the_closed_form(quality):
    """Scale 0 leaves sigmoid(w . v + b0): ridge on the logit, here against scikit-learn at the strength it chose."""
    from sklearn.linear_model import Ridge

    v, y = quality
    model = DeltaclipRegressor(scale=0, validation_fraction=0, epochs=1, lr=0).fit(v, y)
    logit = np.log(np.clip(y, 0.01, 0.99) / (1 - np.clip(y, 0.01, 0.99)))
    found = np.log(model.predict(v) / (1 - model.predict(v)))
    unit = np.square(v - v.mean(axis=0)).sum() / len(v)
    moved = [found - Ridge(alpha=unit * 10 ** (k / 4)).fit(v, logit).predict(v) for k in range(-16, 25)]
    assert min(map(np.ptp, moved)) < 2e-4  # weights are float32; the constant is what makes the means equal
    assert model.predict(v).mean() == pytest.approx(y.mean(), abs=1e-6)


def test_consistency_follows_the_cosine():
    v, t = unit_rows(1, 400, 8), unit_rows(2, 400, 8)
    y = 50 + 40 * (v * t).sum(axis=1)  # labels from 10 to 90
    x = np.hstack([v, t])
    model = DeltaclipRegressor(head="consistency", label_range=(0, 100)).fit(x[:300], y[:300])
    assert np.corrcoef(model.predict(x[300:]), y[300:])[0, 1] > 0.99
    assert model.score(x[300:], y[300:]) > 0.97


@pytest.mark.parametrize("head", ["quality", "consistency"])
def test_a_row_scores_alone_what_it_scores_among_others(head):
    x = np.hstack([unit_rows(3, 50, 6), unit_rows(4, 50, 6)])
    model = DeltaclipRegressor(head=head, epochs=3).fit(x, np.linspace(0, 1, 50))
    alone = np.concatenate([model.predict(row[None]) for row in x])
    assert alone == pytest.approx(model.predict(x), abs=1e-12)


def test_seeds_decide(quality):
    v, y = quality
    first = DeltaclipRegressor(random_state=1, epochs=3).fit(v, y)
    same = clone(first).fit(v, y).predict(v)
    other = clone(first).set_params(random_state=2).fit(v, y).predict(v)
    assert np.array_equal(first.predict(v), same)
    assert not np.array_equal(same, other)


def test_groups_stay_on_one_side():
    groups = np.repeat([f"prompt {number}" for number in range(40)], 5)
    train, val = _sides(200, groups, 0.1, seed=0)
    assert len(val) == 20
    assert not set(groups[train]) & set(groups[val])
    assert sorted([*train, *val]) == list(range(200))
    assert len(_sides(200, None, 0.1, seed=0)[1]) == 20
    assert len(_sides(200, None, 0.0, seed=0)[1]) == 0
    assert len(_sides(40, None, 0.1, seed=0)[1]) == 0  # four rows are too few to choose by


@pytest.mark.parametrize(
    ("settings", "features", "labels", "words"),
    [
        ({"label_range": (0, 1)}, (9, 4), 2.0, r"labels from 2 to 2 do not lie in label_range \(0, 1\)"),
        ({"label_range": (1, 0)}, (9, 4), 0.5, "label_range must rise, not go from 1 to 0"),
        ({"head": "consistency"}, (9, 5), 0.5, r"takes \[v, t\] side by side, an even number of features, not 5"),
        ({"head": "consistency"}, (9, 6), 0.5, r"takes embeddings of unit length; v of row \d has 0.7071"),
        ({"scale": 1.5}, (9, 4), 0.5, "'scale' parameter"),
        ({"head": "beauty"}, (9, 4), 0.5, "'head' parameter"),
    ],
)
def test_what_it_refuses(settings, features, labels, words):
    x = unit_rows(5, *features)
    if features[1] == 6:
        x = np.hstack([unit_rows(5, 9, 3), unit_rows(6, 9, 3)]) * np.sqrt(0.5)
    with pytest.raises(ValueError, match=words):
        DeltaclipRegressor(**settings).fit(x, np.full(9, labels))


def test_groups_must_be_as_many_as_rows(quality):
    v, y = quality
    with pytest.raises(ValueError, match="300 rows but 2 groups"):
        DeltaclipRegressor().fit(v, y, groups=["a", "b"])


def test_rows_that_choose_the_epoch_are_of_groups_of_any_size():
    """One large group does not keep all others from choosing, and small ones do not do it more often."""
    sizes = np.array([60, *[8] * 10, *[2] * 30])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    chosen = np.zeros(len(sizes))
    for seed in range(300):
        train, val = _sides(len(groups), groups, 0.2, seed)
        assert 0.15 < len(val) / len(groups) < 0.25
        assert not set(groups[train]) & set(groups[val])
        chosen[np.unique(groups[val])] += 1 / 300
    assert abs(chosen[1:11].mean() - chosen[11:].mean()) < 0.05
