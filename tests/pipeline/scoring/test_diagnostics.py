"""Diagnostics: the figure always, the advice only where something is off, each sentence in full."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deltaclip.pipeline.scoring.diagnostics import Diagnostic, diagnose_residual
from deltaclip.tests import reference


def diagnose(used, *, scale=0.2, head="quality", train_srocc=0.8, val_srocc=0.78, helps=True):
    """Diagnose a run by the shares of the scale its corrections use, with labels that they reach or not."""
    delta = np.asarray(used, dtype=np.float64) * scale
    base = np.full(delta.size, 0.5) + np.linspace(0, 1e-3, delta.size)
    label = base + delta if helps else base
    found = diagnose_residual(
        base, delta, label_N=label, scale=scale, head=head, train_srocc=train_srocc, val_srocc=val_srocc
    )
    return {one.name.removeprefix(f"{head}."): one for one in found}


EVEN = np.linspace(-1, 1, 201)


def test_an_even_correction_gets_figures_and_no_advice():
    found = diagnose(EVEN)
    assert list(found) == ["saturated_share", "small_share", "base_srocc", "final_srocc", "train_val_gap"]
    assert found["saturated_share"].value == pytest.approx(0.1, abs=0.01)
    assert found["small_share"].value == pytest.approx(0.25, abs=0.01)
    assert found["final_srocc"].value == pytest.approx(1)
    assert found["train_val_gap"].value == pytest.approx(0.02)
    assert {one.advice for one in found.values()} == {""}


@pytest.mark.parametrize(("head", "flag"), [("quality", "q"), ("consistency", "c")])
@pytest.mark.parametrize("sign", [-1, 1])
def test_corrections_at_the_bound_ask_for_a_larger_scale(head, flag, sign):
    used = np.where(np.arange(100) < 21, 0.91, 0.5) * sign
    found = diagnose(used, head=head)["saturated_share"]
    expected = f"21% of corrections press against the scale of 0.2: raise --residual-scale-{flag}."
    assert (found.name, found.value, found.advice) == (f"{head}.saturated_share", 0.21, expected)
    assert diagnose(np.where(np.arange(100) < 20, 0.91, 0.5))["saturated_share"].advice == ""
    assert diagnose(np.full(100, 0.89))["saturated_share"].value == 0


def test_corrections_that_hardly_move_ask_for_less_restraint():
    found = diagnose(np.where(np.arange(100) < 76, 0.24, 0.5))["small_share"]
    assert found.value == 0.76
    assert found.advice == (
        "76% of corrections use under a quarter of the scale: lower --weight-decay or --dropout, or raise --epochs."
    )
    assert diagnose(np.where(np.arange(100) < 75, 0.24, 0.5))["small_share"].advice == ""
    assert diagnose(np.full(100, -0.26))["small_share"].value == 0
    off = diagnose(np.zeros(100))["small_share"]
    assert (off.value, off.advice) == (1, "")  # the base was the best epoch


def test_a_correction_that_hurts_is_named_with_what_it_costs():
    rng = np.random.default_rng(0)
    used = rng.uniform(-1, 1, 50)
    found = diagnose(used, helps=False)
    base = np.full(50, 0.5) + np.linspace(0, 1e-3, 50)
    final = reference.spearman(base + 0.2 * used, base)
    assert found["base_srocc"].value == pytest.approx(1)
    assert found["final_srocc"].value == pytest.approx(final)
    assert found["final_srocc"].advice == (
        f"The correction lowers SROCC by {1 - final:.3f} against the base alone: "
        "lower --residual-scale-q or raise --dropout."
    )


@pytest.mark.parametrize(("num_moved", "advised"), [(1, False), (20, True)])
def test_a_loss_within_noise_is_no_reason_for_advice(num_moved, advised):
    base, delta = np.linspace(0.2, 0.8, 200), np.zeros(200)
    delta[:num_moved] = 0.2  # past the next 66 rows
    found = diagnose_residual(base, delta, label_N=base, scale=0.2, head="quality", train_srocc=0.5, val_srocc=0.5)
    loss = found[2].value - found[3].value
    assert loss > 0
    assert (loss > 0.01) is advised
    assert bool(found[3].advice) is advised


def test_the_final_score_is_clamped():
    base, delta = np.array([0.9, 0.95, 0.1, 0.5]), np.array([0.2, 0.1, -0.2, 0.0])
    label = np.array([1.0, 0.9, 0.2, 0.6])
    found = diagnose_residual(base, delta, label_N=label, scale=0.2, head="quality", train_srocc=0.5, val_srocc=0.5)
    assert found[3].value == pytest.approx(reference.spearman([1.0, 1.0, 0.0, 0.5], label))


@pytest.mark.parametrize(("train", "val", "advised"), [(0.81, 0.76, False), (0.82, 0.76, True), (0.7, 0.9, False)])
def test_a_gap_over_five_hundredths_is_overfitting(train, val, advised):
    found = diagnose(EVEN, train_srocc=train, val_srocc=val - 1e-9 if advised else val + 1e-9)["train_val_gap"]
    expected = (
        f"Training is {train - val:.3f} SROCC ahead of validation (overfit): lower --residual-scale-q, raise "
        "--dropout or --weight-decay, or with finetune raise --freeze-layers."
    )
    assert found.advice == (expected if advised else "")


@pytest.mark.parametrize(("used", "scale"), [(EVEN, 0.0), ([], 0.2)])
def test_without_corrections_there_are_no_shares(used, scale):
    found = diagnose(used, scale=scale, train_srocc=math.nan)
    for name in ("saturated_share", "small_share", "train_val_gap"):
        assert found[name].to_json() == {"name": f"quality.{name}", "value": None, "advice": ""}


def test_labels_that_are_missing_leave_the_shares_alone():
    base, delta = np.linspace(0.2, 0.8, 10), np.full(10, 0.19)
    found = diagnose_residual(
        base,
        delta,
        label_N=np.full(10, np.nan),
        scale=0.2,
        head="consistency",
        train_srocc=0.7,
        val_srocc=0.7,
    )
    assert [one.value for one in found[:2]] == [1.0, 0.0]
    assert math.isnan(found[2].value)
    assert math.isnan(found[3].value)
    assert found[3].advice == ""


def test_json_is_strict():
    one = Diagnostic(name="quality.train_val_gap", value=np.float64(0.1))
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["value"] == 0.1
