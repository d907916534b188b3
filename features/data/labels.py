"""Labels as numbers in [0, 1]: the range is given, known by the adapter, or detected and said.

Knows label columns of a table. Must not know images or prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.features.data.table import Table

# The scales the field uses, narrowest first; detection takes the first that holds every label.
KNOWN_RANGES = ((0.0, 1.0), (1.0, 5.0), (0.0, 5.0), (0.0, 10.0), (0.0, 100.0))


@dataclass(frozen=True)
class LabelRange:
    """The scale of a label column: `lo` maps to 0, `hi` to 1; `how` is 'given', 'adapter' or 'detected'."""

    lo: float
    hi: float
    how: str

    def __str__(self) -> str:
        return f"{self.lo:g} to {self.hi:g} ({self.how})"


def parse_label_range(text: str) -> LabelRange:
    """Read `LO,HI`.

    Raises:
        UserError: not two numbers in rising order.
    """
    try:
        lo, hi = (float(part) for part in text.split(","))
    except ValueError:
        lo, hi = 0.0, 0.0
    if not (np.isfinite([lo, hi]).all() and lo < hi):
        raise UserError(f"{text!r} is no range", place="--label-range", remedy="give two rising numbers such as 1,5")
    return LabelRange(lo, hi, "given")


def read_label(table: Table, column: str, label_range: LabelRange | None) -> tuple[NDArray[np.float64], LabelRange]:
    """Map a label column to [0, 1].

    Returns:
        labels (N,) float64 in [0, 1], NaN where the cell is empty, and the range that was used.

    Raises:
        UserError: a cell is no number or lies outside the range; names file, line and column.
    """
    raw_N = _numbers(table, column)
    known = label_range or _detect(raw_N, table, column)
    outside_N = (raw_N < known.lo) | (raw_N > known.hi)
    if outside_N.any():
        row = int(np.flatnonzero(outside_N)[0])
        raise UserError(
            f"label {raw_N[row]:g} is outside {known}",
            place=table.place(row, column),
            remedy="correct the label or give --label-range LO,HI",
        )
    return (raw_N - known.lo) / (known.hi - known.lo), known


def read_label_std(table: Table, column: str, label_range: LabelRange) -> NDArray[np.float64]:
    """Map a column of label standard deviations to the unit of the mapped labels, (N,) float64, NaN where empty."""
    raw_N = _numbers(table, column)
    negative_N = raw_N < 0
    if negative_N.any():
        row = int(np.flatnonzero(negative_N)[0])
        raise UserError(
            f"standard deviation {raw_N[row]:g} is negative",
            place=table.place(row, column),
            remedy="correct it",
        )
    return raw_N / (label_range.hi - label_range.lo)


def _numbers(table: Table, column: str) -> NDArray[np.float64]:
    cells = table.columns[column]
    values_N = np.empty(len(cells))
    for row, cell in enumerate(cells):
        try:
            values_N[row] = float(cell) if cell else np.nan
        except ValueError:
            raise UserError(
                f"{cell!r} is no number", place=table.place(row, column), remedy="leave a missing label empty"
            ) from None
    infinite_N = np.isinf(values_N)
    if infinite_N.any():
        row = int(np.flatnonzero(infinite_N)[0])
        raise UserError(
            f"{cells[row]!r} is not finite",
            place=table.place(row, column),
            remedy="leave a missing label empty",
        )
    return values_N


def _detect(values_N: NDArray[np.float64], table: Table, column: str) -> LabelRange:
    present = values_N[~np.isnan(values_N)]
    if present.size == 0:
        return LabelRange(0.0, 1.0, "detected")
    for lo, hi in KNOWN_RANGES:
        if present.min() >= lo and present.max() <= hi:
            return LabelRange(lo, hi, "detected")
    row = int(np.nanargmin(values_N) if present.min() < 0 else np.nanargmax(values_N))
    raise UserError(
        f"label {values_N[row]:g} fits none of the usual ranges",
        place=table.place(row, column),
        remedy="give --label-range LO,HI",
    )
