"""What lies in a folder: its images, and everything else counted by what it is, so that nothing is left out unsaid.

Images are known by their content, which costs a look at the first bytes of a file; a file that has the name of an image
is listed whatever it holds, so that its reader can say what is wrong with it. Knows names and first bytes. Must not
know how images are decoded.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.kinds import kind_of_bytes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

IMAGE_SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"}
    | {".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"}
)
# What systems and programs put beside people's files; names that begin with a dot are hidden everywhere.
SYSTEM_NAMES = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".tmp", ".filepart", ".!ut", ".aria2")
SNIFFED = 512  # bytes; a tar archive says what it is at 257
PLAIN_PPM = re.compile(rb"P[1-6]\s+(#|\d)")  # the one image that starts like a text
# Kinds of `base.kinds` that are no image, by the words that count them; then further beginnings of files, at a place.
KINDS = {"pdf": "page of PDF or PostScript"} | dict.fromkeys(
    ("zip", "gzip", "bzip2", "xz", "zstd", "7z", "rar", "tar"), "archive"
)
MARKS = (
    (0, re.compile(rb"8BPS"), "Photoshop image"),
    (0, re.compile(rb"v/1\x01|#\?RADIANCE"), "HDR image"),
    (0, re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg", re.DOTALL), "SVG image"),
    (0, re.compile(rb"%!PS"), "page of PDF or PostScript"),
    (4, re.compile(rb"ftyp|moov|mdat"), "video"),
    (0, re.compile(rb"\x1aE\xdf\xa3|FLV\x01|\0\0\x01[\xba\xb3]|OggS|RIFF....AVI ", re.DOTALL), "video"),
    (0, re.compile(rb"ID3|fLaC|\xff[\xfb\xf3\xf2]|RIFF....WAVE", re.DOTALL), "audio file"),
)
PLURALS = {
    "link to a folder": "links to folders",
    "pipe or device": "pipes or devices",
    "page of PDF or PostScript": "pages of PDF or PostScript",
    "link out of the folder": "links out of the folder",
    "link or device": "links or devices",
    **{
        f"{noun} {rest}": f"{noun}s {rest}"
        for noun, rest in (
            ("picture", "without a row in the metadata"),
            ("picture", "whose name is no text"),
            ("file", "whose name is no text"),
            ("earlier member", "of the same name"),
            ("member", "whose name leads out of the archive"),
        )
    },
}
IMAGE, FOLDER = "image", "folder"


class Listing(NamedTuple):
    """The images of a folder and of those in it, by path; and what else is there, each with the words for its kind."""

    images: list[Path]
    others: dict[Path, str]

    def counts(self, used: Collection[Path] = ()) -> dict[str, int]:
        """Return how many files of each kind are no images, the most first, without those that were `used`."""
        return dict(Counter(kind for path, kind in self.others.items() if path not in used).most_common())


def list_folder(folder: Path) -> Listing:
    """Return what a folder and the folders in it hold; hidden ones are not entered, links to folders not followed."""
    found = dict(_walked(folder))
    # By the parts of the path, as people see them in a tree.
    ordered = sorted(found, key=lambda path: path.parts)
    others = {path: found[path] for path in ordered if found[path] != IMAGE}
    return Listing([path for path in ordered if found[path] == IMAGE], others)


def count_words(counts: dict[str, int]) -> str:
    """Return `3 text files, 1 hidden file`, and what to install for pictures that could be read."""
    from deltaclip.features.data.pillow import lacking

    return ", ".join(
        f"{count:,} {kind if count == 1 else PLURALS.get(kind, f'{kind}s')}"
        + (f" ({remedy})" if (remedy := lacking(kind)) else "")
        for kind, count in counts.items()
    )


def is_system_name(name: str) -> bool:
    """Tell names that people did not give: hidden ones, and what systems and offices leave behind."""
    return name.startswith((".", "~$")) or name.lower() in SYSTEM_NAMES


def is_image_name(name: str) -> bool:
    """Tell whether a file's name says that it is an image that is read here."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - a Path costs ten times as much


def kind_of(path: Path) -> str:
    """Return what a file is, `image` or other words, by its first bytes; an empty text where it cannot be read."""
    try:
        start = _start(path)
    except OSError:
        return ""
    return kind_of_start(start)


def _walked(folder: Path) -> Iterator[tuple[Path, str]]:
    to_enter = [folder]
    base = os.path.join(os.path.realpath(folder), "")  # noqa: PTH118 - ends in one separator
    while to_enter:
        inside = to_enter.pop()
        try:
            entries = list(os.scandir(inside))
        except OSError:
            if inside == folder:
                raise
            yield inside, "unreadable folder"
            continue
        for entry in entries:
            kind = _kind_of_entry(entry, base)
            path = inside / entry.name
            if kind == FOLDER:
                to_enter.append(path)
            else:
                yield path, kind


def _kind_of_entry(entry: os.DirEntry[str], base: str) -> str:
    is_folder = entry.is_dir(follow_symlinks=False)
    if is_system_name(entry.name):
        return "hidden folder" if is_folder else "hidden file"
    if is_folder:
        return FOLDER
    if entry.name.lower().endswith(UNFINISHED) or entry.name.endswith("~"):
        return "unfinished or temporary file"
    if entry.is_symlink():
        return _kind_of_link(entry, base)
    return IMAGE if is_image_name(entry.name) else _kind_of_file(entry)


def _kind_of_link(entry: os.DirEntry[str], base: str) -> str:
    try:
        if entry.is_dir():
            return "link to a folder"
    except OSError:  # links in a circle
        return IMAGE if is_image_name(entry.name) else "broken link"
    if is_image_name(entry.name):
        return IMAGE
    return _kind_of_file(entry) if os.path.realpath(entry.path).startswith(base) else "link out of the folder"


def _kind_of_file(entry: os.DirEntry[str]) -> str:
    try:
        status = entry.stat()
    except OSError:
        return "broken link"
    if not stat.S_ISREG(status.st_mode):
        return "pipe or device"
    if not status.st_size:
        return "empty file"
    return kind_of(Path(entry.path)) or "unreadable file"


def _start(path: Path) -> bytes:
    # Not to wait, should it be a pipe; Windows lacks the flag.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        return os.read(handle, SNIFFED)
    finally:
        os.close(handle)


def kind_of_start(start: bytes) -> str:
    """Return what a file is, `image` or other words, by its first `SNIFFED` bytes."""
    from deltaclip.features.data.pillow import AVIF, format_of, lacking, plugin_format

    if AVIF.match(start):
        return IMAGE
    if words := plugin_format(start):
        return words if lacking(words) else IMAGE
    for place, mark, kind in MARKS:
        if mark.match(start, place):
            return kind
    known = kind_of_bytes(start)
    if known is not None and known.name in KINDS:
        return KINDS[known.name]
    if _is_text(start):
        return IMAGE if PLAIN_PPM.match(start) else "text file"
    return IMAGE if format_of(start) else "other file"


def _is_text(start: bytes) -> bool:
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        return True
    # Letters of any 8-bit alphabet, without the control characters that only pixels and programs have.
    return not any(byte < 9 or 13 < byte < 27 or 27 < byte < 32 for byte in start)
