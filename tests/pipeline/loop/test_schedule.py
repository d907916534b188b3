"""Learning rate and curriculum as functions of progress."""

from __future__ import annotations

import math

import pytest

from deltaclip.pipeline.loop.epochs import curriculum_fraction, lr_factor


def factors(num_steps, **arguments):
    return [lr_factor(step, num_steps=num_steps, **arguments) for step in range(num_steps)]


def test_warmup_then_cosine():
    values = factors(100, warmup_ratio=0.1)
    assert values[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    expected = [0.5 * (1 + math.cos(math.pi * k / 90)) for k in range(90)]
    assert values[10:] == pytest.approx(expected)
    assert 0 < values[-1] < 0.001


def test_linear_and_constant():
    assert factors(5, warmup_ratio=0.0, schedule="linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors(5, warmup_ratio=0.4, schedule="constant") == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 1.0])
def test_short_runs_never_start_at_zero(num_steps, warmup_ratio):
    values = factors(num_steps, warmup_ratio=warmup_ratio)
    assert all(0 < value <= 1 for value in values)


def test_steps_beyond_the_plan_have_no_rate():
    assert lr_factor(120, num_steps=100) == 0


def test_curriculum():
    values = [curriculum_fraction(epoch, num_epochs=10) for epoch in range(1, 11)]
    assert values == pytest.approx([0.1 * k for k in range(1, 11)])
    assert values[-1] == 1
    assert curriculum_fraction(1, num_epochs=1) == 1
