"""What a check finds: how many rows have which problem, some of them as examples, and what to do about it.

Knows tables and their places. Must not know any single check.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from deltaclip.features.data.manifest import ALIASES, RATERS, find_columns, plain_name
from deltaclip.features.data.targets import targets_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaclip.base.vocabulary import Target
    from deltaclip.features.data.adapters.finding import DataTables
    from deltaclip.features.data.table import Table
    from deltaclip.features.data.targets import AskedTarget

Level = Literal["error", "warning"]

RATER_NAMES = frozenset(plain_name(name) for name in RATERS)
EXAMPLES = 5
LONGEST = 60  # characters of a value that an example shows


@dataclass(frozen=True)
class Finding:
    """One problem: `check` names its kind, `count` is of rows or of what the message counts."""

    level: Level
    check: str
    message: str
    count: int
    examples: list[str]
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the lines for a person."""
        more = [f"    ... and {self.count - len(self.examples):,} more"] if self.count > len(self.examples) > 1 else []
        return [f"{self.level}: {self.message}", *(f"    {e}" for e in self.examples), *more, f"  {self.remedy}"]


class Rows:
    """The rows of one or several tables, each column by its canonical name, '' where a cell or a column is missing."""

    def __init__(self, data: DataTables) -> None:
        self._at: list[tuple[Table, int]] = []
        self.asked = data.targets  # targets beside the known ones
        self._named: list[dict[str, str]] = []
        own = [name for asked in data.targets for name in (asked.target.name, asked.target.std)]
        self.cells: dict[str, list[str]] = {name: [] for name in dict.fromkeys([*ALIASES, *own])}
        self.columns: set[str] = set()
        self.raters: list[str] = []  # columns that say who rated
        self.left_out = 0
        for table in data.tables:
            found = find_columns(table, data.targets)
            kept = _kept(table, found, data.targets) if data.labelled_only else range(len(table.lines))
            self.left_out += len(table.lines) - len(kept)
            self.columns |= set(found)
            self.raters += [name for name in table.columns if plain_name(name) in RATER_NAMES]
            for name, cells in self.cells.items():
                column = table.columns[found[name]] if name in found else None
                cells.extend([column[row] if column else "" for row in kept])
            self._at += [(table, row) for row in kept]
            self._named += [found] * len(kept)

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets with a column of labels."""
        return targets_of(self.columns, self.asked)

    def __len__(self) -> int:
        return len(self._at)

    def example(self, row: int, column: str) -> str:
        """Name a cell and what it holds."""
        table, at = self._at[row]
        value = self.cells[column][row]
        shown = value if len(value) <= LONGEST else f"{value[: LONGEST - 3]}..."
        return f"{table.place(at, self._named[row].get(column, column))}: {shown!r}"


def _kept(table: Table, found: dict[str, str], asked: Sequence[AskedTarget]) -> list[int]:
    labels = [table.columns[found[target.name]] for target in targets_of(found, asked)]
    return [row for row in range(len(table.lines)) if any(cells[row] for cells in labels)]


@dataclass
class Findings:
    """Collects findings in the order of the checks."""

    rows: Rows
    found: list[Finding] = field(default_factory=list)

    def error(self, check: str, message: str, *, remedy: str, at: Sequence[int] = (), column: str = "image") -> None:
        """Report what `extract` would stop at or skip, in the rows `at`."""
        self._add("error", check, message, remedy=remedy, at=at, column=column)

    def warn(self, check: str, message: str, *, remedy: str, at: Sequence[int] = (), column: str = "image") -> None:
        """Report what makes figures worse than they look, in the rows `at`."""
        self._add("warning", check, message, remedy=remedy, at=at, column=column)

    def _add(self, level: Level, check: str, message: str, *, remedy: str, at: Sequence[int], column: str) -> None:
        examples = [self.rows.example(row, column) for row in at[:EXAMPLES]]
        self.found.append(Finding(level, check, message, max(1, len(at)), examples, remedy))
