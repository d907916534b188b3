"""From what a user names (`agiqa-3k:DIR`, `demo`, a table) to a manifest.

One file per public set, each with one function `read(folder) -> (Table, image root, extras)`. Spec section 4.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.features.data.adapters import agiqa_3k, demo
from deltaclip.features.data.labels import parse_label_range
from deltaclip.features.data.manifest import Manifest, manifest_from_table
from deltaclip.features.data.table import SUFFIXES, read_table

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER_ADAPTERS: dict[str, Callable[..., Manifest]] = {"agiqa-3k": agiqa_3k.read}


def read_manifest(
    data: str,
    *,
    image_root: Path | None = None,
    label_range: str | None = None,
    allow_outside: bool = False,
    read_labels: bool = True,
) -> Manifest:
    """Read what `data` names: `demo`, `ADAPTER:DIR`, or the path of a CSV, TSV, JSONL or Parquet table.

    Args:
        data: as the user typed it.
        image_root: folder of the images; default is the folder of the table.
        label_range: `LO,HI` of both labels; default is the adapter's, else detected.
        allow_outside: permit image paths that leave the image root.
        read_labels: False leaves the label columns alone, whatever is in them.

    Raises:
        UserError: unknown adapter, missing folder, or anything wrong in the table.
    """
    given = parse_label_range(label_range) if label_range else None
    if data == "demo":
        return demo.read(given, read_labels=read_labels)
    name, colon, folder = data.partition(":")
    if colon and name in FOLDER_ADAPTERS:
        if not folder or not Path(folder).is_dir():
            raise UserError(
                "no such folder", place=folder or data, remedy=f"give {name}:DIR with the folder of the set"
            )
        return FOLDER_ADAPTERS[name](Path(folder), given, read_labels=read_labels)
    if colon and not Path(data).exists():
        raise UserError(f"unknown adapter {name!r}", place=data, remedy=did_you_mean(name, FOLDER_ADAPTERS))
    path = Path(data)
    if path.is_dir():
        raise UserError(
            "is a folder",
            place=path,
            remedy=f"give a table, or ADAPTER:{path} with one of: {', '.join(FOLDER_ADAPTERS)}",
        )
    if not path.exists() and path.suffix == "":
        raise UserError(
            "no such file",
            place=path,
            remedy=did_you_mean(data, ["demo", *(f"{a}:DIR" for a in FOLDER_ADAPTERS)]),
        )
    table = read_table(path)
    root = image_root or path.parent
    return manifest_from_table(
        table,
        name=path.stem,
        image_root=root,
        label_range=given,
        allow_outside=allow_outside,
        read_labels=read_labels,
    )


def data_name(data: str) -> str:
    """Return a file name for what `data` names: `demo`, `ratings-1a2b3c` of a table, `agiqa-3k-FOLDER-1a2b3c`.

    The six digits are of the SHA-256 of the resolved path, since many a table is called `data.csv`.
    """
    if data == "demo":
        return data
    adapter, colon, folder = data.partition(":")
    named = bool(colon) and adapter in FOLDER_ADAPTERS
    path = Path(folder if named else data).resolve()
    stem = f"{adapter}-{path.name}" if named else path.stem if path.suffix.lower() in SUFFIXES else path.name
    return re.sub(r"\W+", "-", f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}")
