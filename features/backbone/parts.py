"""Parts of a batch at the same time, each on processors of its own: less waiting than all of them in every product.

A product that two processors share is done when the slower one is, and the one that has just been given to a decoding
thread is the slower one. Knows tensors and threads. Must not know models.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def in_parts(encode: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, *, smallest: int) -> torch.Tensor:
    """Return what `encode` makes of a batch on a CPU, (B, ...), without gradients.

    Args:
        encode: maps (P, ...) to (P, ...), every item alone; called from several threads at a time.
        batch: (B, ...), one or more.
        smallest: items that are worth a thread.
    """
    import torch

    threads = torch.get_num_threads()
    most = max(1, min(threads, len(batch) // smallest))
    parts = next(count for count in range(most, 0, -1) if threads % count == 0)  # none is left without work

    def without_gradients(part: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return encode(part)

    if parts == 1:
        return without_gradients(batch)
    return torch.cat(list(_threads(parts, threads // parts).map(without_gradients, batch.tensor_split(parts))))


@functools.cache
def _threads(count: int, processors: int) -> ThreadPoolExecutor:
    """Return `count` threads whose operations run on `processors` each."""
    import torch
    from threadpoolctl import threadpool_limits

    def start() -> None:
        torch.get_num_threads()  # a thread takes torch's number when it first asks, which would undo what follows
        # torch.set_num_threads would change the number for threads of others that are yet to come.
        threadpool_limits(processors, user_api="openmp")

    return ThreadPoolExecutor(count, "part", initializer=start)
