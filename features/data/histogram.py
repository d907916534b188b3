"""Counts of 8-bit levels, and what follows from them: one pass over the pixels, the rest on 256 numbers.

Knows counts. Must not know what was counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

PART = 1 << 15  # of 16 bits each: their sum fits 32, and their squares little memory


def log_ratio(above: float, below: float, floor: float) -> float:
    """Return log((above + floor) / (below + floor)): near 0 where both lie far below the floor."""
    return float(np.log((above + floor) / (below + floor)))


def total(plane: NDArray[Any]) -> float:
    """Return the sum of a plane: exact of integers of up to 16 bits or of what 32 bits hold, by pairs of floats."""
    flat = plane.reshape(-1)
    if plane.dtype.itemsize > 2 or plane.dtype.kind not in "iu":
        return float(flat.sum(dtype=np.int64 if plane.dtype.kind in "iu" else plane.dtype))
    # Sums of 32 bits take half as long as those of 64, and hold a part.
    wide = np.int32 if plane.dtype.kind == "i" else np.uint32
    return float(sum(int(flat[start : start + PART].sum(dtype=wide)) for start in range(0, flat.size, PART)))


def mean_of(plane: NDArray[Any]) -> float:
    """Return the mean of a plane, see `total`."""
    return total(plane) / plane.size


def mean_square_of(plane: NDArray[np.int16]) -> float:
    """Return the mean square of a contiguous plane of integers, exact; in parts, which need little memory."""
    flat = plane.ravel()
    parts = (flat[start : start + PART] for start in range(0, flat.size, PART))
    return sum(int(np.square(part, dtype=np.int32).sum(dtype=np.int64)) for part in parts) / flat.size


class Histogram:
    """How often each level occurs; `count_K` is not negative, level k is their place."""

    def __init__(self, count_K: NDArray[Any]) -> None:
        number = count_K.sum()
        self.share_K = count_K / number if number else np.eye(1, len(count_K))[0]
        self._level_K = np.arange(len(count_K), dtype=np.float64)

    @classmethod
    def of(cls, *planes: NDArray[np.uint8]) -> Histogram:
        """Count the levels of all planes together."""
        return cls(np.sum([counts(plane) for plane in planes], axis=0))

    def mean(self) -> float:
        """Return the mean level."""
        return float((self.share_K * self._level_K).sum())

    def mean_square(self) -> float:
        """Return the mean of the squared level."""
        return float((self.share_K * self._level_K**2).sum())

    def moment(self, order: int) -> float:
        """Return the central moment of this order."""
        return float((self.share_K * (self._level_K - self.mean()) ** order).sum())

    def spread(self) -> float:
        """Return the standard deviation."""
        return float(np.sqrt(self.moment(2)))

    def quantile(self, share: float) -> float:
        """Return the level below which this share lies; a level k counts as spread evenly over k - 1/2 to k + 1/2."""
        below_K = np.concatenate([[0.0], np.cumsum(self.share_K)])
        edge = min(int(np.searchsorted(below_K, share, side="left")), len(self.share_K))
        level = max(edge - 1, 0)
        within = (share - below_K[level]) / self.share_K[level] if self.share_K[level] else 0.5
        return min(max(level - 0.5 + float(within), 0.0), len(self.share_K) - 1.0)

    def share(self, first: int, last: int) -> float:
        """Return the share of the levels `first` to `last`, both included."""
        return float(self.share_K[first : last + 1].sum())

    def entropy(self) -> float:
        """Return Shannon's entropy in bits."""
        there = self.share_K[self.share_K > 0]
        return float(-(there * np.log2(there)).sum()) + 0.0

    def unused(self) -> float:
        """Return the share of levels that never occur, of those between the lowest and the highest that do."""
        there = np.flatnonzero(self.share_K)
        return 1 - len(there) / int(there[-1] - there[0] + 1)


def counts(plane: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return how often each of 256 levels occurs; four times as fast as numpy.bincount, which widens all first."""
    flat = np.ascontiguousarray(plane).reshape(1, -1)
    return np.array(Image.frombuffer("L", flat.shape[::-1], flat, "raw", "L", 0, 1).histogram())
