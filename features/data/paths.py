"""Paths of images as people write them: which file is meant, and why there is none.

A table comes from Windows, from a web page or from another machine. What can mean one file alone is understood and
said; of the rest the cause is named. Whether a path may be followed is decided afterwards, on what was understood
(`rows_outside`, and `images` for links). Knows names of files. Must not know tables or images.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
import urllib.parse
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.errors import UserError
from deltaclip.base.places import DRIVE, is_address, readings
from deltaclip.features.data.addresses import RemotePath
from deltaclip.features.data.cells import spelled_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Only of texts that start or end so, or hold \ or % or letters of other alphabets, is asked whether their file is
# there: a million plain names cost half a second and no look at the disk.
STARTS, ENDS = frozenset("~\"'< \t\r\n"), frozenset("\"'> \t\r\n")
WEB_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # one letter is a drive of Windows
NUMBER = re.compile(r"\d+")
NEAREST_NAMES = 2000  # of a folder that the nearest name is looked for in: 5 ms
MOST_NEAREST = 50  # files of a table that it is looked for: all others have the same fault
GONE = "no such file"
UNDERSTOOD = "image paths were understood by"
UPLOADED = "/data/"  # how Label Studio names what was given to it
UPLOAD = re.compile(r"[0-9a-f]{8}-")  # which it puts before the name
KEYS: dict[str, Callable[[str], str]] = {
    "form": lambda name: unicodedata.normalize("NFC", name),
    "case": str.casefold,
    "stem": lambda name: os.path.splitext(name)[0].casefold(),  # noqa: PTH122
}


def understood(written: str, root: Path, *, allow_outside: bool = False) -> tuple[str, str]:
    """Return the path that a text names, and how it had to be read ('' where it is taken as it stands).

    A reading counts where its file is there; the text itself first. One that leaves the root is returned without a
    look, so that nobody learns from the answer what lies there, and is refused like every path that leaves it.

    Args:
        written: of an image.
        root: folder that it is relative to.
        allow_outside: whether paths may leave it.
    """
    if _is_plain(written) or _is_file(root, written):
        return written, ""
    if (downloaded := _downloaded(written, root)) is not None:
        return downloaded, "the name of the file behind their address"
    for how, reading in readings(written):
        if not (allow_outside or is_inside(reading, root)):
            return reading, how
        if (found := _in_any_form(root, reading)) is not None:
            return found, how if found == reading else " and ".join(filter(None, [how, "another Unicode form"]))
    return written, ""


def understood_all(images: Sequence[str], root: Path, *, allow_outside: bool) -> tuple[list[str], list[str]]:
    """Return the paths that texts name, and notes on how many had to be read in another way; see `understood`.

    What was at an address and lies in the root is that file; other addresses stay, without their secrets.
    """
    found, counts = list(images), Counter[str]()
    for row, image in enumerate(images):
        found[row], how = understood(image, root, allow_outside=allow_outside)
        if how:
            counts[how] += 1
        elif "://" in image and is_address(image) and found[row] == image:
            found[row] = str(RemotePath.of(image))
    return found, [f"{count:,} {UNDERSTOOD} {how}" for how, count in counts.items()]


def is_inside(image: str, root: Path) -> bool:
    """Tell by the text alone whether a path stays in a folder."""
    base = os.path.join(os.path.normpath(root.absolute()), "")  # noqa: PTH118 - ends in one separator, also for /
    return os.path.normpath(os.path.join(base, image)).startswith(base)  # noqa: PTH118


class Cause(NamedTuple):
    """Why a path leads to no file: of which kind, and what to write instead."""

    kind: str
    words: str


def explained(reason: str, image: str, root: Path, *, near: bool = True) -> str:
    """Return the reason why an image cannot be read, with the cause where there is no such file; see `why_gone`."""
    cause = why_gone(image, root, near=near) if reason == GONE else None
    return f"{reason}: {cause.words}" if cause else reason


def explained_rows(failed: Mapping[int, str], images: Sequence[str], root: Path) -> dict[int, str]:
    """Return why rows have no image, with the cause of the first ones whose file is not there; see `why_gone`."""
    found = dict(failed)
    for row in [row for row, reason in failed.items() if reason == GONE][:MOST_NEAREST]:
        found[row] = explained(GONE, images[row], root)
    return found


def why_gone(image: str, root: Path, *, near: bool = True) -> Cause | None:
    """Return why a path leads to no file; None where nothing tells.

    Args:
        image: as it was understood.
        root: folder that it is relative to.
        near: also look for the nearest name, which takes some milliseconds.
    """
    if (cause := _no_path(image)) is not None:
        return cause
    parts = [part for part in re.split(r"[\\/]+", image) if part not in {"", "."}]
    kind = "a path of Windows" if DRIVE.match(image) else "a path of another machine" if image[:1] == "/" else ""
    if ".." in parts:  # leads who knows where: nothing is told of other folders
        return None
    for first in range(1, len(parts)):
        if _is_file(root, tail := "/".join(parts[first:])):
            return Cause(kind or "too long a path", f"{tail} is there: leave out what stands before it")
    if kind:
        return Cause(kind, "give --image-root and paths below it")
    above = root.absolute().parent
    if _is_file(above, image):
        return Cause("a path from the folder above", f"give --image-root {above}")
    return _why_not_in_folder(parts, root, near=near)


def _no_path(image: str) -> Cause | None:
    if spelled := spelled_out(image):
        return Cause("Python's spelling of another value", f"it is {spelled} made text: write the path alone")
    if WEB_ADDRESS.match(image):
        return Cause("a web address", "download the images and give their folder with --image-root")
    return None


def refuse_absent(path: Path) -> None:
    """Refuse a file of data that is not there.

    Raises:
        UserError: with the one name in its folder that is its own in another case or suffix, where there is one.
    """
    if path.exists():
        return
    alike = next(filter(None, (_index(path.parent, what).get(KEYS[what](path.name)) for what in KEYS)), None)
    remedy = f"there is {alike} in that folder" if alike else "check the path of the manifest"
    raise UserError("no such file", place=path, remedy=remedy)


def check_plain_data(data: str) -> None:
    """Refuse a table that is not there, sooner than the readers of data are imported.

    What can be anything else than a path of a table, such as an adapter, a pattern or an address, passes.

    Raises:
        UserError: see `refuse_absent`.
    """
    if Path(data).suffix and not set(data) & set(":*?[]{}"):
        refuse_absent(Path(data))


def _why_not_in_folder(parts: list[str], root: Path, *, near: bool) -> Cause | None:
    folder = root
    for place, part in enumerate(parts):
        if (folder / part).exists():
            folder /= part
            continue
        if (folder / part).is_symlink():  # and not there
            return Cause("a broken link", "what it links to is not there")
        is_last = place == len(parts) - 1
        where = f" in {folder.relative_to(root)}" if folder != root else ""
        by_case = _index(folder, "case")
        alike = by_case.get(part.casefold())
        if not alike and is_last:
            alike = _index(folder, "stem").get(KEYS["stem"](part))
        if not alike and near and len(by_case) <= NEAREST_NAMES:
            alike = _misspelt(part, folder)
        if alike:
            return Cause("another name", f"there is {alike}{where}")
        return None if is_last else Cause("no such folder", f"there is no folder {part}{where}")
    return Cause("a folder", "give the image in it") if folder.is_dir() and parts else None


def _misspelt(name: str, folder: Path) -> str | None:
    # By stems, since all suffixes are alike; and another number is another image, not a slip of the pen.
    numbers = NUMBER.findall(KEYS["stem"](name))
    stems = {stem: known for stem, known in _index(folder, "stem").items() if numbers == NUMBER.findall(stem)}
    close = difflib.get_close_matches(KEYS["stem"](name), stems, n=1, cutoff=0.8)
    return stems[close[0]] if close else None


def _is_plain(written: str) -> bool:
    return (
        written.isascii()
        and "://" not in written
        and not written.startswith(UPLOADED)
        and "\\" not in written
        and "%" not in written
        and written[:1] not in STARTS
        and written[-1:] not in ENDS
        and written[:5].lower() != "file:"
    )


def _downloaded(text: str, root: Path) -> str | None:
    """Return the file that was at a web address, or uploaded to a program, as it lies in the root; None without."""
    web = WEB_ADDRESS.match(text)
    if not (text.startswith(UPLOADED) or (web and web[1].lower() != "file")):
        return None
    there = urllib.parse.urlsplit(text)
    query = urllib.parse.parse_qs(there.query).get("d", [""])[0]
    parts = [part for part in (query or urllib.parse.unquote(there.path)).split("/") if part not in {"", ".", ".."}]
    tails = ["/".join(parts[first:]) for first in range(len(parts))]
    last = parts[-1] if parts else ""
    names = [*tails, *([last[match.end() :]] if (match := UPLOAD.match(last)) else [])]
    return next((name for name in names if name and _is_file(root, name)), None)


def _is_file(root: Path, image: str) -> bool:
    return os.path.isfile(os.path.join(root, image))  # noqa: PTH113, PTH118 - Path objects cost five times as much


def _in_any_form(root: Path, image: str) -> str | None:
    """Return the path of a file whose name is the same text, composed or not, as it is on the disk."""
    if _is_file(root, image):
        return image
    if image.isascii():
        return None
    folder, found = Path(os.path.join(root, "")), list[str]()  # noqa: PTH118
    for part in image.split("/"):
        known = (
            part
            if not part or (folder / part).exists()
            else _index(folder, "form").get(unicodedata.normalize("NFC", part))
        )
        if known is None:
            return None
        found.append(known)
        folder = folder / (known or "/")
    path = "/".join(found)
    return path if _is_file(root, path) else None


def _index(folder: Path, what: str) -> dict[str, str]:
    """Return the names of a folder by their form, case or stem, without those that are alike in it."""
    try:
        return _index_at(folder, folder.stat().st_mtime_ns, what)
    except OSError:
        return {}


@lru_cache(64)
def _index_at(folder: Path, _changed_ns: int, what: str) -> dict[str, str]:
    names, key = os.listdir(folder), KEYS[what]  # noqa: PTH208 - names alone
    counts = Counter(map(key, names))
    return {key(name): name for name in names if counts[key(name)] == 1}
