"""Shards of a table: found, read as one cache without copying a vector, or merged into one.

Which shards make a table is told by their names and headers: missing and foreign ones are refused by name. Names,
labels and the index of what lies where are put together in memory, 0.7 KB a row; vectors stay in the shards and are
read, and checked, from there. Merged caches are rows one after another, every image and text once. Knows readers and
the writer. Must not know backbones or how the shards came to be.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.base.progress import Progress
from deltaclip.features.data.images import ImageContent
from deltaclip.features.data.manifest import Manifest
from deltaclip.features.data.sharding import Shard
from deltaclip.features.data.views import ANCHORS, CENTER, RECIPES, of_images
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import (
    CODE_COLUMNS,
    DONE,
    MISSING_KEY,
    StoredPairs,
    ViewLayout,
    lay_out,
    make_plan,
    number_columns,
    write_attributes,
)
from deltaclip.features.store.writer import (
    StoreWriter,
    check_recipes,
    check_request,
    draft_path,
    find_content,
    part_path,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.base.vocabulary import Target
    from deltaclip.features.store.reader import Kind
    from deltaclip.features.store.schema import Plan


# ---- Several caches of one backbone as one: rows one after another, every image and text once


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
    targets = _common_targets(stores)
    numbers: dict[str, list[NDArray[np.float32]]] = {name: [] for name in number_columns(targets)}
    readable = {key for store in stores for key in _keys(store)[store.status() == DONE].tolist()}
    seen: dict[bytes, int] = {}  # the place of a row among those of all caches
    pairs: list[StoredPairs] = []
    for number, store in zip(sets, stores, strict=True):
        found, keys, reasons, frames = store.rows(usable=False), _keys(store), store.reasons(), store.more_frames()
        texts = np.append(store.texts(), "")  # -1, no explanation, is the last one
        text = {name: column[:] for name, column in found.text.items()} | {"explanation": texts[found.explanation]}
        nothing = np.full(len(found), np.nan, dtype=np.float32)
        labels = {name: found.numbers.get(name, nothing) for name in numbers}
        digests = _digests(keys[found.image], [*labels.values()], [text[name] for name in rows])
        new = [row for row, digest in enumerate(digests) if digest not in seen]
        for place, row in enumerate(new, start=len(contents)):
            seen.setdefault(digests[row], place)
        if (own := store.preferences(usable=False)) is not None:
            pairs.append(_moved_pairs(own, store, np.array([seen[digest] for digest in digests]), targets))
        position = store.positions()[new]
        places.append(np.stack([np.full_like(position, number), position]))
        for name, column in rows.items():
            column.extend(text[name][new])
        for name, parts in numbers.items():
            parts.append(labels[name][new])
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
            targets=targets,
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
    plan = replace(plan, dataset=about | _common_root(datasets) | _common_agreement(datasets))
    return replace(plan, preferences=_joined_pairs(pairs, order)) if pairs else plan


def _moved_pairs(
    pairs: StoredPairs, store: FeatureStore, place_N: NDArray[np.int64], targets: Sequence[Target]
) -> StoredPairs:
    """Return the pairs of a cache with the places that its rows and targets have among those of all."""
    target_of = np.array([targets.index(target) for target in store.targets], dtype=np.int32)
    return replace(pairs, a_P=place_N[pairs.a_P], b_P=place_N[pairs.b_P], target_P=target_of[pairs.target_P])


def _joined_pairs(parts: Sequence[StoredPairs], order: NDArray[np.int64]) -> StoredPairs:
    """Return the pairs of all caches, without those that an earlier cache has; a pair may stand twice in one."""
    row_of, seen, kept = np.argsort(order), set[tuple[Any, ...]](), list[tuple[Any, ...]]()
    for part in parts:
        columns = part.columns() | {"a": row_of[part.a_P], "b": row_of[part.b_P]}
        pairs = list(zip(*(column.tolist() for column in columns.values()), strict=True))
        kept += [pair for pair in pairs if pair not in seen]
        seen.update(pairs)
    a, b, preferred, target = zip(*kept, strict=True)
    return StoredPairs(
        a_P=np.array(a, np.int64),
        b_P=np.array(b, np.int64),
        preferred_P=np.array(preferred, np.float32),
        target_P=np.array(target, np.int32),
    )


def _common_targets(stores: Sequence[FeatureStore]) -> tuple[Target, ...]:
    """Return the targets that any of the caches has, each once; refuse one that raters saw differently."""
    found: dict[str, tuple[Target, FeatureStore]] = {}
    for store in stores:
        for target in store.targets:
            first, other = found.setdefault(target.name, (target, store))
            if target != first:
                message = f"{target.name} sees the {target.sees}, in {other.path.name} the {first.sees}"
                raise UserError(message, place=store.path, remedy="extract one of them again with another --target")
    return tuple(target for target, _ in found.values())


def _common_root(datasets: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the folder of the images if the caches that record it agree: file names are relative to it."""
    roots = {dataset["image_root"] for dataset in datasets if "image_root" in dataset}
    return {"image_root": roots.pop()} if len(roots) == 1 else {}


def _common_agreement(datasets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how well raters agree if all caches say the same, as shards of one table do."""
    found = [dataset.get("agreement") for dataset in datasets]
    return {"agreement": found[0]} if found[0] and all(each == found[0] for each in found) else {}


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
    numbers_N = np.stack(arrays, axis=1) if arrays else np.empty((len(keys), 0), dtype=np.float32)
    for key, numbers, cells in zip(keys, numbers_N, zip(*texts, strict=True), strict=True):
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


# ---- Which shards make a table, and whether all are there: missing and foreign ones are refused by name


_NAME = re.compile(r"(?P<stem>.+)\.shard-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.[^.]*)?")


@dataclass(frozen=True)
class Mark:
    """What a shard says of itself: which it is, of which state of which table."""

    shard: Shard
    table: str

    @property
    def of(self) -> tuple[int, str]:
        """What all shards of one set have in common."""
        return self.shard.count, self.table


def read_mark(store: FeatureStore) -> Mark | None:
    """Return what a cache says of itself as a shard, None where it is none."""
    found = store.header.get("shard")
    return Mark(Shard(found["number"], found["count"]), found["table"]) if found else None


def check_sets(stores: Sequence[FeatureStore]) -> list[int]:
    """Refuse shards whose set is not complete.

    Returns:
        for each cache the number of the set that it belongs to; a cache that is no shard is a set by itself.

    Raises:
        UserError: names the shard that is missing, or one of another table or state, and the command that makes it.
    """
    marks = [read_mark(store) for store in stores]
    sets: dict[object, list[int]] = {}
    for number, mark in enumerate(marks):
        sets.setdefault(mark.of if mark else number, []).append(number)
    lacking = {members[0]: _missing([mark for n in members if (mark := marks[n])]) for members in sets.values()}
    if any(lacking.values()):
        _refuse_foreign(stores, marks)
    for first, missing in lacking.items():
        if missing:
            path = missing[0].path(whole_path(stores[first].path))
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            remedy = f"make it by the same `deltaclip extract` with --shard {missing[0]}"
            raise UserError(f"shard {missing[0]}{more} is missing", place=path, remedy=remedy)
    numbers = {member: number for number, members in enumerate(sets.values()) for member in members}
    return [numbers[number] for number in range(len(stores))]


def _missing(marks: Sequence[Mark]) -> list[Shard]:
    there = {mark.shard.number for mark in marks}
    return (
        [Shard(number, marks[0].shard.count) for number in range(1, marks[0].shard.count + 1) if number not in there]
        if marks
        else []
    )


def _refuse_foreign(stores: Sequence[FeatureStore], marks: Sequence[Mark | None]) -> None:
    """Refuse a shard that has the count of others and another table, as after rows were added and not all made anew."""
    found = [(store, mark) for store, mark in zip(stores, marks, strict=True) if mark]
    by_count: dict[int, dict[str, list[FeatureStore]]] = {}
    for store, mark in found:
        by_count.setdefault(mark.shard.count, {}).setdefault(mark.table, []).append(store)
    for count, tables in by_count.items():
        if len(tables) > 1:
            # The few are the strangers; of as many, the later ones.
            groups = sorted(tables.values(), key=len, reverse=True)
            stranger = groups[-1][0]
            message = f"is a shard of another table, or of another state of it, than {groups[0][0].path.name}"
            remedy = f"give the same `deltaclip extract` with each --shard from 1/{count}: only what is new is computed"
            raise UserError(message, place=stranger.path, remedy=remedy)


def whole_path(path: Path) -> Path:
    """Return the name of the cache that a shard of this name is of; the name itself where it is none of a shard."""
    found = _NAME.fullmatch(path.name)
    return path.with_name(found["stem"] + (found["suffix"] or "")) if found else path


def find_shards(whole: Path) -> dict[int, list[Path]]:
    """Return by their count the files named as finished shards of the cache `whole`, in order of their numbers."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(whole.parent.glob("*.shard-*-of-*")) if whole.parent.is_dir() else []:
        name = _NAME.fullmatch(path.name)
        if name and whole_path(path) == whole:
            found.setdefault(int(name["count"]), {})[int(name["number"])] = path
    return {count: [shards[number] for number in sorted(shards)] for count, shards in sorted(found.items())}


def find_set(path: Path) -> list[Path] | None:
    """Return the shards that `path` stands for: a pattern (`x.shard-*-of-4.h5`), or a cache that lies there in shards.

    Returns:
        None where `path` is a file, or nothing of that name is there.

    Raises:
        UserError: there are sets of several sizes.
    """
    if path.exists():
        return None
    sets = find_shards(whole_path(path.with_name(path.name.replace("*", "0"))))
    if "*" in path.name:
        sets = {count: kept for count, paths in sets.items() if (kept := [p for p in paths if p.match(path.name)])}
        if not sets:
            raise UserError("no such shards", place=path, remedy="make them with `deltaclip extract --shard I/N`")
    if len(sets) > 1:
        found = " and ".join(f"1/{count}" for count in sets)
        remedy = f"name one set: {next(iter(sets.values()))[0].name.partition('.shard-')[0]}.shard-*-of-N{path.suffix}"
        raise UserError(f"there are shards of several sets ({found})", place=path, remedy=remedy)
    return next(iter(sets.values()), None)


def set_size(whole: Path) -> int | None:
    """Return of how many shards those that lie there, finished or begun, are; None where there is none.

    Raises:
        UserError: they are of several sets.
    """
    begun = {path.with_name(path.name.removesuffix(".part")) for path in whole.parent.glob("*.shard-*-of-*")}
    names = [name for path in begun if (name := _NAME.fullmatch(path.name)) and whole_path(path) == whole]
    counts = sorted({int(name["count"]) for name in names})
    if len(counts) > 1:
        found = " and ".join(f"1/{count}" for count in counts)
        raise UserError(f"there are shards of several sets ({found})", place=whole, remedy="give --ray-shards")
    return counts[0] if counts else None


def find_sibling(whole: Path, shard: Shard) -> FeatureStore | None:
    """Open another shard of the same set, finished or not; None where there is none yet."""
    for number in range(1, shard.count + 1):
        path = Shard(number, shard.count).path(whole)
        for there in (path, part_path(path), path):  # the last one if it was finished meanwhile
            if number != shard.number and there.exists():
                try:
                    return FeatureStore.open(there, unfinished=True)
                except (UserError, FileNotFoundError):
                    if there.exists():
                        raise
    return None


# ---- The shards of a table read as one cache, without copying a vector


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
        vectors |= {("images", view): _join(file, stores, "images", view) for view in of_images(layouts)}
        if ANCHORS in layouts:
            vectors[ANCHORS, CENTER] = _join(file, stores, ANCHORS, CENTER)
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
    group, keys = file[f"views/{view}" if kind == "images" else kind], file[f"{kind}/sha256"][:]
    name = view if kind == "images" else kind
    having = [store for store in stores if kind == "texts" or name in store.view_layouts()]
    source, entry = np.full(len(keys), -1), np.full(len(keys), -1)
    columns = {name: group[name][:] for name in ("norm", "crc32", "status")}
    for number, store in enumerate(stores):
        if store not in having:
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
    like = having[0].group(kind, view)["embedding"]
    return Joined(
        stores=stores, kind=kind, view=view, source_K=source, entry_K=entry, width=like.shape[1], dtype=like.dtype
    )
