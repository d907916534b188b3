"""Several caches of one backbone as one: rows one after another, every image and text once.

Knows readers and the writer. Must not know backbones or how the shards came to be.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.base.progress import Progress
from deltaclip.features.data.content import ImageContent
from deltaclip.features.data.manifest import Manifest
from deltaclip.features.data.views import CENTER
from deltaclip.features.store.plan import make_plan
from deltaclip.features.store.schema import CODE_COLUMNS, DONE, MISSING_KEY, NUMBER_COLUMNS
from deltaclip.features.store.sets import check_sets
from deltaclip.features.store.store import FeatureStore
from deltaclip.features.store.takeover import check_recipes, check_request
from deltaclip.features.store.writer import StoreWriter, draft_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.store.schema import Plan, ViewLayout

APART = "merge only caches of one backbone, precision and recipe of each view"


def merge(paths: Sequence[Path], out: Path) -> Path:
    """Write one cache that holds what several finished caches hold, whole or not at all, and return where.

    Rows keep their order, cache after cache, those of the shards of one table the order of the table; a row that an
    earlier cache has in every column is not repeated. A view is there if any cache has it, and left to do for the
    images of those that lack it.

    Args:
        paths: finished caches.
        out: must not exist.

    Raises:
        UserError: the caches are of different backbones or recipes, one is damaged or not complete, shards are missing,
            `out` exists.
    """
    with one_writer(out), contextlib.ExitStack() as opened:
        if out.exists():
            raise UserError("already exists", place=out, remedy="give another --merge or remove it first")
        stores = [opened.enter_context(FeatureStore.open(path)) for path in paths]
        views = common_views(stores)
        request = stores[0].header["request"]
        writer = StoreWriter.create(
            draft_path(out), merged_plan(stores), request=request, facts=stores[0].facts, views=views
        )
        try:
            with Progress(len(stores), "merging", unit="caches") as progress:
                for store in stores:
                    writer.reuse(store)
                    progress.advance(1)
            return writer.finish(out, is_new=True)
        except BaseException:
            writer.discard()
            raise


def common_views(stores: Sequence[FeatureStore]) -> dict[str, ViewLayout]:
    """Return the views that any of the caches has, beside `center`; refuse caches that do not fit together."""
    first, found = stores[0], dict[str, "ViewLayout"]()
    for store in stores:
        check_request(store, first.header["request"], remedy=APART)
        check_recipes(store, {name: layout.recipe for name, layout in found.items()}, remedy=APART)
        found |= store.view_layouts()
    return {name: layout for name, layout in found.items() if name != CENTER}


def merged_plan(stores: Sequence[FeatureStore]) -> Plan:
    """Lay out what the caches hold together: the plan of a manifest that has all their rows."""
    sets = check_sets(stores)
    contents: list[ImageContent] = []
    places: list[NDArray[np.int64]] = []
    rows: dict[str, list[str]] = {name: [] for name in ("file", "prompt", "explanation", *CODE_COLUMNS)}
    numbers: dict[str, list[NDArray[np.float32]]] = {name: [] for name in NUMBER_COLUMNS}
    readable = {key for store in stores for key in _keys(store)[store.status() == DONE].tolist()}
    seen: set[bytes] = set()
    for number, store in zip(sets, stores, strict=True):
        found, keys, reasons, frames = store.rows(usable=False), _keys(store), store.reasons(), store.more_frames()
        texts = np.append(store.texts(), "")  # -1, no explanation, is the last one
        text = {name: column[:] for name, column in found.text.items()} | {"explanation": texts[found.explanation]}
        digests = _digests(keys[found.image], [*found.numbers.values()], [text[name] for name in rows])
        new = [row for row, digest in enumerate(digests) if digest not in seen]
        seen.update(digests)
        position = store.positions()[new]
        places.append(np.stack([np.full_like(position, number), position]))
        for name, column in rows.items():
            column.extend(text[name][new])
        for name, parts in numbers.items():
            parts.append(found.numbers[name][new])
        for entry in found.image[new]:
            key = keys[entry]
            contents.append(
                ImageContent(
                    key if key != MISSING_KEY else None, "" if key in readable else reasons[entry], bool(frames[entry])
                )
            )
    # Of plain caches the order in which they were read; rows of shards go where the table had them.
    order = np.lexsort(np.concatenate(places, axis=1)[::-1])
    rows = {name: [column[row] for row in order] for name, column in rows.items()}
    datasets = [store.dataset for store in stores]
    plan = make_plan(
        Manifest(
            name="+".join(dict.fromkeys(str(dataset["name"]) for dataset in datasets)),
            path=stores[0].path,
            image_root=stores[0].path.parent,
            images=rows["file"],
            prompts=rows["prompt"],
            labels={name: np.concatenate(parts).astype(np.float64)[order] for name, parts in numbers.items()},
            explanations=rows["explanation"],
            groups=rows["group"],
            sources=rows["source"],
            splits=rows["split"],
            places=[""] * len(contents),
            label_ranges=_all_words([dataset["label_ranges"] for dataset in datasets]),
        ),
        [contents[row] for row in order],
    )
    about = {name: words for name, words in plan.dataset.items() if name != "image_root"}
    return replace(plan, dataset=about | _common_root(datasets))


def _common_root(datasets: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the folder of the images if the caches that record it agree: file names are relative to it."""
    roots = {dataset["image_root"] for dataset in datasets if "image_root" in dataset}
    return {"image_root": roots.pop()} if len(roots) == 1 else {}


def _keys(store: FeatureStore) -> NDArray[np.object_]:
    """Return the content address of each image as bytes, (I,)."""
    keys = np.empty(len(store.status()), dtype=object)
    keys[:] = [key.tobytes() for key in store.keys("images")]
    return keys


def _digests(
    keys: NDArray[np.object_], arrays: Sequence[NDArray[np.float32]], texts: Sequence[NDArray[np.object_]]
) -> list[bytes]:
    """Return 16 bytes that stand for all columns of each row: 20 million rows as tuples would not fit in memory."""
    found = []
    for key, numbers, cells in zip(keys, np.stack(arrays, axis=1), zip(*texts, strict=True), strict=True):
        state = hashlib.blake2b(key + numbers.tobytes(), digest_size=16)
        for cell in cells:
            content = cell.encode()
            state.update(len(content).to_bytes(8) + content)
        found.append(state.digest())
    return found


def _all_words(by_name: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is said of each name, all of it where the dictionaries disagree."""
    names = dict.fromkeys(name for words in by_name for name in words)
    return {name: "; ".join(dict.fromkeys(words[name] for words in by_name if name in words)) for name in names}
