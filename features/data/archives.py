"""Tar archives of pictures, as WebDataset and img2dataset write them: members by name, read where they lie.

The headers are read once, which gives the place of every member; a picture is then read like a file, without what
stands before it. Knows tar. Must not know what a member means.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 512  # bytes of a header; two of zeros end an archive
MEMBER_BYTES = 250  # about what the place of a member takes in memory
AGAIN = "copy or pack it again"


class Place(NamedTuple):
    """Where the bytes of a member lie in the archive."""

    offset: int
    size: int


class Archive:
    """An archive and the places of its regular files, by their names without `./` and `/` in front.

    Of two members of one name the later counts, as for tar itself; `left_out` counts members by what they are.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.left_out = path, Counter[str]()
        self.members: dict[str, Place] = {}
        self._read_headers()

    @property
    def kept_bytes(self) -> int:
        """About what it takes in memory."""
        return MEMBER_BYTES * len(self.members)

    def has(self, inside: str) -> bool:
        """Tell whether there is such a member."""
        return inside in self.members

    def read(self, inside: str) -> bytes:
        """Return the bytes of a member.

        Raises:
            KeyError: there is none of that name.
            UserError: the archive ends before it does.
        """
        place = self.members.get(inside)
        if place is None:
            raise KeyError("no such member")
        # A handle of its own each time: several threads read at once.
        with self.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            content = bytearray()
            while len(content) < place.size and (part := file.read(place.size - len(content))):
                content += part
        if len(content) < place.size:
            raise self._cut(place.offset + len(content), inside)
        return bytes(content)

    def read_start(self, inside: str) -> bytes:
        """Return the first block of a member, or all of one that is shorter."""
        place = self.members[inside]
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return file.read(min(place.size, BLOCK))

    def _read_headers(self) -> None:
        last, end = "its beginning", 0
        try:
            with tarfile.open(self.path, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # which would hold every header
                    last, end = member.name, archive.offset
                    self._take(member)
                end = archive.offset
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise self._cut(end, last) from error
        # Whatever is no header ends the reading without a word: an archive ends with zeros alone.
        with self.path.open("rb") as file:
            file.seek(end)
            block = file.read(BLOCK)
        if len(block) < BLOCK or any(block):
            raise self._cut(end, last)

    def _take(self, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name.lstrip("/")) if member.name else ""
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            self.left_out["link or device" if not member.isreg() else "sparse file"] += 1
        elif name in {"", "."} or name.startswith("../"):
            self.left_out["member whose name leads out of the archive"] += 1
        else:
            if name in self.members:
                self.left_out["earlier member of the same name"] += 1
            self.members[name] = Place(member.offset_data, member.size)

    def _cut(self, offset: int, last: str) -> UserError:
        return UserError(f"is cut or damaged at byte {offset:,}, behind {last}", place=self.path, remedy=AGAIN)
