"""Text files from anywhere: which encoding they are in, said where it is not UTF-8, and refused where it is not known.

Knows bytes. Must not know what a text means.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import zlib
from pathlib import Path
from typing import IO, NamedTuple, cast

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import GZIP, kind_of

DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)  # what reading a broken archive raises
BLOCK_BYTES = 1 << 20
PROBED_BYTES = 4096
MAX_BYTES = 2**34  # unpacked; ten million rows have a fifth of that, a bomb more
MARKS = (  # the longer of two that begin alike first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
UNDEFINED = b"\x81\x8d\x8f\x90\x9d"  # in Windows-1252
# Of the bytes of 128 and more, the share with such a neighbour: letters with accents stand alone between plain ones,
# while the characters of East Asian encodings are pairs (and so is UTF-8 with one wrong byte in it).
PAIRED = 0.4


class Encoding(NamedTuple):
    """The name of an encoding, and what to say of it: '' where there is nothing."""

    name: str
    note: str = ""


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked where it is compressed by gzip."""
    return cast("IO[bytes]", gzip.open(path)) if kind_of(path) is GZIP else path.open("rb")


def unpack(path: Path, target: Path) -> None:
    """Write what a gzip file holds.

    Raises:
        UserError: it is damaged, or holds more than any table.
    """
    size_bytes = 0
    try:
        with open_bytes(path) as source, target.open("wb") as copy:
            while block := source.read(BLOCK_BYTES):
                size_bytes += copy.write(block)
                if size_bytes > MAX_BYTES:
                    raise UserError(f"unpacks to more than {MAX_BYTES >> 30} GB", place=path, remedy="unpack it first")
    except DAMAGED as error:
        raise UserError(f"is a damaged gzip file ({error})", place=path, remedy="compress it again") from error


def decoded(content: bytes, place: str) -> tuple[str, str]:
    """Return the text of a small file by the rule of `find_encoding`, and the encoding where it is not UTF-8, else ''.

    Raises:
        UserError: it is in no encoding that is known.
    """
    found = _encoding_of(io.BytesIO(content), Path(place))
    return content.decode(found.name), "" if found.name.startswith("utf-8") else found.name


def open_text(path: Path) -> tuple[IO[str], str]:
    """Open a text file, line ends as they are; returns what is to be said of its encoding too.

    Raises:
        UserError: it is in no encoding that is known, or a damaged archive.
    """
    encoding = find_encoding(path)
    return io.TextIOWrapper(open_bytes(path), encoding=encoding.name, newline=""), encoding.note


def read_text(path: Path) -> str:
    """Return the content of a small text file.

    Raises:
        UserError: it is in no encoding that is known.
        OSError: it cannot be read.
    """
    with open_text(path)[0] as file:
        return file.read()


def find_encoding(path: Path) -> Encoding:
    """Return the encoding of a text file: by its mark, UTF-16 by its zeros, UTF-8 if all of it is, else Windows-1252.

    Raises:
        UserError: it is none of these; names the first byte that is not UTF-8.
    """
    try:
        with open_bytes(path) as file:
            return _encoding_of(file, path)
    except DAMAGED as error:
        raise UserError(f"is a damaged gzip file ({error})", place=path, remedy="compress it again") from error


def _encoding_of(file: IO[bytes], path: Path) -> Encoding:
    head = file.read(PROBED_BYTES)
    marked = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if marked and not _holds(file, marked):
        raise UserError(f"is marked as {marked.upper()} text and is none", place=path, remedy="save it as UTF-8")
    if marked:
        return Encoding(marked)
    if (wide := _wide(head)) and _holds(file, wide):
        return Encoding(wide, f"{path.name} is read as {wide.upper()}, which it does not say itself")
    file.seek(0)
    return _narrow(path, file)


def _wide(head: bytes) -> str:
    """Return which form of UTF-16 has the zeros where these bytes have them, '' if none: of plain letters, one is 0."""
    zeros = [head[start::2].count(0) / max(1, len(head) // 2) for start in (0, 1)]
    return {(False, True): "utf-16-le", (True, False): "utf-16-be"}.get((zeros[0] > 0.4, zeros[1] > 0.4), "")


def _holds(file: IO[bytes], name: str) -> bool:
    """Tell whether all of a file is text of an encoding."""
    file.seek(0)
    decoder = codecs.getincrementaldecoder(name)()
    try:
        while block := file.read(BLOCK_BYTES):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeError:
        return False
    return True


def _narrow(path: Path, file: IO[bytes]) -> Encoding:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, line = 0, 1
    while True:
        block = file.read(BLOCK_BYTES)
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte, offset = error.object[error.start], done - held + error.start
            line += error.object[: error.start].count(b"\n")
            return _of_one_byte(path, block, f"byte 0x{byte:02X} at {offset:,}, line {line:,}")
        if not block:
            return Encoding("utf-8")
        done, line = done + len(block), line + block.count(b"\n")
        if done > MAX_BYTES:
            raise UserError(f"unpacks to more than {MAX_BYTES >> 30} GB", place=path, remedy="give a smaller table")


def _of_one_byte(path: Path, block: bytes, where: str) -> Encoding:
    high = [byte >= 0x80 for byte in block]
    count = sum(high)
    paired = sum(here and following for here, following in itertools.pairwise(high))
    if any(byte in block for byte in UNDEFINED) or paired > PAIRED * count:
        remedy = "save it as UTF-8; it may be in GB18030, Shift-JIS or damaged"
        raise UserError(f"is no UTF-8 text ({where})", place=path, remedy=remedy)
    return Encoding("cp1252", f"{path.name} is no UTF-8 text ({where}) and is read as Windows-1252")
