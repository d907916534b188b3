"""Files that appear whole or not at all, locks and fingerprints; all that one system has and another lacks.

Knows the file system. Must not know what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import MachineError, UserError, system_number
from deltaclip.base.progress import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

# What file systems answer that have no such operation: some of networks, ZFS, those of other systems.
_NOT_HERE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
_BLOCK_BYTES = 1 << 20
_NAME_CHARS = 60  # of a result's name in a temporary one: names end at 255 bytes


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable: without this the new name can vanish with the power.

    Windows has no such call for a folder, and keeps its names in a journal.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until what was written to `path` is on the disk."""
    descriptor = os.open(path, os.O_RDWR)  # Windows syncs what may be written alone
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name: fsync, rename, fsync of the folder."""
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def publish_new(temporary: Path, path: Path) -> Path:
    """Give a finished file or folder a name that nothing has, and return it: `path`, or the next one that is free.

    Whoever took `path` while the work went on keeps it, and a line says where the result is.
    """
    sync = sync_folder if temporary.is_dir() else sync_file
    sync(temporary)
    free, number = path, 1
    while not _rename_new(temporary, free):
        number += 1
        free = path.with_name(f"{path.name if temporary.is_dir() else path.stem}-{number}")
        free = free if temporary.is_dir() else free.with_name(free.name + path.suffix)
    sync_folder(free.parent)
    if free != path:
        say(f"{path}: was made by somebody else meanwhile; the result is {free}")
    return free


def _rename_new(temporary: Path, path: Path) -> bool:
    """Rename, and tell whether that was possible: never onto something that is there."""
    if os.path.lexists(path):
        return False
    if temporary.is_dir():
        try:
            temporary.rename(path)
        except OSError:
            if os.path.lexists(path):  # since the line above
                return False
            raise
        return True
    try:
        os.link(temporary, path)  # refuses what is there, which a rename does on Windows alone
    except FileExistsError:
        return False
    except (OSError, AttributeError):  # a file system, or a system, without links
        temporary.rename(path)
        return True
    temporary.unlink()
    return True


class _Named:
    """Tells of which result the disk's refusals are: libraries leave its name out, or name the temporary file."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self._path, self._temporary = path, temporary

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, UserError) or (number := system_number(error)) is None:
            return
        named = getattr(error, "filename", None)
        if named is None or Path(os.fsdecode(named)).is_relative_to(self._temporary):
            raise OSError(number, os.strerror(number), str(self._path)) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` only if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:_NAME_CHARS]}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_umask())
    try:
        with _Named(path, temporary):
            yield temporary
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Growing:
    """A folder while it is made: `work` is what to write into, `path` its name, in the end perhaps another one."""

    work: Path
    path: Path


@contextlib.contextmanager
def whole_folder(path: Path, *, may_be_taken: bool = False) -> Iterator[Growing]:
    """Yield a temporary folder beside `path`; it becomes `path` only if the block ends without an error.

    What took the name meanwhile keeps it: the folder then gets the next free one, which `Growing.path` says. With
    `may_be_taken` that holds also for what was there before.

    Raises:
        UserError: `path` exists already; a finished folder is never overwritten.
    """
    if path.exists() and not may_be_taken:
        raise UserError("already exists", place=path, remedy="give another name or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:_NAME_CHARS]}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    growing = Growing(temporary, path)
    try:
        with _Named(path, temporary):
            yield growing
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o666 & ~_umask())  # safetensors writes private files
                    sync_file(file)
                elif file.is_dir():
                    sync_folder(file)
            growing.path = publish_new(temporary, path)  # its names first, then its own
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def keep_result(path: Path, write: Callable[[Path], Path | None]) -> Path:
    """Write a finished result by `write(path)`, and return where it lies: what `write` returns, or `path`.

    Where the disk refuses it, a folder for temporary files is tried, so that hours of work are not lost.

    Raises:
        MachineError: the result lies there.
        OSError: nor could it be written there.
    """
    try:
        return write(path) or path
    except OSError as error:
        rescued = _rescue(path, write)
        if rescued is None:
            raise
        remedy = f"what was computed is in {rescued}: move it to where there is room"
        raise MachineError(error.strerror or str(error), place=path, remedy=remedy) from error


def _rescue(path: Path, write: Callable[[Path], Path | None]) -> Path | None:
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="deltaclip-"))
        return write(folder / path.name) or folder / path.name
    except OSError:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return None


def write_json(path: Path, values: Any) -> None:
    """Write JSON values, indented; whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8", newline="\n")


def check_place(path: Path, option: str = "--out") -> None:
    """Refuse, before any work, a result that could not be written to `path`.

    Raises:
        UserError: something on the way to it is no folder.
        MachineError: there is no right to write there.
    """
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise UserError("is no folder", place=folder, remedy=f"give another {option}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MachineError("may not be written to", place=folder, remedy=f"give another {option}, or change its rights")


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
    with warnings.catch_warnings():  # where the system has no locks, the library says so, and locks by a name
        warnings.filterwarnings("ignore", message="only soft file lock is available")
        from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(path.name + ".lock"), blocking=False, mode=0o666 & ~_umask())
    try:
        with _Named(path, Path(lock.lock_file)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flock not supported")  # the library then locks by a name
            lock.acquire()
    except Timeout as error:
        remedy = "wait for it to end or give another --out"
        raise UserError("another process is writing this file", place=path, remedy=remedy) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # while still held; Windows removes no file that is open
            Path(lock.lock_file).unlink()
        lock.release()


def is_abandoned(path: Path, process: int) -> bool:
    """Tell whether `path` is this user's, of a process by this number that has ended.

    False where nothing can tell, as on Windows, where to ask for a process is to end it.

    Raises:
        OSError: there is no such path.
    """
    if not hasattr(os, "getuid") or path.stat().st_uid != os.getuid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
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


def reserve(path: Path, size_bytes: int) -> None:
    """Have the disk set aside `size_bytes` for a file, whose content stays: no later write into it can fail for space.

    Raises:
        OSError: with the path; the disk, a quota or a limit does not allow it.
    """
    with _Named(path, path), path.open("r+b") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
                return
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
        # Written as it is, what was a hole in the file has a place on the disk.
        file.truncate(max(size_bytes, file.seek(0, os.SEEK_END)))
        for start in range(0, size_bytes, _BLOCK_BYTES):
            file.seek(start)
            block = file.read(min(_BLOCK_BYTES, size_bytes - start))
            file.seek(start)
            file.write(block)


def prove_space(path: Path, size_bytes: int) -> None:
    """Ask the disk for `size_bytes` at `path` and give them back: quotas and limits show here, not in the work.

    Raises:
        OSError: with the path; the file is gone again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        reserve(path, size_bytes)
    finally:
        path.unlink()


def user_cache() -> Path:
    """Return the folder for what can be made again: `DELTACLIP_CACHE`, else `~/.cache/deltaclip` (XDG)."""
    if given := os.environ.get("DELTACLIP_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "deltaclip"
    try:
        return Path.home() / ".cache" / "deltaclip"
    except RuntimeError:  # a user without a home: containers have them
        return Path(tempfile.gettempdir()) / "deltaclip"
