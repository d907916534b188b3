"""Modes that a program has set around a call change no score: autocast, default types and devices, no gradients."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from deltaclip import DeltaclipRegressor, Reward, Scorer
from deltaclip.base.device import own_modes

PROMPT = "two small circles"
ROUNDING = 1e-6  # of float32, where torch takes another kernel for the same sum


@contextlib.contextmanager
def default_type(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "autocast to bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to fp16": lambda: torch.autocast("cpu", torch.float16),
    "default type float64": lambda: default_type(torch.float64),
    "default type bf16": lambda: default_type(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
}


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def scorer(demo_run):
    return Scorer.load(demo_run, device="cpu", precision="fp32")


@pytest.fixture
def reward(scorer):
    return Reward(scorer)


@pytest.fixture(scope="module")
def picture(demo_folder, demo_rows):
    return demo_folder / demo_rows[0]["image"]


def test_a_scorer_scores_the_same(scorer, picture, mode):
    expected = scorer.score(picture, PROMPT)
    with mode():
        found = scorer.score(picture, PROMPT)
    assert (float(found.q[0]), float(found.c[0])) == pytest.approx((expected.q[0], expected.c[0]), abs=ROUNDING)


@pytest.mark.parametrize("name", ["autocast to fp16", "default type float64", "inference mode"])
def test_a_run_loads_the_same(demo_run, picture, name, *, scorer):
    with MODES[name]():
        loaded = Scorer.load(demo_run, device=torch.device("cpu"), precision="fp32")
    assert loaded.score(picture, PROMPT).q == scorer.score(picture, PROMPT).q


def test_a_reward_gives_the_same(reward, mode):
    pixels = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with mode():
        found = reward(pixels, PROMPT)
    again = reward(pixels, PROMPT)  # with the prompt that was embedded there
    fresh = Reward(reward._scorer)(pixels, PROMPT)
    for target, score in fresh.items():
        assert float(found[target]) == pytest.approx(float(score), abs=ROUNDING)
        assert float(again[target]) == pytest.approx(float(score), abs=ROUNDING)


def test_an_estimator_learns_and_predicts_the_same(mode):
    x_NF = np.random.default_rng(0).normal(size=(40, 8))
    y_N = 1 / (1 + np.exp(-x_NF[:, 0]))
    fitted = DeltaclipRegressor(epochs=2).fit(x_NF, y_N)
    with mode():
        learned = DeltaclipRegressor(epochs=2).fit(x_NF, y_N)
        assert (fitted.predict(x_NF) == learned.predict(x_NF)).all()


def test_what_was_set_is_set_again(mode):
    with mode():
        before = states()
        with own_modes(learns=True):
            assert states() == (False, torch.float32, torch.device("cpu"), False, True)
        assert states() == before


def states():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )
