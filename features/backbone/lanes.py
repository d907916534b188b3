"""Work dealt to lanes, results in the order of the work: how a device is kept busy while others read and write.

A lane is one thread with a replica of a model. Knows neither models nor images.
"""

from __future__ import annotations

import collections
import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

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
