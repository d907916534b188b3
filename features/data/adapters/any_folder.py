"""A folder as it is: loose pictures, a set that `datasets` saved, tables in several files, or tar archives.

What a folder is follows from what lies in it, and what is left out of it is counted. Knows the names of files that
programs write into folders. Must not know what stands in them.
"""

from __future__ import annotations

import json
import posixpath
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import TAR, kind_of, refuse_other
from deltaclip.features.data.adapters.any_files import open_files, with_sides
from deltaclip.features.data.adapters.finding import DataTables, with_columns
from deltaclip.features.data.listing import count_words, is_system_name, list_folder
from deltaclip.features.data.manifest import find_columns, missing_image, misspelt_prompt
from deltaclip.features.data.sidecars import Known, find_known, picture_table
from deltaclip.features.data.sources import open_source
from deltaclip.features.data.table import SUFFIXES, Table, joined_tables, json_reason, read_table, table_suffix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaclip.features.data.listing import Listing

STATE, SIDES = "state.json", "dataset_dict.json"  # of `save_to_disk`
COLUMNAR = (".parquet", ".arrow", ".feather")
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")
ODD_NAME = "picture whose name is no text"


def open_folder(folder: Path, *, any_names: bool = False, prompts: bool = True) -> DataTables:
    """Open a folder.

    Args:
        folder: one that is there.
        any_names: also take pictures whose names are no text, which a cache cannot hold.
        prompts: look for those of loose pictures.

    Raises:
        UserError: it holds nothing that is read, or what it holds is damaged.
    """
    name = folder.resolve().name or "data"
    if (folder / STATE).is_file() or (folder / SIDES).is_file():
        return open_files(_saved(folder), folder=folder, name=name)
    found = _listed(folder)
    metadata = [path for path in found.others if path.name.lower() in METADATA]
    archives = [path for path, kind in found.others.items() if kind == "archive" and kind_of(path) is TAR]
    seen = [path for path in found.others if not is_system_name(path.name)]
    columnar = [path for path in seen if path.suffix.lower() in COLUMNAR and path not in metadata]
    if found.images and metadata:
        return _with_metadata(folder, found, metadata, name=name)
    if archives:
        return open_files(archives, folder=folder, name=name, left_out=_counts(found, archives))
    if columnar and (not found.images or any(read_table(path).pictures for path in columnar[:1])):
        return open_files(columnar, folder=folder, name=name, left_out=_counts(found, columnar))
    if not found.images:
        raise _nothing(folder, found)
    return _loose(folder, found, name=name, any_names=any_names, prompts=prompts)


def _listed(folder: Path) -> Listing:
    try:
        return list_folder(folder)
    except OSError as error:
        raise UserError(error.strerror or str(error), place=folder, remedy="give a folder that can be read") from error


def _counts(found: Listing, used: Sequence[Path]) -> dict[str, int]:
    """Return what else is in the folder, by what it is."""
    counts = found.counts({*used})
    return {"picture": len(found.images), **counts} if found.images else counts


def _nothing(folder: Path, found: Listing) -> UserError:
    there = count_words(found.counts())
    message = f"holds no pictures: {there or 'it is empty'}"
    return UserError(message, place=folder, remedy=f"give a table, or ADAPTER:{folder} for a public set")


# ---- Loose pictures


class _Loose(NamedTuple):
    names: list[str]
    known: Known


def _known(folder: Path, images: Sequence[Path], found: Listing, *, prompts: bool = True) -> _Loose:
    names = [image.relative_to(folder).as_posix() for image in images]
    if not prompts:
        return _Loose(names, Known(prompts=[""] * len(names)))
    others = {path.relative_to(folder).as_posix() for path in found.others}

    def read(name: str) -> bytes:
        try:
            return (folder / name).read_bytes()
        except OSError as error:
            message = error.strerror or str(error)
            raise UserError(message, place=folder / name, remedy="make it readable, or remove it") from error

    known = find_known(
        names,
        others,
        read=read,
        look=lambda name: open_source(folder / name, None),
        place=lambda name: str(folder / name),
    )
    return _Loose(names, known)


def _loose(folder: Path, found: Listing, *, name: str, any_names: bool, prompts: bool) -> DataTables:
    """Return the pictures of a folder, with the prompts that stand beside them or in them."""
    images = [path for path in found.images if any_names or _is_text(str(path))]
    if not images:
        raise UserError("has no picture whose name is text", place=folder, remedy="rename them")
    names, known = _known(folder, images, found, prompts=prompts)
    left_out = found.counts({folder / used for used in known.used})
    if len(images) < len(found.images):
        left_out[ODD_NAME] = len(found.images) - len(images)
    table = picture_table(folder, names, known, folder=folder, notes=_unread_tables(folder, found, known))
    return DataTables(name=name, tables=[table], image_root=folder, left_out=left_out)


def _is_text(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _unread_tables(folder: Path, found: Listing, known: Known) -> list[str]:
    """Say of a table among the pictures that it is not read: it may be the one that has their ratings."""
    here = [path for path in found.others if path.parent == folder and table_suffix(path) in SUFFIXES]
    tables = [path for path in here if path.name not in known.used and found.others[path] != "hidden file"]
    if not tables:
        return []
    remedy = "give it in place of the folder if it says what the pictures are of"
    return [f"{tables[0].name} is not read: {remedy}"]


def _with_metadata(folder: Path, found: Listing, metadata: Sequence[Path], *, name: str) -> DataTables:
    """Return the rows of the tables that lie beside the pictures; paths in one are relative to its own folder."""
    tables = with_sides([_relative(folder, read_table(path)) for path in metadata])
    table = joined_tables(folder, tables.tables)
    notes, used = tables.notes, {*metadata}
    if "prompt" not in find_columns(table) and misspelt_prompt(table) is None:
        cells = [posixpath.normpath(cell) for cell in table.columns[find_columns(table)["image"]]]
        there = {path.relative_to(folder).as_posix(): path for path in found.images}
        names, known = _known(folder, [there[cell] for cell in dict.fromkeys(cells) if cell in there], found)
        prompt_of = dict(zip(names, known.prompts, strict=True))
        table = with_columns(table, prompt=[prompt_of.get(cell, "") for cell in cells])
        notes, used = [*notes, *known.notes()], used | {folder / name for name in known.used}
    left_out = found.counts(used)
    rows = {posixpath.normpath(cell) for cell in table.columns[find_columns(table)["image"]]}
    lacking = sum(path.relative_to(folder).as_posix() not in rows for path in found.images)
    if lacking:
        left_out = {"picture without a row in the metadata": lacking, **left_out}
    return DataTables(name=name, tables=[table], image_root=folder, notes=tuple(notes), left_out=left_out)


def _relative(folder: Path, table: Table) -> Table:
    """Return a table of metadata with image paths relative to a folder above its own."""
    column = find_columns(table).get("image")
    if column is None:
        message, remedy = missing_image(table)
        raise UserError(message.replace("'image'", "'file_name'"), place=table.path, remedy=remedy)
    above = table.path.parent.relative_to(folder).as_posix()
    cells = [posixpath.join(above, cell) if cell and above != "." else cell for cell in table.images(column)]
    return replace(table, columns=table.columns | {column: cells})


# ---- What `datasets` saved


def _saved(folder: Path) -> list[Path]:
    """Return the files of a data set, or of several sides of one, as `save_to_disk` names them."""
    if (folder / SIDES).is_file():
        sides = _json(folder / SIDES).get("splits")
        if not isinstance(sides, list) or not sides or not all(isinstance(side, str) for side in sides):
            raise UserError("names no splits", place=folder / SIDES, remedy="save the data set again")
        return [path for side in sides for path in _saved_side(folder / Path(side).name)]
    return _saved_side(folder)


def _saved_side(folder: Path) -> list[Path]:
    state = _json(folder / STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        message, remedy = "is a choice of rows by their numbers", "call flatten_indices() and save it again"
        raise UserError(message, place=folder / STATE, remedy=remedy)
    files = state.get("_data_files")
    names = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError("names no files", place=folder / STATE, remedy="save the data set again")
    paths = [folder / Path(str(name)).name for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError("no such file", place=path, remedy=f"{STATE} names it: copy the whole folder")
    return paths


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(error.strerror or str(error), place=path, remedy="copy the whole folder") from error
    except (ValueError, RecursionError) as error:
        refuse_other(path, {"json", "text"}, what="JSON file")
        raise UserError(f"broken JSON ({json_reason(error)})", place=path, remedy="save the data set again") from error
    if not isinstance(found, dict):
        raise UserError("is no JSON object", place=path, remedy="save the data set again")
    return found
