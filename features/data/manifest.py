"""A manifest: which images, with which prompts, labels, groups and sources.

Knows columns and their aliases, and which paths an image may have. Must not know CLIP, caches or scores.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError, nearest
from deltaclip.base.targets import LABELS, need_prompts
from deltaclip.features.data.labels import LabelRange, read_label, read_label_std
from deltaclip.features.data.numbers import is_numeric
from deltaclip.features.data.paths import understood_all
from deltaclip.features.data.prompts import prompt_group
from deltaclip.features.data.table import SHARED_TEXTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.data.table import Table

# Field -> spellings seen in public copies, best first; compared without case.
ALIASES = {
    "image": (
        "image",
        "img",
        "image_path",
        "img_path",
        "image_name",
        "name",
        "filename",
        "file_name",
        "file",
        "path",
    ),
    "prompt": ("prompt", "caption", "text"),
    "quality": ("quality", "mos_quality", "mos", "quality_mos"),
    "consistency": (
        "consistency",
        "mos_align",
        "alignment",
        "mos_alignment",
        "correspondence",
        "mos_consistency",
    ),
    "quality_std": ("quality_std", "std_quality", "mos_quality_std", "sd"),
    "consistency_std": ("consistency_std", "std_align", "std_alignment", "mos_align_std", "std_consistency"),
    "explanation": ("explanation", "rationale", "reason"),
    "group": ("group", "prompt_id"),
    "source": ("source", "generator", "model"),
    "split": ("split", "subset", "partition", "set"),
}
TEXT_FIELDS = ("images", "prompts", "explanations", "groups", "sources", "splits", "places")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """N rows; text columns are '' and numbers NaN where a cell is empty."""

    name: str
    path: Path
    image_root: Path
    images: list[str]  # relative to image_root, as `paths.understood` gives them
    prompts: list[str]
    labels: dict[str, NDArray[np.float64]]  # quality, consistency (mapped to [0, 1]) and their _std, each (N,)
    explanations: list[str]
    groups: list[str]
    sources: list[str]
    splits: list[str]
    places: Sequence[str]  # 'file, line' of each row, for messages
    label_ranges: dict[str, LabelRange] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was left out or put in, and why

    def __len__(self) -> int:
        return len(self.images)

    def image_path(self, row: int) -> Path:
        """Return the file of a row's image."""
        return self.image_root / self.images[row]

    def selected(self, rows: NDArray[np.int64]) -> Manifest:
        """Return the manifest of some rows, in their order."""
        taken: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in TEXT_FIELDS}
        return replace(self, labels={name: values[rows] for name, values in self.labels.items()}, **taken)


def joined(parts: Sequence[Manifest]) -> Manifest:
    """Return the rows of several manifests of one set as one; what is not a row is the first one's."""
    if len(parts) == 1:
        return parts[0]
    texts: dict[str, Any] = {name: [value for part in parts for value in getattr(part, name)] for name in TEXT_FIELDS}
    labels = {name: np.concatenate([part.labels[name] for part in parts]) for name in parts[0].labels}
    ranges = {name: known for part in parts for name, known in part.label_ranges.items()}
    notes = tuple(note for part in parts for note in part.notes)
    return replace(parts[0], labels=labels, label_ranges=ranges, notes=notes, **texts)


def manifest_from_table(
    table: Table,
    *,
    name: str,
    image_root: Path,
    label_ranges: Mapping[str, LabelRange] = MappingProxyType({}),
    source_of: Callable[[str], str] | None = None,
    allow_outside: bool = False,
    read_labels: bool = True,
) -> Manifest:
    """Turn a table into a manifest.

    Args:
        table: columns as read.
        name: short name of the data set, for tables and default file names.
        image_root: folder that image paths are relative to and may not leave.
        label_ranges: scales of labels; one that is not among them is detected.
        source_of: gives the generator from an image name where no column does.
        allow_outside: permit image paths that leave `image_root`.
        read_labels: False leaves the label columns alone, whatever is in them.

    Raises:
        UserError: missing column, empty prompt or image, label not a number or out of range, path outside the root.
    """
    found = find_columns(table)
    written = _required(table, found, "image")
    images, read_so = understood_all(written, image_root, allow_outside=allow_outside)
    prompts = _prompts(table, found)
    if not allow_outside:
        _refuse_outside(table, found["image"], images, image_root)
    labels, ranges, notes = _read_labels(table, found if read_labels else {}, label_ranges)
    notes += _mask_unprompted(table, prompts, labels)
    empty = [""] * len(images)
    sources = (
        table.columns[found["source"]] if "source" in found else [source_of(i) for i in images] if source_of else empty
    )
    groups = table.columns[found["group"]] if "group" in found else empty
    group_of = lru_cache(SHARED_TEXTS)(prompt_group)  # and one object for the rows of a prompt
    return Manifest(
        name=name,
        path=table.path,
        image_root=image_root,
        images=images,
        prompts=prompts,
        labels=labels,
        explanations=table.columns[found["explanation"]] if "explanation" in found else empty,
        groups=[group or (prompt and group_of(prompt)) for group, prompt in zip(groups, prompts, strict=True)],
        sources=sources,
        splits=table.columns[found["split"]] if "split" in found else empty,
        places=table.places(),
        label_ranges=ranges,
        notes=(*read_so, *notes),
    )


def find_columns(table: Table) -> dict[str, str]:
    """Return the column of the table for each field that it has one for, the best alias of each."""
    by_lower = {name.lower(): name for name in reversed(table.columns)}
    return {
        column: next(by_lower[alias] for alias in aliases if alias in by_lower)
        for column, aliases in ALIASES.items()
        if any(alias in by_lower for alias in aliases)
    }


def _required(table: Table, found: dict[str, str], column: str) -> list[str]:
    if column not in found:
        close = nearest(column, table.columns)
        hint = f"rename {close!r} to {column!r}" if close else f"found: {', '.join(table.columns)}"
        raise UserError(f"missing column {column!r}", place=table.path, remedy=hint)
    cells = table.columns[found[column]]
    row = next((row for row, cell in enumerate(cells) if not cell), None)
    if row is not None:
        raise UserError(f"empty {column}", place=table.place(row, found[column]), remedy="fill it in or remove the row")
    return cells


def _prompts(table: Table, found: dict[str, str]) -> list[str]:
    """Return the prompts, '' where a row has none; a column that is probably misspelt is not passed over."""
    if "prompt" in found:
        return table.columns[found["prompt"]]
    close = nearest(
        "prompt", [name for name in table.columns if name not in found.values() and not is_numeric(table.columns[name])]
    )
    if close:
        raise UserError("missing column 'prompt'", place=table.path, remedy=f"rename {close!r} to 'prompt'")
    return [""] * len(table.lines)


def _mask_unprompted(table: Table, prompts: list[str], labels: dict[str, NDArray[np.float64]]) -> list[str]:
    """Take the labels that see a prompt from the rows that have none, and say what such rows are good for.

    Raises:
        UserError: no label is left.
    """
    none_N = np.array([not prompt for prompt in prompts], dtype=bool)
    if not none_N.any():
        return []
    blind = [label for label in LABELS if need_prompts([label])]
    lost = {label: int((~np.isnan(labels[label][none_N])).sum()) for label in blind}
    for label in blind:
        labels[label][none_N] = labels[f"{label}_std"][none_N] = np.nan
    words = " and ".join(f"{count:,} labels of {label}" for label, count in lost.items() if count)
    if words and all(np.isnan(labels[label]).all() for label in LABELS):
        raise UserError(f"has {words} and no prompts to go with them", place=table.path, remedy="add a column prompt")
    who = "no row has a prompt" if none_N.all() else f"{none_N.sum():,} rows have no prompt"
    note = f"{who}: of use for {' and '.join(label for label in LABELS if label not in blind)} alone"
    return [f"{note}; {words} are left out" if words else note]


def _read_labels(
    table: Table, found: dict[str, str], given: Mapping[str, LabelRange]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, LabelRange], list[str]]:
    num_rows, notes = len(table.lines), list[str]()
    labels = {name: np.full(num_rows, np.nan) for label in LABELS for name in (label, f"{label}_std")}
    ranges = {}
    for label in LABELS:
        if label in found:
            labels[label], ranges[label], said = read_label(table, found[label], label, given.get(label))
            notes += said
            if f"{label}_std" in found:
                labels[f"{label}_std"] = read_label_std(table, found[f"{label}_std"], ranges[label])
    return labels, ranges, notes


def _refuse_outside(table: Table, column: str, images: list[str], root: Path) -> None:
    for row in rows_outside(images, root):
        raise UserError(
            f"image {images[row]!r} lies outside {root}",
            place=table.place(row, column),
            remedy="give --image-root, or --allow-outside to permit it",
        )


def rows_outside(images: Sequence[str], root: Path) -> Iterator[int]:
    """Yield the rows whose image path leaves the root.

    By the text alone (cheap, every row), so that a manifest from elsewhere cannot name /etc through `..`; symbolic
    links that leave the root are caught when the file is opened (images.py).
    """
    base = os.path.join(os.path.normpath(root.absolute()), "")  # noqa: PTH118 - ends in one separator, also for /
    for row, image in enumerate(images):
        joined = os.path.join(base, image)  # noqa: PTH118 - Path objects cost five times as much, on every row
        if not os.path.normpath(joined).startswith(base):
            yield row
