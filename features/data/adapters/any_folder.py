"""A folder as it is: what `datasets` saved, or tables in several files.

What a folder is follows from what lies in it, and what is left out of it is counted. Knows the names of files that
programs write into folders. Must not know what stands in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters.any_files import open_files
from deltaclip.features.data.listing import count_words, list_folder
from deltaclip.features.data.table import json_reason

if TYPE_CHECKING:
    from deltaclip.features.data.adapters.finding import DataTables
    from deltaclip.features.data.listing import Listing

STATE, SIDES = "state.json", "dataset_dict.json"  # of `save_to_disk`
COLUMNAR = (".parquet", ".arrow", ".feather")


def open_folder(folder: Path) -> DataTables:
    """Open a folder.

    Raises:
        UserError: it holds nothing that is read, or what it holds is damaged.
    """
    if (folder / STATE).is_file() or (folder / SIDES).is_file():
        return open_files(_saved(folder), folder=folder, name=_name(folder))
    found = list_folder(folder)
    tables = [path for path in found.others if path.suffix.lower() in COLUMNAR]
    if not tables:
        raise _nothing(folder, found)
    return open_files(tables, folder=folder, name=_name(folder), notes=_left_out(found, tables))


def _name(folder: Path) -> str:
    return folder.resolve().name or "data"


def _left_out(found: Listing, used: list[Path]) -> list[str]:
    """Say what else is in the folder, by what it is."""
    counts = found.counts(used)
    if found.images:
        counts = {"picture": len(found.images), **counts}
    return [f"left out of the folder: {count_words(counts)}"] if counts else []


def _nothing(folder: Path, found: Listing) -> UserError:
    there = count_words(found.counts())
    message = f"holds no pictures: {there or 'it is empty'}"
    return UserError(message, place=folder, remedy=f"give a table, or ADAPTER:{folder} for a public set")


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
        raise UserError(f"broken JSON ({json_reason(error)})", place=path, remedy="save the data set again") from error
    if not isinstance(found, dict):
        raise UserError("is no JSON object", place=path, remedy="save the data set again")
    return found
