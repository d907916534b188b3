"""Tables in one file or in several, named one by one, by a pattern (`shards/{000..099}.tar`) or by their folder.

Several files are one set: their rows stand one after another, a label has one range in all of them. Knows patterns and
names of files. Must not know what stands in a table.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import side_of
from deltaclip.features.data.adapters.finding import DataTables, with_columns
from deltaclip.features.data.manifest import find_columns
from deltaclip.features.data.table import Table, joined_tables, read_table

if TYPE_CHECKING:
    from collections.abc import Sequence

BRACES = re.compile(r"\{([^{}]*)\}")
SPAN = re.compile(r"(\d+)\.\.(\d+)")
MAX_NAMED = 1_000_000  # files of a pattern; a slip of the pen names more
OF_MANY = re.compile(r"-(\d{5})-of-(\d{5})$")


def is_pattern(data: str) -> bool:
    """Tell whether a text names files by a pattern; that of a file that is there is no pattern."""
    return (BRACES.search(data) is not None or glob.has_magic(data)) and not Path(data).exists()


def expand(pattern: str) -> list[Path]:
    """Return the files that a pattern names: `{000..099}` and `{a,b}` each of them, `*`, `?` and `[ab]` those there.

    Raises:
        UserError: one that is named is not there, or there is none.
    """
    texts = _without_braces(pattern)
    found: list[Path] = []
    for text in texts:
        here = sorted(map(Path, glob.glob(text, recursive=True))) if glob.has_magic(text) else [Path(text)]  # noqa: PTH207 - any text, also an absolute one
        missing = not here or not here[0].is_file()
        if missing:
            of = f", one of {len(texts):,} that the pattern names" if len(texts) > 1 else ""
            raise UserError(f"no such file{of}", place=text, remedy="check the pattern, and keep it in quotes")
        found += here
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _without_braces(pattern: str) -> list[str]:
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    span = SPAN.fullmatch(match[1])
    if span is None:
        inner = match[1].split(",")
    else:
        first, last = int(span[1]), int(span[2])
        if abs(last - first) >= MAX_NAMED:
            raise UserError(f"names {abs(last - first) + 1:,} files", place=pattern, remedy="give fewer at a time")
        width = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        inner = [str(number).zfill(width) for number in numbers]
    before, behind = pattern[: match.start()], pattern[match.end() :]
    found = [f"{before}{part}{rest}" for part in inner for rest in _without_braces(behind)]
    if len(found) > MAX_NAMED:
        raise UserError(f"names {len(found):,} files", place=pattern, remedy="give fewer at a time")
    return found


def open_pattern(pattern: str) -> DataTables:
    """Open the files that a pattern names as one set.

    Raises:
        UserError: one is not there, or cannot be read.
    """
    paths = expand(pattern)
    folder = Path(os.path.commonpath([path.parent.absolute() for path in paths]))
    own = paths[0].parent
    folder = own if own.absolute() == folder else folder
    return open_files(paths, folder=folder, name=folder.resolve().name or "data")


def open_files(paths: Sequence[Path], *, folder: Path, name: str, notes: Sequence[str] = ()) -> DataTables:
    """Open files as one set.

    Args:
        paths: at least one.
        folder: that they and their images lie in.
        name: of the set.
        notes: what is to be said besides.

    Raises:
        UserError: one cannot be read.
    """
    tables = [read_table(path) for path in paths]
    tables, said = _with_sides(tables)
    table = joined_tables(folder, tables)
    return DataTables(name=name, tables=[table], image_root=folder, notes=(*notes, *said, *_missing_parts(paths)))


def _with_sides(tables: list[Table]) -> tuple[list[Table], list[str]]:
    """Put the side of a split that files are called after (`train-00000-of-00002.parquet`) into a column of it."""
    sides = [_side(table.path) for table in tables]
    if None in sides or len(set(sides)) < 2 or any("split" in find_columns(table) for table in tables):
        return tables, []
    counts = dict.fromkeys(sides, 0)
    for side, table in zip(sides, tables, strict=True):
        counts[side] += len(table.lines)
    words = ", ".join(f"{side} {count:,}" for side, count in counts.items())
    placed = [
        with_columns(table, split=[str(side)] * len(table.lines)) for side, table in zip(sides, tables, strict=True)
    ]
    return placed, [f"the split is that of the files' names: {words}"]


def _side(path: Path) -> str | None:
    """Return the side that the name of a file, or that of its folder, begins with."""
    for name in (path.stem, path.parent.name):
        word = re.match(r"[A-Za-z]+", name)
        if word and (side := side_of(word[0])):
            return side
    return None


def _missing_parts(paths: Sequence[Path]) -> list[str]:
    """Say which of `NAME-00000-of-00012` are not there."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if part := OF_MANY.search(path.stem):
            numbers.setdefault((path.stem[: part.start()], int(part[2])), set()).add(int(part[1]))
    said = []
    for (stem, count), there in numbers.items():
        lacking = list(itertools.islice((number for number in range(count) if number not in there), 1))
        if lacking:
            first = f"{stem}-{lacking[0]:05}-of-{count:05}"
            said.append(f"{count - len(there):,} of {count:,} files of {stem} are not there (the first: {first})")
    return said
