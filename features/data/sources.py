"""Where the bytes of a row's picture come from: a file, or a place inside a file that holds many pictures.

A picture has one address, a path. Where the path goes on inside a file (`00000.tar/cat.jpg`, `train.parquet/image/17`)
the picture is a member of that archive or a cell of that table; where it is a `RemotePath`, the file is fetched first.
Nobody else needs to know. Knows paths, and which reader a file with pictures has. Must not know what a picture is,
manifests or caches.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import threading
from collections import OrderedDict
from typing import IO, TYPE_CHECKING, Protocol

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import ARROW, PARQUET, TAR, kind_of
from deltaclip.features.data.addresses import RemotePath
from deltaclip.features.data.paths import GONE, is_inside
from deltaclip.features.data.remote import MAX_IMAGE_BYTES, NotFetched, held

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOT_FILES = {
    stat.S_IFDIR: "Is a directory",
    stat.S_IFIFO: "a pipe, not a file",
    stat.S_IFSOCK: "a socket, not a file",
    stat.S_IFCHR: "a device, not a file",
    stat.S_IFBLK: "a device, not a file",
}
OUTSIDE = "lies outside the image root"
# What a part of an address must end in to be a file that the rest leads into: nobody can look.
HOLDS_PICTURES = re.compile(r"\.(tar|parquet|arrow|feather)(\?|$)", re.IGNORECASE)
KEPT_BYTES = 256 << 20  # of lists of members and windows of cells, of all files together


class UnreadableImage(Exception):  # noqa: N818 - a reason to list, not an error to stop at
    """Why a file cannot be used as an image; `str()` is the reason without the file's name."""


class UnreadableFile(UnreadableImage):
    """The bytes could not be had now; says nothing of what they are, so that another run may fare better."""


class Container(Protocol):
    """A file that holds pictures; several threads read it at a time."""

    @property
    def kept_bytes(self) -> int:
        """About what it takes in memory while it is kept."""

    def read(self, inside: str) -> bytes:
        """Return the bytes of the picture at a place inside.

        Raises:
            KeyError: there is no such place; the argument says what is not there.
            UserError: the file is damaged there.
        """

    def has(self, inside: str) -> bool:
        """Tell whether there is such a place inside."""


def read_image_bytes(path: Path, root: Path | None) -> bytes:
    """Return the bytes of an image file, or of what lies inside a file at that path.

    Args:
        path: address of the picture.
        root: folder that the file must lie in once symbolic links are followed; None permits every place.

    Raises:
        UnreadableFile: no such file or place in it, no right to read it, empty, no regular file, or outside the root.
    """
    with open_source(path, root) as file:
        return file.read()


@contextlib.contextmanager
def open_source(path: Path, root: Path | None) -> Iterator[IO[bytes]]:
    """Open a picture at its address for reading, at its first byte; see `read_image_bytes`."""
    with _refusing_files():
        try:
            opened = _open_remote(path) if isinstance(path, RemotePath) else _open_file(path, root)
        except (NotADirectoryError, FileNotFoundError):  # Windows has one error for both
            if (holder := container_of(path)) is None:
                raise
            opened = io.BytesIO(_read_inside(path, holder, root))
        with opened as file:
            yield file


@contextlib.contextmanager
def _refusing_files() -> Iterator[None]:
    try:
        yield
    except NotFetched as reason:
        raise UnreadableFile(str(reason)) from None
    except FileNotFoundError:
        raise UnreadableFile(GONE) from None
    except OSError as error:
        raise UnreadableFile(error.strerror or str(error)) from error
    except ValueError:  # a zero byte, or a letter that this machine's names cannot have
        raise UnreadableFile("not the name of a file") from None
    except MemoryError:
        raise UnreadableFile("not enough memory to read it") from None


def _open_remote(path: RemotePath) -> IO[bytes]:
    holder = container_of(path)
    if holder is not None:
        return io.BytesIO(_read_inside(path, holder, None))
    with held(path, most_bytes=MAX_IMAGE_BYTES) as local:
        content = local.read_bytes()
    if not content:
        raise UnreadableFile("empty file")
    return io.BytesIO(content)


def _open_file(path: Path, root: Path | None) -> IO[bytes]:
    refuse_outside_links(path, root)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise UnreadableFile(NOT_FILES.get(stat.S_IFMT(status.st_mode), "empty file"))
    # Not to wait, should it have become a pipe: that has no end before somebody writes to it. Windows lacks the flag.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def refuse_outside_links(path: Path, root: Path | None) -> None:
    """Refuse a file that does not lie in the root once symbolic links are followed.

    Raises:
        UnreadableFile: it lies elsewhere.
        OSError: there is no such file, or links lead in a circle.
    """
    if root is None:
        return
    # Not Path.resolve: it answers a circle of links with a RuntimeError.
    base = os.path.realpath(root)
    there = os.path.realpath(path, strict=True)
    if there != base and not there.startswith(os.path.join(base, "")):  # noqa: PTH118 - ends in one separator
        is_link = is_inside(os.path.abspath(path), root)  # noqa: PTH100 - links stay
        raise UnreadableFile("links to a file outside the image root" if is_link else OUTSIDE)


def container_of(path: Path) -> Path | None:
    """Return the file that a path goes on inside of, None where it leads through folders alone."""
    if isinstance(path, RemotePath):
        return next((above for above in path.parents if HOLDS_PICTURES.search(above.name)), None)
    try:
        return next((above for above in path.parents if above.is_file()), None)
    except (OSError, ValueError):
        return None


def is_there(path: Path) -> bool:
    """Tell whether there is a file at an address, or a picture inside one; what has to be fetched may be there."""
    if isinstance(path, RemotePath) or path.is_file():
        return True
    holder = container_of(path)
    if holder is None:
        return False
    try:
        return _OPENED.get(holder).has(path.relative_to(holder).as_posix())
    except (OSError, UserError):
        return False


def _read_inside(path: Path, holder: Path, root: Path | None) -> bytes:
    refuse_outside_links(holder, root)
    try:
        with held(holder) if isinstance(holder, RemotePath) else contextlib.nullcontext(holder) as local:
            content = _OPENED.get(local).read(path.relative_to(holder).as_posix())
    except KeyError as missing:
        raise UnreadableFile(f"{missing.args[0]} in {holder.name}") from None
    except UserError as error:
        raise UnreadableFile(f"{holder.name} {error.message}") from error
    if not content:
        raise UnreadableFile("empty file")
    return content


class _OpenedFiles:
    """Files with pictures that were read lately: their lists of members are costly to make again."""

    def __init__(self) -> None:
        self._lock, self._kept = threading.Lock(), OrderedDict[tuple[str, int, int], Container]()

    def get(self, path: Path) -> Container:
        status = path.stat()
        key = (str(path.absolute()), status.st_mtime_ns, status.st_size)  # one that was replaced is another file
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _open_container(path)
            self._kept.move_to_end(key)
            total = sum(kept.kept_bytes for kept in self._kept.values())
            while total > KEPT_BYTES and len(self._kept) > 1:
                total -= self._kept.popitem(last=False)[1].kept_bytes
            return self._kept[key]


def _open_container(path: Path) -> Container:
    kind = kind_of(path)
    if kind is TAR:
        from deltaclip.features.data.archives import Archive

        return Archive(path)
    if kind in (PARQUET, ARROW):
        from deltaclip.features.data.columnar import PictureCells

        return PictureCells(path)
    raise NotADirectoryError(20, "Not a directory", str(path))


_OPENED = _OpenedFiles()
