"""Checks of the image files: unreadable, odd, and one image under several names.

Cost: `header` opens every file and reads its first bytes, and reads those in full that are as large as another; `full`
reads and decodes all, as `extract` would, without the backbone: ten times as much on AGIQA-3K.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.progress import Progress
from deltaclip.features.data.addresses import address
from deltaclip.features.data.images import has_more_frames, hash_images, open_image, read_header
from deltaclip.features.data.manifest import rows_outside
from deltaclip.features.data.paths import GONE, MOST_NEAREST, why_gone
from deltaclip.features.data.sources import UnreadableImage, read_image_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaclip.features.checking.findings import Findings
    from deltaclip.features.data.preferences import PairTable


WORKERS = 8
CHUNK = 256
SMALL = 64  # pixels; CLIP would enlarge such an image three to five times
LONG = 2.5  # width to height; CLIP's square crop then loses 60 % of the image


class Looked(NamedTuple):
    """What a look at one file gave: a reason why it cannot be used, or its size."""

    reason: str = ""
    size: tuple[int, int] = (0, 0)
    more_frames: bool = False
    key: object = None  # equal for files that may be the same image


@dataclass(frozen=True)
class Looks:
    """What a look at all files gave; `keys` are equal in rows that show the same image, `broken` rows without one."""

    checked: int
    readable: int
    sizes: list[tuple[int, int]]
    keys: list[object]
    broken: set[int]


def check_images(findings: Findings, folder: Path, root: Path | None, *, full: bool, copies: bool = True) -> Looks:
    """Look at every image file once.

    Args:
        findings: of the rows.
        folder: that image paths are relative to.
        root: folder that files must lie in once symbolic links are followed; None permits every place.
        full: decode every image instead of reading its header.
        copies: report images that stand under several names; pairs inside a file have nothing but copies.
    """
    images = findings.rows.cells["image"]
    outside = {images[row] for row in rows_outside(images, root)} if root else set()  # reported as such, not opened
    paths = list(dict.fromkeys(image for image in images if image and image not in outside))
    look = _look_full if full else _look_header
    found: dict[str, Looked] = {}
    with Progress(len(paths), "checking images", unit="files") as progress, ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(paths), CHUNK):
            part = paths[start : start + CHUNK]
            found |= zip(part, pool.map(lambda image: look(address(folder, image), root), part), strict=True)
            progress.advance(len(part))
    keys = {path: looked.key for path, looked in found.items()} if full else _hashed(found, folder, root)
    _report_unreadable(findings, found, folder)
    _report_odd(findings, found)
    if copies:
        _report_copies(findings, keys)
    sizes = sorted({looked.size for looked in found.values() if not looked.reason})
    readable = sum(not looked.reason for looked in found.values())
    broken = {row for row, image in enumerate(images) if image in found and found[image].reason}
    return Looks(len(paths), readable, sizes, [keys.get(image) or image for image in images], broken)


def check_pairs(findings: Findings, pairs: PairTable, looks: Looks) -> None:
    """Look for pairs of one image with itself, and for those of which one image alone can be read.

    Args:
        findings: of the rows.
        pairs: of these rows.
        looks: at their images.
    """
    both = list(zip(pairs.a_P.tolist(), pairs.b_P.tolist(), strict=True))
    itself = [a for a, b in both if looks.keys[a] == looks.keys[b]]
    if itself:
        message = f"{len(itself):,} pairs are of one image with itself, byte for byte"
        findings.error("pair_of_one", message, at=itself, remedy="give two images, or remove the pairs")
    torn = [a if a in looks.broken else b for a, b in both if (a in looks.broken) != (b in looks.broken)]
    if torn:
        message = f"{len(torn):,} pairs have one image that cannot be read; extract would leave them out"
        findings.error("torn_pair", message, at=torn, remedy="repair the image, or remove the pairs")


def _look_header(path: Path, root: Path | None) -> Looked:
    try:
        header = read_header(path, root)
    except UnreadableImage as reason:
        return Looked(str(reason))
    size = (header.width, header.height)
    return Looked(size=size, more_frames=header.more_frames, key=(header.size_bytes, size))


def _look_full(path: Path, root: Path | None) -> Looked:
    try:
        content = read_image_bytes(path, root)
        image = open_image(content)
    except UnreadableImage as reason:
        return Looked(str(reason))
    return Looked(size=image.size, more_frames=has_more_frames(content), key=hashlib.sha256(content).digest())


def _hashed(found: dict[str, Looked], folder: Path, root: Path | None) -> dict[str, object]:
    """Return the content's hash of files that are as large as another; of others the name will do."""
    alike: dict[object, list[str]] = defaultdict(list)
    for path, looked in found.items():
        if looked.key:
            alike[looked.key].append(path)
    suspects = [path for paths in alike.values() if len(paths) > 1 for path in paths]
    if not suspects:
        return {}
    contents = hash_images([address(folder, path) for path in suspects], root)
    return {path: content.sha256 for path, content in zip(suspects, contents, strict=True)}


def _report_unreadable(findings: Findings, found: dict[str, Looked], folder: Path) -> None:
    by_reason: dict[str, list[int]] = defaultdict(list)
    words: dict[str, str] = {}
    looked_near = 0
    for row, image in enumerate(findings.rows.cells["image"]):
        if image not in found or not found[image].reason:
            continue
        reason = found[image].reason.partition(" (")[0]
        if reason == GONE:
            cause = why_gone(image, folder, near=looked_near < MOST_NEAREST)
            looked_near += cause is None or cause.kind == "another name"
            if cause:
                reason = f"{reason}, {cause.kind}"
                words.setdefault(reason, f"{cause.words}; extract would skip them")
        by_reason[reason].append(row)
    words[GONE] = "check the paths or give --image-root; extract would skip them"
    for reason, at in by_reason.items():
        remedy = words.get(reason, "repair or remove them; extract would skip them")
        message = f"{len(at):,} rows have an image that cannot be read: {reason}"
        findings.error("unreadable_image", message, at=at, remedy=remedy)


def _report_odd(findings: Findings, found: dict[str, Looked]) -> None:
    images = findings.rows.cells["image"]
    seen = [(row, found[image]) for row, image in enumerate(images) if image in found and not found[image].reason]
    for check, words, remedy, at in (
        (
            "small_image",
            f"images are smaller than {SMALL} pixels and will be enlarged",
            "use the images in the size that people rated",
            [row for row, looked in seen if min(looked.size) < SMALL],
        ),
        (
            "long_image",
            f"images are longer than {LONG}:1, and CLIP sees their middle alone",
            "crop or pad them, or extract --views tiles",
            [row for row, looked in seen if max(looked.size) > LONG * min(looked.size)],
        ),
        (
            "animated_image",
            "images have several frames or pages, and the first is taken",
            "save the frame that people rated",
            [row for row, looked in seen if looked.more_frames],
        ),
    ):
        if at:
            findings.warn(check, f"{len(at):,} {words}", at=at, remedy=remedy)


def _report_copies(findings: Findings, keys: dict[str, object]) -> None:
    names: dict[object, set[str]] = defaultdict(set)
    for path, key in keys.items():
        if key:
            names[key].add(path)
    images: Sequence[str] = findings.rows.cells["image"]
    copies = [row for row, image in enumerate(images) if len(names.get(keys.get(image), ())) > 1]
    if copies:
        findings.warn(
            "same_image",
            f"{len(copies):,} rows have an image that is also there under another name, byte for byte",
            at=copies,
            remedy="a grouped split keeps them together; remove the copies if they are a mistake",
        )
