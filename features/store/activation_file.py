"""Boundary files: what a tower gives at its cut for each image or text, so that later epochs run only what is after it.

Safe as a feature cache is, by the same means: full size from the start, a status and a checksum for each entry, a seal
and a rename at the end. Knows h5py. Must not know towers or how entries are computed. `docs/cache.md` has the layout.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import prove_space, publish, require_space, reserve, sync_folder
from deltaclip.features.store.integrity import (
    SEAL_BYTES,
    break_seal,
    find_damage,
    has_seal,
    row_checksums,
    write_seal,
)
from deltaclip.features.store.schema import DONE, KEY_BYTES, PENDING, allocate, commit, selection
from deltaclip.features.store.writer import STORED_DTYPE, draft_path, part_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray


FORMAT, VERSION = "deltaclip-boundary", 1
ANEW = "remove it, and it is made again"
COPY_BYTES = 64 << 20  # taken over at a time


def boundary_path(cache: Path, kind: str, frozen_blocks: int, *, view: str, precision: str) -> Path:
    """Return where the boundary file of a cut lies: beside the feature cache, and named after it."""
    stored = "fp32" if precision == "fp32" else "fp16"
    return cache.with_name(f"{cache.stem}.boundary-{kind}-{frozen_blocks}-{view}-{stored}.h5")


def boundary_bytes(num_entries: int, boundary_shape: tuple[int, ...], precision: str) -> int:
    """Return at least what a boundary file takes on the disk."""
    entry_bytes = int(np.prod(boundary_shape)) * np.dtype(STORED_DTYPE[precision]).itemsize
    return num_entries * (entry_bytes + KEY_BYTES + 8) + (1 << 14)


class BoundaryWriter:
    """An unfinished boundary file; only one process may hold it (`base.files.one_writer`)."""

    def __init__(self, part: Path, file: h5py.File) -> None:
        self._part, self._file = part, file

    @classmethod
    def start(
        cls, path: Path, keys: NDArray[np.uint8], *, shape: tuple[int, ...], identity: dict[str, Any]
    ) -> BoundaryWriter:
        """Go on with an interrupted file, or lay out a new one that takes over the entries of the old ones.

        Args:
            path: of the finished file.
            keys: (E, 32) SHA-256 of each entry's content, E > 0.
            shape: of an entry.
            identity: all that changes an entry but its content, as JSON values; holds `precision`.

        Raises:
            UserError: what is there is for something else; the disk is too small.
        """
        part = part_path(path)
        if part.exists():
            break_seal(part)  # of a run that was killed between the seal and the rename
            old = _open(part, "r+")
            _check_identity(old, identity, part)
            if np.array_equal(old["sha256"], keys):
                return cls(part, old)
            old.close()
        draft = draft_path(path)
        writer = cls(draft, _lay_out(draft, keys, shape=shape, identity=identity))
        for source in (path, part):
            if source.exists():
                writer._take_over(source, identity)
        writer.close()
        draft.replace(part)
        sync_folder(part.parent)
        return cls(part, _open(part, "r+"))

    def todo(self) -> NDArray[np.int64]:
        """Return the entries that are not there, rising."""
        return np.flatnonzero(self._file["status"][:] == PENDING)

    def put(
        self,
        entries: Sequence[int] | NDArray[np.int64],
        x_B: NDArray[np.floating],
        *,
        is_finite: bool | None = None,
    ) -> None:
        """Store a batch, (B, *shape), at rising `entries`; durable when this returns.

        Whether all of it `is_finite` as it is stored, a device tells sooner; None looks.

        Raises:
            UserError: a value is not finite, or too large for the numbers that are stored.
        """
        where = selection(np.asarray(entries))
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            stored = np.asarray(x_B, dtype=self._file["x"].dtype)
        if not (np.isfinite(stored).all() if is_finite is None else is_finite):
            what = f"the tower gives values at the cut that {stored.dtype} does not hold"
            raise UserError(what, place=self._part, remedy="give --precision fp32")
        self._file["x"][where], self._file["crc32"][where] = stored, _checksums(stored)
        commit(self._file, self._part)
        self._file["status"][where] = DONE
        commit(self._file, self._part)

    def finish(self, path: Path) -> None:
        """Give the file its name `path`: seal, fsync, rename."""
        assert not self.todo().size, "finish() before every entry was stored"
        x = self._file["x"].id
        place = int(x.get_offset()), int(x.get_storage_size())
        self.close()
        write_seal(self._part, [place])
        publish(self._part, path)

    def close(self) -> None:
        """Close the file; what was stored stays, and can be gone on with."""
        if self._file:
            commit(self._file, self._part)
            self._file.close()

    def _take_over(self, source: Path, identity: dict[str, Any]) -> None:
        if damage := find_damage(source):
            raise UserError(damage, place=source, remedy=ANEW)
        with _open(source, "r") as old:
            _check_identity(old, identity, source)
            by_key = {
                key.tobytes(): entry for entry, key in enumerate(old["sha256"][:]) if old["status"][entry] == DONE
            }
            keys = self._file["sha256"][:]
            pairs = [(entry, by_key[key]) for entry in self.todo() if (key := keys[entry].tobytes()) in by_key]
            at_once = max(1, COPY_BYTES // max(1, int(old["x"].dtype.itemsize * np.prod(old["x"].shape[1:]))))
            for start in range(0, len(pairs), at_once):
                block = pairs[start : start + at_once]
                x_B = np.stack([old["x"][row] for _, row in block])
                sound = _checksums(x_B) == np.array([old["crc32"][row] for _, row in block])
                if sound.any():  # the others are computed again
                    self.put(np.array([entry for entry, _ in block])[sound], x_B[sound])


class BoundaryReader:
    """A finished boundary file; any number of threads may read it at once."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self.keys = path, np.asarray(file["sha256"])
        self.identity: dict[str, Any] = json.loads(file.attrs["identity"])
        self._checksums = np.asarray(file["crc32"])
        x = file["x"]
        # Contiguous, and the file never changes: read as memory, past HDF5's one lock.
        self._x = np.memmap(path, dtype=x.dtype, mode="r", offset=x.id.get_offset(), shape=x.shape)

    @classmethod
    def open(
        cls, path: Path, identity: dict[str, Any] | None = None, *, keys: NDArray[np.uint8] | None = None
    ) -> BoundaryReader:
        """Open a finished file.

        Args:
            path: the file.
            identity: what must have made it; None takes any.
            keys: (E, 32) of the entries that it must hold, in this order; None takes any.

        Raises:
            UserError: no such file, damaged, not finished, or made by something else or of something else.
        """
        if not path.is_file():
            raise UserError("no such boundary file", place=path, remedy="fill it first")
        if damage := find_damage(path):
            raise UserError(damage, place=path, remedy=ANEW)
        with _open(path, "r") as file:
            if not has_seal(path):
                raise UserError("is not complete", place=path, remedy=ANEW)
            if identity is not None:
                _check_identity(file, identity, path)
            if keys is not None and not np.array_equal(file["sha256"], keys):
                remedy = "give the same command again: another one has filled it meanwhile"
                raise UserError("holds other images or texts, or in another order", place=path, remedy=remedy)
            return cls(path, file)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def size_bytes(self) -> int:
        """Bytes of all entries."""
        return int(self._x.nbytes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an entry."""
        return tuple(self._x.shape[1:])

    def read(self, entries: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """Return entries in any order, (B, *shape) as stored: float16 or float32.

        Raises:
            UserError: an entry is not what was computed.
        """
        import torch

        rows = np.asarray(entries, dtype=np.int64)
        x_B = np.asarray(self._x[rows])
        damaged = np.flatnonzero(_checksums(x_B) != self._checksums[rows])
        if damaged.size:
            message = f"is damaged ({damaged.size:,} of {len(rows):,} entries read, the first is {rows[damaged[0]]})"
            raise UserError(message, place=self.path, remedy=ANEW)
        return torch.from_numpy(x_B)


def _lay_out(draft: Path, keys: NDArray[np.uint8], *, shape: tuple[int, ...], identity: dict[str, Any]) -> h5py.File:
    assert len(keys), "a boundary file of nothing"
    needed_bytes = boundary_bytes(len(keys), shape, identity["precision"])
    require_space(draft.parent, needed_bytes, "the boundary cache")
    prove_space(draft, needed_bytes)  # HDF5 does not survive a write that fails: it must not meet one
    file = h5py.File(draft, "w", locking=False, userblock_size=SEAL_BYTES)
    allocate(file, "x", (len(keys), *shape), STORED_DTYPE[identity["precision"]])
    allocate(file, "crc32", (len(keys),), np.uint32)
    file["sha256"], file["status"] = keys, np.full(len(keys), PENDING, np.uint8)
    file.attrs["format"], file.attrs["schema_version"] = FORMAT, VERSION
    file.attrs["identity"] = json.dumps(identity, sort_keys=True)
    commit(file, draft)
    reserve(draft, draft.stat().st_size)  # no hole that could fail to fill later
    return file


def _checksums(x_B: NDArray[Any]) -> NDArray[np.uint32]:
    return row_checksums(x_B.reshape(len(x_B), -1))


def _open(path: Path, mode: str) -> h5py.File:
    try:
        file = h5py.File(path, mode, locking=False)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"is no readable HDF5 file ({reason})", place=path, remedy=ANEW) from error
    if file.attrs.get("format") != FORMAT or file.attrs.get("schema_version") != VERSION:
        file.close()
        raise UserError(f"is no boundary file of version {VERSION}", place=path, remedy=ANEW)
    return file


def _check_identity(file: h5py.File, identity: dict[str, Any], path: Path) -> None:
    found, wanted = json.loads(file.attrs["identity"]), json.loads(json.dumps(identity))
    different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if different:
        file.close()
        name = different[0]
        message = f"was made with another {name} ({found.get(name)}, not {wanted.get(name)})"
        raise UserError(message, place=path, remedy=ANEW)
