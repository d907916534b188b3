"""What a residual run's own numbers say about its settings: of each head one outcome, and at most one thing to do.

Figures that are off each by its own threshold once gave each its own advice: lower --dropout beside raise --dropout. So
the figures stand alone, and of the outcomes that hold the one that spoils most is told. It names the scale of the head
itself, or a flag that is only ever moved one way, so that no two heads of a run can ask for opposite things.

Knows deltas, bases and labels of one head as arrays. Must not know heads, files or how training works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltaclip.pipeline.scoring.agreement import json_number, srocc

if TYPE_CHECKING:
    import numpy.typing as npt

# A correction spread evenly over its range has 10 % of its rows above 0.9 of the scale and 25 % below 0.25.
SATURATED, SMALL = 0.9, 0.25
# Twice the even share: corrections then pile up at the bound, where tanh has lost four fifths of its slope.
SATURATED_SHARE_MAX = 0.20
# Three times the even share: for most images three quarters of the allowed correction is never touched.
SMALL_SHARE_MAX = 0.75
# Splits of AGIQA-3K differ by 0.013 to 0.03 in SROCC; 0.05 is clearly beyond that.
GAP_MAX = 0.05
# A loss beyond noise: on 246 validation rows of AGIQA-3K the same settings gain 0.494 to 0.501 over four seeds of the
# weights.
LOSS_MAX = 0.01

Verdict = Literal["unknown", "base alone", "hurts", "overfit", "bounded", "hardly moves", "works"]


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """A figure of a run; that of the outcome has a verdict, and says in `advice` what happened and what to do."""

    name: str
    value: float
    advice: str = ""
    verdict: Verdict | Literal[""] = ""

    def to_json(self) -> dict[str, float | str | None]:
        """Return name, value (NaN as None), advice and verdict."""
        return {"name": self.name, "value": json_number(self.value), "advice": self.advice, "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What else is known of the training of one head.

    SROCC of the final scores and of the base alone on training rows, NaN where unknown; whether the last epoch is the
    one that was kept; whether the run trained towers too, so that more of them can be frozen.
    """

    train_srocc: float
    train_base_srocc: float
    last_is_best: bool = False
    tuned: bool = False


def diagnose_residual(
    base_N: npt.ArrayLike,
    delta_N: npt.ArrayLike,
    *,
    label_N: npt.ArrayLike,
    scale: float,
    head: str,
    trained: Trained,
) -> list[Diagnostic]:
    """Examine one residual head on validation rows, so that following the advice does not look at the test.

    Args:
        base_N: (N,) base predictions in [0, 1].
        delta_N: (N,) bounded corrections scale * tanh(...), |delta| <= scale, before the final clamp.
        label_N: (N,) labels in [0, 1]; NaN marks a missing one.
        scale: the residual scale at the end of training, in [0, 1].
        head: names the figures and the flag (`--scale HEAD=…`).
        trained: what is known beside these rows.

    Returns:
        The outcome, whose value is what the correction adds to the SROCC of the base; then shares of saturated and of
        small corrections (NaN without rows or with scale 0), SROCC of the base alone and of the final score
        clamp(base + delta, 0, 1), and the train-validation gap, in this order.
    """
    base, delta = np.asarray(base_N, dtype=np.float64), np.asarray(delta_N, dtype=np.float64)
    used = np.abs(delta) / scale if scale > 0 and delta.size else np.full(1, math.nan)
    missing = bool(np.isnan(used).any())
    base_srocc, final_srocc = srocc(base, label_N), srocc(np.clip(base + delta, 0, 1), label_N)
    figures = {
        "saturated_share": math.nan if missing else float(np.mean(used > SATURATED)),
        "small_share": math.nan if missing else float(np.mean(used < SMALL)),
        "base_srocc": base_srocc,
        "final_srocc": final_srocc,
        "train_val_gap": trained.train_srocc - final_srocc,
    }
    verdict, words = _outcome(figures, trained, is_off=not delta.any(), scale=scale, flag=f"--scale {head}")
    outcome = Diagnostic(name=f"{head}.outcome", value=final_srocc - base_srocc, advice=words, verdict=verdict)
    return [outcome, *(Diagnostic(name=f"{head}.{name}", value=value) for name, value in figures.items())]


def _outcome(
    figures: dict[str, float], trained: Trained, *, is_off: bool, scale: float, flag: str
) -> tuple[Verdict, str]:
    """Return what happened and, where there is one, the thing to do; the first that holds."""
    gain, gap = figures["final_srocc"] - figures["base_srocc"], figures["train_val_gap"]
    if scale == 0:
        return "base alone", f"{flag} is 0: the base alone."
    if math.isnan(gain):
        return "unknown", ""
    if is_off:
        return "base alone", "The base alone was best on validation rows: training a correction did not help."
    if gain < -LOSS_MAX:
        return "hurts", f"The correction lowers SROCC by {-gain:.3f} against the base alone: lower {flag}."
    if gap > GAP_MAX:
        return "overfit", _overfit_words(gap, trained.train_base_srocc - figures["base_srocc"], trained, flag=flag)
    verdict, words = _about_size(figures, trained, scale=scale, flag=flag)
    return verdict, f"The correction changes SROCC by {gain:+.3f} on validation rows{words}."


def _about_size(figures: dict[str, float], trained: Trained, *, scale: float, flag: str) -> tuple[Verdict, str]:
    saturated, small = figures["saturated_share"], figures["small_share"]
    if saturated > SATURATED_SHARE_MAX:
        remedy = f": raise {flag}" if scale < 1 else ", the largest there is"
        return "bounded", f"; {saturated:.0%} of corrections press against the scale of {scale:g}{remedy}"
    if small > SMALL_SHARE_MAX:
        remedy = ", and the last epoch was the best: raise --epochs" if trained.last_is_best else ""
        return "hardly moves", f"; {small:.0%} use under a quarter of the scale{remedy}"
    return "works", ""


def _overfit_words(gap: float, base_gap: float, trained: Trained, *, flag: str) -> str:
    ahead = f"Training is {gap:.3f} SROCC ahead of validation (overfit)"
    if not base_gap > gap / 2:
        return f"{ahead}: lower {flag}."
    # A smaller correction leaves the base as it is.
    if trained.tuned:
        return f"{ahead}, the base alone by {base_gap:.3f}: raise --freeze-layers."
    return f"{ahead}, the base alone by {base_gap:.3f}: it takes more rows, not another scale."
