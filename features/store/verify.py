"""Examine a cache: every problem as one phrase.

Knows seals, checksums and the reader. Must not know what to do about a problem.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.progress import Progress
from deltaclip.features.data.views import ANCHORS
from deltaclip.features.store.integrity import damaged_rows
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import BLOCK_TEXTS, DONE, text_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import h5py

BLOCK_BYTES = 64 << 20


def find_problems(path: Path) -> list[str]:
    """Return what is wrong with a cache or with what an interrupted run left, one phrase each, in bounded memory.

    Raises:
        UserError: no such file.
    """
    if not path.is_file():
        FeatureStore.open(path)
    try:
        store = FeatureStore.open(path, unfinished=True)
    except UserError as error:
        return [error.message]
    with store:
        return list(_problems(store))


def _problems(store: FeatureStore) -> Iterator[str]:
    if "crc32" not in store.group("texts"):
        version = store.schema_version
        yield f"schema version {version} has no checksums: extract the same data again, nothing is computed"
    groups = [store.group("images", view) for view in store.view_names()]
    of_texts = [store.group("texts"), *([store.group(ANCHORS)] if ANCHORS in store.view_layouts() else [])]
    groups += of_texts
    with Progress(sum(len(group["status"]) for group in groups), "verifying", unit="rows") as progress:
        for group in groups:
            yield from _of_vectors(group, progress)
    for group in of_texts:
        yield from _of_texts(group)


def _of_texts(group: h5py.Group) -> Iterator[str]:
    texts, keys = group["text"], group["sha256"]
    wrong: list[int] = []
    for start in range(0, len(texts), BLOCK_TEXTS):
        pairs = zip(texts.asstr()[start : start + BLOCK_TEXTS], keys[start : start + BLOCK_TEXTS], strict=True)
        wrong += [start + entry for entry, (text, key) in enumerate(pairs) if key.tobytes() != text_key(text)]
    if wrong:
        name = f"{group.name.strip('/')}/sha256"
        yield f"{name}: {len(wrong):,} texts are not those of their keys, the first is text {wrong[0]}"


def _of_vectors(group: h5py.Group, progress: Progress) -> Iterator[str]:
    embedding, status = group["embedding"], group["status"][:]
    name, num_rows = f"{group.name.strip('/')}/embedding", len(embedding)
    step = max(1, BLOCK_BYTES // max(1, embedding.dtype.itemsize * embedding.shape[1]))
    damaged, unusable = [], []
    for start in range(0, num_rows, step):
        vectors, done = embedding[start : start + step], status[start : start + step]
        if "crc32" in group:
            damaged += (start + damaged_rows(vectors, group["crc32"][start : start + step], done)).tolist()
        unusable += (start + np.flatnonzero((done == DONE) & ~np.isfinite(vectors).all(axis=1))).tolist()
        progress.advance(len(done))
    for rows, words in ((damaged, "are not what was computed"), (unusable, "are not finite")):
        if rows:
            yield f"{name}: {len(rows):,} of {num_rows:,} rows {words}, the first is row {rows[0]}"
