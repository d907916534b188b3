"""Write a feature cache so that a crash at any byte loses at most the batch in flight. Spec section 6.

The work happens in `<cache>.part`, preallocated; the finished file appears under its own name by a rename. Within
a batch: values, flush, fsync, then the status bytes that declare them valid. `docs/cache.md` says why this holds.
"""

from __future__ import annotations

import errno
import json
import os
import re
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from deltaclip.base.files import prove_space, publish, require_space
from deltaclip.features.store.schema import (
    CODE_COLUMNS,
    DONE,
    FAILED,
    FORMAT,
    NUMBER_COLUMNS,
    PENDING,
    REASON_BYTES,
    SCHEMA_VERSION,
    VIEW,
    Plan,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.store.store import FeatureStore, Kind

STORED_DTYPE = {"fp32": np.float32, "bf16": np.float16, "fp16": np.float16}
Failure = tuple[int, str]  # an image and why it has no embedding
COPY_ROWS = 65_536  # copied at a time from an older cache: about 200 MB at D = 768


def part_path(path: Path) -> Path:
    """Return where a cache lies while it is not finished."""
    return path.with_name(path.name + ".part")


class StoreWriter:
    """An unfinished cache at `part`; only one process may hold it (`base.files.one_writer`)."""

    def __init__(self, part: Path, file: h5py.File) -> None:
        self.part, self._file = part, file
        self._groups = {"images": file[f"views/{VIEW}"], "texts": file["texts"]}

    @classmethod
    def resume(cls, part: Path) -> StoreWriter:
        """Open an unfinished cache; the caller has checked that it is for the same work."""
        return cls(part, h5py.File(part, "r+", locking=False))

    @classmethod
    def create(cls, part: Path, plan: Plan, *, request: dict[str, Any], facts: dict[str, Any]) -> StoreWriter:
        """Lay out an unfinished cache of full size.

        Args:
            part: where to write; an existing file there is replaced.
            plan: rows, keys and texts.
            request: the backbone's identity.
            facts: what the backbone says of itself; holds `dim` and `precision`.

        Raises:
            UserError: the disk cannot hold it.
        """
        dtype, dim = STORED_DTYPE[facts["precision"]], int(facts["dim"])
        size_bytes = _size_bytes(plan, vector_bytes=dim * np.dtype(dtype).itemsize + REASON_BYTES + 64)
        require_space(part.parent, size_bytes, "the cache")
        prove_space(part, size_bytes)  # HDF5 does not survive a write that fails: it must not meet one
        # default libver: newer ones mark a file that was not closed as unusable
        file = h5py.File(part, "w", locking=False)
        _write_plan(file, plan)
        view = file.create_group(f"views/{VIEW}")
        for group, count in ((view, plan.num_images), (file["texts"], len(plan.texts))):
            _allocate(group, "embedding", (count, dim), dtype)
            _allocate(group, "norm", (count,), np.float32)
            group["status"] = np.zeros(count, np.uint8)
        view["status"][:] = np.where([bool(reason) for reason in plan.image_reasons], FAILED, PENDING).astype(np.uint8)
        file.attrs["format"], file.attrs["schema_version"] = FORMAT, SCHEMA_VERSION
        file.attrs["complete"] = np.uint8(0)
        file.attrs["facts"] = json.dumps(facts)
        file.attrs["dataset"] = json.dumps(plan.dataset)
        file.attrs["header"] = json.dumps({"request": request, "plan": plan.digest()})
        writer = cls(part, file)
        writer.commit()
        os.posix_fallocate(file.id.get_vfd_handle(), 0, part.stat().st_size)  # no hole that could fail to fill later
        return writer

    def todo(self, kind: Kind) -> NDArray[np.int64]:
        """Return the images or texts that have neither an embedding nor a reason, in order, (K,) int64."""
        return np.flatnonzero(self._groups[kind]["status"][:] == PENDING)

    def put(
        self,
        kind: Kind,
        entries: Sequence[int] | NDArray[np.int64],
        unit_BD: NDArray[Any],
        norm_B: NDArray[Any],
    ) -> None:
        """Store a batch of embeddings, float (B, D) and (B,), at rising `entries`; durable when this returns."""
        group, where = self._groups[kind], _selection(np.asarray(entries))
        group["embedding"][where], group["norm"][where] = unit_BD, norm_B
        self.commit()
        group["status"][where] = DONE
        self.commit()

    def put_truncated(self, entries: NDArray[np.int64], truncated_B: NDArray[np.bool_]) -> None:
        """Say which texts were cut at the context length; made durable by the `put` that follows."""
        self._file["texts/truncated"][_selection(entries)] = truncated_B

    def put_images(
        self, entries: Sequence[int], vectors: tuple[NDArray[Any], NDArray[Any]] | None, failed: Sequence[Failure]
    ) -> None:
        """Store a batch of images, those that could not be read included; durable when this returns.

        Args:
            entries: rising images that have an embedding.
            vectors: their embeddings (B, D) and lengths (B,); None where `entries` is empty.
            failed: rising (image, reason) of the others.
        """
        view, places = self._groups["images"], [*entries, *(entry for entry, _ in failed)]
        if vectors is not None:
            where = _selection(np.asarray(entries))
            view["embedding"][where], view["norm"][where] = vectors
        for entry, reason in failed:
            self._file["images/reason"][entry] = _fit(reason)
        self.commit()
        # All of the batch counts from one write on, or nothing: a run that resumes then cuts the same batches.
        first, last = min(places), max(places)
        status = view["status"][first : last + 1]
        status[np.asarray(entries, dtype=np.int64) - first] = DONE
        status[np.array([entry for entry, _ in failed], dtype=np.int64) - first] = FAILED
        view["status"][first : last + 1] = status
        self.commit()

    def reuse(self, old: FeatureStore) -> None:
        """Take over every embedding whose content `old` already holds."""
        for kind in ("images", "texts"):
            old_status = old.group(kind)["status"][:]
            new, source = _matches(self._file[f"{kind}/sha256"][:], self.todo(kind), old.keys(kind), old_status)
            for start in range(0, len(new), COPY_ROWS):
                block, rows = new[start : start + COPY_ROWS], source[start : start + COPY_ROWS]
                vectors = old.group(kind)
                if kind == "texts":
                    self.put_truncated(block, old.truncated()[rows])
                self.put(kind, block, _gather(vectors["embedding"], rows), _gather(vectors["norm"], rows))

    def has_images(self) -> bool:
        """Tell whether any image has an embedding."""
        return bool((self._groups["images"]["status"][:] == DONE).any())

    def first_reason(self) -> str:
        """Return why the first image has no embedding."""
        return bytes(self._file["images/reason"][0]).decode(errors="replace")

    def discard(self) -> None:
        """Close the file and remove it."""
        self.close()
        self.part.unlink()

    def finish(self, path: Path) -> None:
        """Give the cache its name `path`: complete flag, flush, fsync, rename."""
        assert not self.todo("images").size, "finish() before every image was stored"
        assert not self.todo("texts").size, "finish() before every text was stored"
        self._file.attrs.modify("complete", np.uint8(1))
        self.close()
        publish(self.part, path)

    def close(self) -> None:
        """Close the file; what was stored stays and can be resumed."""
        if self._file:
            self.commit()
            self._file.close()

    def commit(self) -> None:
        """Wait until all that was written is on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.id.get_vfd_handle())
        except (RuntimeError, OSError) as error:  # h5py gives a RuntimeError that holds the number
            found = re.search(r"errno = (\d+)", str(error))
            number = int(found[1]) if found else getattr(error, "errno", None) or errno.EIO
            raise OSError(number, os.strerror(number), str(self.part)) from error


def _size_bytes(plan: Plan, *, vector_bytes: int) -> int:
    """Return at least what the file will take: 64 bytes for each string's place in HDF5's heap, 128 for a row."""
    strings = [
        *plan.texts,
        *plan.row_files,
        *plan.image_files,
        *(name for names in plan.names.values() for name in names),
    ]
    text_bytes = sum(len(text.encode()) + 64 for text in strings)
    num_vectors = plan.num_images + len(plan.texts)
    return num_vectors * vector_bytes + len(plan.row_files) * 128 + text_bytes + (1 << 20)


def _allocate(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    # Early allocation fixes the layout before the first batch; no fill, or 10 million rows would be written twice.
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, dcpl=properties)


def _write_plan(file: h5py.File, plan: Plan) -> None:
    text = h5py.string_dtype()
    reasons = np.array([_fit(reason) for reason in plan.image_reasons], dtype=f"S{REASON_BYTES}")
    for kind, keys in (("images", plan.image_keys), ("texts", plan.text_keys)):
        file[f"{kind}/sha256"] = keys
    file["images/reason"] = reasons
    file.create_dataset("images/file", data=plan.image_files, dtype=text)
    file.create_dataset("texts/text", data=plan.texts, dtype=text)
    file["texts/truncated"] = np.zeros(len(plan.texts), np.uint8)
    rows = file.create_group("rows")
    rows.create_dataset("file", data=plan.row_files, dtype=text)
    rows["image"], rows["prompt"], rows["explanation"] = plan.row_image, plan.row_prompt, plan.row_explanation
    for column in NUMBER_COLUMNS:
        rows[column] = plan.numbers[column]
    for column in CODE_COLUMNS:
        rows[column] = plan.codes[column]
        file.create_dataset(f"names/{column}", data=plan.names[column], shape=(len(plan.names[column]),), dtype=text)


def _fit(reason: str) -> bytes:
    return reason.encode()[:REASON_BYTES]


def _selection(entries: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    # A slice is one write; a list of points is one per row.
    first, last = int(entries[0]), int(entries[-1])
    return slice(first, last + 1) if last - first + 1 == len(entries) else entries


def _matches(
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
    return np.asarray(dataset[_selection(distinct)])[inverse]
