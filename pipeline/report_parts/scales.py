"""From values to places on a plot, and the round numbers to label them with. Knows numbers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_DECIMALS = 9
MAX_PLAIN = 1e6  # from here on, ticks are written with powers of ten


@dataclass(frozen=True)
class Scale:
    """A straight line from the domain [lo, hi], lo < hi, to places on the page."""

    lo: float
    hi: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where a value lies; values outside the domain lie outside the plot."""
        return self.start + (value - self.lo) / (self.hi - self.lo) * (self.end - self.start)


def domain(values: Iterable[float], *, pad: float = 0.05) -> tuple[float, float]:
    """Return limits around all finite values, wider by a share `pad` of their range at both ends.

    Without any it is 0 to 1; around one constant value, half of it (or 0.5) to either side, so that it has a middle.
    """
    known = [float(value) for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    lo, hi = min(known), max(known)
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):
        side = abs(lo) / 2 or 0.5
        return lo - side, hi + side
    return lo - pad * (hi - lo), hi + pad * (hi - lo)


def ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers within [lo, hi], lo < hi: multiples of 1, 2 or 5 times a power of ten."""
    rough = (hi - lo) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.75 * rough)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    decimals = min(max(0, -math.floor(math.log10(step))), 300)
    return [round(number * step, decimals) + 0.0 for number in range(first, last + 1)]  # + 0.0: no -0


def tick_words(values: list[float]) -> list[str]:
    """Return the labels of ticks, all with the decimals that they need, or digits where that would be too many."""
    if max(map(abs, values), default=0) < MAX_PLAIN:
        for places in range(MAX_DECIMALS):
            words = [number(value, places) for value in values]
            exact = all(abs(round(value, places) - value) <= 1e-9 * max(1.0, abs(value)) for value in values)
            if exact and len(set(words)) == len(values):
                return words
    for digits in range(3, 18):  # 17 tell any two numbers apart
        words = [f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}") for value in values]
        if len(set(words)) == len(values):
            break
    return words


def number(value: float | None, decimals: int = 3) -> str:
    """Return a figure for a reader: a real minus sign, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    words = f"{value:,.{decimals}f}"
    if not words.strip("-0.,"):
        words = words.lstrip("-")  # a minus before zeros says nothing
    return words.replace("-", "\N{MINUS SIGN}")
