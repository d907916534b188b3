"""Images decoded ahead of the model, and work dealt to lanes whose results come in the order of the work.

Images, files or in memory, become batches of pixels in threads, since Pillow releases the interpreter's lock while it
decodes and resizes. A lane is one thread with a replica of a model: so a device is kept busy while others read and
write. Knows files and a transform. Must not know models or caches.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from deltaclip.base.device import usable_processors
from deltaclip.features.data.images import from_memory, open_image
from deltaclip.features.data.sources import UnreadableFile, UnreadableImage, read_image_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from pathlib import Path

    import torch
    from PIL.Image import Image


# ---- Images, files or in memory, to batches of pixels: parallel decoding with back-pressure


BATCHES_AHEAD = 2  # enough to hide one slow file, little enough to bound memory
PROBE_IMAGES = 16  # to measure or to check on
Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class ImageFile:
    """One image to encode: the entry it belongs to, where it lies, and the content expected there (None: any)."""

    entry: int
    path: Path
    sha256: bytes | None

    def read(self, root: Path | None) -> bytes:
        """Return the bytes; `root` is a folder that the file may not leave.

        Raises:
            UnreadableFile: the reason.
        """
        content = read_image_bytes(self.path, root)
        if self.sha256 is not None and hashlib.sha256(content).digest() != self.sha256:
            raise UnreadableFile("changed since its content was recorded")
        return content

    def decode(self, content: bytes, open_file: Callable[[bytes], Image]) -> Image:
        """Return the image of the bytes, RGB.

        Raises:
            UnreadableImage: the reason.
        """
        return open_file(content)


@dataclass(frozen=True)
class MemoryImage:
    """One image in memory: the entry it belongs to, and a Pillow image, or the bytes of a file."""

    entry: int
    image: Image | bytes

    def read(self, _root: Path | None) -> Image | bytes:
        """Return what is there already.

        Raises:
            UnreadableFile: nothing is.
        """
        if self.image == b"":
            raise UnreadableFile("empty file")
        return self.image

    def decode(self, content: Image | bytes, open_file: Callable[[bytes], Image]) -> Image:
        """Return the image, RGB.

        Raises:
            UnreadableImage: the reason.
        """
        return open_file(content) if isinstance(content, bytes) else from_memory(content)


Source = TypeVar("Source", bound=ImageFile | MemoryImage)


@dataclass(frozen=True)
class ImageBatch(Generic[Prepared]):
    """What was `prepared` of each of `entries`; `failed` holds (entry, reason) of those that could not be read.

    `passing` are the entries of `failed` whose bytes could not be had: another time they may be. `busy_s` says how long
    threads were at it: `read` in seconds until the bytes were there and had been hashed, `decode` in seconds of
    a processor.
    """

    entries: list[int]
    prepared: list[Prepared]
    failed: list[tuple[int, str]]
    passing: frozenset[int]
    busy_s: dict[str, float]


@dataclass(frozen=True)
class PixelBatch:
    """`pixels_B3HW` as `preprocess` gives them for `entries`; the rest as in `ImageBatch`."""

    entries: list[int]
    pixels_B3HW: torch.Tensor | None
    failed: list[tuple[int, str]]
    passing: frozenset[int] = frozenset()
    busy_s: dict[str, float] = field(default_factory=dict)


class _Timed(NamedTuple, Generic[Prepared]):
    prepared: Prepared
    read_s: float
    decode_s: float


def default_workers() -> int:
    """Return the number of decoding threads: one per processor this process may use, its share under torchrun."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, usable_processors() // max(1, int(processes) if processes.isdecimal() else 1))


def spread(num_items: int) -> list[int]:
    """Return the places of a few items to look at, evenly spread from the first to the last."""
    count = min(PROBE_IMAGES, num_items)
    return [place * (num_items - 1) // max(1, count - 1) for place in range(count)]


def pixel_batches(
    files: Sequence[ImageFile],
    preprocess: Callable[[Any], torch.Tensor],
    *,
    root: Path | None,
    batch_size: int,
    workers: int,
    open_file: Callable[[bytes], Any] = open_image,
) -> Generator[PixelBatch]:
    """Yield the pixels of all files in order, `batch_size` at a time; see `image_batches`."""
    import torch

    def prepare(_file: ImageFile, image: Any) -> torch.Tensor:
        return preprocess(image)

    batches = image_batches(files, prepare, root=root, batch_size=batch_size, workers=workers, open_file=open_file)
    with contextlib.closing(batches):
        for batch in batches:
            pixels = torch.stack(batch.prepared) if batch.prepared else None
            yield PixelBatch(batch.entries, pixels, batch.failed, batch.passing, batch.busy_s)


def image_batches(
    files: Sequence[Source],
    prepare: Callable[[Source, Any], Prepared],
    *,
    root: Path | None,
    batch_size: int,
    workers: int,
    open_file: Callable[[bytes], Any] = open_image,
) -> Generator[ImageBatch[Prepared]]:
    """Yield what `prepare` makes of each decoded file, in order, decoding the next batches meanwhile.

    Batches are cut by position, so that a run which resumes at a batch computes the same batches again.

    Args:
        files: images.
        prepare: called in the threads with a file and its image.
        root: folder that the files may not leave; None permits every place.
        batch_size: files a batch.
        workers: threads.
        open_file: bytes of a file to its image; raises `UnreadableImage`.
    """
    starts = range(0, len(files), batch_size)
    pending: collections.deque[list[Future[_Timed[Prepared]]]] = collections.deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            ahead = iter(starts)
            for start in starts:
                while len(pending) <= BATCHES_AHEAD and (following := next(ahead, None)) is not None:
                    batch = files[following : following + batch_size]
                    pending.append([pool.submit(_prepared, file, prepare, open_file, root) for file in batch])
                yield _collect(files[start : start + batch_size], pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepared(
    source: Source,
    prepare: Callable[[Source, Any], Prepared],
    open_file: Callable[[bytes], Any],
    root: Path | None,
) -> _Timed[Prepared]:
    started = time.perf_counter()
    content: Any = source.read(root)
    read_s, started = time.perf_counter() - started, time.thread_time()
    try:
        prepared = prepare(source, source.decode(content, open_file))
    except MemoryError:  # the next image may be smaller
        raise UnreadableFile("not enough memory to decode it") from None
    return _Timed(prepared, read_s, time.thread_time() - started)


def _collect(files: Sequence[Source], futures: list[Future[_Timed[Prepared]]]) -> ImageBatch[Prepared]:
    entries, prepared, failed, passing = [], [], [], set()
    busy_s = {"read": 0.0, "decode": 0.0}
    for file, future in zip(files, futures, strict=True):
        try:
            timed = future.result()
        except UnreadableImage as reason:
            failed.append((file.entry, str(reason)))
            if isinstance(reason, UnreadableFile):
                passing.add(file.entry)
        else:
            prepared.append(timed.prepared)
            entries.append(file.entry)
            busy_s["read"] += timed.read_s
            busy_s["decode"] += timed.decode_s
    return ImageBatch(entries, prepared, failed, frozenset(passing), busy_s)


# ---- Work dealt to lanes, results in the order of the work: how a device is kept busy while others read and write


Work = TypeVar("Work")
Result = TypeVar("Result")


def dealt(work: Iterable[Work], lanes: Sequence[Callable[[Work], Result]]) -> Generator[Result]:
    """Yield what the lanes make of each piece of work, in order; piece n goes to lane n modulo their number.

    While lanes compute, the caller's thread draws the next piece from `work` and consumes the results: reading and
    writing cost nothing as long as they are faster. At most one result a lane waits, and one more is being made.

    Args:
        work: drawn in the caller's thread.
        lanes: each is called from one thread of its own, never twice at a time.
    """
    pending: collections.deque[Future[Result]] = collections.deque()
    with contextlib.ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="encode")) for _ in lanes]
        try:
            for number, piece in enumerate(work):
                turn = number % len(lanes)
                pending.append(threads[turn].submit(lanes[turn], piece))
                if len(pending) > len(lanes):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
