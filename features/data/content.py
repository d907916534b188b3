"""Content addresses of image files: the same bytes are the same image, whatever their name."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.progress import Progress
from deltaclip.features.data.images import UnreadableImage, has_more_frames, read_image_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WORKERS = 8  # reading waits for the disk, hashing releases the interpreter's lock
CHUNK = 256


class ImageContent(NamedTuple):
    """`sha256` of a file's bytes, or None and the `reason` why it cannot be read; whether it has `more_frames`."""

    sha256: bytes | None
    reason: str
    more_frames: bool = False


def hash_images(paths: Sequence[Path], root: Path | None) -> list[ImageContent]:
    """Read and hash files, in order.

    Args:
        paths: image files.
        root: folder that they must lie in once symbolic links are followed; None permits every place.
    """
    found: list[ImageContent] = []
    with (
        Progress(len(paths), "hashing images", unit="files") as progress,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        for start in range(0, len(paths), CHUNK):
            found += pool.map(lambda path: _hash(path, root), paths[start : start + CHUNK])
            progress.advance(len(found) - start)
    return found


def _hash(path: Path, root: Path | None) -> ImageContent:
    try:
        content = read_image_bytes(path, root)
        return ImageContent(hashlib.sha256(content).digest(), "", has_more_frames(content))
    except UnreadableImage as reason:
        return ImageContent(None, str(reason))
