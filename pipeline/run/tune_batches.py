"""Steps of a fine-tuning: rows drawn as everywhere, with the towers' inputs read ahead."""

from __future__ import annotations

import collections
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deltaclip.pipeline.run.tuned import TunePart

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.pipeline.run.processes import Processes
    from deltaclip.pipeline.run.tuned import TowerSide
    from deltaclip.pipeline.training.batches import MemoryBatches

STEPS_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class SideBatches:
    """Steps over some rows of a cache: `memory` has all of a step's rows as one batch, which goes in so many `parts`.

    `image_N`, `prompt_N` are the entries of the rows; `text` is None where the text tower is frozen. A loss that is
    `by_row` (a mean over labelled rows) comes out as that of the whole step, whichever rows of a part lack a label.
    """

    memory: MemoryBatches
    image_N: NDArray[np.int64]
    prompt_N: NDArray[np.int64]
    image: TowerSide
    text: TowerSide | None
    parts: int
    processes: Processes
    by_row: bool

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch."""
        return self.memory.steps_per_epoch

    def __call__(self, epoch: int, *, first: int = 0) -> Iterator[list[TunePart]]:
        """Return the steps of an epoch from `first` on; a thread reads the next ones meanwhile."""
        steps = self.memory.order(epoch)[first:]
        pending: collections.deque[Future[list[TunePart]]] = collections.deque()
        ahead = iter(steps)
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            try:
                for _ in steps:
                    while len(pending) <= STEPS_AHEAD and (rows_B := next(ahead, None)) is not None:
                        pending.append(pool.submit(self._step, rows_B, epoch))
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _step(self, rows_B: Tensor, epoch: int) -> list[TunePart]:
        parts = rows_B.tensor_split(min(self.parts, len(rows_B)))
        return [self._part(part, epoch, step_S=rows_B) for part in parts]

    def _part(self, rows_B: Tensor, epoch: int, *, step_S: Tensor) -> TunePart:
        mine = self.processes.share(len(rows_B))
        own = rows_B.cpu().numpy()[mine]
        return TunePart(
            batch=self.memory.take(rows_B)._replace(**(self._weights(rows_B, step_S) if self.by_row else {})),
            images=self.image.entries(self.image_N[own], epoch),
            texts=None if self.text is None else self.text.entries(self.prompt_N[own], epoch),
            mine=mine,
        )

    def _weights(self, rows_B: Tensor, step_S: Tensor) -> dict[str, Tensor]:
        """Return weights of labels that make of the mean over parts, by rows, that over the step's labelled rows."""
        found = {}
        for head, label_N in (("q", self.memory.q_N), ("c", self.memory.c_N)):
            here, there = ((~label_N[rows].isnan()).float().mean() for rows in (rows_B, step_S))
            if here != there:
                given_N = self.memory.columns_N.get(f"{head}_weight_B")
                weight_B = torch.ones_like(label_N[rows_B]) if given_N is None else given_N[rows_B]
                found[f"{head}_weight_B"] = weight_B * (here / there)
        return found
