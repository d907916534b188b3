"""What a training learns from and is judged by: settings where they meet what the rows have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import CONSISTENCY, QUALITY, Target
from deltaclip.pipeline.model.losses import std_weights
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.rows.task import LossWeights, Task, labels_with_std, present_labels, rankable_labels
from deltaclip.pipeline.settings import TrainConfig

TARGETS = (QUALITY, CONSISTENCY, Target("lighting", "image"))
NAMES = [target.name for target in TARGETS]


@pytest.fixture(scope="module")
def rows(demo_cache):
    """Return the demo rows with a third target, whose ratings have an SD in every other row."""
    found = load_rows(demo_cache, "cpu")
    rng = np.random.default_rng(0)
    std = rng.uniform(0.05, 0.2, 240)
    std[::2] = np.nan
    return with_labels(replace(found, targets=TARGETS), lighting=rng.random(240), lighting_std=std)


def with_labels(rows, **labels):
    numbers = rows.rows.numbers | {name: np.asarray(values, dtype=np.float32) for name, values in labels.items()}
    return replace(rows, rows=replace(rows.rows, numbers=numbers))


def task(rows, *, train=None, **settings):
    """Return a task of these settings on the split that they ask for; `train` are its training rows if given."""
    config = TrainConfig(cache=rows.path, **settings)
    split = split_cache(rows, "grouped", fractions="0.6,0.2,0.2", seed=0)
    if train is not None:
        rest = np.setdiff1d(np.arange(240), train)
        split = replace(split, train=train, val=rest[::2], test=rest[1::2])
    return Task(config=config, rows=rows, split=split)


def test_what_can_rank(rows):
    everything, none = np.arange(240), np.empty(0, dtype=np.int64)
    assert rankable_labels(rows, everything) == NAMES
    assert rankable_labels(rows, none) == []
    assert rankable_labels(rows, everything[:2]) == []  # two rows always correlate
    flat = np.full(240, 0.5)
    assert rankable_labels(with_labels(rows, quality=flat, consistency=flat * np.nan), everything) == ["lighting"]
    assert rankable_labels(with_labels(rows, quality=flat), everything) == ["consistency", "lighting"]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, (0.5, 0.5, 0.5)),
        ({"weight": "2"}, (2, 2, 2)),
        ({"weight": "lighting=0.25"}, (0.5, 0.5, 0.25)),
        ({"weight": "1,quality=0", "w_c": 0.1}, (0, 0.1, 1)),
        ({"w_q": 0, "w_c": 0}, (0, 0, 0.5)),
    ],
)
def test_weights_are_by_target_and_decide_what_is_trained(rows, settings, weights):
    found = task(rows, **settings)
    assert found.weights == LossWeights(dict(zip(NAMES, weights, strict=True)))
    assert found.trained == found.ranked == [name for name, weight in zip(NAMES, weights, strict=True) if weight]
    assert found.sees_prompts is (weights[1] > 0)
    assert list(found.truth) == found.ranked


def test_a_target_without_labels_weighs_nothing(rows):
    nothing = np.full(240, np.nan)
    bare = with_labels(rows, consistency=nothing)
    assert present_labels(bare) == ["quality", "lighting"]
    found = task(bare, weight="consistency=3")
    assert found.weights.targets == {"quality": 0.5, "consistency": 0, "lighting": 0.5}
    assert found.trained == ["quality", "lighting"]
    assert not found.sees_prompts
    with pytest.raises(UserError) as error:
        _ = task(with_labels(bare, quality=nothing, lighting=nothing)).weights
    remedy = "give the manifest a quality or consistency column and extract again"
    assert str(error.value) == f"{rows.path}: has no labels; {remedy}"


def test_labels_that_no_training_row_has_are_not_learned(rows):
    train = np.arange(100)
    late = np.where(np.arange(240) < 100, np.nan, np.linspace(0, 1, 240))
    found = task(with_labels(rows, lighting=late), train=train)
    assert found.trained == found.ranked == ["quality", "consistency"]  # though it could be ranked


def test_explanations_weigh_where_a_head_sees_the_prompt(rows):
    assert task(rows).weights.explanations == 0
    assert task(rows, use_explanations=True, w_exp=0.3).weights.explanations == 0.3
    alone = replace(rows, targets=(TARGETS[0], TARGETS[2]))
    assert task(alone, use_explanations=True, w_exp=0.3).weights.explanations == 0
    assert not task(alone, use_explanations=True).sees_prompts
    unheeded = task(rows, use_explanations=True, weight="consistency=0")
    assert unheeded.trained == ["quality", "lighting"]
    assert unheeded.sees_prompts


def test_stds_and_row_weights_are_there_for_what_asks_for_them(rows):
    assert "lighting" in labels_with_std(rows)
    plain = next(iter(task(rows).train_batches()(1)))
    assert plain.std_B == plain.weight_B == {}
    found = task(rows, loss="fidelity", std_weighting=True)
    batches = found.train_batches(batch_size=9)
    (whole,) = batches.in_order()
    train = found.split.train
    assert list(whole.std_B) == list(whole.weight_B) == labels_with_std(rows)
    for target in labels_with_std(rows):
        label, std = (torch.from_numpy(rows.label(name)[train]) for name in (target, f"{target}_std"))
        assert torch.equal(whole.std_B[target].nan_to_num(9), std.nan_to_num(9))
        assert torch.equal(whole.weight_B[target], std_weights(label, std))
        assert torch.equal(whole.label_B[target].nan_to_num(9), label.nan_to_num(9))
    assert max(batch.num_rows for batch in batches(1)) <= 9
    (judged,) = found.val_batches().in_order()
    assert judged.num_rows == found.split.val.size
    assert judged.std_B == {}


def test_an_epoch_is_judged_by_the_mean_of_two_correlations(rows):
    found = task(rows, weight="consistency=0")
    said = {name: np.random.default_rng(1).random(found.split.val.size) for name in NAMES}
    judged = found.judge(said)
    assert list(judged.scores) == ["quality", "lighting"]
    for name in judged.scores:
        truth = found.truth[name].astype(np.float64)
        rank, linear = stats.spearmanr(said[name], truth).statistic, stats.pearsonr(said[name], truth).statistic
        assert judged.figures[f"val_{name}_srocc"] == pytest.approx(rank)
        assert judged.figures[f"val_{name}_plcc"] == pytest.approx(linear)
        assert judged.scores[name] == pytest.approx((rank + linear) / 2)
    said["lighting"][3] = np.inf
    assert np.isnan(found.judge(said).scores["lighting"])
    assert found.judge(said).scores["quality"] == judged.scores["quality"]
