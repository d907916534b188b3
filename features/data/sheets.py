"""Rows of an Excel sheet as cells, from files that nobody vouches for.

Knows workbooks, and what broken and hostile ones do. Must not know what a column means.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_ROWS = 1_048_576  # Excel's own limit; a row number beyond it would have openpyxl count up to it
MAX_COLUMNS = 256  # what stands further right is not read
MAX_PROBED_ROWS = 100  # in which a sheet that has any rows has one
MAX_BYTES = 2**30  # unpacked: a full sheet of ratings has half of that, a bomb more
# What openpyxl and the standard library raise on broken archives and broken XML, found by flipping bytes.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    SyntaxError,  # ElementTree's ParseError is one
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,  # encrypted archives
)


class Sheet(NamedTuple):
    """Rows of cells with the number that each has, and what is to be said."""

    rows: list[list[object]]
    numbers: list[int]
    notes: list[str]


def read_rows(path: Path) -> Sheet:
    """Read the first sheet that has any rows.

    Returns:
        the cells of every row that has any, without empty ones at its end, the number of each row in the sheet, and
        what is to be said of the other sheets.

    Raises:
        UserError: no workbook, damaged, or larger than a sheet can be.
    """
    import openpyxl

    try:
        _refuse_bombs(path)
        with path.open("rb") as file:  # by its name, openpyxl would refuse one that is called otherwise
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            try:
                return _first(path, book)
            finally:
                book.close()
    except BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"is no readable Excel workbook ({reason})", place=path, remedy="save it again, as .xlsx or .csv"
        ) from error


def _refuse_bombs(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        size_bytes = sum(entry.file_size for entry in archive.infolist())
    if size_bytes > MAX_BYTES:
        raise UserError(
            f"unpacks to {size_bytes / 1e6:,.0f} MB, more than a table of ratings has",
            place=path,
            remedy="save as .csv",
        )


def _first(path: Path, book: Any) -> Sheet:
    there = sorted(book.worksheets, key=lambda sheet: sheet.sheet_state != "visible")  # what people see comes first
    filled = [sheet for sheet in there if any(_cells(sheet, MAX_PROBED_ROWS))]
    if not filled:
        return Sheet([], [], [])
    others = ", ".join(repr(sheet.title) for sheet in filled[1:])
    notes = [f"{path.name}: the sheet {filled[0].title!r} is read, not {others}"] if others else []
    rows, numbers = list[list[object]](), list[int]()
    for number, row in enumerate(_cells(filled[0]), start=1):
        if number > MAX_ROWS:
            raise UserError(f"has more than {MAX_ROWS:,} rows", place=path, remedy="save it as .csv or .parquet")
        if row:
            rows.append(row)
            numbers.append(number)
    return Sheet(rows, numbers, notes)


def _cells(sheet: Any, most: int | None = None) -> Iterator[list[object]]:
    """Yield the cells of each row without empty ones at its end."""
    sheet.reset_dimensions()  # what the file says of its size may be wrong
    for cells in sheet.iter_rows(values_only=True, max_col=MAX_COLUMNS, max_row=most):
        row = list(cells)
        while row and (row[-1] is None or not str(row[-1]).strip()):
            row.pop()
        yield row
