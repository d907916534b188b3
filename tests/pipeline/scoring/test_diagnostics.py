"""Diagnostics: the figures always, and of each head one outcome with at most one thing to do, in full sentences."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaclip.pipeline.scoring.diagnostics import Diagnostic, Trained, diagnose_residual
from deltaclip.tests import reference

OPTIONS = json.loads((Path(__file__).parents[2] / "data" / "options.json").read_text(encoding="utf-8"))
FIGURES = ["saturated_share", "small_share", "base_srocc", "final_srocc", "train_val_gap"]


def diagnose(used, *, scale=0.2, head="quality", gap=0.02, base_gap=0.0, helps=True, **trained):
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
        trained=Trained(train_srocc=val + gap, train_base_srocc=val_base + base_gap, **trained),
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
    gain = found["outcome"].value
    assert found["outcome"].verdict == "works"
    assert found["outcome"].advice == f"The correction changes SROCC by {gain:+.3f} on validation rows."
    assert {one.advice + one.verdict for name, one in found.items() if name != "outcome"} == {""}


@pytest.mark.parametrize("head", ["quality", "consistency", "lighting"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_corrections_at_the_bound_ask_for_a_larger_scale(head, sign):
    found = diagnose(BOUNDED * sign, head=head)
    gain = found["outcome"].value
    assert (found["outcome"].name, found["saturated_share"].value) == (f"{head}.outcome", 0.21)
    assert found["outcome"].advice == (
        f"The correction changes SROCC by {gain:+.3f} on validation rows; 21% of corrections press against the scale "
        f"of 0.2: raise --scale {head}."
    )
    assert diagnose(np.where(np.arange(100) < 20, 0.91, 0.5))["outcome"].verdict == "works"
    assert diagnose(np.full(100, 0.89))["saturated_share"].value == 0
    largest = diagnose(BOUNDED * np.resize([1, -1], 100), scale=1.0, gap=-1.0)  # the clamp leaves two values
    assert largest["outcome"].advice.endswith("against the scale of 1, the largest there is.")


def test_corrections_that_hardly_move_ask_for_more_epochs_where_these_may_help():
    found = diagnose(TIMID)
    assert found["small_share"].value == 0.76
    gain = found["outcome"].value
    what = f"The correction changes SROCC by {gain:+.3f} on validation rows; 76% use under a quarter of the scale"
    assert (found["outcome"].verdict, found["outcome"].advice) == ("hardly moves", f"{what}.")
    assert diagnose(TIMID, last_is_best=True)["outcome"].advice == (
        f"{what}, and the last epoch was the best: raise --epochs."
    )
    assert diagnose(np.where(np.arange(100) < 75, 0.24, 0.5))["outcome"].verdict == "works"
    assert diagnose(np.full(100, -0.26))["small_share"].value == 0


def test_a_base_that_was_kept_needs_no_advice_on_corrections():
    found = diagnose(np.zeros(100), gap=0.2)
    assert found["small_share"].value == 1
    assert (found["outcome"].verdict, found["outcome"].advice) == (
        "base alone",
        "The base alone was best on validation rows: training a correction did not help.",
    )
    assert diagnose(EVEN, scale=0.0)["outcome"].advice == "--scale quality is 0: the base alone."


def test_a_correction_that_hurts_is_named_with_what_it_costs():
    used = np.random.default_rng(0).uniform(-1, 1, 50)
    found = diagnose(used, helps=False, gap=0.2)
    base = np.full(50, 0.5) + np.linspace(0, 1e-3, 50)
    final = reference.spearman(base + 0.2 * used, base)
    assert found["base_srocc"].value == pytest.approx(1)
    assert found["final_srocc"].value == pytest.approx(final)
    assert found["outcome"].verdict == "hurts"
    assert found["outcome"].advice == (
        f"The correction lowers SROCC by {1 - final:.3f} against the base alone: lower --scale quality."
    )


@pytest.mark.parametrize(("num_moved", "verdict"), [(1, "hardly moves"), (20, "hurts")])
def test_a_loss_within_noise_is_no_reason_for_advice(num_moved, verdict):
    base, delta = np.linspace(0.2, 0.8, 200), np.zeros(200)
    delta[:num_moved] = 0.2  # past the next 66 rows
    trained = Trained(train_srocc=0.5, train_base_srocc=0.5)
    found = diagnose_residual(base, delta, label_N=base, scale=0.2, head="quality", trained=trained)
    assert found[0].value < 0
    assert (found[0].value < -0.01) is (verdict == "hurts")
    assert found[0].verdict == verdict


def test_the_final_score_is_clamped():
    base, delta = np.array([0.9, 0.95, 0.1, 0.5]), np.array([0.2, 0.1, -0.2, 0.0])
    label = np.array([1.0, 0.9, 0.2, 0.6])
    trained = Trained(train_srocc=0.5, train_base_srocc=0.5)
    found = diagnose_residual(base, delta, label_N=label, scale=0.2, head="quality", trained=trained)
    assert found[4].value == pytest.approx(reference.spearman([1.0, 1.0, 0.0, 0.5], label))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gap": 0.04}, None),
        ({"gap": -0.2}, None),
        ({"gap": 0.06}, ": lower --scale quality."),
        ({"gap": 0.06, "tuned": True}, ": lower --scale quality."),
        ({"gap": 0.06, "base_gap": 0.05}, ", the base alone by 0.050: it takes more rows, not another scale."),
        ({"gap": 0.06, "base_gap": 0.05, "tuned": True}, ", the base alone by 0.050: raise --freeze-layers."),
        ({"gap": 0.06, "base_gap": math.nan}, ": lower --scale quality."),
    ],
)
def test_a_gap_over_five_hundredths_is_overfitting(settings, words):
    outcome = diagnose(BOUNDED, **settings)["outcome"]
    assert (outcome.verdict == "overfit") is (words is not None)
    if words:
        assert outcome.advice == f"Training is 0.060 SROCC ahead of validation (overfit){words}"


@pytest.mark.parametrize(("used", "scale"), [(EVEN, 0.0), ([], 0.2)])
def test_without_corrections_there_are_no_shares(used, scale):
    found = diagnose(used, scale=scale, gap=math.nan)
    for name in ("saturated_share", "small_share", "train_val_gap"):
        assert found[name].to_json() == {"name": f"quality.{name}", "value": None, "advice": "", "verdict": ""}


def test_labels_that_are_missing_leave_the_shares_alone():
    base, delta = np.linspace(0.2, 0.8, 10), np.full(10, 0.19)
    trained = Trained(train_srocc=0.7, train_base_srocc=0.7)
    missing = np.full(10, np.nan)
    found = diagnose_residual(base, delta, label_N=missing, scale=0.2, head="consistency", trained=trained)
    assert [one.value for one in found[1:3]] == [1.0, 0.0]
    assert math.isnan(found[3].value)
    assert math.isnan(found[4].value)
    assert (found[0].verdict, found[0].advice) == ("unknown", "")


def flags(words):
    """Return which flags a sentence asks to raise or lower."""
    return {flag: verb for verb, flag in re.findall(r"(raise|lower) (--scale \w+|--[a-z-]+)", words)}


outcomes = st.builds(
    dict,
    seed=st.integers(0, 2**32),
    num_rows=st.integers(0, 40),
    size=st.sampled_from([0.0, 0.01, 0.3, 1.0, 5.0]),
    scale=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]),
    helps=st.booleans(),
    gap=st.sampled_from([math.nan, -0.1, 0.0, 0.06, 0.4]),
    base_gap=st.sampled_from([math.nan, -0.1, 0.0, 0.06, 0.4]),
    last_is_best=st.booleans(),
)


def outcome_of(head, case, *, tuned):
    rng = np.random.default_rng(case["seed"])
    base = rng.uniform(0, 1, case["num_rows"])
    delta = case["scale"] * np.tanh(case["size"] * rng.normal(size=base.size))
    label = np.clip(base + (delta if case["helps"] else -delta), 0, 1)
    trained = Trained(
        train_srocc=0.5 + case["gap"],
        train_base_srocc=0.5 + case["base_gap"],
        last_is_best=case["last_is_best"],
        tuned=tuned,
    )
    return diagnose_residual(base, delta, label_N=label, scale=case["scale"], head=head, trained=trained)


@settings(deadline=None, max_examples=200)
@given(outcomes, outcomes, st.booleans())
def test_no_two_sentences_of_a_run_ask_for_opposite_things(quality, consistency, tuned):
    commands = ("finetune",) if tuned else ("train", "sweep")
    asked = {}
    for head, case in (("quality", quality), ("consistency", consistency)):
        found = outcome_of(head, case, tuned=tuned)
        assert [bool(one.advice) for one in found[1:]] == [False] * len(FIGURES)
        mine = flags(found[0].advice)
        assert len(mine) <= 1
        for flag, verb in mine.items():
            assert asked.setdefault(flag, verb) == verb
            option, _, target = flag.partition(" ")
            assert all(option in OPTIONS[command] for command in commands)
            if option == "--scale":
                assert target == head
                assert case["scale"] < 1 if verb == "raise" else case["scale"] > 0


def test_json_is_strict():
    one = Diagnostic(name="quality.train_val_gap", value=np.float64(0.1))
    assert json.loads(json.dumps(one.to_json(), allow_nan=False))["value"] == 0.1
