"""Cells of a table as numbers, in the ways that people and programs write them.

| cell | is |
|---|---|
| `3`, `3.5`, `1e-3`, `٣` | that number |
| ``, `-`, `nan`, `NA`, `N/A`, `null`, `None`, `<NA>` | missing |
| `1,5`; `1.234,5` | a decimal comma, where no cell of the column says otherwise |
| `1,234.5`; `1,234,567` | separated thousands |
| `1,234` | as the rest of the column shows; refused where nothing does |
| `80%`, `4/5` | 80 of 0 to 100, 4 of a scale up to 5: then every cell of the column is of that scale |
| `inf`, `1_000`, `0x10`, words | refused |

Knows cells. Must not know what a column means.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

# What programs write in place of a value that is not there, in any case.
MISSING_WORDS = frozenset({"nan", "na", "n/a", "null", "none", "<na>", "#n/a", "nat"})
LONGEST_WORD = max(map(len, MISSING_WORDS))
DASHES = frozenset({"-", "--", "\u2013", "\u2014"})
OF_FULL = re.compile(r"(.+?)\s*(?:%|(?:/|of|out of)\s*(\d+(?:\.\d+)?))", re.IGNORECASE)  # `80%`, `4/5`, `4 out of 5`
DECIMAL_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
PERCENT = 100.0
PROBED = 200  # cells that tell whether a column holds numbers


@dataclass(frozen=True)
class Numbers:
    """N cells: `values` (N,) float64 with NaN where missing or wrong, `wrong` says of a row why it is no number.

    `full` is what the cells are parts of, 100 of percents and 5 of `4/5`, where they say so; `missing` counts the words
    that stand for no value.
    """

    values: NDArray[np.float64]
    wrong: dict[int, str] = field(default_factory=dict)
    full: float | None = None
    missing: dict[str, int] = field(default_factory=dict)


def is_missing_word(cell: str) -> bool:
    """Tell whether a cell is a word that programs write for a value that is not there; '' is none."""
    return cell.casefold() in MISSING_WORDS


def says_nothing(cell: str) -> bool:
    """Tell whether a cell is what programs or people write for a value that is not there: a word, or a dash."""
    return cell in DASHES or is_missing_word(cell)


class Said(NamedTuple):
    """Cells of names or texts, '' where there is none, and the words that stood for none, counted."""

    cells: list[str]
    missing: Mapping[str, int]


def without_missing(cells: list[str]) -> Said:
    """Return cells without words for nothing: rows that share one have nothing in common."""
    missing = Counter(cell for cell in cells if cell and len(cell) <= LONGEST_WORD and says_nothing(cell))
    return Said(["" if cell in missing else cell for cell in cells] if missing else cells, missing)


def is_numeric(cells: Iterable[str]) -> bool:
    """Tell whether cells are numbers, by the first of them that say anything."""
    said = []
    for cell in cells:
        if cell and not says_nothing(cell):
            said.append(cell)
            if len(said) == PROBED:
                break
    return bool(said) and not read_numbers(said).wrong


def read_numbers(cells: Sequence[str]) -> Numbers:
    """Read the cells of a column, all in one way of writing; nothing is raised."""
    values, odd = np.full(len(cells), np.nan), dict[int, str]()
    missing: Counter[str] = Counter()
    for row, cell in enumerate(cells):
        if not cell:
            continue
        if says_nothing(cell):
            missing[cell] += 1
        elif (number := _plain(cell)) is None:
            odd[row] = cell
        else:
            values[row] = number
    wrong: dict[int, str] = {}
    full = _read_parts(cells, values, odd, wrong)
    _read_commas(values, odd, wrong)
    for row in np.flatnonzero(np.isinf(values)).tolist():
        values[row], wrong[row] = np.nan, f"{cells[row]!r} is not finite"
    return Numbers(values, dict(sorted(wrong.items())), full, dict(missing))


def _plain(text: str) -> float | None:
    """Return what Python reads, but for its own spelling of thousands, 1_000."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _read_parts(
    cells: Sequence[str], values: NDArray[np.float64], odd: dict[int, str], wrong: dict[int, str]
) -> float | None:
    """Read `80%` and `4/5`; `odd` keeps what stands before the sign. One column has one scale."""
    found = {row: match for row, text in odd.items() if (match := OF_FULL.fullmatch(text))}
    if not found:
        return None
    scales = {row: float(match[2]) if match[2] else PERCENT for row, match in found.items()}
    full = Counter(scales.values()).most_common(1)[0][0]
    for row, match in found.items():
        odd[row] = match[1]
        if scales[row] != full:
            del odd[row]
            wrong[row] = f"{cells[row]!r} is of another scale than the rest of the column, {full:g}"
        elif (number := _plain(match[1])) is not None:
            del odd[row]
            values[row] = number
    for row in np.flatnonzero(~np.isnan(values)).tolist():
        if row not in found:
            values[row] = np.nan
            wrong[row] = f"{cells[row]!r} does not say of what scale it is, as other cells of the column do"
    return full


def _read_commas(values: NDArray[np.float64], odd: dict[int, str], wrong: dict[int, str]) -> None:
    decimal = any(DECIMAL_COMMA.fullmatch(text) and not THOUSANDS.fullmatch(text) for text in odd.values())
    thousands = any(THOUSANDS.fullmatch(text) and ("." in text or text.count(",") > 1) for text in odd.values())
    for row, text in odd.items():
        read_as = None
        if decimal and not thousands and DECIMAL_COMMA.fullmatch(text):
            read_as = text.replace(".", "").replace(",", ".")
        elif thousands and not decimal and THOUSANDS.fullmatch(text):
            read_as = text.replace(",", "")
        if read_as is not None:
            values[row] = float(read_as)
        elif DECIMAL_COMMA.fullmatch(text) or THOUSANDS.fullmatch(text):
            why = "the column writes numbers in both ways" if decimal and thousands else "nothing says which"
            wrong[row] = f"{text!r} may have a decimal comma or separated thousands: {why}"
        else:
            wrong[row] = f"{text!r} is no number"
