"""Lay out an unfinished cache in its full size: every dataset, its attributes, and the space that they will take.

Knows h5py, the schema and a plan. Must not know files on a disk or embeddings.
"""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from deltaclip.features.data.views import CENTER
from deltaclip.features.store.disk import allocate
from deltaclip.features.store.schema import (
    BLOCK_TEXTS,
    CODE_COLUMNS,
    FAILED,
    FORMAT,
    NUMBER_COLUMNS,
    PENDING,
    REASON_BYTES,
    SCHEMA_VERSION,
    Plan,
    ViewLayout,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def size_bytes(plan: Plan, view_bytes: Sequence[int]) -> int:
    """Return at least what the file will take: 64 bytes for each string's place in HDF5's heap, 128 for a row."""
    strings = chain(plan.texts, plan.row_files, plan.image_files, *plan.names.values())
    text_bytes = sum(len(text.encode()) + 64 for text in strings)
    image_bytes = plan.num_images * (sum(width + 16 for width in view_bytes) + REASON_BYTES + 64)
    vector_bytes = image_bytes + len(plan.texts) * (view_bytes[0] + 64)
    return vector_bytes + len(plan.row_files) * 128 + text_bytes + (len(view_bytes) << 20)


def lay_out(file: h5py.File, plan: Plan, views: Mapping[str, ViewLayout], *, dtype: np.dtype[Any]) -> None:
    """Make every dataset in its full size and fill those that need no backbone."""
    _write_plan(file, plan)
    unread = np.array([bool(reason) for reason in plan.image_reasons])
    for name, layout in views.items():
        view = file.create_group(f"views/{name}")
        view.attrs["recipe"] = json.dumps(layout.recipe)
        _allocate_vectors(view, (plan.num_images, layout.width), layout.stored_as(dtype))
        view["status"][:] = np.where(unread, FAILED, PENDING).astype(np.uint8)
    _allocate_vectors(file["texts"], (len(plan.texts), views[CENTER].width), dtype)


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
    for column in NUMBER_COLUMNS:
        rows[column] = plan.numbers[column]
    for column in CODE_COLUMNS:
        rows[column] = plan.codes[column]
        file.create_dataset(f"names/{column}", data=plan.names[column], shape=(len(plan.names[column]),), dtype=text)


def fit_reason(reason: str) -> bytes:
    """Return the bytes of a reason that have room in their place."""
    return reason.encode()[:REASON_BYTES]
