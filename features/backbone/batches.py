"""Image files to batches of pixels: parallel decoding with back-pressure.

Threads, since Pillow releases the interpreter's lock while it decodes and resizes. Knows files and a transform.
Must not know models or caches. Spec section 9.
"""

from __future__ import annotations

import collections
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.features.data.images import UnreadableFile, UnreadableImage, open_image, read_image_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch

BATCHES_AHEAD = 2  # enough to hide one slow file, little enough to bound memory


@dataclass(frozen=True)
class ImageFile:
    """One image to encode: the entry it belongs to, where it lies, and the content expected there (None: any)."""

    entry: int
    path: Path
    sha256: bytes | None


@dataclass(frozen=True)
class PixelBatch:
    """`pixels_B3HW` float32 for `entries`; `failed` holds (entry, reason) of those that could not be read.

    `passing` are the entries of `failed` whose bytes could not be had: another time they may be.
    """

    entries: list[int]
    pixels_B3HW: torch.Tensor | None
    failed: list[tuple[int, str]]
    passing: frozenset[int] = frozenset()


def default_workers() -> int:
    """Return the number of decoding threads: one per processor this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def pixel_batches(
    files: Sequence[ImageFile],
    preprocess: Callable[[Any], torch.Tensor],
    *,
    root: Path | None,
    batch_size: int,
    workers: int,
) -> Iterator[PixelBatch]:
    """Yield all files in order, `batch_size` at a time, decoding the next batches meanwhile.

    Batches are cut by position, so that a run which resumes at a batch computes the same batches again.
    """
    starts = range(0, len(files), batch_size)
    pending: collections.deque[list[Future[torch.Tensor]]] = collections.deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            ahead = iter(starts)
            for start in starts:
                while len(pending) <= BATCHES_AHEAD and (following := next(ahead, None)) is not None:
                    batch = files[following : following + batch_size]
                    pending.append([pool.submit(_pixels, file, preprocess, root) for file in batch])
                yield _collect(files[start : start + batch_size], pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pixels(file: ImageFile, preprocess: Callable[[Any], torch.Tensor], root: Path | None) -> torch.Tensor:
    content = read_image_bytes(file.path, root)
    if file.sha256 is not None and hashlib.sha256(content).digest() != file.sha256:
        raise UnreadableFile("changed while the run was reading it")
    return preprocess(open_image(content))


def _collect(files: Sequence[ImageFile], futures: list[Future[torch.Tensor]]) -> PixelBatch:
    import torch

    entries, pixels, failed, passing = [], [], [], set()
    for file, future in zip(files, futures, strict=True):
        try:
            pixels.append(future.result())
            entries.append(file.entry)
        except UnreadableImage as reason:
            failed.append((file.entry, str(reason)))
            if isinstance(reason, UnreadableFile):
                passing.add(file.entry)
    return PixelBatch(entries, torch.stack(pixels) if pixels else None, failed, frozenset(passing))
