"""How many pairs a score orders as people did, with an interval over whole groups.

Knows differences of scores, preferences and groups. Must not know heads, rows or files.

Shapes: P pairs, G groups.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.scoring.agreement import json_number

if TYPE_CHECKING:
    import numpy.typing as npt
    from numpy.typing import NDArray

MIN_PAIRS = 10  # of fewer, a share says nothing
RESAMPLES = 1_000
TIE = 0.5
CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """Share of pairs ordered rightly, `share_ci` its 95 % interval; of `n` pairs, beside which `ties` were left out."""

    share: float
    share_ci: tuple[float, float]
    n: int
    ties: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, NaN as None."""
        bounds = [json_number(bound) for bound in self.share_ci]
        return asdict(self) | {"share": json_number(self.share), "share_ci": bounds}


def ordered_share(difference_P: NDArray[np.floating], preferred_P: NDArray[np.floating]) -> float:
    """Return the share of pairs that are ordered as people did, in [0, 1]; NaN where people ordered none.

    Pairs that people tied order nothing and are left out; scores that are equal count half. A probability counts as
    what it leans to.
    """
    right_P = _right(difference_P, preferred_P)
    known = right_P[~np.isnan(right_P)]
    return float(known.mean()) if len(known) else math.nan


def ordering(
    difference_P: NDArray[np.floating], preferred_P: NDArray[np.floating], *, groups: npt.ArrayLike, seed: int = 0
) -> Ordering:
    """Return the share of pairs ordered rightly, with the bootstrap interval of whole groups drawn.

    Args:
        difference_P: score of a less that of b.
        preferred_P: probability in [0, 1] that people prefer a; .5 is a tie.
        groups: (P,) strings or integers, such as the prompt; pairs of one are drawn together.
        seed: of the draws.
    """
    right_P = _right(difference_P, preferred_P)
    known = ~np.isnan(right_P)
    share = float(right_P[known].mean()) if known.any() else math.nan
    _, code_P = np.unique(np.asarray(groups)[known], return_inverse=True)
    counts_G, sums_G = np.bincount(code_P), np.bincount(code_P, right_P[known])
    bounds = (math.nan, math.nan)
    if len(counts_G) > 1:
        drawn_RG = np.random.default_rng(seed).multinomial(
            len(counts_G), np.full(len(counts_G), 1 / len(counts_G)), size=RESAMPLES
        )
        lo, hi = np.quantile((drawn_RG @ sums_G) / (drawn_RG @ counts_G), [0.025, 0.975])
        bounds = (float(lo), float(hi))
    return Ordering(share=share, share_ci=bounds, n=int(known.sum()), ties=int((~known).sum()))


def _right(difference_P: NDArray[np.floating], preferred_P: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return 1 for each pair ordered as people did, 0 for the other order, .5 for equal scores, NaN for a tie."""
    agrees_P = np.sign(np.asarray(difference_P, dtype=np.float64)) * np.sign(np.asarray(preferred_P) - TIE)
    return np.where(np.asarray(preferred_P) == TIE, np.nan, (agrees_P + 1) / 2)
