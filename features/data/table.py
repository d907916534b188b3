"""Read a CSV, TSV, JSONL, JSON, Parquet, Arrow or Excel table as named columns of text, with the line of every row.

Knows file formats: what a file holds decides, not what it is called. Must not know what a column means.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import itertools
import json
import re
import tempfile
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError, moved
from deltaclip.base.kinds import (
    ARROW,
    EMPTY,
    GZIP,
    HEAD_BYTES,
    JSON,
    PARQUET,
    XLSX,
    ZIP,
    kind_of,
    kind_of_bytes,
    wrong_kind,
)
from deltaclip.base.lazy import LazySequence
from deltaclip.base.progress import Progress
from deltaclip.features.data.cells import Column, as_column
from deltaclip.features.data.delimited import WORDS, read_delimited, rows_above, watched
from deltaclip.features.data.sheets import read_rows
from deltaclip.features.data.text import DAMAGED, find_encoding, open_bytes, open_text, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from deltaclip.base.kinds import Kind
    from deltaclip.features.data.cells import Odd


# ---- Read a CSV, TSV, JSONL, JSON, Parquet, Arrow or Excel table as named columns of text, with the line of every row


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES)
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow", ".xlsx")
CALLED = {".parquet": PARQUET, ".arrow": ARROW, ".feather": ARROW, ".xlsx": XLSX}
WANTED = {".parquet": "Parquet file", ".arrow": "Arrow file", ".feather": "Arrow file", ".xlsx": "Excel workbook"}
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # that of UTF-32-LE begins like the first
PACKED = ".gz"  # behind the suffix of a text file
EXPORTS = (b'"annotations"', b'"images"', b'"data"')  # at the beginning of exports that are no list of rows
ROWS_OF_JSON = re.compile(rb"\s*\[\s*\{")


class Part(NamedTuple):
    """The rows of one file among those of several; without a word for lines they are named by their images.

    Then `path` is the folder that these are relative to.
    """

    first: int
    path: Path
    line_word: str

    def where(self, line: int, image: str) -> str:
        """Name one of its rows in a message."""
        return f"{self.path}, {self.line_word} {line}" if self.line_word else f"{self.path / image}"


def _part_of(parts: Sequence[Part], row: int) -> Part:
    return parts[bisect.bisect_right(parts, row, key=lambda part: part.first) - 1]


@dataclass(frozen=True)
class Table:
    """Columns of equal length; a missing cell is ''. `lines[i]` is where row i stands in the file.

    Rows of several files have `parts`: of each file its first row here, its path and its word for lines.

    `odd` says of a column that some of its cells are neither text nor numbers (their text is ''), `numbers` which
    columns hold numbers that are no text, with the first such row; `notes` what is to be said of how it was read;
    `pictures` says of columns that hold pictures which have their bytes in the file, (N,) bool: those cells are their
    addresses, relative to its folder; `others` keeps the lists and truth values of columns that have such, by row.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    line_word: str  # 'line' in text files, 'row' in Parquet and Excel
    odd: Mapping[str, Odd] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    others: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)

    def places(self) -> Sequence[str]:
        """Return where each row stands, 'file, line', for messages."""
        lines, parts, images = array("q", self.lines), self._all_parts(), self._images()
        return LazySequence(len(lines), lambda row: _part_of(parts, row).where(lines[row], images[row]))

    def place(self, row: int, column: str) -> str:
        """Name one cell in an error message."""
        where = _part_of(self._all_parts(), row).where(self.lines[row], self._images()[row])
        return f"{where}, column {column}"

    def _all_parts(self) -> tuple[Part, ...]:
        return self.parts or (Part(0, self.path, self.line_word),)

    def _images(self) -> Sequence[str]:
        if all(part.line_word for part in self._all_parts()):
            return LazySequence(len(self.lines), lambda _row: "")
        return self.columns["image"]

    def texts(self, column: str) -> list[str]:
        """Return a column whose cells must be texts: numbers are refused.

        Raises:
            UserError: names the first cell that is none.
        """
        if column in self.numbers:
            row = self.numbers[column]
            message = f"{self.columns[column][row]} is a number, no text"
            raise UserError(
                message, place=self.place(row, column), remedy="write texts, or see whether columns are mixed up"
            )
        return self.values(column)

    def names(self, column: str) -> list[str]:
        """Return a column of names: a whole number is one too, as it would be written by hand.

        Raises:
            UserError: names the first cell that is neither.
        """
        cells = self.values(column)
        return [cell.removesuffix(".0") for cell in cells] if column in self.numbers else cells

    def values(self, column: str) -> list[str]:
        """Return a column of texts or numbers.

        Raises:
            UserError: names the first cell that is neither.
        """
        if odd := self.odd.get(column):
            remedy = (
                "save pictures as files and give their paths" if "picture" in odd.words else "write texts and numbers"
            )
            raise UserError(f"holds {odd.words}, no text", place=self.place(odd.row, column), remedy=remedy)
        if column in self.pictures and self.pictures[column].any():
            place = self.place(int(self.pictures[column].argmax()), column)
            raise UserError("holds a picture, no text", place=place, remedy="call the column image, or remove it")
        return self.columns[column]

    def images(self, column: str) -> list[str]:
        """Return a column of images: their paths, and the addresses of pictures inside the file.

        Raises:
            UserError: names the first cell that is neither.
        """
        return self.columns[column] if column in self.pictures else self.names(column)


def joined_tables(path: Path, tables: Sequence[Table]) -> Table:
    """Return the rows of several files as one table, a cell '' where a file lacks its column; such files are said.

    Addresses of pictures become relative to `path`, the folder that all files lie in.
    """
    tables = [below(path, table, table.path.parent) for table in tables]
    if len(tables) == 1:
        return tables[0]
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    firsts = [0, *itertools.accumulate(len(table.lines) for table in tables)]
    columns: dict[str, list[str]] = {name: [] for name in names}
    for table in tables:
        for name, cells in columns.items():
            cells.extend(table.columns.get(name) or [""] * len(table.lines))
    placed = list(zip(firsts, tables, strict=False))
    return Table(
        path,
        columns,
        [line for table in tables for line in table.lines],
        tables[0].line_word,
        {
            name: replace(odd, row=first + odd.row)
            for first, table in reversed(placed)
            for name, odd in table.odd.items()
        },
        {name: first + row for first, table in reversed(placed) for name, row in table.numbers.items()},
        (*_lacking(tables, names), *dict.fromkeys(note for table in tables for note in table.notes)),
        _joined_pictures(tables),
        tuple(
            Part(first + part.first, part.path if part.line_word else path, part.line_word)
            for first, table in placed
            for part in table._all_parts()
        ),
        _joined_others(placed),
    )


def _joined_others(placed: Sequence[tuple[int, Table]]) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for first, table in placed:
        for name, values in table.others.items():
            found.setdefault(name, {}).update((first + row, value) for row, value in values.items())
    return found


def _lacking(tables: Sequence[Table], names: Sequence[str]) -> list[str]:
    """Say which columns are not in all files."""
    lacking = {name: [table for table in tables if name not in table.columns] for name in names}
    return [
        f"{len(without):,} of {len(tables):,} files lack the column {name} (the first: {without[0].path.name})"
        for name, without in lacking.items()
        if without
    ]


def _joined_pictures(tables: Sequence[Table]) -> dict[str, NDArray[np.bool_]]:
    names = dict.fromkeys(name for table in tables for name in table.pictures)
    none = [np.zeros(len(table.lines), dtype=bool) for table in tables]
    return {
        name: np.concatenate([table.pictures.get(name, no) for table, no in zip(tables, none, strict=True)])
        for name in names
    }


def below(folder: Path, table: Table, here: Path) -> Table:
    """Return a table whose addresses of pictures inside files, now relative to `here`, are so to a folder above it."""
    above = here.relative_to(folder).as_posix()
    if above == "." or not table.pictures:
        return table
    moved = {
        name: [
            f"{above}/{cell}" if inside else cell for cell, inside in zip(table.columns[name], inside_N, strict=True)
        ]
        for name, inside_N in table.pictures.items()
    }
    return replace(table, columns=table.columns | moved)


def table_suffix(path: Path) -> str:
    """Return the suffix that says what a file holds, in lower case: that before `.gz`, where it is compressed."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix == PACKED else suffix


def read_table(path: Path, *, names: Sequence[str] = (), delimiter: str = "") -> Table:
    """Read a table; the format follows from the content, and from the suffix where that leaves it open.

    Args:
        path: the file.
        names: columns of a file that may have no header (CSV, TSV, Excel): unless two cells of the first row are
            among them, in any case, that row is data.
        delimiter: of a text file whose suffix does not tell.

    Raises:
        UserError: no such file, unknown suffix, broken content (with its line), no rows.
    """
    if not path.is_file():
        raise UserError("no such file", place=path, remedy="check the path of the manifest")
    suffix = table_suffix(path)
    if suffix not in {*SUFFIXES, *CALLED} and not delimiter:
        raise UserError(f"unknown suffix {path.suffix!r}", place=path, remedy=f"use one of {', '.join(SUFFIXES)}")
    if kind_of(path) is GZIP and suffix in CALLED:
        return _read_packed(path, names=names)
    kind = _kind(path)
    if kind in (PARQUET, ARROW):
        table = _read_columnar(path)
    elif kind is XLSX:
        sheet = read_rows(path)
        table = _from_rows(path, sheet.rows, sheet.numbers, without_header=names, line_word="row", notes=sheet.notes)
    elif kind is JSON or (suffix in JSON_SUFFIXES and not delimiter):
        table = _read_json(path)
    else:
        usual = delimiter or ("\t" if suffix == ".tsv" else ",")
        found = read_delimited(path, usual, must=bool(delimiter))
        table = _from_rows(path, found.rows, found.lines, without_header=names, line_word="line", notes=found.notes)
    if not table.lines:
        raise UserError("has no rows", place=path, remedy="a manifest needs a header and at least one row")
    refuse_no_text(table)
    named = CALLED.get(suffix, JSON if suffix in JSON_SUFFIXES else None)
    if kind is named or delimiter or (kind is None and named is JSON):  # JSON of a wide encoding has no mark
        return table
    words = kind.words if kind else "text between separators"
    return replace(table, notes=(f"{path.name} is {words} and is read as that", *table.notes))


def _read_packed(path: Path, *, names: Sequence[str]) -> Table:
    """Read a Parquet, Arrow or Excel file inside a gzip file."""
    with tempfile.TemporaryDirectory(prefix="deltaclip-") as folder:
        copy = Path(folder) / path.with_suffix("").name
        unpack(path, copy)
        try:
            table = read_table(copy, names=names)
        except UserError as error:
            raise moved(error, copy, path) from error
    if table.pictures:
        message = "has pictures inside, which have no place of their own in a compressed file"
        raise UserError(message, place=path, remedy="unpack it first")
    return replace(table, path=path)


def _kind(path: Path) -> Kind | None:
    """Return the kind of a table by its content, None for text between separators.

    Raises:
        UserError: it surely is no table.
    """
    suffix, kind = table_suffix(path), kind_of(path)
    called = CALLED.get(suffix)
    if kind is GZIP:
        kind = kind_of_bytes(_head(path))
        if kind not in (JSON, EMPTY, None):  # no text
            raise wrong_kind(path, GZIP)
    if kind is JSON and suffix not in JSON_SUFFIXES:
        return JSON if _begins_as_json(path) else None  # a bracket can begin a header
    if kind in (PARQUET, ARROW, XLSX, JSON):
        return kind
    if called and (kind is ZIP or (kind is None and not _has_fields(path))):
        return called  # whose reader says what is wrong
    if kind is None or (kind is EMPTY and not called):
        return None
    raise wrong_kind(path, kind, WANTED.get(suffix, "table"))


def _head(path: Path) -> bytes:
    """Return the first bytes of a file, unpacked, of text in UTF-8; those of a damaged archive are none."""
    with open_bytes(path) as file:
        try:
            head = file.read(HEAD_BYTES)
        except DAMAGED:
            return b""
    if head.startswith(WIDE_MARKS) or 0 in head[:2]:
        with contextlib.suppress(UserError):
            return head.decode(find_encoding(path).name, errors="ignore").encode()
    return head


def _begins_as_json(path: Path) -> bool:
    head = _head(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    return _is_json(head.splitlines()[0]) or ROWS_OF_JSON.match(head) is not None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _has_fields(path: Path) -> bool:
    """Tell whether text looks like rows of several fields; bytes that are no text do not."""
    try:
        lines = _head(path).decode("utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError:
        return False
    return len(lines) > 1 and any(word in lines[0] and word in lines[1] for word in WORDS)


def _from_rows(
    path: Path,
    rows: Sequence[Sequence[object]],
    lines: list[int],
    *,
    without_header: Sequence[str],
    line_word: str,
    notes: Sequence[str] = (),
) -> Table:
    if not without_header and (above := rows_above(rows)):
        rows, lines = rows[above:], lines[above:]
        notes = [*notes, f"{path.name}: {above:,} {line_word}{'s' * (above > 1)} above the header left out"]
    header = as_column(rows[0]).cells if rows else []
    known = {name.lower() for name in without_header}
    if without_header and sum(cell.lower() in known for cell in header) < min(2, len(known)):
        header = [*without_header[: len(header)], *[""] * (len(header) - len(without_header))]
    else:
        rows, lines = rows[1:], lines[1:]
    is_sheet = line_word == "row"  # whose rows end with their last cell that is not empty
    for row, line in zip(rows, lines, strict=True):
        too_long = len(row) > len(header) and any(cell not in ("", None) for cell in row[len(header) :])
        if too_long or (len(row) < len(header) and not is_sheet):
            message = f"{len(row)} fields where the header has {len(header)}"
            remedy = "give every column a name" if is_sheet else "quote fields that hold the delimiter"
            raise UserError(message, place=f"{path}, {line_word} {line}", remedy=remedy)
    _refuse_duplicates(path, header)
    columns = {
        name: as_column(row[i] if i < len(row) else None for row in rows) for i, name in enumerate(header) if name
    }
    return _table(path, columns, lines, line_word=line_word, notes=notes)


def _table(
    path: Path, columns: Mapping[str, Column], lines: list[int], *, line_word: str, notes: Sequence[str] = ()
) -> Table:
    return Table(
        path,
        {name: column.cells for name, column in columns.items()},
        lines,
        line_word,
        {name: column.odd for name, column in columns.items() if column.odd},
        {name: column.number for name, column in columns.items() if column.number is not None},
        tuple(notes),
        others={name: column.others for name, column in columns.items() if column.others},
    )


def _read_json(path: Path) -> Table:
    """Read one object a line, a list of objects, or what another program exports."""
    if (exported := _exported(path)) is not None:
        records, what = exported
        lines, word, note = list(range(1, len(records) + 1)), "row", f"{path.name} is {what} and is read as that"
    elif ROWS_OF_JSON.match(_head(path).removeprefix(b"\xef\xbb\xbf")):
        records, lines, word, note = *_entries(path), "entry", ""
    else:
        records, lines, note = _json_lines(path)
        word = "line"
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {name: as_column(record.get(name) for record in records) for name in names}
    return _table(path, columns, lines, line_word=word, notes=[note] if note else [])


def _exported(path: Path) -> tuple[list[dict[str, Any]], str] | None:
    """Return the rows of a file of a known layout of another program, with its name; None of any other."""
    from deltaclip.features.data.exports import rows_of

    head = _head(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    if table_suffix(path) != ".json" or not (head.startswith(b"{") or any(mark in head for mark in EXPORTS)):
        return None
    first, _, rest = head.partition(b"\n")
    if rest.strip() and _is_json(first):  # one object a line
        return None
    try:
        with open_text(path)[0] as file:
            return rows_of(json.load(file))
    except (ValueError, RecursionError, *DAMAGED):  # which is said by whoever reads it as rows
        return None


def _entries(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    try:
        with open_text(path)[0] as file:
            records = json.load(file)
    except (ValueError, RecursionError, *DAMAGED) as error:
        raise UserError(f"broken JSON ({json_reason(error)})", place=path, remedy="write it again") from error
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            message = f"{json.dumps(record)[:40]} is no JSON object"
            raise UserError(message, place=f"{path}, entry {number}", remedy="one object an entry")
    return records, list(range(1, len(records) + 1))


def _json_lines(path: Path) -> tuple[list[dict[str, Any]], list[int], str]:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    file, note = open_text(path)
    with file, Progress(path.stat().st_size, f"reading {path.name}", unit="characters") as progress:
        try:
            for line, text in enumerate(watched(file, progress), start=1):
                if text.strip():
                    records.append(_json_object(text, f"{path}, line {line}"))
                    lines.append(line)
        except DAMAGED as error:
            raise UserError(f"is a damaged gzip file ({error})", place=path, remedy="compress it again") from error
    if (
        table_suffix(path) == ".json"
        and len(records) == 1
        and any(isinstance(v, (list, dict)) for v in records[0].values())
    ):
        remedy = "give a list of objects, or one object a line"
        raise UserError("is one JSON object, no list of rows", place=path, remedy=remedy)
    return records, lines, note


def _json_object(text: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON ({json_reason(error)})", place=place, remedy="one object a line") from error
    if not isinstance(record, dict):
        raise UserError(f"{text.strip()[:40]!r} is no JSON object", place=place, remedy="one object a line")
    return record


def json_reason(error: Exception) -> str:
    """Say what `json.loads` found wrong: also brackets of any depth, and numbers of thousands of digits."""
    return "brackets too deep" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def _refuse_duplicates(path: Path, names: list[str]) -> None:
    lower = [name.casefold() for name in names]
    twice = next((name for i, name in enumerate(names) if name and lower[i] in lower[:i]), None)
    if twice is not None:
        raise UserError(f"two columns are called {twice!r}", place=path, remedy="rename or remove one")


def refuse_no_text(table: Table) -> None:
    """Refuse what neither a file name nor HDF5 can hold: U+0000, and halves of surrogate pairs, which JSON can have.

    Raises:
        UserError: names the cell.
    """
    for name, cells in table.columns.items():
        for row, cell in enumerate(cells):
            if "\0" in cell or not (cell.isascii() or _can_be_encoded(cell)):
                message = "holds a character that is no text (U+0000 or half of a surrogate pair)"
                raise UserError(message, place=table.place(row, name), remedy="remove it")


def _can_be_encoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_columnar(path: Path) -> Table:
    """Read Parquet or Arrow; pictures in it stay where they are."""
    from deltaclip.features.data.columnar import read_columns

    found = read_columns(path)
    columns = {name: as_column(cells.values) for name, cells in found.items()}
    num_rows = len(next(iter(columns.values())).cells) if columns else 0
    pictures = {name: cells.embedded for name, cells in found.items() if cells.embedded is not None}
    return replace(_table(path, columns, list(range(1, num_rows + 1)), line_word="row"), pictures=pictures)
