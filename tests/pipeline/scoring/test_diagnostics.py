"""Diagnostics: the figures always, and of each head one state of its correction."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deltaclip.pipeline.scoring.diagnostics import Diagnostic, diagnose_residual
from deltaclip.tests import reference

FIGURES = ["saturated_share", "small_share", "base_srocc", "final_srocc", "train_val_gap"]


def diagnose(used, *, scale=0.2, head="quality", gap=0.02, base_gap=0.0, helps=True):
    """Diagnose a run by the shares of the scale its corrections use, with labels that they reach or not."""
    delta = np.asarray(used, dtype=np.float64) * scale
    base = np.full(delta.size, 0.5) + np.linspace(0, 1e-3, delta.size)
    label = base + delta if helps else base
    val, val_base = (reference.spearman(one, label) if delta.any() else 1.0 for one in (base + delta, base))
    found = diagnose_residual(
        base,
        delta,
        label_N=label,
        scale=scale,
        head=head,
        train_srocc=val + gap,
        train_base_srocc=val_base + base_gap,
    )
    return {one.name.removeprefix(f"{head}."): one for one in found}


EVEN = np.random.default_rng(0).permutation(np.linspace(-1, 1, 201))
BOUNDED = np.where(np.arange(100) < 21, 0.91, 0.5)
TIMID = np.where(np.arange(100) < 76, 0.24, 0.5)


def test_an_even_correction_gets_figures_and_nothing_to_do():
    found = diagnose(EVEN)
    assert list(found) == ["outcome", *FIGURES]
    assert found["saturated_share"].value == pytest.approx(0.1, abs=0.01)
    assert found["small_share"].value == pytest.approx(0.25, abs=0.01)
    assert found["final_srocc"].value == pytest.approx(1)
    assert found["train_val_gap"].value == pytest.approx(0.02)
    assert found["outcome"].value == pytest.approx(1 - found["base_srocc"].value)
    assert found["outcome"].state == "works"
    assert {one.state for name, one in found.items() if name != "outcome"} == {""}


@pytest.mark.parametrize("head", ["quality", "consistency", "lighting"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_corrections_at_the_bound_are_found(head, sign):
    found = diagnose(BOUNDED * sign, head=head)
    assert (found["outcome"].name, found["saturated_share"].value) == (f"{head}.outcome", 0.21)
    assert found["outcome"].state == "bounded"
    assert diagnose(np.where(np.arange(100) < 20, 0.91, 0.5))["outcome"].state == "works"
    assert diagnose(np.full(100, 0.89))["saturated_share"].value == 0


def test_corrections_that_hardly_move_are_found():
    found = diagnose(TIMID)
    assert (found["small_share"].value, found["outcome"].state) == (0.76, "hardly moves")
    assert diagnose(np.where(np.arange(100) < 75, 0.24, 0.5))["outcome"].state == "works"
    assert diagnose(np.full(100, -0.26))["small_share"].value == 0


def test_a_base_that_was_kept_is_found():
    found = diagnose(np.zeros(100), gap=0.2)
    assert (found["small_share"].value, found["outcome"].state) == (1, "base alone")
    assert diagnose(EVEN, scale=0.0)["outcome"].state == "base alone"


def test_a_correction_that_hurts_is_named_with_what_it_costs():
    used = np.random.default_rng(0).uniform(-1, 1, 50)
    found = diagnose(used, helps=False, gap=0.2)
    base = np.full(50, 0.5) + np.linspace(0, 1e-3, 50)
    final = reference.spearman(base + 0.2 * used, base)
    assert found["base_srocc"].value == pytest.approx(1)
    assert found["final_srocc"].value == pytest.approx(final)
    assert found["outcome"].state == "hurts"
    assert found["outcome"].value == pytest.approx(final - 1)


@pytest.mark.parametrize(("num_moved", "state"), [(1, "hardly moves"), (20, "hurts")])
def test_a_loss_within_noise_is_none(num_moved, state):
    base, delta = np.linspace(0.2, 0.8, 200), np.zeros(200)
    delta[:num_moved] = 0.2  # past the next 66 rows
    found = diagnose_residual(
        base, delta, label_N=base, scale=0.2, head="quality", train_srocc=0.5, train_base_srocc=0.5
    )
    assert found[0].value < 0
    assert (found[0].value < -0.01) is (state == "hurts")
    assert found[0].state == state


def test_the_final_score_is_clamped():
    base, delta = np.array([0.9, 0.95, 0.1, 0.5]), np.array([0.2, 0.1, -0.2, 0.0])
    label = np.array([1.0, 0.9, 0.2, 0.6])
    found = diagnose_residual(
        base, delta, label_N=label, scale=0.2, head="quality", train_srocc=0.5, train_base_srocc=0.5
    )
    assert found[4].value == pytest.approx(reference.spearman([1.0, 1.0, 0.0, 0.5], label))


@pytest.mark.parametrize(
    ("settings", "state"),
    [
        ({"gap": 0.04}, "bounded"),
        ({"gap": -0.2}, "bounded"),
        ({"gap": 0.06}, "overfit"),
        ({"gap": 0.06, "base_gap": 0.05}, "base overfit"),
        ({"gap": 0.06, "base_gap": 0.02}, "overfit"),
        ({"gap": 0.06, "base_gap": math.nan}, "overfit"),
    ],
)
def test_a_gap_over_five_hundredths_is_overfitting(settings, state):
    assert diagnose(BOUNDED, **settings)["outcome"].state == state


@pytest.mark.parametrize(("used", "scale"), [(EVEN, 0.0), ([], 0.2)])
def test_without_corrections_there_are_no_shares(used, scale):
    found = diagnose(used, scale=scale, gap=math.nan)
    for name in ("saturated_share", "small_share", "train_val_gap"):
        assert found[name].to_json() == {"name": f"quality.{name}", "value": None, "state": ""}


def test_labels_that_are_missing_leave_the_shares_alone():
    base, delta = np.linspace(0.2, 0.8, 10), np.full(10, 0.19)
    missing = np.full(10, np.nan)
    found = diagnose_residual(
        base, delta, label_N=missing, scale=0.2, head="consistency", train_srocc=0.7, train_base_srocc=0.7
    )
    assert [one.value for one in found[1:3]] == [1.0, 0.0]
    assert math.isnan(found[3].value)
    assert math.isnan(found[4].value)
    assert found[0].state == "unknown"


def test_json_is_strict():
    one = Diagnostic(name="quality.train_val_gap", value=np.float64(0.1))
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["value"] == 0.1
