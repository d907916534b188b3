"""What adapters share: find the files of a set in a folder, and say what was expected where one is missing.

Knows folders and tables. Must not know any set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.listing import count_words
from deltaclip.features.data.manifest import joined, manifest_from_table
from deltaclip.features.data.preferences import holds_pairs, manifest_of_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deltaclip.features.data.manifest import LabelRange, Manifest
    from deltaclip.features.data.ratings import Raters
    from deltaclip.features.data.table import Table
    from deltaclip.features.data.targets import AskedTarget


LOOKED_AT = 20  # images that tell which folder they lie in


@dataclass(frozen=True, kw_only=True)
class DataTables:
    """What a user named: tables with columns that `ALIASES` knows, and the folder of their images.

    `labelled_only`: rows without any label are the set's hidden part and of no use but for prediction.
    `left_out` counts what else lies in a folder or an archive, by what it is.
    """

    name: str
    tables: list[Table]
    image_root: Path
    label_range: LabelRange | None = None
    targets: tuple[AskedTarget, ...] = ()  # that were asked for beside the known ones
    labelled_only: bool = False
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def said(self) -> tuple[str, ...]:
        """What is to be said of the data as it is, what was left out included."""
        return (*self.notes, *([f"left out: {count_words(dict(self.left_out))}"] if self.left_out else []))

    def ranges(self, given: Mapping[str, LabelRange]) -> dict[str, LabelRange]:
        """Return the scales that are known of labels: those given, else the set's."""
        return ({"": self.label_range} if self.label_range else {}) | dict(given)


def manifest_of(
    data: DataTables,
    *,
    label_ranges: Mapping[str, LabelRange],
    allow_outside: bool = False,
    read_labels: bool = True,
    raters: Raters = "mean",
    pairs_target: str | None = None,
) -> Manifest:
    """Turn tables into one manifest; that of pairs has their images as rows.

    Args:
        data: the tables, as `open_data` gives them.
        label_ranges: scales of labels that win over the set's.
        allow_outside: permit image paths that leave the root.
        read_labels: False leaves label columns alone and keeps rows that have none.
        raters: how the ratings of several people become one label.
        pairs_target: what pairs speak for, as `--pairs-target` has it.

    Raises:
        UserError: anything wrong in a table, or no row has a label.
    """
    if pairs := [table for table in data.tables if holds_pairs(table)]:
        found = manifest_of_pairs(
            pairs[0],
            name=data.name,
            image_root=data.image_root,
            target=pairs_target,
            allow_outside=allow_outside,
            read_labels=read_labels,
        )
        return replace(found, notes=(*data.said, *found.notes))
    parts = []
    for table in data.tables:
        part = manifest_from_table(
            table,
            name=data.name,
            image_root=data.image_root,
            targets=data.targets,
            label_ranges=data.ranges(label_ranges),
            allow_outside=allow_outside,
            read_labels=read_labels,
            raters=raters,
        )
        parts.append(_labelled(part) if data.labelled_only and read_labels else part)
    whole = joined(parts)
    if not len(whole):
        places = ", ".join(str(table.path) for table in data.tables)
        raise UserError(
            "no row has a score", place=places, remedy="take the part of the set that is published with them"
        )
    return replace(whole, notes=(*data.said, *whole.notes))


def _labelled(part: Manifest) -> Manifest:
    known = [~np.isnan(part.labels[target.name]) for target in part.targets]
    has = np.any(known, axis=0) if known else np.zeros(len(part), dtype=bool)
    if has.all():
        return part
    left = int((~has).sum())
    note = f"{part.path.name}: {left:,} rows have no score and are left out"
    said = part.notes if has.any() else ()  # what there is to say of a part without scores
    return replace(part.selected(np.flatnonzero(has)), notes=(*said, note))


def find_file(folder: Path, names: Sequence[str], *, inside: Sequence[str] = ("",), what: str) -> Path:
    """Return the first file of `names` (any case) in the folder or its sub-folders `inside`.

    Raises:
        UserError: there is none; says what was expected.
    """
    found = find_optional(folder, names, inside=inside)
    if found is None:
        places = [str(Path(sub) / names[0]) for sub in inside]
        raise UserError(
            f"{names[0]} is missing ({what})",
            place=folder,
            remedy=f"expected {' or '.join([*places, *names[1:]])}; give the folder of the set as it was unpacked",
        )
    return found


def find_optional(folder: Path, names: Sequence[str], *, inside: Sequence[str] = ("",)) -> Path | None:
    """Return the first file of `names` (any case) in the folder or its sub-folders `inside`, or None."""
    for name in names:
        for sub in inside:
            for path in _entries(folder / sub):
                if path.name.lower() == name.lower() and path.is_file():
                    return path
    return None


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def image_folder(folder: Path, images: Sequence[str], subs: Sequence[str]) -> Path:
    """Return the sub-folder that holds the images: the first that has one of them, else the first there is."""
    folders = [*(path for sub in subs if (path := folder / sub).is_dir()), folder]
    for root in folders:
        if any(os.path.isfile(os.path.join(root, image)) for image in images[:LOOKED_AT]):  # noqa: PTH113, PTH118
            return root
    return folders[0]


def with_columns(table: Table, **columns: list[str]) -> Table:
    """Return a table with columns put in or replaced."""
    return replace(table, columns=table.columns | columns)


def column(table: Table, *names: str) -> list[str] | None:
    """Return a column by the first of its names (any case) that the table has, or None."""
    by_lower = {key.lower(): key for key in table.columns}
    found = next((by_lower[name] for name in names if name in by_lower), None)
    return None if found is None else table.names(found)


def required(table: Table, *names: str) -> list[str]:
    """Return a column by the first of its names (any case).

    Raises:
        UserError: the table has none of them.
    """
    cells = column(table, *names)
    if cells is None:
        have = ", ".join(table.columns) or "none"
        raise UserError(f"missing column {names[0]!r}", place=table.path, remedy=f"found: {have}")
    return cells
