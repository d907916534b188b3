"""The configuration in words: what is printed before training."""

from __future__ import annotations

import pytest

from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.rows.task import Task
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.words.plan_words import describe
from deltaclip.tests.pipeline.conftest import calibrated


@pytest.fixture(scope="module")
def rows(demo_cache):
    return load_rows(demo_cache, "cpu")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "epochs        20, batch 64, seed 42"),
        ({"patience": 3}, "epochs        20, batch 64, seed 42, stops after 3 epochs without gain"),
        ({"schedule": "linear", "warmup_ratio": 0.0}, "learning rate 0.001, 0% warm-up, then linear"),
        ({"max_grad_norm": 0}, "optimiser     AdamW, weight decay 0.0001, gradients not clipped, dropout 0.1"),
        ({"weight": "consistency=0.25"}, "loss          0.5 mse(quality) + 0.25 mse(consistency); no explanations"),
        ({}, "freezing      image tower: all frozen; text tower: all frozen (cached embeddings)"),
        ({"residual_scale_q": 0}, "quality       clamp(sigmoid(w . v + b0) + 0 tanh(MLP(v)), 0, 1)"),
        ({"scale": "quality=0.3"}, "quality       clamp(sigmoid(w . v + b0) + 0.3 tanh(MLP(v)), 0, 1)"),
        (
            {"scale_mode": "learned"},
            "quality       clamp(sigmoid(w . v + b0) + 0.2 (start; learned) tanh(MLP(v)), 0, 1)",
        ),
        (
            {"scale_mode": "curriculum"},
            "consistency   clamp(clamp(a (s + 1)/2 + b, 0, 1) + 0.2 (end; ramped up) tanh(Fusion([v, t, s])), "
            "0, 1), s = v . t",
        ),
        ({"base": "identity"}, "bases         identity"),
        ({"base": "auto"}, "quality       clamp(clamp(f, 0, 1) + 0.2 tanh(MLP(v)), 0, 1)"),
        (
            {"base": "auto"},
            "consistency   clamp(clamp(a (s + 1)/2 + b + f, 0, 1) + 0.2 tanh(Fusion([v, t, s])), 0, 1), s = v . t",
        ),
        (
            {"base": "auto"},
            "bases         f is chosen among closed forms by left-out training and validation rows, on center",
        ),
        ({"residual_learning": False}, "consistency   sigmoid(MLP([v, t, s])), s = v . t"),
    ],
)
def test_line(rows, demo_cache, settings, line):
    config = TrainConfig(cache=demo_cache, **calibrated(settings))
    split = split_cache(rows, config.split, fractions=config.fractions, seed=config.split_seed)
    assert line in describe(Task(config=config, rows=rows, split=split))
