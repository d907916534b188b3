"""Files that appear whole or not at all, locks and fingerprints.

Knows the file system. Must not know what the files mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable: without this the new name can vanish with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until what was written to `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name: fsync, rename, fsync of the folder."""
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_umask())
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` only if the block ends without an error.

    Raises:
        UserError: `path` exists already; a finished folder is never overwritten.
    """
    if path.exists():
        raise UserError("already exists", place=path, remedy="give another name or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes private files
                sync_file(file)
            elif file.is_dir():
                sync_folder(file)
        sync_folder(temporary)  # its names, before it has one itself
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    # mkstemp and mkdtemp make private entries; a result should have the rights a plain open() gives.
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Hold the writer's lock of `path`; the lock goes with the process, also when it is killed.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            remedy = "wait for it to end or give another --out"
            raise UserError("another process is writing this file", place=path, remedy=remedy) from error
        if _same_file(descriptor, lock):
            break
        os.close(descriptor)  # its owner removed the name between our open and our lock: once more
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while still held, so that nobody can hold a lock without a name
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, read in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, size_bytes: int, what: str) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        UserError: names the folder, the size needed and the size free.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < size_bytes:
        raise UserError(
            f"{what} needs {size_bytes / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free",
            place=folder,
            remedy="free some space or give another --out",
        )


def prove_space(path: Path, size_bytes: int) -> None:
    """Ask the disk for `size_bytes` at `path` and give them back: quotas and limits show here, not in the work.

    Raises:
        OSError: with the path; the file is gone again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
        path.unlink()


def user_cache() -> Path:
    """Return the folder for what can be made again: `DELTACLIP_CACHE`, else `~/.cache/deltaclip` (XDG)."""
    if given := os.environ.get("DELTACLIP_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaclip"
