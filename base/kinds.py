"""What a file really is, by its first bytes: names lie (a `.csv` that is a workbook, a `.h5` that is a sign-in page).

Knows the marks of formats that people mistake for one another. Must not know how any of them is read.
"""

from __future__ import annotations

import codecs
import zipfile
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

HEAD_BYTES = 4096
MARKUP = (b"<!doctype", b"<html", b"<head", b"<body", b"<script", b"<title")


class Kind(NamedTuple):
    """A format: its `name` for code, `words` for a person, and what to do where it stands in place of another."""

    name: str
    words: str
    remedy: str = "give the file that belongs here"


AGAIN = "download it again, signed in where the site asks for it"
UNPACK = "unpack it first"
AS_TABLE = "save it as .csv, .parquet or .xlsx"
LFS = Kind("lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull` where it came from")
HTML = Kind("html", "a page of HTML", AGAIN)
XML = Kind("xml", "XML", "save it in another format")
EMPTY = Kind("empty", "empty", "write or download it again")
JSON = Kind("json", "JSON")
PARQUET = Kind("parquet", "a Parquet file", "name it .parquet")
XLSX = Kind("xlsx", "an Excel workbook", "name it .xlsx")
ZIP = Kind("zip", "a ZIP archive", UNPACK)
GZIP = Kind("gzip", "gzip-compressed", UNPACK)
ARROW = Kind("arrow", "an Arrow file", "name it .arrow")
TAR = Kind("tar", "a tar archive", UNPACK)
HDF5 = Kind("hdf5", "an HDF5 file")
CACHE = Kind("cache", "a feature cache", "give it to `deltaclip train`")
PICKLE = Kind("pickle", "a Python pickle", "save it in another format: a pickle can run any program")
TORCH = Kind("torch", "a checkpoint as torch.save writes it")
SAFETENSORS = Kind("safetensors", "a safetensors file")
NPY = Kind("npy", "a NumPy array")
TEXT = Kind("text", "text", "download it again: what a server answers in place of a file is often text")
IMAGE = Kind("image", "a picture")

# Bytes at the beginning of a file, of which the first that fit decide.
MARKS: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs", LFS),
    (b"PAR1", PARQUET),
    (b"deltaclip-features", CACHE),  # the seal before its HDF5
    (b"\x89HDF\r\n\x1a\n", HDF5),
    (b"MATLAB 7.3", Kind("mat73", "a MATLAB file of version 7.3", "save it with -v7")),
    (b"MATLAB 5.0", Kind("mat", "a MATLAB file")),
    (b"\x93NUMPY", NPY),
    (b"\x1f\x8b", GZIP),
    (b"BZh", Kind("bzip2", "bzip2-compressed", UNPACK)),
    (b"\xfd7zXZ\x00", Kind("xz", "xz-compressed", UNPACK)),
    (b"\x28\xb5\x2f\xfd", Kind("zstd", "Zstandard-compressed", UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Kind("7z", "a 7z archive", UNPACK)),
    (b"Rar!\x1a\x07", Kind("rar", "a RAR archive", UNPACK)),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Kind("xls", "an old Excel workbook (.xls)", "save it as .xlsx or .csv")),
    (b"ARROW1", ARROW),
    (b"\xff\xff\xff\xff", ARROW),  # a stream
    (b"SQLite format 3\x00", Kind("sqlite", "an SQLite database", AS_TABLE)),
    (b"%PDF", Kind("pdf", "a PDF", AS_TABLE)),
    (b"\x89PNG\r\n\x1a\n", IMAGE),
    (b"\xff\xd8\xff", IMAGE),
    (b"GIF8", IMAGE),
    (b"II*\x00", IMAGE),
    (b"MM\x00*", IMAGE),
)


def kind_of(path: Path) -> Kind | None:
    """Return what the first bytes of a file say that it is; None for plain text, and for what is not known.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_fifo():  # it would wait for a writer
        return None
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    found = kind_of_bytes(head)
    return _kind_of_zip(path) if found is ZIP else found


def kind_of_bytes(head: bytes) -> Kind | None:
    """Return what the first bytes of a file say that it is, best `HEAD_BYTES` of them; every ZIP is `ZIP`."""
    marked = next((kind for mark, kind in MARKS if head.startswith(mark)), None)
    return marked or next((kind for holds, kind in SHAPES if holds(head)), None)


def _is_safetensors(head: bytes) -> bool:
    # The length of a header of JSON, which is below 4 GB, then the header.
    return len(head) > 9 and head[4:8] == bytes(4) and head[8:9] == b"{" and head[9:10] in b'"} \n'


def _text(head: bytes) -> bytes:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()


# What no fixed beginning tells, in the order of asking.
SHAPES: tuple[tuple[Callable[[bytes], bool], Kind], ...] = (
    (lambda head: not head, EMPTY),
    (lambda head: head[:4] in {b"PK\x03\x04", b"PK\x05\x06"}, ZIP),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", IMAGE),
    (lambda head: head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}, PICKLE),
    (lambda head: head[257:262] == b"ustar", TAR),
    (_is_safetensors, SAFETENSORS),
    (
        lambda head: _text(head).startswith(MARKUP) or (_text(head).startswith(b"<?xml") and b"<html" in _text(head)),
        HTML,
    ),
    (lambda head: _text(head).startswith(b"<?xml"), XML),
    (lambda head: _text(head)[:1] in {b"{", b"["}, JSON),
)


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return ZIP
    if any(name.startswith("xl/") for name in names):
        return XLSX
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return TORCH
    if "content.xml" in names:
        return Kind("ods", "an OpenDocument file", "save it as .xlsx or .csv")
    if names and all(name.endswith(".npy") for name in names):
        return Kind("npz", "a NumPy archive (.npz)", UNPACK)
    return ZIP


def refuse_other(path: Path, expected: Collection[str], *, what: str = "") -> None:
    """Refuse a file that is surely of another kind than one of those expected; what is not known passes.

    Args:
        path: of a file; of one that is not there nothing is said.
        expected: names of kinds; "text" for what has no mark and is read as text.
        what: words for what was expected, such as "Excel workbook".

    Raises:
        UserError: names what it is.
    """
    if not path.is_file():
        return
    kind = kind_of(path) or (TEXT if _is_text(path) else None)
    if kind is not None and kind.name not in expected:
        raise wrong_kind(path, kind, what)


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # which may be cut inside a letter
    except UnicodeDecodeError:
        return False
    return not any(byte < 32 and byte not in b"\t\n\r\f" for byte in head)


def wrong_kind(path: Path, kind: Kind, what: str = "") -> UserError:
    """Return the error that says what a file is in place of what was expected."""
    return UserError(f"is {kind.words}" + (f", no {what}" if what else ""), place=path, remedy=kind.remedy)
