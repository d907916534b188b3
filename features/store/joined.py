"""The shards of a table read as one cache, without copying a vector.

Knows shards and the reader. Must not know who reads. Names, labels and the index of what lies where are put together in
memory, 0.7 KB a row; vectors stay in the shards and are read, and checked, from there.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from deltaclip.features.data.views import CENTER, RECIPES
from deltaclip.features.store.layout import lay_out, write_attributes
from deltaclip.features.store.schema import DONE, ViewLayout
from deltaclip.features.store.sets import find_set, whole_path
from deltaclip.features.store.shards import common_views, merged_plan
from deltaclip.features.store.store import FeatureStore
from deltaclip.features.store.writer import find_content

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.store.store import Kind


def open_cache(path: Path, *, unfinished: bool = False) -> FeatureStore:
    """Open a cache, or all shards of one as it: by its plain name where only shards lie, or by a pattern.

    Raises:
        UserError: see `FeatureStore.open`; a shard is missing, or does not belong to the others.
    """
    paths = find_set(path)
    return open_shards(paths) if paths else FeatureStore.open(path, unfinished=unfinished)


def open_shards(paths: Sequence[Path]) -> FeatureStore:
    """Open finished shards as one cache: each row, image and text once, in the order of the table.

    Raises:
        UserError: a shard is missing, damaged, or made by another backbone, recipe or from another table.
    """
    with contextlib.ExitStack() as opened:
        stores = [opened.enter_context(FeatureStore.open(path)) for path in paths]
        views, first = common_views(stores), stores[0]
        plan = merged_plan(stores)
        file = opened.enter_context(_file_in_memory())
        # Of no width: what they hold stays where it is.
        layouts = {CENTER: ViewLayout(width=0, recipe=RECIPES[CENTER])}
        layouts |= {name: ViewLayout(width=0, recipe=layout.recipe) for name, layout in views.items()}
        lay_out(file, plan, layouts, dtype=np.dtype(np.float32))
        write_attributes(file, plan, request=first.header["request"], facts=first.facts)
        file.attrs.modify("complete", np.uint8(1))
        vectors: dict[tuple[Kind, str], Joined] = {("texts", CENTER): _join(file, stores, "texts", CENTER)}
        vectors |= {("images", view): _join(file, stores, "images", view) for view in layouts}
        return FeatureStore(whole_path(paths[0]), file, vectors=vectors, opened=opened.pop_all())


def _file_in_memory() -> h5py.File:
    # HDF5 tells open files apart by their names, those in memory too: two sets may be open at once.
    return h5py.File(f"shards-{uuid.uuid4()}", "w", driver="core", backing_store=False)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Vectors of shards as one dataset: that of entry k is number `entry_K[k]` of `stores[source_K[k]]`, none at -1."""

    stores: Sequence[FeatureStore]
    kind: Kind
    view: str
    source_K: NDArray[np.int64]
    entry_K: NDArray[np.int64]
    width: int
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Return (K, W)."""
        return len(self.source_K), self.width

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.source_K) * self.width

    def __len__(self) -> int:
        return len(self.source_K)

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        source, entry = self.source_K[rows], self.entry_K[rows]
        if np.ndim(source) == 0:
            return np.asarray(self[int(rows) : int(rows) + 1][0])
        found = np.zeros((len(source), self.width), dtype=self.dtype)
        for number, store in enumerate(self.stores):
            mine = np.flatnonzero(source == number)
            if mine.size:
                distinct, inverse = np.unique(entry[mine], return_inverse=True)
                found[mine] = store.take(self.kind, distinct, view=self.view)[inverse]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: FBT001 - numpy's protocol
        return self[:] if dtype is None else self[:].astype(dtype, copy=bool(copy))


def _join(file: h5py.File, stores: Sequence[FeatureStore], kind: Kind, view: str) -> Joined:
    """Say where each vector lies, and put together what stands beside them."""
    group, keys = file[f"views/{view}"] if kind == "images" else file["texts"], file[f"{kind}/sha256"][:]
    source, entry = np.full(len(keys), -1), np.full(len(keys), -1)
    columns = {name: group[name][:] for name in ("norm", "crc32", "status")}
    for number, store in enumerate(stores):
        if kind == "images" and view not in store.view_names():
            continue
        there = store.group(kind, view)
        new, old = find_content(keys, np.flatnonzero(source < 0), store.keys(kind), there["status"][:])
        source[new], entry[new] = number, old
        for name, values in columns.items():
            values[new] = there[name][:][old]
        if kind == "texts":
            for name, found in (("truncated", store.truncated()), ("tokens", store.tokens())):
                there = group[name][:]
                there[new] = found[old]
                group[name][:] = there
    columns["status"][source >= 0] = DONE
    for name, values in columns.items():
        group[name][:] = values
    like = next(store for store in stores if kind == "texts" or view in store.view_names()).group(kind, view)[
        "embedding"
    ]
    return Joined(
        stores=stores, kind=kind, view=view, source_K=source, entry_K=entry, width=like.shape[1], dtype=like.dtype
    )
