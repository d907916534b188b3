"""Rows of a run as a report shows them: those of one side, columns as arrays.

Knows the table of predictions. Must not know pages or plots.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.pipeline.run.predictions import CSV_FIELD_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TEXT = ("image", "prompt", "source")
NUMBERS = ("quality", "consistency", "q", "c", "q_base", "c_base", "q_delta", "c_delta")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N rows: `text` columns (N) str and `numbers` columns (N,) float64, NaN where a cell is empty."""

    text: dict[str, list[str]]
    numbers: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.text["image"])

    def error(self, label: str) -> NDArray[np.float64]:
        """Return predicted minus human score of 'quality' or 'consistency', (N,), NaN where either is missing."""
        return self.numbers[label[0]] - self.numbers[label]


def read_rows(path: Path, *, split: str) -> Rows:
    """Read the rows of one side; the others do not stay in memory.

    Raises:
        UserError: the table cannot be read or lacks a column.
    """
    csv.field_size_limit(CSV_FIELD_BYTES)
    text: dict[str, list[str]] = {name: [] for name in TEXT}
    numbers: dict[str, list[float]] = {name: [] for name in NUMBERS}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            for name in ("split", *TEXT, *NUMBERS):
                if name not in (table.fieldnames or ()):
                    raise UserError(f"has no column {name!r}", place=path, remedy="train again")
            for row in table:
                if row["split"] == split:
                    for name in TEXT:
                        text[name].append(row[name])
                    for name in NUMBERS:
                        numbers[name].append(float(row[name] or "nan"))
    except (OSError, csv.Error, ValueError, TypeError) as error:  # TypeError: a row that ends early
        raise UserError(f"cannot be read ({error})", place=path, remedy="train again") from error
    return Rows(text=text, numbers={name: np.array(values) for name, values in numbers.items()})


def read_history(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read the table of epochs, every column (E,) float64, NaN where a cell is empty.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = rows[0] if rows else {}
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (OSError, csv.Error, ValueError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", place=path, remedy="train again") from error
