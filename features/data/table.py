"""Read a CSV, TSV, JSONL, Parquet or Excel table as named columns of text, with the line of every row.

Knows file formats. Must not know what a column means.
"""

from __future__ import annotations

import csv
import json
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.lazy import LazySequence
from deltaclip.base.progress import Progress
from deltaclip.features.data.xlsx import read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

SHARED_TEXTS = 65_536  # texts that are looked at for an equal one
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx")


@dataclass(frozen=True)
class Table:
    """Columns of equal length; a missing cell is ''. `lines[i]` is where row i stands in the file."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    line_word: str  # 'line' in text files, 'row' in Parquet and Excel

    def places(self) -> Sequence[str]:
        """Return where each row stands, 'file, line', for messages."""
        words, lines = f"{self.path}, {self.line_word}", array("q", self.lines)
        return LazySequence(len(lines), lambda row: f"{words} {lines[row]}")

    def place(self, row: int, column: str) -> str:
        """Name one cell in an error message."""
        return f"{self.path}, {self.line_word} {self.lines[row]}, column {column}"


def sharing() -> Callable[[str], str]:
    """Return a function that gives equal texts as one object, of those that it saw lately: prompts repeat."""
    seen: dict[str, str] = {}

    def share(text: str) -> str:
        if len(seen) >= SHARED_TEXTS:
            seen.clear()
        return seen.setdefault(text, text)

    return share


def read_table(path: Path, *, names: Sequence[str] = (), delimiter: str = "") -> Table:
    """Read a table; the format follows from the suffix.

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
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES and not delimiter:
        raise UserError(f"unknown suffix {path.suffix!r}", place=path, remedy=f"use one of {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        table = _read_parquet(path)
    elif suffix == ".jsonl":
        table = _read_jsonl(path)
    elif suffix == ".xlsx":
        table = _from_rows(path, *read_rows(path), without_header=names, line_word="row")
    else:
        table = _read_delimited(path, delimiter or ("\t" if suffix == ".tsv" else ","), names)
    if not table.lines:
        raise UserError("has no rows", place=path, remedy="a manifest needs a header and at least one row")
    refuse_no_text(table)
    return table


def _read_delimited(path: Path, delimiter: str, names: Sequence[str]) -> Table:
    lines: list[int] = []
    rows: list[list[str]] = []
    reader, share = None, sharing()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file, _reading(path) as progress:
            reader = csv.reader(_watched(file, progress), delimiter=delimiter, strict=True)
            start = 1
            for row in reader:
                if row:  # a blank line is no row
                    rows.append([share(cell) for cell in row])
                    lines.append(start)
                start = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except csv.Error as error:
        where = f"{path}, line {reader.line_num if reader else 1}"
        raise UserError(
            f"broken CSV ({error})", place=where, remedy="quote fields that hold commas or quotes"
        ) from error
    return _from_rows(path, rows, lines, without_header=names, line_word="line")


def _reading(path: Path) -> Progress:
    return Progress(path.stat().st_size, f"reading {path.name}", unit="characters")


def _watched(lines: Iterable[str], progress: Progress) -> Iterator[str]:
    """Yield lines, counting their characters: about as many as the file has bytes."""
    for line in lines:
        progress.advance(len(line))
        yield line


def _from_rows(
    path: Path, rows: Sequence[Sequence[object]], lines: list[int], *, without_header: Sequence[str], line_word: str
) -> Table:
    header = [_cell(cell) for cell in rows[0]] if rows else []
    known = {name.lower() for name in without_header}
    if without_header and sum(cell.lower() in known for cell in header) < min(2, len(known)):
        header = [*without_header[: len(header)], *[""] * (len(header) - len(without_header))]
    else:
        rows, lines = rows[1:], lines[1:]
    is_sheet = line_word == "row"  # whose rows end with their last cell that is not empty
    for row, line in zip(rows, lines, strict=True):
        if len(row) > len(header) or (len(row) < len(header) and not is_sheet):
            message = f"{len(row)} fields where the header has {len(header)}"
            remedy = "give every column a name" if is_sheet else "quote fields that hold the delimiter"
            raise UserError(message, place=f"{path}, {line_word} {line}", remedy=remedy)
    _refuse_duplicates(path, header)
    columns = {name: [_cell(row[i]) if i < len(row) else "" for row in rows] for i, name in enumerate(header) if name}
    return Table(path, columns, lines, line_word)


def _read_jsonl(path: Path) -> Table:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8-sig") as file, _reading(path) as progress:
            for line, text in enumerate(_watched(file, progress), start=1):
                if text.strip():
                    records.append(_json_object(text, f"{path}, line {line}"))
                    lines.append(line)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {name: [_cell(record.get(name)) for record in records] for name in names}
    return Table(path, columns, lines, "line")


def _json_object(text: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON ({json_reason(error)})", place=place, remedy="one object a line") from error
    if not isinstance(record, dict):
        raise UserError(f"{text.strip()[:40]!r} is no JSON object", place=place, remedy="one object a line")
    return record


def json_reason(error: ValueError | RecursionError) -> str:
    """Say what `json.loads` found wrong: also brackets of any depth, and numbers of thousands of digits."""
    return "brackets too deep" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"is not UTF-8 text ({error.reason})", place=path, remedy="save it as UTF-8")


def _refuse_duplicates(path: Path, names: list[str]) -> None:
    twice = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
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


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _refuse_duplicates(path, file.schema_arrow.names)
            table = file.read()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"is no readable Parquet file ({str(error).splitlines()[0]})", place=path, remedy="write it again"
        ) from error
    share = sharing()
    columns = {name: [share(_cell(value)) for value in table.column(name).to_pylist()] for name in table.column_names}
    return Table(path, columns, list(range(1, table.num_rows + 1)), "row")


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value.strip()
    if value is None or value != value:  # noqa: PLR0124 - NaN: how Parquet tables say missing
        return ""
    return repr(value) if isinstance(value, float) else str(value)
