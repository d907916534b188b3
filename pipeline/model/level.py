"""The constant that gives a base the mean of its labels.

Knows two ways from an unbounded number to a score in [0, 1]. Must not know heads or where rows come from.

Least squares hits the mean of what it is fitted to, but a score goes through a sigmoid or a clamp behind the fit, and
its mean is then another: .07 too high on labels that pile up at one end. Every correction would first learn that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

# A sigmoid never reaches 0 or 1; labels that are all there are missed by this much.
_END = 1e-4
# What float32 scores of float32 labels can tell; without a clamped row least squares is within it.
_EXACT = 1e-9


def sigmoid_shift(logit_N: Tensor, label_N: Tensor) -> float:
    """Return d for which mean(sigmoid(logit + d)) = mean(label), labels (N,) in [0, 1], N > 0."""
    from scipy.special import expit

    target = min(max(float(label_N.double().mean()), _END), 1 - _END)
    x_N, middle = _numbers(logit_N), math.log(target / (1 - target))
    lo, hi = middle - x_N.max(), middle - x_N.min()
    return _root(lambda d: float(expit(x_N + d).mean()) - target, lo, hi)


def clamp_shift(x_N: Tensor, label_N: Tensor) -> float:
    """Return d for which mean(clamp(x + d, 0, 1)) = mean(label), labels (N,) in [0, 1], N > 0."""
    target, found_N = float(label_N.double().mean()), _numbers(x_N)
    lo, hi = target - found_N.max(), target - found_N.min()
    return _root(lambda d: float(np.clip(found_N + d, 0, 1).mean()) - target, lo, hi)


def _numbers(x_N: Tensor) -> NDArray[np.float64]:
    return np.asarray(x_N.detach().cpu().double().numpy())


def _root(excess: Callable[[float], float], lo: float, hi: float) -> float:
    """Return a root of a function that never falls, at most 0 at `lo` and at least 0 at `hi`; 0 where it is one."""
    from scipy.optimize import brentq

    if abs(excess(0.0)) <= _EXACT:
        return 0.0
    for end in (lo, hi):  # a bracket of one point, or an end that rounding leaves on the wrong side
        if abs(excess(end)) <= _EXACT:
            return end
    return float(brentq(excess, lo, hi, xtol=1e-12))
