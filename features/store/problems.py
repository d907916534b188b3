"""What is wrong with the layout of a file that is said to be a feature cache, in one phrase.

Knows names, lengths and ranges (`schema.py`). Must not know what the values mean to a reader.
"""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np

from deltaclip.features.data.views import CENTER, RECIPES
from deltaclip.features.store.schema import CODE_COLUMNS, FORMAT, NUMBER_COLUMNS, READABLE_VERSIONS

_ROW_COLUMNS = ("image", "prompt", "explanation", "file", *NUMBER_COLUMNS, *CODE_COLUMNS)


def find_problem(file: h5py.File, *, unfinished: bool, has_seal: bool) -> str | None:
    """Return why an open file is no cache that can be used, None where it is one.

    Args:
        file: any HDF5 file.
        unfinished: accept the file of an interrupted run.
        has_seal: whether there is a seal on it; version 1 had none.
    """
    if file.attrs.get("format") != FORMAT:
        return "is no deltaclip cache"
    version = file.attrs.get("schema_version", 0)
    if version not in READABLE_VERSIONS:
        return f"has schema version {version}, this release reads {' and '.join(map(str, READABLE_VERSIONS))}"
    is_finished = file.attrs.get("complete") and (has_seal or version == 1)
    if "header" not in file.attrs or not (unfinished or is_finished):
        return "is not complete"
    return _broken_words(file) or _broken_lengths(file, version) or _broken_indices(file)


def _broken_words(file: h5py.File) -> str | None:
    needed = {"header": {"request", "plan"}, "facts": {"dim", "precision"}, "dataset": {"name", "label_ranges"}}
    for name, parts in needed.items():
        try:
            found = json.loads(file.attrs[name])
        except (KeyError, TypeError, ValueError):
            found = None
        if not isinstance(found, dict) or not parts <= found.keys():
            return f"is damaged ({name})"
    return None


def _broken_lengths(file: h5py.File, version: int) -> str | None:
    of_vectors = ("embedding", "norm", "status", *(() if version == 1 else ("crc32",)))
    views = [name for name in file["views"] if name != CENTER] if isinstance(file.get("views"), h5py.Group) else []
    same_length = {
        "rows": [
            *(f"rows/{name}" for name in _ROW_COLUMNS),
            *(["rows/position"] if "shard" in json.loads(file.attrs["header"]) else []),
        ],
        "images": [
            *(f"views/{view}/{name}" for view in (CENTER, *views) for name in of_vectors),
            *(f"images/{name}" for name in ("sha256", "file", "reason")),
            *(["images/more_frames"] if "images/more_frames" in file else []),
        ],
        "texts": [
            *(f"texts/{name}" for name in (*of_vectors, "sha256", "text", "truncated")),
            *(["texts/tokens"] if "texts/tokens" in file else []),
        ],
    }
    for kind, names in same_length.items():
        wrong = [name for name in names if not isinstance(file.get(name), h5py.Dataset) or not file[name].shape]
        wrong = wrong or [name for name in names if len(file[name]) != len(file[names[0]])]
        if wrong:
            return f"is damaged ({kind}: no {wrong[0]} of the right length)"
    widths = {view: file[f"views/{view}/embedding"].shape[1:] for view in (CENTER, *views)}
    if any(len(width) != 1 for width in widths.values()) or widths[CENTER] != file["texts/embedding"].shape[1:]:
        return "is damaged (width of the embeddings)"
    broken = [view for view in (CENTER, *views) if not isinstance(read_recipe(file, view), dict)]
    return f"is damaged (recipe of the view {broken[0]})" if broken else None


def read_recipe(file: h5py.File, view: str) -> Any:
    """Return the recipe of a view, None where it cannot be read."""
    if file.attrs["schema_version"] == 1:
        return RECIPES[CENTER]
    try:
        return json.loads(file[f"views/{view}"].attrs["recipe"])
    except (KeyError, TypeError, ValueError):
        return None


def _broken_indices(file: h5py.File) -> str | None:
    num_images, num_texts = len(file["images/file"]), len(file["texts/text"])
    limits = {"image": (0, num_images), "prompt": (-1, num_texts), "explanation": (-1, num_texts)}
    for column in CODE_COLUMNS:
        if not isinstance(file.get(f"names/{column}"), h5py.Dataset):
            return f"is damaged (no names/{column})"
        limits[column] = (-1, len(file[f"names/{column}"]))
    for column, (first, end) in limits.items():
        values = np.asarray(file[f"rows/{column}"])
        if ((values < first) | (values >= end)).any():
            return f"is damaged (rows/{column} is out of range)"
    return None
