"""Batches of rows whose vectors stay in a file: read in blocks, shuffled within large windows.

Knows how rows are cut into blocks and in which order they come, from (seed, epoch). Must not know files: two callables
read vectors.

An epoch takes the blocks in random order, a window of them at a time, and the rows of a window in random order: reading
stays in long stretches, and a batch mixes rows from many places. Shapes: N rows, W rows of a window, K distinct
images or texts, D embedding width, B rows of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from deltaclip.pipeline.model.scores import Batch
from deltaclip.pipeline.training.batches import MemoryBatches, memory_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    Read = Callable[[NDArray[np.int64]], Tensor]  # rising, distinct entries (K,) -> their vectors (K, D)

BLOCKS_PER_WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class StreamBatches:
    """N rows whose vectors are read when their turn comes; a `TrainBatches`, and in order for scoring.

    Labels and columns are those of `MemoryBatches`; the indices (N,) int64 are arrays, since they decide what is read.
    At most `window_rows` rows have their vectors in memory, twice that while one window follows another.
    """

    read_images: Read
    read_texts: Read
    q_N: Tensor
    c_N: Tensor
    image_index_N: NDArray[np.int64]
    text_index_N: NDArray[np.int64]
    batch_size: int
    seed: int
    window_rows: int
    columns_N: Mapping[str, Tensor] = field(default_factory=dict)
    explanation_index_N: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if not len(self.q_N):
            raise ValueError("there is no row to train on")

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch; the last rows are used too."""
        return math.ceil(len(self.q_N) / self.batch_size)

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """Return every row once, in an order drawn from (seed, epoch), in equal parts as `MemoryBatches` has them."""
        num_rows, num_steps = len(self.q_N), self.steps_per_epoch
        short, num_long = divmod(num_rows, num_steps)
        done, held, missing = 0, list[Batch](), short + (num_long > 0)
        for window, order_W in self._shuffled(epoch):
            first = 0
            while first < len(order_W):
                rows_B = order_W[first : first + missing]
                held.append(window.take(rows_B))
                first, missing = first + len(rows_B), missing - len(rows_B)
                if not missing:
                    yield held[0] if len(held) == 1 else _joined(held)
                    done, held = done + 1, []
                    missing = short + (done < num_long)

    def in_order(self, batch_size: int = 4096) -> Iterator[Batch]:
        """Return every row once as it lies, in the blocks that `MemoryBatches.in_order` gives."""
        step = max(1, self.window_rows // batch_size) * batch_size
        for start in range(0, len(self.q_N), step):
            yield from self._read(np.arange(start, min(start + step, len(self.q_N)))).in_order(batch_size)

    def _shuffled(self, epoch: int) -> Iterator[tuple[MemoryBatches, Tensor]]:
        """Yield the windows of an epoch, each with the order of its rows, (W,) int64."""
        generator = np.random.default_rng((self.seed, epoch))
        # By image, so that a block is one stretch of the file; rows mostly lie so.
        rows_N = np.argsort(self.image_index_N, kind="stable")
        block_rows = max(1, self.window_rows // BLOCKS_PER_WINDOW)
        starts = generator.permutation(np.arange(0, len(rows_N), block_rows))
        # Windows of equal size: a last one of one block would give batches of neighbours.
        for blocks in np.array_split(starts, math.ceil(len(starts) / BLOCKS_PER_WINDOW)):
            rows_W = np.concatenate([rows_N[start : start + block_rows] for start in blocks])
            order_W = torch.from_numpy(generator.permutation(len(rows_W)))
            yield self._read(rows_W), order_W.to(self.q_N.device)

    def _read(self, rows_W: NDArray[np.int64]) -> MemoryBatches:
        """Return some rows with their vectors in memory."""
        images_K, image_W = np.unique(self.image_index_N[rows_W], return_inverse=True)
        explanation_W = None if self.explanation_index_N is None else self.explanation_index_N[rows_W]
        wanted = self.text_index_N[rows_W]
        if explanation_W is not None:
            wanted = np.concatenate([wanted, explanation_W])
        texts_K = np.unique(wanted[wanted >= 0])  # -1 is no text
        device = self.q_N.device
        rows = torch.from_numpy(rows_W).to(device)

        def places(entries: NDArray[np.int64]) -> Tensor:
            found = np.where(entries < 0, -1, np.searchsorted(texts_K, entries))
            return torch.from_numpy(found).to(device)

        return memory_batches(
            self.read_images(images_K),
            self.read_texts(texts_K),
            self.q_N.index_select(0, rows),
            self.c_N.index_select(0, rows),
            image_index_N=torch.from_numpy(image_W).to(device),
            text_index_N=places(self.text_index_N[rows_W]),
            columns_N={name: column_N.index_select(0, rows) for name, column_N in self.columns_N.items()},
            explanation_index_N=None if explanation_W is None else places(explanation_W),
            batch_size=self.batch_size,
            seed=self.seed,
        )


def _joined(parts: list[Batch]) -> Batch:
    """Return the rows of several batches as one."""
    columns = {name: [getattr(part, name) for part in parts] for name in Batch._fields}
    return Batch(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})
