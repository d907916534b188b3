"""Tables and tar archives of pictures, in one file or in several, named by a pattern (`shards/{000..099}.tar`).

Several files are one set: their rows stand one after another, a label has one range in all of them. Knows patterns and
names of files. Must not know what stands in a table.
"""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import HEAD_BYTES, TAR, kind_of
from deltaclip.base.vocabulary import side_of
from deltaclip.features.data.adapters.finding import DataTables, with_columns
from deltaclip.features.data.addresses import RemotePath
from deltaclip.features.data.archives import Archive
from deltaclip.features.data.listing import IMAGE, count_words, is_image_name, is_system_name, kind_of_start
from deltaclip.features.data.manifest import find_columns
from deltaclip.features.data.remote import matching, table_at
from deltaclip.features.data.sidecars import find_known, picture_table
from deltaclip.features.data.sources import HOLDS_PICTURES
from deltaclip.features.data.table import Table, joined_tables, read_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BRACES = re.compile(r"\{([^{}]*)\}")
SPAN = re.compile(r"(\d+)\.\.(\d+)")
NOTHING: Mapping[str, int] = MappingProxyType({})
MAX_NAMED = 1_000_000  # files of a pattern; a slip of the pen names more
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
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


def open_addresses(data: str) -> DataTables:
    """Open the table or tar archive at an address, or those that a pattern names; their images are relative to it.

    Raises:
        UserError: one is not there, or cannot be read.
    """
    paths = [RemotePath.of(text) for text in _without_braces(data)]
    if any(glob.has_magic(path.file_name) for path in paths):
        paths = [found for path in paths for found in matching(path)]
    own = paths[0].folder
    above = os.path.commonpath([path.folder for path in paths])
    folder = own if os.path.normpath(own) == above else RemotePath.of(above)
    return open_files(paths, folder=folder, name=folder.name if len(paths) > 1 else Path(paths[0].file_name).stem)


def open_files(
    paths: Sequence[Path], *, folder: Path, name: str, notes: Sequence[str] = (), left_out: Mapping[str, int] = NOTHING
) -> DataTables:
    """Open files as one set.

    Args:
        paths: at least one.
        folder: that they and their images lie in.
        name: of the set.
        notes: what is to be said besides.
        left_out: what else lies in the folder, by what it is.

    Raises:
        UserError: one cannot be read.
    """
    left_out = Counter(left_out)
    tables = [_table_of(path, left_out) for path in paths]
    sided = with_sides(tables)
    return DataTables(
        name=name,
        tables=[joined_tables(folder, sided.tables)],
        image_root=folder,
        notes=(*notes, *sided.notes, *_missing_parts(paths)),
        left_out=dict(left_out.most_common()),
    )


def _table_of(path: Path, left_out: Counter[str]) -> Table:
    if isinstance(path, RemotePath):
        with table_at(path) as local:
            table = _table_of(local, left_out)
        if table.pictures and not HOLDS_PICTURES.search(path.name):
            remedy = "give an address that ends in .tar, .parquet or .arrow, or download it"
            raise UserError("has pictures inside, which are not found again at this address", place=path, remedy=remedy)
        return replace(table, path=path)
    kind, name = kind_of(path), path.name.lower()
    if kind is TAR:
        return _archive_table(path, left_out)
    if name.endswith(PACKED_TARS):
        message = "is a compressed archive, in which no picture has a place of its own"
        raise UserError(message, place=path, remedy="unpack it to .tar first: pictures hardly get smaller")
    if path.suffix.lower() == ".tar":
        what = "empty" if kind is None and not any(_start(path)) else kind.words if kind else "something else"
        raise UserError(f"is no tar archive but {what}", place=path, remedy="copy or pack it again")
    return read_table(path)


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _archive_table(path: Path, left_out: Counter[str]) -> Table:
    """Return the pictures of a tar archive with what stands beside them; counts the other members.

    Raises:
        UserError: damaged, without a picture, or something beside one cannot be read.
    """
    archive = Archive(path)
    left_out.update(archive.left_out)
    kinds = {name: _kind_of_member(archive, name) for name in archive.members}
    images = [name for name, kind in kinds.items() if kind == IMAGE]
    if not images:
        there = count_words(dict(Counter(kinds.values()).most_common())) or "no members"
        raise UserError(f"holds no pictures, only {there}", place=path, remedy="give archives of pictures")
    known = find_known(
        images,
        archive.members,
        read=archive.read,
        look=lambda name: contextlib.nullcontext(io.BytesIO(archive.read(name))),
        place=lambda name: f"{path}/{name}",
    )
    left_out.update(kind for name, kind in kinds.items() if kind != IMAGE and name not in known.used)
    table = picture_table(path, [f"{path.name}/{image}" for image in images], known, folder=path.parent)
    return replace(table, pictures={"image": np.ones(len(images), dtype=bool)})


def _kind_of_member(archive: Archive, name: str) -> str:
    if any(is_system_name(part) for part in name.split("/")):
        return "hidden file"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "file whose name is no text"
    if is_image_name(name):
        return IMAGE
    return kind_of_start(archive.read_start(name)) or "empty file"


class Sided(NamedTuple):
    """Tables, with a column for the side of a split where their names say one, and what is to be said of it."""

    tables: list[Table]
    notes: list[str]


def with_sides(tables: list[Table]) -> Sided:
    """Put the side of a split that files are called after (`train-00000-of-00002.parquet`) into a column of it."""
    sides = [_side(table.path) for table in tables]
    if None in sides or len(set(sides)) < 2 or any("split" in find_columns(table) for table in tables):
        return Sided(tables, [])
    counts = dict.fromkeys(sides, 0)
    for side, table in zip(sides, tables, strict=True):
        counts[side] += len(table.lines)
    words = ", ".join(f"{side} {count:,}" for side, count in counts.items())
    placed = [
        with_columns(table, split=[str(side)] * len(table.lines)) for side, table in zip(sides, tables, strict=True)
    ]
    return Sided(placed, [f"the split is that of the files' names: {words}"])


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
