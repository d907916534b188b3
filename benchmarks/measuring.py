"""A row of the table, and how a ratio is measured: both sides in turns, the median of the pairs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    `value` is None where this machine cannot measure it, for the reason in `note`; `goal` stands in words, `met` is
    None where the row is only shown; `ceiling_share` says how much of what the machine can do at most was reached.
    """

    name: str
    value: float | None
    unit: str
    goal: str = ""
    met: bool | None = None
    ceiling_share: float | None = None
    note: str = ""

    def line(self) -> str:
        """Return the row as a line of the table."""
        value = "-" if self.value is None else f"{self.value:.4g}"
        verdict = {None: "", True: "met", False: "NOT MET"}[self.met]
        share = "" if self.ceiling_share is None else f"{100 * self.ceiling_share:.0f} %"
        return f"{self.name:70}{value:>10} {self.unit:10}{self.goal:18}{verdict:9}{share:>6}  {self.note}".rstrip()


def at_least(goal: float, *, name: str, value: float, unit: str, **more: object) -> Row:
    """Return a row whose value must reach a goal."""
    return Row(name=name, value=value, unit=unit, goal=f"at least {goal:g}", met=value >= goal, **more)  # type: ignore[arg-type]


def at_most(goal: float, *, name: str, value: float, unit: str, **more: object) -> Row:
    """Return a row whose value must not pass a goal."""
    return Row(name=name, value=value, unit=unit, goal=f"at most {goal:g}", met=value <= goal, **more)  # type: ignore[arg-type]


def not_measured(name: str, goal: str, note: str) -> Row:
    """Return a row of the goals that this machine cannot measure, and so does not meet."""
    return Row(name=name, value=None, unit="", goal=goal, met=False, note=note)


def peak_bytes() -> int:
    """Return the highest memory of this process so far.

    Not `ru_maxrss`, which a new process has from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired_ratio(a: Callable[[], object], b: Callable[[], object], *, repeats: int = 9) -> float:
    """Return the median over repeats of time(a) / time(b), after one warm-up of each, in alternating order."""
    a(), b()
    ratios = []
    for repeat in range(repeats):
        first, second = (a, b) if repeat % 2 == 0 else (b, a)
        times = {first: seconds(first), second: seconds(second)}
        ratios.append(times[a] / times[b])
    return statistics.median(ratios)
