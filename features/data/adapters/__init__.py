"""From what a user names (`agiqa-3k:DIR`, `demo`, a table) to a manifest.

One file per public set, each with one function `read_<set>(folder) -> DataTables`: the tables of the set with the names
of columns that every manifest has, the folder of its images and the range of its labels.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.places import SCHEMES, is_address
from deltaclip.features.data.adapters.agiqa_1k import read_agiqa_1k
from deltaclip.features.data.adapters.agiqa_3k import read_agiqa_3k
from deltaclip.features.data.adapters.aigciqa2023 import read_aigciqa2023
from deltaclip.features.data.adapters.aigiqa_20k import read_aigiqa_20k
from deltaclip.features.data.adapters.any_files import is_pattern, open_addresses, open_files, open_pattern
from deltaclip.features.data.adapters.any_folder import open_folder
from deltaclip.features.data.adapters.demo import read_demo
from deltaclip.features.data.adapters.evalmuse_40k import read_evalmuse_40k
from deltaclip.features.data.adapters.finding import LOOKED_AT, DataTables, manifest_of
from deltaclip.features.data.adapters.koniq_10k import read_koniq_10k
from deltaclip.features.data.adapters.pku_i2iqa import read_pku_i2iqa
from deltaclip.features.data.addresses import RemotePath, as_place
from deltaclip.features.data.manifest import parse_label_ranges
from deltaclip.features.data.paths import WEB_ADDRESS, refuse_absent
from deltaclip.features.data.preferences import OPTION, holds_pairs, moved_images, read_pair_table, with_preferences
from deltaclip.features.data.sources import is_there
from deltaclip.features.data.table import SUFFIXES, below
from deltaclip.features.data.targets import parse_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deltaclip.features.data.manifest import Manifest
    from deltaclip.features.data.ratings import Raters
    from deltaclip.features.data.targets import AskedTarget

FOLDER_ADAPTERS: dict[str, Callable[[Path], DataTables]] = {
    "agiqa-1k": read_agiqa_1k,
    "agiqa-3k": read_agiqa_3k,
    "aigciqa2023": read_aigciqa2023,
    "aigiqa-20k": read_aigiqa_20k,
    "evalmuse-40k": read_evalmuse_40k,
    "koniq-10k": read_koniq_10k,
    "pku-i2iqa": read_pku_i2iqa,
}


def read_manifest(  # noqa: PLR0913 - what a user may say of data
    data: str,
    *,
    image_root: Path | None = None,
    label_range: str | Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    allow_outside: bool = False,
    read_labels: bool = True,
    raters: Raters = "mean",
    pairs: str | None = None,
    pairs_target: str | None = None,
) -> Manifest:
    """Read what `data` names: `demo`, `ADAPTER:DIR`, the path of a table or folder, or a pattern of several files.

    Args:
        data: as the user typed it.
        image_root: folder of the images; default is the folder of the table.
        label_range: `LO,HI` of all labels, `LABEL=LO,HI` of one; default is the adapter's, else detected.
        targets: `NAME=COLUMN:image` or `:pair` of each target beside the known ones.
        allow_outside: permit image paths that leave the image root.
        read_labels: False leaves the label columns alone, whatever is in them.
        raters: how the ratings of several people become one label.
        pairs: a table of pairs of images that people chose between, beside `data`.
        pairs_target: what the pairs speak for; see `parse_pairs_target`.

    Raises:
        UserError: unknown adapter, missing folder, or anything wrong in the table.
    """
    asked = parse_targets(targets)
    given = parse_label_ranges(label_range, asked)
    tables = open_data(data, image_root=image_root, targets=asked)
    found = manifest_of(
        tables,
        label_ranges=given,
        allow_outside=allow_outside,
        read_labels=read_labels,
        raters=raters,
        pairs_target=pairs_target,
    )
    if pairs is None:
        if pairs_target is not None and found.preferences is None:
            raise UserError("has no effect without pairs", place=OPTION, remedy="give --pairs TABLE, or leave it out")
        return found
    if found.preferences is not None:
        raise UserError("holds pairs already", place=found.path, remedy="put them into one table with those of --pairs")
    beside = _pairs_beside(pairs, found, image_root, allow_outside=allow_outside)
    return with_preferences(
        found, manifest_of(beside, label_ranges={}, allow_outside=allow_outside, pairs_target=pairs_target)
    )


def _pairs_beside(pairs: str, ratings: Manifest, image_root: Path | None, *, allow_outside: bool) -> DataTables:
    """Open a table of pairs, its images relative to the folder of those with ratings.

    Raises:
        UserError: it holds no pairs, or its images lie elsewhere.
    """
    tables = open_data(pairs, image_root=image_root)
    table, root = tables.tables[0], ratings.image_root
    if not holds_pairs(table):
        message, remedy = "holds no pairs", "give columns image_a, image_b and preferred; see docs/pairs.md"
        raise UserError(message, place=table.path, remedy=remedy)
    first = read_pair_table(table, need_labels=False).rows.columns["image"][:LOOKED_AT]
    there = any(is_there(root / image) for image in first)
    if there or tables.image_root.absolute() == root.absolute():
        return replace(tables, image_root=root)
    here = Path(os.path.relpath(tables.image_root.absolute(), root.absolute())).as_posix()
    if here.startswith("..") and not allow_outside:
        message = f"has images in {tables.image_root}, outside {root}, where those with ratings are"
        raise UserError(
            message, place=table.path, remedy="give --image-root with a folder above both, or --allow-outside"
        )
    return replace(tables, tables=[moved_images(table, here)], image_root=root)


def open_data(data: str, *, image_root: Path | None = None, targets: Sequence[AskedTarget] = ()) -> DataTables:
    """Open the tables of what `data` names, with `image_root` as the folder of the images where one is given.

    Raises:
        UserError: unknown adapter, missing folder, no such file, or a table that cannot be read.
    """
    found = replace(_open(data), targets=tuple(targets))
    return _with_root(found, as_place(image_root)) if image_root else found


def _with_root(found: DataTables, image_root: Path) -> DataTables:
    """Return tables with another folder of images; pictures inside the files stay where they are.

    Raises:
        UserError: the files with pictures do not lie in that folder.
    """
    if not any(inside_N.any() for table in found.tables for inside_N in table.pictures.values()):
        return replace(found, image_root=image_root)
    here, root = Path(os.path.abspath(found.image_root)), Path(os.path.abspath(image_root))  # noqa: PTH100 - links stay
    if not here.is_relative_to(root):
        message = "is another folder than that of the pictures, which lie in the data itself"
        raise UserError(message, place="--image-root", remedy=f"leave it out, or give {found.image_root} or one above")
    return replace(found, tables=[below(root, table, here) for table in found.tables], image_root=image_root)


def _open(data: str) -> DataTables:
    if data == "demo":
        return read_demo()
    if is_address(data):
        return open_addresses(data)
    name, colon, folder = data.partition(":")
    if colon and name in FOLDER_ADAPTERS:
        if not folder or not Path(folder).is_dir():
            raise UserError(
                "no such folder", place=folder or data, remedy=f"give {name}:DIR with the folder of the set"
            )
        return FOLDER_ADAPTERS[name](Path(folder))
    _refuse_address(data)
    if colon and not Path(data).exists() and not is_pattern(data):
        raise UserError(f"unknown adapter {name!r}", place=data, remedy=did_you_mean(name, FOLDER_ADAPTERS))
    path = Path(data)
    if path.is_dir():
        return open_folder(path)
    if is_pattern(data):
        return open_pattern(data)
    if not path.exists() and path.suffix == "":
        raise UserError(
            "no such file",
            place=path,
            remedy=did_you_mean(data, ["demo", *(f"{a}:DIR" for a in FOLDER_ADAPTERS)]),
        )
    refuse_absent(path)
    return open_files([path], folder=path.parent, name=path.stem)


def _refuse_address(data: str) -> None:
    web = WEB_ADDRESS.match(data)
    if web and not Path(data).exists():
        what = "no such file" if web[1].lower() == "file" else "is at an address of a kind that is not fetched"
        raise UserError(what, place=data, remedy=f"download it, or give one of {', '.join(SCHEMES[:-1])}")


def data_name(data: str) -> str:
    """Return a file name for what `data` names: `demo`, `ratings-1a2b3c` of a table, `agiqa-3k-FOLDER-1a2b3c`.

    The six digits are of the SHA-256 of the resolved path, since many a table is called `data.csv`.
    """
    if data == "demo":
        return data
    adapter, colon, folder = data.partition(":")
    named = bool(colon) and adapter in FOLDER_ADAPTERS
    path = RemotePath.of(data) if is_address(data) else Path(folder if named else data).resolve()
    name = Path(path.file_name if isinstance(path, RemotePath) else path.name)
    stem = f"{adapter}-{name}" if named else name.stem if name.suffix.lower() in {*SUFFIXES, ".tar"} else str(name)
    return re.sub(r"\W+", "-", f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}")
