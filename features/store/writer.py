"""Write a feature cache so that a crash at any byte loses at most the batch in flight.

The work happens in `<cache>.part`, preallocated; the finished file appears under its own name by a rename. Within
a batch: values, flush, fsync, then the status bytes that declare them valid. `docs/cache.md` says why this holds.

All that is already there is taken over, from a finished cache or an interrupted run: extracting again computes only
what is new; another backbone is another cache, never a silent mix.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import prove_space, publish, publish_new, require_space, reserve
from deltaclip.features.data.views import ANCHORS, CENTER, LEFT_OUT, OF_TOWER, RECIPES
from deltaclip.features.store.integrity import SEAL_BYTES, break_seal, row_checksums, write_seal
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import (
    DONE,
    FAILED,
    MISSING_KEY,
    PENDING,
    Plan,
    ViewLayout,
    commit,
    fit_reason,
    lay_out,
    selection,
    size_bytes,
    write_attributes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.store.reader import Kind


# ---- Write a feature cache so that a crash at any byte loses at most the batch in flight


STORED_DTYPE = {"fp32": np.float32, "bf16": np.float16, "fp16": np.float16}
Failure = tuple[int, str]  # an image and why it has no embedding
Vectors = tuple["Sequence[int]", Any, Any]  # rising images of a view, their vectors (B, W) and lengths (B,)
COPY_ROWS = 65_536  # copied at a time from an older cache: about 200 MB at D = 768


def part_path(path: Path) -> Path:
    """Return where a cache lies while it is not finished."""
    return path.with_name(path.name + ".part")


def draft_path(path: Path) -> Path:
    """Return where a new layout is made, before it replaces anything; a kill may leave it, nobody reads it."""
    return path.with_name(path.name + ".part.new")


class StoreWriter:
    """An unfinished cache at `part`; only one process may hold it (`base.files.one_writer`)."""

    def __init__(self, part: Path, file: h5py.File) -> None:
        self.part, self._file = part, file

    @classmethod
    def resume(cls, part: Path) -> StoreWriter:
        """Open an unfinished cache; the caller has checked that it is for the same work."""
        break_seal(part)  # of a run that was killed between the seal and the rename
        return cls(part, h5py.File(part, "r+", locking=False))

    @classmethod
    def create(
        cls,
        part: Path,
        plan: Plan,
        *,
        request: dict[str, Any],
        facts: dict[str, Any],
        views: Mapping[str, ViewLayout],
    ) -> StoreWriter:
        """Lay out an unfinished cache of full size.

        Args:
            part: where to write; an existing file there is replaced.
            plan: rows, keys and texts.
            request: the backbone's identity.
            facts: what the backbone says of itself; holds `dim` and `precision`.
            views: further views by name; `center` is always there.

        Raises:
            UserError: the disk cannot hold it.
        """
        dtype, dim = np.dtype(STORED_DTYPE[facts["precision"]]), int(facts["dim"])
        layouts = {CENTER: ViewLayout(width=dim, recipe=RECIPES[CENTER]), **views}
        needed_bytes = size_bytes(plan, layouts, dtype=dtype)
        require_space(part.parent, needed_bytes, "the cache")
        prove_space(part, needed_bytes)  # HDF5 does not survive a write that fails: it must not meet one
        # default libver: newer ones mark a file that was not closed as unusable
        file = h5py.File(part, "w", locking=False, userblock_size=SEAL_BYTES)
        lay_out(file, plan, layouts, dtype=dtype)
        write_attributes(file, plan, request=request, facts=facts)
        writer = cls(part, file)
        writer.commit()
        reserve(part, part.stat().st_size)  # no hole that could fail to fill later
        return writer

    def group(self, kind: Kind, view: str = CENTER) -> h5py.Group:
        """Return the group with `embedding`, `norm` and `status` of a view of the images, of the texts or anchors."""
        return self._file[f"views/{view}" if kind == "images" else kind]

    def view_names(self) -> list[str]:
        """Return the views that the file has room for."""
        return list(self._file["views"])

    def todo(self, kind: Kind, view: str = CENTER) -> NDArray[np.int64]:
        """Return the images or texts that have neither an embedding nor a reason, in order, (K,) int64."""
        if kind == ANCHORS and ANCHORS not in self._file:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.group(kind, view)["status"][:] == PENDING)

    def put(
        self,
        kind: Kind,
        entries: Sequence[int] | NDArray[np.int64],
        vector_BW: NDArray[Any],
        norm_B: NDArray[Any],
        *,
        view: str = CENTER,
    ) -> None:
        """Store a batch of embeddings, float (B, W) and (B,), at rising `entries`; durable when this returns."""
        group, where = self.group(kind, view), selection(np.asarray(entries))
        _write_vectors(group, where, vector_BW, norm_B)
        self.commit()
        _write_status(group["status"], np.asarray(entries), np.empty(0, dtype=np.int64))
        self.commit()

    def put_tokens(
        self, entries: NDArray[np.int64], truncated_B: NDArray[np.bool_], tokens_B: NDArray[np.uint64]
    ) -> None:
        """Say which texts were cut at the context length, and what stands for their tokens, 0 where nobody knows.

        Made durable by the `put` that follows.
        """
        where = selection(entries)
        self._file["texts/truncated"][where], self._file["texts/tokens"][where] = truncated_B, tokens_B

    def put_images(self, found: Mapping[str, Vectors], failed: Sequence[Failure]) -> None:
        """Store a batch of images, those that could not be read included; durable when this returns.

        Args:
            found: by view, the images that it was computed for and their vectors.
            failed: rising (image, reason) of the others: no view of them will ever be, unless it is there.
        """
        for name, (entries, vector_BW, norm_B) in found.items():
            where = selection(np.asarray(entries))
            _write_vectors(self.group("images", name), where, vector_BW, norm_B)
        for entry, reason in failed:
            self._file["images/reason"][entry] = fit_reason(reason)
        self.commit()
        given_up = np.array([entry for entry, _ in failed], dtype=np.int64)
        for name in self.view_names():
            entries = found[name][0] if name in found else []
            status = self.group("images", name)["status"]
            _write_status(status, np.asarray(entries, dtype=np.int64), given_up)
        self.commit()

    def reuse(self, old: FeatureStore) -> None:
        """Take over every embedding whose content `old` already holds, of every view that it has.

        Raises:
            UserError: an embedding is not what was computed.
        """
        self._copy(old, "texts", CENTER)
        self._copy_tokens(old)
        if ANCHORS in old.view_layouts():
            self._copy(old, ANCHORS, CENTER)
        for view in old.view_names():
            self._copy(old, "images", view)

    def _copy(self, old: FeatureStore, kind: Kind, view: str) -> None:
        vectors = old.group(kind, view)
        new, source = find_content(
            self._file[f"{kind}/sha256"][:], self.todo(kind, view), old.keys(kind), vectors["status"][:]
        )
        for start in range(0, len(new), COPY_ROWS):
            block, rows = new[start : start + COPY_ROWS], source[start : start + COPY_ROWS]
            embedding = _gather(vectors["embedding"], rows)
            old.check_vectors(embedding, kind, view=view, rows=rows)
            if kind == "texts":
                self.put_tokens(block, old.truncated()[rows], old.tokens()[rows])
            self.put(kind, block, embedding, _gather(vectors["norm"], rows), view=view)

    def _copy_tokens(self, old: FeatureStore) -> None:
        """Take over what stands for tokens also of texts that a cache of before this was kept gave already."""
        tokens, known = self._file["texts/tokens"][:], old.tokens()
        status = np.where(known > 0, DONE, PENDING)
        new, source = find_content(
            self._file["texts/sha256"][:], np.flatnonzero(tokens == 0), old.keys("texts"), status
        )
        if len(new):
            tokens[new] = known[source]
            self._file["texts/tokens"][:] = tokens
            self.commit()

    def has_images(self) -> bool:
        """Tell whether any image has an embedding."""
        return bool((self.group("images")["status"][:] == DONE).any())

    def first_reason(self) -> str:
        """Return why the first image has no embedding."""
        return bytes(self._file["images/reason"][0]).decode(errors="replace")

    def discard(self) -> None:
        """Close the file and remove it."""
        self.close()
        self.part.unlink(missing_ok=True)

    def finish(self, path: Path, *, is_new: bool = False) -> Path:
        """Give the cache its name `path`: complete flag, seal, fsync, rename; return the name.

        One that `is_new` replaces nothing: where somebody has taken `path` meanwhile, it gets the next free name.
        """
        assert not self.todo("images").size, "finish() before every image was stored"
        assert not self.todo("texts").size, "finish() before every text was stored"
        assert not self.todo(ANCHORS).size, "finish() before every anchor was stored"
        self._file.attrs.modify("complete", np.uint8(1))
        anchors = [self._file[ANCHORS]] if ANCHORS in self._file else []
        groups = (self._file["texts"], *anchors, *self._file["views"].values())
        places = [self._place(group) for group in groups if group["embedding"].size]  # a shard may have no rows
        self.close()
        write_seal(self.part, places)
        if is_new:
            return publish_new(self.part, path)
        publish(self.part, path)
        return path

    @staticmethod
    def _place(group: h5py.Group) -> tuple[int, int]:
        dataset = group["embedding"].id
        return int(dataset.get_offset()), int(dataset.get_storage_size())

    def close(self) -> None:
        """Close the file; what was stored stays and can be resumed."""
        if self._file:
            self.commit()
            self._file.close()

    def commit(self) -> None:
        """Wait until all that was written is on the disk."""
        commit(self._file, self.part)


def _write_vectors(group: h5py.Group, where: Any, vector_BW: NDArray[Any], norm_B: NDArray[Any]) -> None:
    stored = np.asarray(vector_BW, dtype=group["embedding"].dtype)  # the checksum is of the bytes in the file
    group["embedding"][where], group["norm"][where], group["crc32"][where] = stored, norm_B, row_checksums(stored)


def _write_status(dataset: h5py.Dataset, done: NDArray[np.int64], failed: NDArray[np.int64]) -> None:
    # All of the batch counts from one write on, or nothing: a run that resumes then cuts the same batches.
    places = np.concatenate([done, failed])
    if not places.size:
        return
    first = int(places.min())
    status = dataset[first : int(places.max()) + 1]
    status[done - first] = DONE
    status[(failed - first)[status[failed - first] == PENDING]] = FAILED
    dataset[first : first + len(status)] = status


def find_content(
    keys: NDArray[np.uint8],
    todo: NDArray[np.int64],
    old_keys: NDArray[np.uint8],
    old_status: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the entries to fill, rising, and for each the entry of the old cache that has its content."""
    by_key = {old_keys[entry].tobytes(): entry for entry in np.flatnonzero(old_status == DONE)}
    pairs = [(entry, by_key[key]) for entry in todo if (key := keys[entry].tobytes()) in by_key]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _gather(dataset: h5py.Dataset, rows: NDArray[np.int64]) -> NDArray[Any]:
    # h5py wants rising, distinct indices.
    distinct, inverse = np.unique(rows, return_inverse=True)
    return np.asarray(dataset[selection(distinct)])[inverse]


# ---- Start or go on writing a cache, taking over all that is already there: a finished cache, an interrupted run


WHERE_MISSING = {"decode": "exact"}  # what an identity means that does not name it
NO_VIEWS: Mapping[str, ViewLayout] = MappingProxyType({})


def open_writer(
    path: Path,
    plan: Plan,
    *,
    request: dict[str, Any],
    facts: dict[str, Any],
    views: Mapping[str, ViewLayout] = NO_VIEWS,
) -> StoreWriter:
    """Return a writer for `plan` that already holds every embedding found in the cache or in an interrupted run.

    Args:
        path: of the finished cache.
        plan: what it is to hold.
        request: the backbone's identity.
        facts: what the backbone says of itself.
        views: views to make room for, beside `center` and those that are there already.

    Raises:
        UserError: what lies there was made by another backbone, in another precision or, of a view, by another
            recipe; it is damaged; the disk is full.
    """
    part = part_path(path)
    for store in open_left(path):  # both, before a byte is written: they may come from different requests
        with store:
            check_request(store, request)
    layouts = views_left(path, {name: layout.recipe for name, layout in views.items()}) | dict(views)
    header = plan.header(request)
    if (interrupted := open_interrupted(path)) is not None:
        with interrupted:
            is_said = interrupted.facts.get(LEFT_OUT) == facts.get(LEFT_OUT)
            can_go_on = interrupted.header == header and is_said and _has_room(interrupted, layouts)
        if can_go_on:
            return StoreWriter.resume(part)
    # A new layout is made beside the old one and replaces it when it holds all that the old one held.
    draft = draft_path(path)
    further = {name: layout for name, layout in layouts.items() if name != CENTER}
    writer = StoreWriter.create(draft, plan, request=request, facts=facts, views=further)
    try:
        for store in open_left(path):
            with store:
                writer.reuse(store)
    except UserError:
        writer.discard()
        raise
    writer.close()
    publish(draft, part)
    return StoreWriter.resume(part)


def _has_room(store: FeatureStore, views: Mapping[str, ViewLayout]) -> bool:
    return store.is_current and set(views) <= set(store.view_layouts())


def views_left(path: Path, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, ViewLayout]:
    """Return every view that earlier runs left under the name `path`.

    Args:
        path: of the finished cache.
        recipes: of the views that are asked for.

    Raises:
        UserError: one of them was made by another recipe.
    """
    found: dict[str, ViewLayout] = {}
    for store in open_left(path):
        with store:
            check_recipes(store, {name: layout.recipe for name, layout in found.items()} | dict(recipes))
            found |= store.view_layouts()
    return found


def check_recipes(
    store: FeatureStore, recipes: Mapping[str, Mapping[str, Any]], *, remedy: str = "give another --out"
) -> None:
    """Refuse a cache that has a view of one of these names and of another recipe.

    A recipe given without the part that follows from the backbone is compared without it.

    Raises:
        UserError: with every difference.
    """
    for name, layout in store.view_layouts().items():
        there = dict(layout.recipe)
        of_tower = {OF_TOWER: there[OF_TOWER]} if OF_TOWER in there else {}
        wrong = differences(there, of_tower | dict(recipes.get(name, there)))
        if wrong:
            message = f"has a view {name} of another recipe: {'; '.join(wrong)}"
            raise UserError(message, place=store.path, remedy=remedy)


def open_left(path: Path) -> Iterator[FeatureStore]:
    """Yield what earlier runs left under the name `path`: a finished cache, an interrupted run."""
    if path.exists():
        yield FeatureStore.open(path)
    if (interrupted := open_interrupted(path)) is not None:
        yield interrupted


def open_interrupted(path: Path) -> FeatureStore | None:
    """Open what an interrupted run left beside `path`; None where it left nothing."""
    part = part_path(path)
    return FeatureStore.open(part, unfinished=True) if part.exists() else None


def check_request(
    store: FeatureStore,
    request: dict[str, Any],
    *,
    remedy: str = "give another --out, or the backbone that made it",
) -> None:
    """Refuse a cache that another backbone, preprocessing or precision made than `request` says.

    Raises:
        UserError: with every difference.
    """
    wrong = differences(store.header["request"], request)
    if wrong:
        raise UserError(f"was made by another backbone: {'; '.join(wrong)}", place=store.path, remedy=remedy)


def check_data(store: FeatureStore, plan: Plan) -> None:
    """Refuse to replace a cache that has embeddings and not one image of `plan`: it is another data set's.

    Raises:
        UserError: with the name and size of that data set.
    """
    here = {key.tobytes() for key in plan.image_keys} - {MISSING_KEY}
    if not plan.num_images or not (store.status() == DONE).any():  # a shard may have no rows, or none that is usable
        return
    if not any(key.tobytes() in here for key in store.keys("images")):
        message = f"holds another data set ({store.dataset['name']}, {store.num_rows:,} rows)"
        raise UserError(message, place=store.path, remedy="give another --out or remove it")


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return what differs between the identities of two backbones, one phrase each."""
    names = dict.fromkeys([*there, *here])
    pairs = {name: tuple(side.get(name, WHERE_MISSING.get(name)) for side in (there, here)) for name in names}
    return [f"{name} {_short(a)} there, {_short(b)} here" for name, (a, b) in pairs.items() if a != b]


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
