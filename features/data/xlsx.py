"""Rows of an Excel sheet as text, from files that nobody vouches for.

Knows openpyxl, which is imported inside the function, and what a broken or hostile workbook does.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

MAX_ROWS = 1_048_576  # Excel's own limit; a row number beyond it would have openpyxl count up to it
MAX_COLUMNS = 256  # what stands further right is not read
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


def read_rows(path: Path) -> tuple[list[list[object]], list[int]]:
    """Read the first sheet.

    Returns:
        the cells of every row that has any, without empty ones at its end, and the number of each row in the sheet.

    Raises:
        UserError: no workbook, damaged, or larger than a sheet can be.
    """
    import openpyxl

    try:
        _refuse_bombs(path)
        with path.open("rb") as file:  # by its name, openpyxl would refuse one that is called otherwise
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            try:
                return _rows(path, book)
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


def _rows(path: Path, book: Any) -> tuple[list[list[object]], list[int]]:
    rows: list[list[object]] = []
    numbers: list[int] = []
    if not book.worksheets:
        return rows, numbers
    sheet = book.worksheets[0]
    sheet.reset_dimensions()  # what the file says of its size may be wrong
    for number, cells in enumerate(sheet.iter_rows(values_only=True, max_col=MAX_COLUMNS), start=1):
        if number > MAX_ROWS:
            raise UserError(f"has more than {MAX_ROWS:,} rows", place=path, remedy="save it as .csv or .parquet")
        row = list(cells)
        while row and (row[-1] is None or not str(row[-1]).strip()):
            row.pop()
        if row:
            rows.append(row)
            numbers.append(number)
    return rows, numbers
