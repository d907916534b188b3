"""Micro-batches: what is asked within a few milliseconds shares one forward pass.

Knows asyncio and a function that scores many items at once. Must not know HTTP or models.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
