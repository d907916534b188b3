"""How fast an extraction goes and what holds it back: batch and threads by measuring, shares of the stages.

Knows seconds and a function that encodes. Must not know files, models or caches.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

DEFAULT_BATCH = 64
MIN_IMAGES = 2_000  # measuring costs 80 forward passes: 4 % of the smallest job that pays for it
CPU_BATCHES = (8, 64)
GPU_BATCHES = (64, 128, 256, 512, 1024)
CLOSE = 0.95  # of the best rate: what measuring a few passes can tell apart
SPARE_WORKERS = 1.5
STAGES = ("read", "decode", "forward", "write")


def fastest_batch(encode: Callable[[torch.Tensor], object], pixels_P3HW: torch.Tensor, *, on_gpu: bool) -> int:
    """Return a batch size whose rate is within 5 % of the best: on a GPU the smallest one, on a CPU the largest.

    A GPU needs large ones to be busy at all. On a CPU large convolutional maps fall out of the caches, and there small
    batches win by a factor of two; without that, large ones do, which can be cut for several processors.

    Args:
        encode: the whole forward pass, done when it returns.
        pixels_P3HW: some images, repeated to fill batches.
        on_gpu: which sizes to try; one that does not fit its memory ends the list.
    """
    import torch

    rates: dict[int, float] = {}
    for size in GPU_BATCHES if on_gpu else CPU_BATCHES:
        batch = pixels_P3HW[torch.arange(size) % len(pixels_P3HW)]
        try:
            if on_gpu:
                encode(torch.cat([batch, batch]))  # two lanes will compute at a time: the memory must hold both
            if on_gpu or not rates:
                encode(batch)  # the first pass of a size makes plans and allocates
            started = time.perf_counter()
            encode(batch)
        except torch.OutOfMemoryError:
            break
        rates[size] = size / (time.perf_counter() - started)
    if not rates:
        return (GPU_BATCHES if on_gpu else CPU_BATCHES)[0] // 8
    return (min if on_gpu else max)(size for size, rate in rates.items() if rate >= CLOSE * max(rates.values()))


def is_fed_by_processors(device: str) -> bool:
    """Tell whether processors have nothing to do but feed the model, so that no more threads than that should decode.

    On a CPU decoding and model take turns anyway: as many threads as processors slow all parts of a batch alike.
    """
    return device.startswith("cuda")


def needed_workers(busy_s: Mapping[str, float], *, lanes: int, processors: int) -> int:
    """Return how many threads keep `lanes` busy, half as many again to spare.

    Args:
        busy_s: seconds of `read`, `decode` and `forward` that some images took, each summed over its threads.
        lanes: forward passes at a time.
        processors: the most; more pay where a slow disk is waited for, which only `--workers` can ask for, as waiting
            for a busy processor looks the same.
    """
    preparing = busy_s["read"] + busy_s["decode"]
    if not busy_s["forward"]:
        return processors
    return max(1, min(processors, math.ceil(SPARE_WORKERS * lanes * preparing / busy_s["forward"])))


class StageClock:
    """Which share of its time each stage of a pipeline was busy."""

    def __init__(self, *, workers: int, lanes: int) -> None:
        self.workers, self.lanes = workers, lanes
        self._busy_s = dict.fromkeys(STAGES, 0.0)
        self._wall_s = self._threads_s = 0.0
        self._last = time.perf_counter()

    def add(self, busy_s: Mapping[str, float]) -> None:
        """Count seconds of stages, summed over the threads of each, that have passed up to now."""
        now = time.perf_counter()
        self._wall_s += now - self._last
        self._threads_s += self.workers * (now - self._last)
        self._last = now
        for stage, seconds in busy_s.items():
            self._busy_s[stage] += seconds

    def shares(self) -> dict[str, float]:
        """Return by stage the busy share of its threads: `read` and `decode` share theirs."""
        capacity_s = {"forward": self.lanes * self._wall_s, "write": self._wall_s}
        return {
            stage: round(min(1.0, self._busy_s[stage] / max(capacity_s.get(stage, self._threads_s), 1e-9)), 4)
            for stage in STAGES
        }


def share_words(shares: Mapping[str, float]) -> str:
    """Return the shares as words: `read 2 %, decode 31 %, forward 96 %, write 2 %`."""
    return ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in shares.items())


def bottleneck(shares: Mapping[str, float]) -> str:
    """Return the stage that holds the others back: the busiest, of the two that share threads the longer one."""
    threads = {"forward": shares["forward"], "write": shares["write"], "": shares["read"] + shares["decode"]}
    return max(threads, key=lambda stage: threads[stage]) or max(("read", "decode"), key=lambda stage: shares[stage])
