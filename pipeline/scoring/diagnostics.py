"""What a residual run's own numbers say about its settings: figures of each head, and one state that they are in.

Figures that are off each by its own threshold once gave each its own advice: lower --dropout beside raise --dropout. So
the figures stand alone, and of the states that hold the one that spoils most is told.

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

State = Literal["unknown", "base alone", "hurts", "overfit", "base overfit", "bounded", "hardly moves", "works"]


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """A figure of a run; that of the outcome has the state of the correction."""

    name: str
    value: float
    state: State | Literal[""] = ""

    def to_json(self) -> dict[str, float | str | None]:
        """Return name, value (NaN as None) and state."""
        return {"name": self.name, "value": json_number(self.value), "state": self.state}


def diagnose_residual(
    base_N: npt.ArrayLike,
    delta_N: npt.ArrayLike,
    *,
    label_N: npt.ArrayLike,
    scale: float,
    head: str,
    train_srocc: float,
    train_base_srocc: float,
) -> list[Diagnostic]:
    """Examine one residual head on validation rows, so that following the advice does not look at the test.

    Args:
        base_N: (N,) base predictions in [0, 1].
        delta_N: (N,) bounded corrections scale * tanh(...), |delta| <= scale, before the final clamp.
        label_N: (N,) labels in [0, 1]; NaN marks a missing one.
        scale: the residual scale at the end of training, in [0, 1].
        head: names the figures.
        train_srocc: SROCC of the final scores on training rows, NaN where unknown.
        train_base_srocc: that of the base alone.

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
        "train_val_gap": train_srocc - final_srocc,
    }
    base_gap = train_base_srocc - base_srocc
    state = _state(figures, base_gap, is_off=not delta.any(), scale=scale)
    outcome = Diagnostic(name=f"{head}.outcome", value=final_srocc - base_srocc, state=state)
    return [outcome, *(Diagnostic(name=f"{head}.{name}", value=value) for name, value in figures.items())]


def _state(figures: dict[str, float], base_gap: float, *, is_off: bool, scale: float) -> State:
    """Return what happened: of what holds, that which spoils most."""
    gain, gap = figures["final_srocc"] - figures["base_srocc"], figures["train_val_gap"]
    if math.isnan(gain):
        return "base alone" if scale == 0 else "unknown"
    if is_off or scale == 0:
        return "base alone"
    if gain < -LOSS_MAX:
        return "hurts"
    if gap > GAP_MAX:
        # A smaller correction leaves the base as it is.
        return "base overfit" if base_gap > gap / 2 else "overfit"
    if figures["saturated_share"] > SATURATED_SHARE_MAX:
        return "bounded"
    return "hardly moves" if figures["small_share"] > SMALL_SHARE_MAX else "works"
