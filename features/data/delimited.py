"""Rows of a text file whose fields stand between commas, semicolons, tabs or bars.

Knows how such files differ. Must not know what a column means.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from itertools import islice
from typing import IO, TYPE_CHECKING, NamedTuple

from deltaclip.base.errors import UserError
from deltaclip.base.progress import Progress
from deltaclip.features.data.cells import sharing
from deltaclip.features.data.text import open_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

WORDS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SEP_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # how Excel is told of a separator
PROBED_LINES, PROBED_CHARACTERS = 60, 1 << 18
MOST_ABOVE = 20  # rows above a header
DATA = re.compile(r"^[-+]?[\d.,]+%?$|\.\w{2,5}$|[/\\]")  # a number, a name of a file, a path
FIELD_BYTES = 2**31 - 1  # a prompt may be longer than the csv module's 128 kB


class Rows(NamedTuple):
    """Rows of fields with the line that each begins at, and what is to be said of how they were read."""

    rows: list[list[str]]
    lines: list[int]
    notes: list[str]


class Form(NamedTuple):
    """How a file is written: its separator, and how many lines stand before its rows."""

    delimiter: str
    skipped: int
    notes: list[str]


def read_delimited(path: Path, usual: str, *, must: bool) -> Rows:
    """Read all rows but blank ones; a first line `sep=;` and comments above the header are left out.

    Args:
        path: a text file, may be compressed by gzip.
        usual: the separator that the name of the file stands for.
        must: whether it is certain; else the file itself says which it is.

    Raises:
        UserError: an unknown encoding, a quote that is not closed.
    """
    csv.field_size_limit(FIELD_BYTES)
    file, note = open_text(path)
    with file:
        probed = list(islice(_bounded(file), PROBED_LINES))
    form = Form(usual, 0, []) if must else find_form(probed, usual)
    notes = [*([note] if note else []), *(f"{path.name}: {words}" for words in form.notes)]
    with open_text(path)[0] as file, Progress(path.stat().st_size, f"reading {path.name}", unit="characters") as bar:
        for _ in range(form.skipped):
            file.readline()
        rows, lines = _rows(path, watched(file, bar), form)
    return Rows(rows, lines, notes)


def _bounded(file: IO[str]) -> Iterator[str]:
    left = PROBED_CHARACTERS
    while left > 0 and (line := file.readline(left)):
        left -= len(line)
        yield line


def watched(lines: Iterable[str], progress: Progress) -> Iterator[str]:
    """Yield lines, counting their characters: about as many as the file has bytes."""
    for line in lines:
        progress.advance(len(line))
        yield line


def _rows(path: Path, lines: Iterable[str], form: Form) -> tuple[list[list[str]], list[int]]:
    rows: list[list[str]] = []
    starts: list[int] = []
    share, start = sharing(), form.skipped + 1
    reader = csv.reader(lines, delimiter=form.delimiter, strict=True)
    try:
        for row in reader:
            if any(field.strip() for field in row):  # a blank line is no row, nor one of separators alone
                rows.append([share(field.strip()) for field in row])
                starts.append(start)
            start = form.skipped + reader.line_num + 1
    except csv.Error as error:
        where = f"{path}, line {form.skipped + reader.line_num}"
        remedy = f"quote fields that hold {WORDS.get(form.delimiter, 'separators')} or quotes"
        raise UserError(f"broken CSV ({error})", place=where, remedy=remedy) from error
    return rows, starts


def find_form(lines: Sequence[str], usual: str) -> Form:
    """Find separator and header among the first lines of a file.

    The separator is the one by which the header has most fields and all rows as many; where none fits all rows, the
    one by which the header has most.
    """
    if lines and (told := SEP_LINE.fullmatch(lines[0].strip())):
        return Form(
            told[1], 1, [f"fields are separated by {WORDS.get(told[1], repr(told[1]))}, as its first line says"]
        )
    comments = next((place for place, line in enumerate(lines) if not line.startswith("#")), 0)
    below = lines[comments:]
    best, fields = _best(below, usual)
    notes = [] if best == usual else [f"fields are separated by {WORDS[best]}"]
    if comments and fields == len(next(csv.reader([lines[comments - 1]], delimiter=best))) > 1:
        comments -= 1  # the header itself, behind its mark
    if comments:
        notes.append(f"{comments} lines of comments at the beginning are left out")
    return Form(best, comments, notes)


def _best(lines: Sequence[str], usual: str) -> tuple[str, int]:
    found = []
    for delimiter in dict.fromkeys([usual, *WORDS]):
        counts = _field_counts(lines, delimiter)
        header = counts[0] if counts else 0
        fits = header > 1 and all(count == header for count in counts)
        found.append((fits, header, delimiter))
    fits, header, best = max(found, key=lambda one: one[:2])  # of equals the first, which is the usual one
    if not fits and found[0][1] > 1:
        return usual, found[0][1]
    return (best, header) if header > 1 else (usual, header)


def rows_above(rows: Sequence[Sequence[object]]) -> int:
    """Return how many rows stand above the header: titles and remarks, which have fewer fields than most that follow.

    A row of names is the header: what holds numbers or names of files is data, below a header that lacks fields.
    """
    widths = [_width(row) for row in rows[: MOST_ABOVE + PROBED_LINES]]
    usual = max(Counter(widths).items(), key=lambda each: (each[1], each[0]))[0] if widths else 0
    first = next((place for place, width in enumerate(widths[: MOST_ABOVE + 1]) if width >= usual), 0)
    if not first or widths[first] != usual or len(widths) < first + 2:
        return 0
    return 0 if any(DATA.search(str(cell)) for cell in rows[first]) else first


def _width(row: Sequence[object]) -> int:
    width = len(row)
    while width and (row[width - 1] is None or not str(row[width - 1]).strip()):
        width -= 1
    return width


def _field_counts(lines: Sequence[str], delimiter: str) -> list[int]:
    """Return the number of fields of each row but the last, which may be cut; without empty ones at its end."""
    rows = [row for row in csv.reader(lines, delimiter=delimiter) if any(row)]
    rows = rows[rows_above(rows) :]
    rows = rows[:-1] if len(rows) > 2 and len(lines) >= PROBED_LINES else rows
    if not rows:
        return []
    header = _trimmed(rows[0])
    return [header, *(header if len(row) >= header >= _trimmed(row) else len(row) for row in rows[1:])]


def _trimmed(row: Sequence[str]) -> int:
    while row and not row[-1].strip():
        row = row[:-1]
    return len(row)
