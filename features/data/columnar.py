"""Parquet and Arrow files as columns of values, and the pictures that lie in their cells.

Pictures are left where they are: a column of them becomes the places of its cells, and a cell is read when it is asked
for. Knows pyarrow's files, and how `datasets` writes a picture (`struct<bytes, path>`) or others do (plain bytes). Must
not know what a column means.

Cells are decoded forward, a few rows at a time, so that a file whose one row group has all pictures is read in bounded
memory too; what was decoded last stays, since threads ask a little out of order.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import os
import posixpath
import re
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote, unquote

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import IMAGE, kind_of_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

FILE_MARK = b"ARROW1"[:4]
STREAM_MARK = b"\xff\xff\xff\xff"
STREAM_END = STREAM_MARK + bytes(4)
STEP_ROWS = 32  # decoded at a time
WINDOW_BYTES = 48 << 20  # of cells that stay decoded
PROBED_ROWS = 256  # cells that tell whether bytes are pictures
AGAIN = "write it again"
ADDRESS = re.compile(r"([^/]+)/(\d+)(?:/[^/]*)?")


class Cells(NamedTuple):
    """A column: `values` of any type, or, where it holds pictures, addresses of those below the file and '' without.

    `embedded` says which rows have the bytes of their picture in the file, (N,) bool; None of a column of other values.
    """

    values: list[Any]
    embedded: NDArray[np.bool_] | None = None


def read_columns(path: Path) -> dict[str, Cells]:
    """Read all columns, pictures left in their places.

    Raises:
        UserError: damaged, or two columns of one name.
    """
    file = _opened(path)
    names = list(file.schema.names)
    lower = [name.casefold() for name in names]
    twice = next((name for i, name in enumerate(names) if lower[i] in lower[:i]), None)
    if twice is not None:
        raise UserError(f"two columns are called {twice!r}", place=path, remedy="rename or remove one")
    with _refusing(path):
        pictures = [
            column for name in names if (column := _picture_column(file.schema, name)) and _holds_pictures(file, column)
        ]
        by_name = {column.name: column for column in pictures}
        others = file.values([name for name in names if name not in by_name])
        return {
            name: _addresses(path, file, by_name[name]) if name in by_name else Cells(others[name]) for name in names
        }


class PictureCells:
    """The pictures in the cells of a Parquet or Arrow file, by `COLUMN/ROW` and by `COLUMN/ROW/NAME`, rows from 1."""

    kept_bytes = WINDOW_BYTES

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._lock = path, _opened(path), threading.Lock()
        self._windows: dict[str, _Window] = {}

    def has(self, inside: str) -> bool:
        """Tell whether there is such a cell in a column that may hold pictures."""
        try:
            self._find(inside)
        except KeyError:
            return False
        return True

    def read(self, inside: str) -> bytes:
        """Return the bytes of a cell.

        Raises:
            KeyError: no such cell, or one without bytes.
            UserError: the file is damaged there.
        """
        column, row = self._find(inside)
        with self._lock, _refusing(self._path):
            window = self._windows.get(column.name)
            if window is None:
                window = self._windows[column.name] = _Window(self._file, column)
            cell = window.take(row)
        if cell is None:
            raise KeyError(f"no bytes in row {row + 1}, column {column.name}")
        return cell

    def _find(self, inside: str) -> tuple[_Column, int]:
        found = ADDRESS.fullmatch(inside)
        column = _picture_column(self._file.schema, unquote(found[1])) if found else None
        if found is None or column is None:
            raise KeyError("no such picture")
        row = int(found[2]) - 1
        if not 0 <= row < self._file.num_rows:
            raise KeyError(f"no row {row + 1}")
        return column, row


class _Column(NamedTuple):
    """A column that may hold pictures: bytes by themselves, or the field `bytes` of a struct beside a `path`."""

    name: str
    in_struct: bool = False
    has_path: bool = False


def _holds_pictures(file: _File, column: _Column) -> bool:
    """Tell bytes that are pictures from text that was written as bytes, by the first cells that have any."""
    if column.in_struct:
        return True
    seen = 0
    for block in file.blocks(column, 0):
        for cell in block.to_pylist():
            if cell:
                head = bytes(cell[:64])
                if kind_of_bytes(head) is IMAGE or _has_format(head):
                    return True
                seen += 1
        if seen >= PROBED_ROWS:
            break
    return False


def _has_format(head: bytes) -> bool:
    from deltaclip.features.data.pillow import format_of, plugin_format

    return format_of(head) is not None or plugin_format(head) is not None


def _addresses(path: Path, file: _File, column: _Column) -> Cells:
    names = file.paths(column)
    has_bytes = file.has_bytes(column)
    quoted, cells = quote(column.name, safe=" "), list[str]()
    for row in range(file.num_rows):
        name = names[row] if names else None
        if has_bytes[row]:
            last = posixpath.basename((name or "").replace("\\", "/")).strip()
            tail = f"/{last}" if last not in {"", ".", ".."} and "\0" not in last else ""
            cells.append(f"{path.name}/{quoted}/{row + 1}{tail}")
        else:
            cells.append((name or "").strip())
    return Cells(cells, has_bytes)


class _Window:
    """The cells of a column that were decoded last, and the way forward."""

    def __init__(self, file: _File, column: _Column) -> None:
        self._file, self._column = file, column
        self._ahead: Iterator[Any] = iter(())
        self._blocks: deque[tuple[int, Any]] = deque()  # first row, cells
        self._next_row, self._held_bytes = -1, 0

    def take(self, row: int) -> bytes | None:
        """Return a cell, None where it is empty; goes on from where it is where that is before the row."""
        held = self._held(row)
        if held is None:
            group = bisect.bisect_right(self._file.starts, row) - 1
            start = self._file.starts[group]
            if self._next_row < 0 or row < self._next_row or start > self._next_row:
                self._ahead, self._next_row, self._held_bytes = self._file.blocks(self._column, group), start, 0
                self._blocks.clear()
            try:
                while row >= self._next_row:
                    self._advance()
            except BaseException:
                self._next_row = -1  # what is behind the damage has to be begun with anew
                raise
            held = self._held(row)
            assert held is not None, "the block that was read last is held"
        first, block = held
        cell = block[row - first].as_py()
        return None if cell is None else bytes(cell)

    def _held(self, row: int) -> tuple[int, Any] | None:
        return next(((first, block) for first, block in reversed(self._blocks) if 0 <= row - first < len(block)), None)

    def _advance(self) -> None:
        block = next(self._ahead, None)
        if block is None:
            raise OSError("has fewer rows than it says")
        self._blocks.append((self._next_row, block))
        self._next_row += len(block)
        self._held_bytes += block.nbytes
        while self._held_bytes > WINDOW_BYTES and len(self._blocks) > 1:
            self._held_bytes -= self._blocks.popleft()[1].nbytes


# ---- The two kinds of files


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            raise
        with path.open("rb") as file:
            kind = "Parquet" if file.read(4) == b"PAR1" or path.suffix.lower() == ".parquet" else "Arrow"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"is no readable {kind} file ({reason})", place=path, remedy=AGAIN) from error


def _opened(path: Path) -> _File:
    with _refusing(path):
        with path.open("rb") as file:
            head = file.read(len(STREAM_MARK))
        if head in (STREAM_MARK, FILE_MARK):
            return _ArrowFile(path, is_stream=head == STREAM_MARK)
        return _ParquetFile(path)


class _File(Protocol):
    """Rows in groups, of which each can be begun with: row groups of Parquet, record batches of Arrow."""

    @property
    def schema(self) -> Any:
        """Names and types of the columns."""

    @property
    def starts(self) -> Sequence[int]:
        """First row of each group."""

    @property
    def num_rows(self) -> int:
        """Number of rows N."""

    def values(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return columns as Python's own values."""

    def blocks(self, column: _Column, group: int) -> Iterator[Any]:
        """Yield the bytes in the cells of a column from a group on, a few rows at a time."""

    def paths(self, column: _Column) -> list[str | None]:
        """Return the field `path` of a column of structs; none where it has no such field."""

    def has_bytes(self, column: _Column) -> NDArray[np.bool_]:
        """Tell which cells have bytes, (N,) bool."""


def _picture_column(schema: Any, name: str) -> _Column | None:
    """Return how a column may hold pictures, None where its type cannot."""
    import pyarrow as pa

    if schema.get_field_index(name) < 0:
        return None
    kind = schema.field(name).type
    if not pa.types.is_struct(kind):
        return _Column(name) if _is_bytes(kind) else None
    fields = {field.name: field.type for field in kind}
    if "bytes" not in fields or not _is_bytes(fields["bytes"]):
        return None
    return _Column(name, in_struct=True, has_path="path" in fields)


def _valid(blocks: Iterator[Any]) -> NDArray[np.bool_]:
    found = [np.asarray(block.is_valid()) for block in blocks]
    return np.concatenate(found) if found else np.empty(0, dtype=bool)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


class _ParquetFile:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        # Buffered and not all at once: a row group may be larger than the memory.
        self._file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        self.schema, self._about = self._file.schema_arrow, self._file.metadata
        sizes = [self._about.row_group(group).num_rows for group in range(self._about.num_row_groups)]
        self.starts, self.num_rows = [0, *itertools.accumulate(sizes)][:-1] or [0], self._about.num_rows

    def values(self, names: Sequence[str]) -> dict[str, list[Any]]:
        table = self._file.read(columns=list(names), use_threads=False)
        return {name: table.column(name).to_pylist() for name in names}

    def blocks(self, column: _Column, group: int) -> Iterator[Any]:
        leaf = self._leaf(column, "bytes") if column.in_struct else column.name
        for number in range(group, self._about.num_row_groups):  # damage in one is none in the one before
            for batch in self._file.iter_batches(STEP_ROWS, row_groups=[number], columns=[leaf], use_threads=False):
                yield _bytes_of(batch.column(0), column)

    def paths(self, column: _Column) -> list[str | None]:
        if not column.has_path:
            return []
        table = self._file.read(columns=[self._leaf(column, "path")], use_threads=False)
        return [None if cell is None else cell["path"] for cell in table.column(0).to_pylist()]

    def has_bytes(self, column: _Column) -> NDArray[np.bool_]:
        leaf = self._leaf(column, "bytes") if column.in_struct else column.name
        empty = sum(self._num_empty(group, leaf) for group in range(self._about.num_row_groups))
        if empty in (0, self.num_rows):
            return np.full(self.num_rows, empty == 0)
        return _valid(self.blocks(column, 0))

    @staticmethod
    def _leaf(column: _Column, field: str) -> str:
        return f"{column.name}.{field}"

    def _num_empty(self, group: int, leaf: str) -> float:
        about = self._about.row_group(group)
        for number in range(about.num_columns):
            chunk = about.column(number)
            if chunk.path_in_schema == leaf and chunk.is_stats_set and chunk.statistics.has_null_count:
                return int(chunk.statistics.null_count)
        return math.nan


class _ArrowFile:
    def __init__(self, path: Path, *, is_stream: bool) -> None:
        self._path, self._is_stream = path, is_stream
        if is_stream:
            with path.open("rb") as file:
                file.seek(-min(path.stat().st_size, len(STREAM_END)), os.SEEK_END)
                if file.read() != STREAM_END:  # which may be left out, but a writer that was killed leaves it out too
                    raise OSError("it has no end mark: what wrote it was stopped, or it is cut")
        self.schema = self._reader().schema
        sizes = [batch.num_rows for batch in self._batches(0)]
        self.starts, self.num_rows = [0, *itertools.accumulate(sizes)][:-1] or [0], sum(sizes)

    def _reader(self) -> Any:
        import pyarrow as pa

        mapped = pa.memory_map(str(self._path))
        return pa.ipc.open_stream(mapped) if self._is_stream else pa.ipc.open_file(mapped)

    def _batches(self, first: int) -> Iterator[Any]:
        reader = self._reader()
        if self._is_stream:
            yield from itertools.islice(reader, first, None)
        else:
            yield from map(reader.get_batch, range(first, reader.num_record_batches))

    def values(self, names: Sequence[str]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {name: [] for name in names}
        for batch in self._batches(0):
            for name, values in found.items():
                values.extend(batch.column(self.schema.get_field_index(name)).to_pylist())
        return found

    def blocks(self, column: _Column, group: int) -> Iterator[Any]:
        for batch in self._batches(group):
            cells = _bytes_of(batch.column(self.schema.get_field_index(column.name)), column)
            for start in range(0, len(cells), STEP_ROWS):
                yield cells.slice(start, STEP_ROWS)

    def has_bytes(self, column: _Column) -> NDArray[np.bool_]:
        return _valid(self.blocks(column, 0))

    def paths(self, column: _Column) -> list[str | None]:
        if not column.has_path:
            return []
        import pyarrow.compute as pc

        number = self.schema.get_field_index(column.name)
        batches = (batch.column(number) for batch in self._batches(0))
        return [path for cells in batches for path in pc.struct_field(cells, "path").to_pylist()]


def _bytes_of(cells: Any, column: _Column) -> Any:
    import pyarrow.compute as pc

    return pc.struct_field(cells, "bytes") if column.in_struct else cells
