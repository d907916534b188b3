"""Names, types and versions of the feature cache (`docs/cache.md` as code), its plan, and its layout on disk.

A plan is made of a manifest and the content of its files: distinct images, distinct texts, rows. Everything has its
full size from the start and is contiguous: a killed writer then leaves a readable file, and the status bytes say what
in it counts. Knows manifests and h5py. Must not know backbones or how embeddings are computed.

Shapes: N rows, I distinct images, T distinct texts, D width.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass, fields
from itertools import chain
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from deltaclip.features.data.anchors import ANCHOR_TEXTS
from deltaclip.features.data.targets import recorded_targets
from deltaclip.features.data.views import ANCHORS, CENTER, of_images

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.base.vocabulary import Target
    from deltaclip.features.data.images import ImageContent
    from deltaclip.features.data.manifest import Manifest
    from deltaclip.features.data.sharding import Part


# ---- Names, types and versions of the feature cache: `docs/cache.md` as code


FORMAT = "deltaclip-features"
SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)  # 1 had one view and no recipe; before 3, the targets were two
KEY_BYTES = 32  # SHA-256
REASON_BYTES = 96  # fixed, so that a failure is recorded without touching HDF5's heap

BLOCK_TEXTS = 65_536  # texts whose bytes are in memory at a time

PENDING, DONE, FAILED = 0, 1, 2

CODE_COLUMNS = ("group", "source", "split")
NO_TEXT = -1  # the text of a row that has none
MISSING_KEY = bytes(KEY_BYTES)  # of an image file that could not be read at all


def number_columns(targets: Sequence[Target]) -> list[str]:
    """Return the columns of numbers that rows have: the label of each target, and the SD of its ratings."""
    return [*(target.name for target in targets), *(target.std for target in targets)]


def text_key(text: str) -> bytes:
    """Return the content address of a text."""
    return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True, kw_only=True)
class ViewLayout:
    """A view as a cache has it: `width` of its vectors, and `recipe`, JSON values that say what made them."""

    width: int
    recipe: Mapping[str, Any]

    def stored_as(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the type of the vectors in a cache of `dtype`: the recipe's where it names one."""
        name = self.recipe.get("dtype")
        return np.dtype(str(name)) if name else dtype


@dataclass(frozen=True, kw_only=True)
class StoredPairs:
    """P pairs of rows that people chose between, as a cache has them.

    `a_P`, `b_P` (P,) int64 index rows, `preferred_P` (P,) float32 in [0, 1] is the probability that a is preferred and
    .5 a tie, `target_P` (P,) int32 indexes the targets of the cache.
    """

    a_P: NDArray[np.int64]
    b_P: NDArray[np.int64]
    preferred_P: NDArray[np.float32]
    target_P: NDArray[np.int32]

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the datasets by name."""
        return {"a": self.a_P, "b": self.b_P, "preferred": self.preferred_P, "target": self.target_P}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache is to hold, all but the embeddings.

    `image_keys` (I, 32) and `text_keys` (T, 32) are uint8 SHA-256; `row_image`, `row_prompt`, `row_explanation`
    (N,) int64 index images and texts, -1 (`NO_TEXT`) where a row has no such text; `numbers` holds (N,) float32 labels,
    NaN where missing; `codes` holds (N,) int32 into `names`, -1 where a cell is empty.
    """

    image_keys: NDArray[np.uint8]
    image_files: list[str]
    image_reasons: list[str]  # why a file could not be read, '' where it could
    image_frames: NDArray[np.uint8]  # 1 where a file has more frames than the one that is taken
    text_keys: NDArray[np.uint8]
    texts: list[str]
    row_files: list[str]
    row_image: NDArray[np.int64]
    row_prompt: NDArray[np.int64]
    row_explanation: NDArray[np.int64]
    numbers: dict[str, NDArray[np.float32]]
    codes: dict[str, NDArray[np.int32]]
    names: dict[str, list[str]]
    dataset: dict[str, Any]  # name, targets, label ranges
    preferences: StoredPairs | None = None
    part: Part | None = None  # of a shard: what it has of the table

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that rows have labels of."""
        return recorded_targets(self.dataset)

    @property
    def num_images(self) -> int:
        """Number of distinct images I."""
        return len(self.image_files)

    def digest(self) -> str:
        """Return a fingerprint of everything here: equal digests, equal caches but for the backbone."""
        state = hashlib.sha256()
        for field in fields(self):
            if field.name not in {"part", "preferences"}:
                _feed(state, field.name, getattr(self, field.name))
        if self.preferences is not None:  # caches without pairs keep the digest that they had before there were any
            _feed(state, "preferences", self.preferences.columns())
        if self.part:
            _feed(state, "part", self.part.to_json() | {"position": self.part.position})
        return state.hexdigest()

    def header(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what identifies a cache of this plan that is made as `request` says."""
        shard = {"shard": self.part.to_json()} if self.part else {}
        return {"request": request, "plan": self.digest(), **shard}


def _feed(state: Any, name: str, value: Any) -> None:
    # Each part goes in with its name and length, so that no two different plans give one byte stream.
    if isinstance(value, dict):
        for key in sorted(value):
            _feed(state, f"{name}.{key}", value[key])
        return
    if isinstance(value, list):
        # Twice through millions of texts rather than all of their bytes at once.
        size = sum(8 + len(str(item).encode()) for item in value)
        state.update(f"{name}:{size}:".encode())
        for start in range(0, len(value), BLOCK_TEXTS):
            parts = [str(item).encode() for item in value[start : start + BLOCK_TEXTS]]
            state.update(b"".join(len(part).to_bytes(8) + part for part in parts))
        return
    content = value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()
    state.update(f"{name}:{len(content)}:".encode())
    state.update(content)


# ---- From a manifest and the content of its files to the plan of a cache: distinct images, distinct texts, rows


def make_plan(manifest: Manifest, contents: Sequence[ImageContent], *, part: Part | None = None) -> Plan:
    """Lay out what a cache is to hold.

    Args:
        manifest: N rows.
        contents: hash or reason of the image of each row, N of them.
        part: of a shard, what its rows are of the whole table.
    """
    row_image, first_rows = _first_seen([c.sha256 or f"missing {manifest.images[r]}" for r, c in enumerate(contents)])
    explanations = [text for text in manifest.explanations if text]
    texts = list(dict.fromkeys([*(text for text in manifest.prompts if text), *explanations]))
    text_index = {text: entry for entry, text in enumerate(texts)} | {"": NO_TEXT}
    codes, names = {}, {}
    for column, values in (
        ("group", _groups(manifest, contents)),
        ("source", manifest.sources),
        ("split", manifest.splits),
    ):
        names[column] = sorted(set(values) - {""})
        code_of = {name: code for code, name in enumerate(names[column])} | {"": -1}
        codes[column] = np.array([code_of[value] for value in values], dtype=np.int32)
    return Plan(
        image_keys=_key_array([contents[row].sha256 or MISSING_KEY for row in first_rows]),
        image_files=[manifest.images[row] for row in first_rows],
        image_reasons=[contents[row].reason for row in first_rows],
        image_frames=np.array([contents[row].more_frames for row in first_rows], dtype=np.uint8),
        text_keys=_key_array([text_key(text) for text in texts]),
        texts=texts,
        row_files=manifest.images,
        row_image=row_image,
        row_prompt=np.array([text_index[text] for text in manifest.prompts], dtype=np.int64),
        row_explanation=np.array([text_index[text] for text in manifest.explanations], dtype=np.int64),
        numbers={name: manifest.labels[name].astype(np.float32) for name in number_columns(manifest.targets)},
        codes=codes,
        names=names,
        dataset={
            "name": manifest.name,
            "targets": [target.to_json() for target in manifest.targets],
            "label_ranges": {k: str(v) for k, v in manifest.label_ranges.items()},
            "image_root": str(manifest.image_root.absolute()),
            **({"agreement": manifest.agreement} if manifest.agreement else {}),
        },
        preferences=_stored(manifest),
        part=part,
    )


def _stored(manifest: Manifest) -> StoredPairs | None:
    pairs = manifest.preferences
    if pairs is None:
        return None
    place = manifest.targets.index(pairs.target)
    return StoredPairs(
        a_P=pairs.a_P,
        b_P=pairs.b_P,
        preferred_P=pairs.preferred_P.astype(np.float32),
        target_P=np.full(len(pairs), place, dtype=np.int32),
    )


def _groups(manifest: Manifest, contents: Sequence[ImageContent]) -> list[str]:
    """Return the group of each row; where neither a column nor a prompt gives one, the image by its content does."""
    return [
        group or f"image {content.sha256.hex()[:16] if content.sha256 else name}"
        for group, content, name in zip(manifest.groups, contents, manifest.images, strict=True)
    ]


def _first_seen(keys: Sequence[bytes | str]) -> tuple[NDArray[np.int64], list[int]]:
    """Return the number of each row's key, in order of appearance, and the first row of each number."""
    entry_of: dict[bytes | str, int] = {}
    first_rows: list[int] = []
    numbers = np.empty(len(keys), dtype=np.int64)
    for row, key in enumerate(keys):
        if key not in entry_of:
            entry_of[key] = len(first_rows)
            first_rows.append(row)
        numbers[row] = entry_of[key]
    return numbers, first_rows


def _key_array(keys: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)


# ---- Lay out an unfinished cache in its full size: every dataset, its attributes, and the space that they will take


def size_bytes(plan: Plan, views: Mapping[str, ViewLayout], *, dtype: np.dtype[Any]) -> int:
    """Return at least what the file will take: 64 bytes for each string's place in HDF5's heap, 128 for a row."""
    view_bytes = [views[name].width * views[name].stored_as(dtype).itemsize for name in of_images(views)]
    strings = chain(plan.texts, plan.row_files, plan.image_files, *plan.names.values())
    text_bytes = sum(len(text.encode()) + 64 for text in strings)
    image_bytes = plan.num_images * (sum(width + 16 for width in view_bytes) + REASON_BYTES + 64)
    vector_bytes = image_bytes + len(plan.texts) * (view_bytes[0] + 64)
    pair_bytes = 32 * len(plan.preferences.a_P) if plan.preferences else 0
    return vector_bytes + len(plan.row_files) * 128 + pair_bytes + text_bytes + (len(view_bytes) << 20)


def lay_out(file: h5py.File, plan: Plan, views: Mapping[str, ViewLayout], *, dtype: np.dtype[Any]) -> None:
    """Make every dataset in its full size and fill those that need no backbone."""
    _write_plan(file, plan)
    unread = np.array([bool(reason) for reason in plan.image_reasons])
    for name, layout in views.items():
        view = file.create_group(ANCHORS if name == ANCHORS else f"views/{name}")
        view.attrs["recipe"] = json.dumps(layout.recipe)
        if name == ANCHORS:
            _write_texts(view, ANCHOR_TEXTS)
            _allocate_vectors(view, (len(ANCHOR_TEXTS), layout.width), dtype)
            continue
        _allocate_vectors(view, (plan.num_images, layout.width), layout.stored_as(dtype))
        view["status"][:] = np.where(unread, FAILED, PENDING).astype(np.uint8)
    _allocate_vectors(file["texts"], (len(plan.texts), views[CENTER].width), dtype)


def _write_texts(group: h5py.Group, texts: Sequence[str]) -> None:
    group["sha256"] = _key_array([text_key(text) for text in texts])
    group.create_dataset("text", data=texts, shape=(len(texts),), dtype=h5py.string_dtype())


def write_attributes(file: h5py.File, plan: Plan, *, request: dict[str, Any], facts: dict[str, Any]) -> None:
    """Say what the file is; the header comes last and makes it a cache that can be resumed."""
    file.attrs["format"], file.attrs["schema_version"] = FORMAT, SCHEMA_VERSION
    file.attrs["complete"] = np.uint8(0)
    file.attrs["facts"] = json.dumps(facts)
    file.attrs["dataset"] = json.dumps(plan.dataset)
    file.attrs["header"] = json.dumps(plan.header(request))


def _allocate_vectors(group: h5py.Group, shape: tuple[int, int], dtype: Any) -> None:
    allocate(group, "embedding", shape, dtype)
    allocate(group, "norm", shape[:1], np.float32)
    allocate(group, "crc32", shape[:1], np.uint32)
    group["status"] = np.zeros(shape[0], np.uint8)


def _write_plan(file: h5py.File, plan: Plan) -> None:
    text = h5py.string_dtype()
    for kind, keys in (("images", plan.image_keys), ("texts", plan.text_keys)):
        file[f"{kind}/sha256"] = keys
    reasons = file.create_dataset("images/reason", (plan.num_images,), f"S{REASON_BYTES}")
    for start in range(0, plan.num_images, BLOCK_TEXTS):
        block = plan.image_reasons[start : start + BLOCK_TEXTS]
        reasons[start : start + len(block)] = np.array([fit_reason(reason) for reason in block], f"S{REASON_BYTES}")
    file["images/more_frames"] = plan.image_frames
    file.create_dataset("images/file", data=plan.image_files, dtype=text)
    file.create_dataset("texts/text", data=plan.texts, dtype=text)
    file["texts/truncated"] = np.zeros(len(plan.texts), np.uint8)
    file["texts/tokens"] = np.zeros(len(plan.texts), np.uint64)
    rows = file.create_group("rows")
    rows.create_dataset("file", data=plan.row_files, dtype=text)
    if plan.part:
        rows["position"] = plan.part.position
    rows["image"], rows["prompt"], rows["explanation"] = plan.row_image, plan.row_prompt, plan.row_explanation
    for column in number_columns(plan.targets):
        rows[column] = plan.numbers[column]
    for column in CODE_COLUMNS:
        rows[column] = plan.codes[column]
        file.create_dataset(f"names/{column}", data=plan.names[column], shape=(len(plan.names[column]),), dtype=text)
    if plan.preferences is not None:
        for name, values in plan.preferences.columns().items():
            file[f"pairs/{name}"] = values


def fit_reason(reason: str) -> bytes:
    """Return the bytes of a reason that have room in their place."""
    return reason.encode()[:REASON_BYTES]


# ---- How HDF5 files are written here


def allocate(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Make a dataset in its full size, in one piece."""
    # Early allocation fixes the layout before the first batch; no fill, or 10 million rows would be written twice.
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_obj_track_times(False)  # equal content, equal bytes
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, dcpl=properties)


def commit(file: h5py.File, path: Path) -> None:
    """Wait until all that was written is on the disk.

    Raises:
        OSError: with its number and `path`.
    """
    try:
        file.flush()
        os.fsync(file.id.get_vfd_handle())
    except (RuntimeError, OSError) as error:  # h5py gives a RuntimeError that holds the number
        found = re.search(r"errno = (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None) or errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def selection(entries: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Return how HDF5 addresses rising entries: a slice is one write, a list of points one per row."""
    first, last = int(entries[0]), int(entries[-1])
    return slice(first, last + 1) if last - first + 1 == len(entries) else entries
