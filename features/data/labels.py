"""Labels as numbers in [0, 1]: the range is given, known by the adapter, or detected and said.

Knows label columns of a table. Must not know images or prompts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.targets import LABELS
from deltaclip.features.data.numbers import read_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deltaclip.features.data.numbers import Numbers
    from deltaclip.features.data.table import Table

# The scales the field uses, narrowest first; detection takes the first that holds every label.
KNOWN_RANGES = ((0.0, 1.0), (1.0, 5.0), (0.0, 5.0), (0.0, 10.0), (0.0, 100.0))
OPTION = "--label-range"
GIVEN = re.compile(r"(?:([^=,;\s]+)\s*=\s*)?([^=,;\s]+)\s*,\s*([^=,;\s]+)")  # `1,5` or `quality=1,5`
FEW_LABELS = 3  # of fewer, their spread says nothing of the scale


@dataclass(frozen=True)
class LabelRange:
    """The scale of a label column: `lo` maps to 0, `hi` to 1; `how` is 'given', 'adapter' or 'detected'."""

    lo: float
    hi: float
    how: str

    def __str__(self) -> str:
        return f"{self.lo:g} to {self.hi:g} ({self.how})"

    def filled_by(self, values_N: NDArray[np.float64]) -> float:
        """Return the share of the scale that lies between the lowest and the highest of some labels."""
        return float((np.nanmax(values_N) - np.nanmin(values_N)) / (self.hi - self.lo))


def parse_label_ranges(given: str | Sequence[str] | None) -> dict[str, LabelRange]:
    """Read `LO,HI` of all labels, or `LABEL=LO,HI` of one; a text may hold several, between commas.

    Raises:
        UserError: not two numbers in rising order, no such label, or one that is given twice.
    """
    shared: dict[str, LabelRange] = {}
    own: dict[str, LabelRange] = {}
    for text in [given] if isinstance(given, str) else given or ():
        for name, found in _parsed(text):
            if name and name not in LABELS:
                raise UserError(f"{name!r} is no label", place=OPTION, remedy=did_you_mean(name, LABELS))
            if name in own or (not name and shared):
                message = f"{text!r} gives {name or 'all labels'} a second range"
                raise UserError(message, place=OPTION, remedy="give one range a label")
            if name:
                own[name] = found
            else:
                shared = dict.fromkeys(LABELS, found)
    return shared | own


def _parsed(text: str) -> list[tuple[str, LabelRange]]:
    found, end = [], 0
    for match in GIVEN.finditer(text):
        if text[end : match.start()].strip(" ,;"):
            break
        end = match.end()
        try:
            lo, hi = float(match[2]), float(match[3])
        except ValueError:
            lo, hi = 0.0, 0.0
        if not (np.isfinite([lo, hi]).all() and lo < hi):
            break
        found.append((match[1] or "", LabelRange(lo, hi, "given")))
    else:
        if found and not text[end:].strip(" ,;"):
            return found
    remedy = "give two rising numbers such as 1,5, or quality=1,10 for one label"
    raise UserError(f"{text!r} is no range", place=OPTION, remedy=remedy)


def range_of(numbers: Numbers, given: LabelRange | None) -> LabelRange | None:
    """Return the range of labels: the given one, else the narrowest of the usual ones that holds all; None without."""
    if given:
        return given
    present = numbers.values[~np.isnan(numbers.values)]
    low, high = (present.min(), present.max()) if present.size else (0.0, 0.0)
    usual = [(lo, hi) for lo, hi in KNOWN_RANGES if numbers.full in (None, hi)]
    if numbers.full is not None:  # `4/7`
        usual.append((0.0, numbers.full))
    return next((LabelRange(lo, hi, "detected") for lo, hi in usual if lo <= low and high <= hi), None)


def read_label(
    table: Table, column: str, label: str, given: LabelRange | None
) -> tuple[NDArray[np.float64], LabelRange, list[str]]:
    """Map a label column to [0, 1].

    Returns:
        labels (N,) float64 in [0, 1], NaN where the cell is empty, the range that was used, and what to say of it.

    Raises:
        UserError: a cell is no number or lies outside the range; names file, line and column.
    """
    numbers = _numbers(table, column)
    raw_N = numbers.values
    known = range_of(numbers, given)
    if known is None:
        row = int(np.nanargmin(raw_N) if np.nanmin(raw_N) < 0 else np.nanargmax(raw_N))
        message = f"label {raw_N[row]:g} fits none of the usual ranges"
        raise UserError(message, place=table.place(row, column), remedy="give --label-range LO,HI")
    outside_N = (raw_N < known.lo) | (raw_N > known.hi)
    if outside_N.any():
        row = int(np.flatnonzero(outside_N)[0])
        raise UserError(
            f"label {raw_N[row]:g} is outside {known}",
            place=table.place(row, column),
            remedy=f"correct the label or give --label-range {label}=LO,HI",
        )
    return (raw_N - known.lo) / (known.hi - known.lo), known, _notes(label, column, numbers, known)


def _notes(label: str, column: str, numbers: Numbers, known: LabelRange) -> list[str]:
    present = numbers.values[~np.isnan(numbers.values)]
    notes = [missing_words(column, numbers)] if numbers.missing else []
    if not present.size:
        notes.append(f"column {column!r} gives no labels of {label}: all of its cells are empty")
    elif sparse := sparse_words(label, present, known):
        notes.append(sparse)
    return notes


def missing_words(column: str, numbers: Numbers) -> str:
    """Say which words of a column count as missing."""
    words = ", ".join(sorted(numbers.missing))
    return f"{sum(numbers.missing.values()):,} cells of {column} count as missing ({words})"


def sparse_words(label: str, present_M: NDArray[np.float64], known: LabelRange) -> str:
    """Return a line where labels fill less than half of a range that was given, '' elsewhere: it is another scale's."""
    if known.how != "given" or present_M.size < FEW_LABELS or known.filled_by(present_M) >= 0.5:
        return ""
    spread = f"{present_M.min():g} to {present_M.max():g}"
    share = f"{known.filled_by(present_M):.0%}"
    return f"{label} lies from {spread}, {share} of the given range: give {OPTION} {label}=LO,HI if it has its own"


def read_label_std(table: Table, column: str, label_range: LabelRange) -> NDArray[np.float64]:
    """Map a column of label standard deviations to the unit of the mapped labels, (N,) float64, NaN where empty."""
    raw_N = _numbers(table, column).values
    negative_N = raw_N < 0
    if negative_N.any():
        row = int(np.flatnonzero(negative_N)[0])
        raise UserError(
            f"standard deviation {raw_N[row]:g} is negative",
            place=table.place(row, column),
            remedy="correct it",
        )
    return raw_N / (label_range.hi - label_range.lo)


def _numbers(table: Table, column: str) -> Numbers:
    numbers = read_numbers(table.columns[column])
    for row, why in numbers.wrong.items():
        raise UserError(why, place=table.place(row, column), remedy="leave a missing label empty")
    return numbers
