"""Scores for whoever asks: uploads and paths to images, images and prompts to micro-batches.

What is asked within a few milliseconds shares one forward pass. Knows a scorer, image files, the limits on them and
asyncio. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from deltaclip.features.backbone.decode_ahead import default_workers
from deltaclip.features.data.paths import understood
from deltaclip.features.data.prompts import prompt_fault
from deltaclip.features.data.sources import UnreadableImage, container_of, read_image_bytes
from deltaclip.pipeline.runs.prediction_table import TrustColumns
from deltaclip.pipeline.runs.trust import flagged_words, together_words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deltaclip.features.backbone.view_vectors import Crops
    from deltaclip.pipeline.api.scorer import Scorer


# ---- Scores for whoever asks: uploads and paths to images, images and prompts to micro-batches


class Scored(NamedTuple):
    """Scores by name, None for what the run has not, the flag a text; and what a set of pictures is judged by.

    `rank` is how strange the picture is among those of the training's sources, NaN where nobody can tell, and `image`
    the same for a picture that is sent twice.
    """

    values: dict[str, float | bool | str | None]
    rank: float
    image: str


class Together(NamedTuple):
    """What is said of pictures together: how many are unlike the training, None where nobody can tell, and lines."""

    unlike: int | None
    lines: list[str]


class Refused(Exception):  # noqa: N818 - an answer
    """Why a pair is not scored, in one sentence."""


class Pair(NamedTuple):
    """An image, its bytes or a path under the root, and a prompt, None where the run needs none."""

    image: bytes | str
    prompt: str | None


class _Ready(NamedTuple):
    crops: Crops
    prompt: str | None
    image: str


class Service:
    """A scorer that many ask at once.

    Args:
        scorer: a run.
        root: folder that paths are taken under; None takes no paths.
        max_pixels: of an image.
        max_bytes: of a file under the root.
        max_prompt_chars: of a prompt.
        coverage: share of human scores that intervals are to hold.
        batch_size: most images of a forward pass; 1 turns micro-batches off.
        wait_s: how long a first image waits for others.
        queue_size: most images that wait; with those of one forward pass, most that are decoded or in memory.
    """

    def __init__(  # noqa: PLR0913 - limits, each by its name
        self,
        scorer: Scorer,
        *,
        root: Path | None,
        max_pixels: int,
        max_bytes: int,
        max_prompt_chars: int,
        coverage: float,
        batch_size: int,
        wait_s: float,
        queue_size: int,
    ) -> None:
        self.scorer, self.root, self.coverage = scorer, root, coverage
        self.max_bytes, self.max_prompt_chars = max_bytes, max_prompt_chars
        self._open = functools.partial(scorer.open_file, max_pixels=max_pixels)
        self.queue_size, self._most_held, self._num_held = queue_size, queue_size + batch_size, 0
        self.batcher: MicroBatcher[_Ready, Scored] = MicroBatcher(
            self._score, batch_size=batch_size, wait_s=wait_s, queue_size=queue_size
        )
        self._decoders = ThreadPoolExecutor(default_workers(), thread_name_prefix="decode")

    @property
    def columns(self) -> list[str]:
        """Names of the scores that an answer has."""
        return list(self.scorer.nothing(0).columns())

    async def stop(self) -> None:
        """End the threads."""
        await self.batcher.stop()
        self._decoders.shutdown(wait=True, cancel_futures=True)

    async def score(self, pairs: Sequence[Pair]) -> list[Scored | Refused]:
        """Return for each pair its scores, or why it is refused.

        Raises:
            QueueFull: as many images wait as may wait; found out before anything is decoded, where it is known then.
        """
        if self._num_held + len(pairs) > self._most_held:
            raise QueueFull
        loop = asyncio.get_running_loop()
        self._num_held += len(pairs)
        try:
            jobs = [loop.run_in_executor(self._decoders, self._prepare, pair) for pair in pairs]
            made = await asyncio.gather(*jobs)
            found = await self.batcher.submit([each for each in made if isinstance(each, _Ready)])
        finally:
            self._num_held -= len(pairs)
        scores = iter(found)
        return [next(scores) if isinstance(each, _Ready) else each for each in made]

    def together(self, found: Sequence[Scored | Refused]) -> Together:
        """Return what `predict` would say of pairs that were asked together: of those that were scored."""
        trust, scored = self.scorer.trust, [each for each in found if isinstance(each, Scored)]
        if trust is None or not scored:
            return Together(None, [])
        what, lines = "pairs" if self.scorer.needs_prompts else "images", trust.notes(self.coverage)
        if not trust.parts:
            return Together(None, lines)
        rank_N = np.array([each.rank for each in scored], dtype=np.float32)
        columns = TrustColumns.nothing(len(scored), (), trust.parts)._replace(rank_N=rank_N)
        flags = [str(each.values["flag"]) for each in scored]
        lines += together_words(trust.excess(columns, np.array([each.image for each in scored])), what)
        return Together(sum(map(bool, flags)), [*lines, flagged_words(flags, len(scored), what)])

    def _prepare(self, pair: Pair) -> _Ready | Refused:
        try:
            if pair.prompt is not None:
                self._check_prompt(pair.prompt)
            content = self._read(pair.image) if isinstance(pair.image, str) else pair.image
            if not content:
                return Refused("image: empty file")
            image = self._open(content)
            # The image itself ends here: what waits in the queue is as small as the model's input.
            return _Ready(self.scorer.crops(image), pair.prompt, hashlib.sha256(content).hexdigest())
        except UnreadableImage as reason:
            return Refused(f"{'path' if isinstance(pair.image, str) else 'image'}: {reason}")
        except Refused as refused:
            return refused

    def _check_prompt(self, prompt: str) -> None:
        if fault := prompt_fault(prompt):
            raise Refused(f"prompt: {fault}")
        if len(prompt) > self.max_prompt_chars:
            raise Refused(f"prompt: has {len(prompt):,} characters, at most {self.max_prompt_chars:,} are taken")

    def _read(self, name: str) -> bytes:
        if self.root is None:
            raise Refused("path: no paths are taken here: start the server with --root, or upload the image")
        if not name.strip():
            raise Refused("path: is empty")
        if "\0" not in name:
            name = understood(name, self.root)[0]
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
            raise Refused("path: must be relative and stay in the root")
        path = self.root / name
        try:
            # No pipe, device or folder: reading them may never end.
            if path.exists() and not path.is_file():
                raise Refused("path: is not a file")
            if path.is_file() and path.stat().st_size > self.max_bytes:
                raise Refused(f"path: the file is over {self.max_bytes / 1e6:g} MB")
            if not path.is_file() and container_of(path):  # nobody has said how large what lies in there may be
                raise Refused("path: leads into a file, and files alone are taken here")
        except OSError as error:  # such as a name that is too long
            raise Refused(f"path: {error.strerror}") from error
        return read_image_bytes(path, self.root)

    def _score(self, items: Sequence[_Ready]) -> list[Scored]:
        prompts = [item.prompt for item in items if item.prompt is not None and self.scorer.needs_prompts]
        texts = list(dict.fromkeys(prompts))
        t_TD, truncated_T = self.scorer.embed_prompts(texts)
        place = [texts.index(prompt) for prompt in prompts]
        t_BD = t_TD[place] if self.scorer.needs_prompts else None
        crops = [item.crops for item in items]
        scores = self.scorer.score_crops(crops, t_BD, range(len(items)), coverage=self.coverage)
        truncated = truncated_T[place].tolist() if self.scorer.needs_prompts else [False] * len(items)
        columns = scores.columns()
        rank_B = np.full(len(items), np.nan) if scores.trust is None else scores.trust.rank_N
        return [
            Scored(
                {name: _plain(values[row]) for name, values in columns.items()} | {"prompt_truncated": truncated[row]},
                float(rank_B[row]),
                item.image,
            )
            for row, item in enumerate(items)
        ]


def _plain(value: float | str) -> float | str | None:
    if isinstance(value, str):
        return value
    return None if math.isnan(value) else float(value)


# ---- Micro-batches: what is asked within a few milliseconds shares one forward pass


Item = TypeVar("Item")
Answer = TypeVar("Answer")


class QueueFull(Exception):  # noqa: N818 - a state to answer with 503, not a defect
    """As many items wait as may wait."""


class MicroBatcher(Generic[Item, Answer]):
    """One thread that scores what waits, several items at a time; the event loop is never blocked.

    Args:
        score: from items to as many answers, in order; called in the one thread.
        batch_size: most items of a call; 1 turns batching off.
        wait_s: how long a first item waits for others.
        queue_size: most items that wait.
    """

    def __init__(
        self, score: Callable[[Sequence[Item]], Sequence[Answer]], *, batch_size: int, wait_s: float, queue_size: int
    ) -> None:
        self._score, self._batch_size, self._wait_s = score, batch_size, wait_s
        self._queue: asyncio.Queue[tuple[Item, asyncio.Future[Answer]]] = asyncio.Queue(queue_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None
        self.num_batches = self.num_scored = 0

    def start(self) -> None:
        """Begin to take items; call inside the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Let the running batch end; what still waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        while not self._queue.empty():
            self._queue.get_nowait()[1].cancel()
        self._thread.shutdown(wait=True)

    @property
    def num_waiting(self) -> int:
        """Number of items that wait."""
        return self._queue.qsize()

    async def submit(self, items: Sequence[Item]) -> list[Answer]:
        """Return the answers to items, in order.

        Raises:
            QueueFull: not all of them can wait; then none does.
        """
        if self._queue.qsize() + len(items) > self._queue.maxsize:
            raise QueueFull
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in items]
        for pair in zip(items, futures, strict=True):
            self._queue.put_nowait(pair)
        return list(await asyncio.gather(*futures))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            taken = [await self._queue.get()]
            if self._wait_s and self._queue.qsize() + 1 < self._batch_size:
                await asyncio.sleep(self._wait_s)
            while len(taken) < self._batch_size and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            wanted = [(item, future) for item, future in taken if not future.done()]  # else its client has gone
            if not wanted:
                continue
            done = loop.run_in_executor(self._thread, self._score, [item for item, _ in wanted])
            await asyncio.wait([done])
            self.num_batches += 1
            self.num_scored += len(wanted)
            error = done.exception()
            for place, (_, future) in enumerate(wanted):
                if future.done():
                    continue
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(done.result()[place])
