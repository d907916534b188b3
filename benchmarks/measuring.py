"""A row of the table, and how a ratio is measured: both sides in turns, the median of the pairs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `goal` in words, `met` None where the row is only shown."""

    name: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired_ratio(a: Callable[[], object], b: Callable[[], object], *, repeats: int = 5) -> float:
    """Return the median over repeats of time(a) / time(b), after one warm-up of each, in alternating order."""
    a(), b()
    ratios = []
    for repeat in range(repeats):
        first, second = (a, b) if repeat % 2 == 0 else (b, a)
        times = {first: seconds(first), second: seconds(second)}
        ratios.append(times[a] / times[b])
    return statistics.median(ratios)
