"""Files at an address (`https://`, `s3://`, `gs://`, `hf://`): fetched whole, kept on the disk while this process runs.

Requests that fail for a while are repeated, and counted. Knows addresses and fsspec. Must not know what is in a file.
"""

from __future__ import annotations

import contextlib
import errno
import http
import importlib.util
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltaclip.base.errors import MachineError, UserError, moved
from deltaclip.base.files import is_abandoned
from deltaclip.base.progress import say
from deltaclip.features.data.addresses import WEB, RemotePath, address, forget_secrets, full_address
from deltaclip.features.data.listing import is_system_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# Scheme -> the module that fsspec needs for it.
MODULES = {"https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
TRIES = 4
WAIT_S = 0.25  # before the second try, four times as long before each further one
LONGEST_WAIT_S = 30.0  # that a server may ask for
CONNECT_S, SILENT_S = 20.0, 60.0
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
AT_ONCE = 8
KEPT_BYTES = 16 << 30  # of copies on the disk, and never more than half of what is free there
MAX_IMAGE_BYTES = 256 << 20
MAX_IMAGE_S = 300.0
FOLDER = "deltaclip-remote-"  # then the process, so that what a killed one left can be told
# Classes of errors of libraries that fsspec calls; only modules that are there already are asked for theirs.
ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("requests", "RequestException"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
FOR_GOOD: dict[type[OSError], str] = {
    FileNotFoundError: "there is no such file",
    PermissionError: "no right to read it",
    IsADirectoryError: "is a folder there, not a file",
}
OF_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_CONNECTION = frozenset(
    {"ClientConnectorError", "ClientConnectorDNSError", "ConnectionTimeoutError", "EndpointConnectionError"}
    | {"ConnectTimeoutError", "ConnectionError", "ConnectError", "ConnectTimeout"}
)


class NotFetched(Exception):  # noqa: N818 - a reason to list, not an error to stop at
    """Why an address could not be fetched, in words without its secrets."""


# ---- What it needs, and what is to be said of it


def require(paths: Iterable[Path], *, place: str | Path) -> None:
    """Refuse addresses whose scheme needs a module that is not installed.

    Raises:
        UserError: names the first such module, and the extra.
    """
    for scheme in dict.fromkeys(path.scheme for path in paths if isinstance(path, RemotePath)):
        for module in ("fsspec", MODULES.get(scheme, "fsspec")):
            if importlib.util.find_spec(module) is None:
                message = f"{scheme}:// needs {module}, which is not installed"
                remedy = "install it with: pip install 'deltaclip[remote]', or download the files and give their folder"
                raise UserError(message, place=place, remedy=remedy)


def announced(images: Sequence[str], root: Path, *, place: Path) -> list[str]:
    """Say at once how many of the images are fetched, and from where; returns that line, none where none is.

    Args:
        images: as `paths.understood` gives them.
        root: folder that they are relative to.
        place: of the table, for messages.

    Raises:
        UserError: a module that is needed for it is not installed.
    """
    is_far = isinstance(root, RemotePath)
    far = [
        there for image in images if is_far or "://" in image if isinstance(there := address(root, image), RemotePath)
    ]
    if not far:
        return []
    require(far, place=place)
    hosts = Counter(path.host for path in far)
    named = ", ".join(host for host, _ in hosts.most_common(3)) + (f" and {len(hosts) - 3:,} more" * (len(hosts) > 3))
    line = f"{len(far):,} of {len(images):,} images are fetched from {named}"
    say(line)
    return [line]


@dataclass
class Tally:
    """What was fetched: files and bytes, and requests that were repeated, by why."""

    files: int = 0
    size_bytes: int = 0
    repeated: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Tally:
        """Return it as it is now."""
        return Tally(self.files, self.size_bytes, self.repeated.copy())

    def since(self, earlier: Tally) -> list[str]:
        """Return a line of what was added to an earlier one; none where nothing was."""
        files, size, again = self.files - earlier.files, self.size_bytes - earlier.size_bytes, Counter(self.repeated)
        again.subtract(earlier.repeated)
        again = +again
        if not files and not again:
            return []
        reasons = ", ".join(
            f"{why}: {count}" for why, count in sorted(again.items(), key=lambda each: (-each[1], each[0]))
        )
        return [
            f"fetched {files:,} files, {size / 1e6:,.1f} MB"
            + (f"; {again.total():,} requests were repeated ({reasons})" if again else "")
        ]


def tally() -> Tally:
    """Return what this process has fetched so far."""
    with _LOCK:
        return _TALLY.copy()


def begin() -> Tally:
    """Forget what was fetched before, which may be another file by now; returns the tally that a stage begins with."""
    forget_secrets()
    with _LOCK:
        _DEAD.clear()
        _ANSWERED.clear()
        for copies in _HERE:
            copies.clear()
        return _TALLY.copy()


_LOCK, _TALLY, _GATE = threading.RLock(), Tally(), threading.BoundedSemaphore(AT_ONCE)
_ANSWERED, _DEAD = set[str](), dict[str, str]()


# ---- Copies on the disk, while this process runs


@dataclass
class _Copy:
    path: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    size_bytes: int = -1  # not there yet
    holders: int = 0


class _Copies:
    """Files by address, those that were used last; of this process alone, also after a fork."""

    def __init__(self) -> None:
        self.process, self.folder = os.getpid(), Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
        self._kept, self._count = OrderedDict[str, _Copy](), 0
        weakref.finalize(self, _remove, str(self.folder), self.process)
        self._most_bytes = min(KEPT_BYTES, shutil.disk_usage(self.folder).free // 2)

    def take(self, path: RemotePath) -> _Copy:
        """Return the copy of a file, that may have to be fetched; `release` says that it is no longer needed."""
        with _LOCK:
            copy = self._kept.get(str(path))
            if copy is None:
                self._count += 1
                name = re.sub(r"[^\w.-]", "_", path.file_name)[-120:]
                copy = self._kept[str(path)] = _Copy(self.folder / str(self._count) / name)
            self._kept.move_to_end(str(path))
            copy.holders += 1
            return copy

    def clear(self) -> None:
        """Remove all copies that nobody holds."""
        for url in [url for url, kept in self._kept.items() if not kept.holders]:
            shutil.rmtree(self._kept.pop(url).path.parent, ignore_errors=True)

    def release(self, copy: _Copy) -> None:
        """Let a copy go; those that were used longest ago are removed where all take too much."""
        with _LOCK:
            copy.holders -= 1
            total = sum(max(0, kept.size_bytes) for kept in self._kept.values())
            for url, kept in list(self._kept.items()):
                if kept.holders or not (total > self._most_bytes or kept.size_bytes < 0):
                    continue
                total -= max(0, kept.size_bytes)
                shutil.rmtree(kept.path.parent, ignore_errors=True)
                del self._kept[url]


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a fork has the same object, and not the same files
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove what processes left that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER}*-*"):
        number = left.name.removeprefix(FOLDER).partition("-")[0]
        with contextlib.suppress(OSError, ValueError):
            if is_abandoned(left, int(number)):
                shutil.rmtree(left, ignore_errors=True)


_HERE: list[_Copies] = []  # one of this process


def _copies() -> _Copies:
    with _LOCK:
        if not _HERE or _HERE[0].process != os.getpid():
            _sweep()
            _HERE[:] = [_Copies()]
        return _HERE[0]


@contextlib.contextmanager
def held(path: RemotePath, *, most_bytes: int | None = None) -> Iterator[Path]:
    """Give the copy of a file on this machine, fetched where it is not there, which stays while it is held.

    Args:
        path: its address.
        most_bytes: larger files are refused; None: as much as the disk has room for.

    Raises:
        NotFetched: why it could not be had.
        MachineError: a host that has answered before does not any more, or the disk is full.
    """
    copies = _copies()
    copy = copies.take(path)
    try:
        with copy.lock:
            if copy.size_bytes < 0:
                copy.path.parent.mkdir(exist_ok=True)
                with _GATE:
                    _fetch(path, copy.path, most_bytes=most_bytes)
                copy.size_bytes = copy.path.stat().st_size
        yield copy.path
    finally:
        copies.release(copy)


@contextlib.contextmanager
def table_at(path: RemotePath) -> Iterator[Path]:
    """Give the copy of a table or an archive as `held` does; what is said of the copy is said of the address.

    Raises:
        UserError: it could not be had.
    """
    require([path], place=path)
    try:
        with held(path) as local:
            try:
                yield local
            except UserError as error:
                raise moved(error, local, path) from error
    except NotFetched as reason:
        raise UserError(str(reason), place=path, remedy="check the address and the network") from None


def matching(pattern: RemotePath) -> list[RemotePath]:
    """Return the files that a pattern with `*`, `?` or `[ab]` names, in the order of their names.

    Raises:
        UserError: there is none, or the host cannot say what it has.
    """
    if pattern.scheme in WEB:
        message = "names files by a pattern, and web servers do not say what they have"
        raise UserError(message, place=pattern, remedy="name them in braces: {000..099}")
    require([pattern], place=pattern)
    try:
        found = sorted(_file_system(pattern.scheme).glob(str(pattern)))
    except _errors() as error:
        raise UserError(_why(error, pattern).words, place=pattern, remedy="check the address and the network") from None
    if not pattern.name.startswith("."):  # as for files here, what is hidden is named or none
        found = [name for name in found if not is_system_name(str(name).rpartition("/")[2])]
    if not found:
        raise UserError("no such file", place=pattern, remedy="check the pattern, and keep it in quotes")
    return [
        RemotePath.of(f"{pattern.scheme}://{str(name).partition('://')[2] or str(name).lstrip('/')}") for name in found
    ]


# ---- Fetching


class _TooMuchError(Exception):
    """A file is larger, or takes longer, than is permitted."""


def _fetch(path: RemotePath, target: Path, *, most_bytes: int | None) -> None:
    if path.host in _DEAD:
        raise NotFetched(_DEAD[path.host])
    why, tries = _Why("not tried"), range(1, TRIES + 1)
    for attempt in tries:
        found = _try(path, target, most_bytes=most_bytes)
        if found is None:
            with _LOCK:
                _ANSWERED.add(path.host)
                _TALLY.files += 1
                _TALLY.size_bytes += target.stat().st_size
            return
        why = found
        if not why.passing or attempt == tries[-1]:
            break
        with _LOCK:
            _TALLY.repeated[why.words] += 1
        time.sleep(max(WAIT_S * 4 ** (attempt - 1), why.wait_s))
    words = f"{why.words}, {TRIES} times" if why.passing else why.words
    if not why.no_connection:
        with _LOCK:
            _ANSWERED.add(path.host)
        raise NotFetched(words)
    if path.host in _ANSWERED:
        remedy = "check the network and give the same command again: it goes on"
        raise MachineError(f"does not answer any more ({words})", place=path.host, remedy=remedy)
    with _LOCK:
        _DEAD[path.host] = words
    raise NotFetched(words)


class _Why(NamedTuple):
    """Why a try failed; whether another may not, how long to wait for it, and whether there was a connection."""

    words: str
    passing: bool = False
    wait_s: float = 0.0
    no_connection: bool = False


def _try(path: RemotePath, target: Path, *, most_bytes: int | None) -> _Why | None:
    import fsspec

    free = shutil.disk_usage(target.parent).free
    most = free if most_bytes is None else min(most_bytes, free)
    limit = _limit(most, MAX_IMAGE_S if most_bytes else None, fsspec.Callback)
    try:
        # Where it takes an address whole, a query included, fsspec's own file system does not cut it.
        _file_system(path.scheme).get_file(full_address(path), str(target), callback=limit)
        return None if target.is_file() else _Why("there is no file")
    except _TooMuchError as error:
        target.unlink(missing_ok=True)
        if most_bytes is None or most < most_bytes:
            raise MachineError(
                "is larger than the disk has room for", place=path, remedy="free some, or set TMPDIR"
            ) from None
        return _Why(str(error))
    except _errors() as error:
        target.unlink(missing_ok=True)
        return _why(error, path)


def _limit(most_bytes: int, seconds: float | None, kind: Any) -> Any:
    end = time.monotonic() + seconds if seconds else None
    words = f"over {most_bytes / 1e6:,.0f} MB"

    class Limit(kind):  # type: ignore[misc]
        def set_size(self, size: int | None) -> None:
            if size is not None and size > most_bytes:
                raise _TooMuchError(words)

        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            if self.value > most_bytes:
                raise _TooMuchError(words)
            if end is not None and time.monotonic() > end:
                raise _TooMuchError(f"takes more than {seconds:.0f} s")

    return Limit()


def _file_system(scheme: str) -> Any:
    import fsspec

    if scheme not in WEB:
        return fsspec.filesystem(scheme)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
    return fsspec.filesystem(scheme, client_kwargs={"timeout": timeout, "trust_env": True})


def _errors() -> tuple[type[BaseException], ...]:
    found = [getattr(sys.modules[name], kind, None) for name, kind in ERRORS if name in sys.modules]
    return (OSError, EOFError, ValueError, TimeoutError, *(kind for kind in found if kind is not None))


def _why(error: BaseException, path: RemotePath) -> _Why:
    status, kind = _status(error), type(error).__name__
    if isinstance(error, FileNotFoundError) and path.scheme in WEB:
        status = 404
    if status is not None:
        phrase = next((f", {known.phrase}" for known in http.HTTPStatus if known == status), "")
        asked = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
        wait_s = min(LONGEST_WAIT_S, float(asked)) if asked.isdecimal() else 0.0
        return _Why(f"the server answers {status}{phrase}", status in PASSING, wait_s)
    if kind in NO_CONNECTION or isinstance(error, (ConnectionRefusedError, socket.gaierror)):
        return _Why(f"{path.host} cannot be reached", passing=True, no_connection=True)
    for known, words in FOR_GOOD.items():
        if isinstance(error, known):
            return _Why(words)
    if isinstance(error, OSError) and (error.filename or error.errno in OF_DISK):
        raise error
    if "Credentials" in kind:
        return _Why(f"{path.scheme}:// needs credentials, or FSSPEC_{path.scheme.upper()}_ANON=true for what is public")
    words = "no answer in time" if isinstance(error, TimeoutError) else f"the connection broke ({kind})"
    return _Why(words, passing=True)


def _status(error: BaseException) -> int | None:
    """Return the status of an answer, as the libraries keep it, None where there was none."""
    found = getattr(error, "status", None) or getattr(error, "code", None)
    answer = getattr(error, "response", None)
    if answer is not None:
        found = getattr(answer, "status_code", found)
        if isinstance(answer, dict):
            found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", found)
    return found if isinstance(found, int) and 400 <= found < 600 else None
