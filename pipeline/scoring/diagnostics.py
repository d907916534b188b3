"""What a residual run's own numbers say about its settings, one sentence of advice each.

Knows deltas, bases and labels of one head as arrays. Must not know heads, files or how training works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from deltaclip.pipeline.scoring.ranks import json_number, srocc

if TYPE_CHECKING:
    import numpy.typing as npt

# A correction spread evenly over its range has 10 % of its rows above 0.9 of the scale and 25 % below 0.25.
SATURATED, SMALL = 0.9, 0.25
# Twice the even share: corrections then pile up at the bound, where tanh has lost four fifths of its slope.
SATURATED_SHARE_MAX = 0.20
# Three times the even share: for most images three quarters of the allowed correction is never touched.
SMALL_SHARE_MAX = 0.75
# Splits of AGIQA-3K differ by 0.013 to 0.03 in SROCC; 0.05 is the spec's figure and clearly beyond that.
GAP_MAX = 0.05
# The advice to weaken a correction needs a loss beyond noise: on 246 validation rows of AGIQA-3K the same settings gain
# 0.494 to 0.501 over four seeds of the weights.
LOSS_MAX = 0.01


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """A figure of a run and what to change because of it; `advice` is empty where nothing is off."""

    name: str
    value: float
    advice: str = ""

    def to_json(self) -> dict[str, float | str | None]:
        """Return name, value (NaN as None) and advice."""
        return {"name": self.name, "value": json_number(self.value), "advice": self.advice}


def diagnose_residual(
    base_N: npt.ArrayLike,
    delta_N: npt.ArrayLike,
    *,
    label_N: npt.ArrayLike,
    scale: float,
    head: Literal["quality", "consistency"],
    train_srocc: float,
    val_srocc: float,
) -> list[Diagnostic]:
    """Examine one residual head on validation rows, so that following the advice does not look at the test.

    Args:
        base_N: (N,) base predictions in [0, 1].
        delta_N: (N,) bounded corrections scale * tanh(...), |delta| <= scale, before the final clamp.
        label_N: (N,) labels in [0, 1]; NaN marks a missing one.
        scale: the residual scale at the end of training, at least 0.
        head: names the figures and the flag (`--residual-scale-q` or `-c`).
        train_srocc: SROCC of the final scores on training rows, NaN where unknown.
        val_srocc: the same on validation rows.

    Returns:
        Shares of saturated and of small corrections (NaN without rows or with scale 0), SROCC of the base
        alone and of the final score clamp(base + delta, 0, 1), and the train-validation gap, in this order.
    """
    base, delta = np.asarray(base_N, dtype=np.float64), np.asarray(delta_N, dtype=np.float64)
    flag = f"--residual-scale-{head[0]}"
    used = np.abs(delta) / scale if scale > 0 and delta.size else np.full(1, math.nan)
    missing = bool(np.isnan(used).any())
    is_off = not delta.any()  # the base was the best epoch: there is nothing to advise about the size of corrections
    saturated = math.nan if missing else float(np.mean(used > SATURATED))
    small = math.nan if missing else float(np.mean(used < SMALL))
    base_srocc, final_srocc = srocc(base, label_N), srocc(np.clip(base + delta, 0, 1), label_N)
    gap = train_srocc - val_srocc
    figures = (
        ("saturated_share", saturated, _saturated_advice(saturated, scale=scale, flag=flag)),
        ("small_share", small, "" if is_off else _small_advice(small)),
        ("base_srocc", base_srocc, ""),
        ("final_srocc", final_srocc, _gain_advice(final_srocc - base_srocc, flag=flag)),
        ("train_val_gap", gap, _gap_advice(gap, flag=flag)),
    )
    return [Diagnostic(name=f"{head}.{name}", value=value, advice=advice) for name, value, advice in figures]


def _saturated_advice(share: float, *, scale: float, flag: str) -> str:
    if not share > SATURATED_SHARE_MAX:
        return ""
    return f"{share:.0%} of corrections press against the scale of {scale:g}: raise {flag}."


def _small_advice(share: float) -> str:
    if not share > SMALL_SHARE_MAX:
        return ""
    return (
        f"{share:.0%} of corrections use under a quarter of the scale: "
        "lower --weight-decay or --dropout, or raise --epochs."
    )


def _gain_advice(gain: float, *, flag: str) -> str:
    if not gain < -LOSS_MAX:
        return ""
    return f"The correction lowers SROCC by {-gain:.3f} against the base alone: lower {flag} or raise --dropout."


def _gap_advice(gap: float, *, flag: str) -> str:
    if not gap > GAP_MAX:
        return ""
    return (
        f"Training is {gap:.3f} SROCC ahead of validation (overfit): lower {flag}, raise --dropout or "
        "--weight-decay, or with finetune raise --freeze-layers."
    )
