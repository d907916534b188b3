"""Batches of rows, shuffled once per epoch from a seed: of rows in memory, or of vectors that stay in a file.

Both give the same seam, a callable from the epoch (counted from 1) to its batches, with the number of steps. Streamed,
an epoch takes blocks of rows in random order, a window of them at a time, and the rows of a window in random order:
reading stays in long stretches, and a batch mixes rows from many places. Must not know files: two callables read
vectors.

Shapes: N rows, W rows of a window, I distinct images, M distinct texts, K of either, D embedding width, B rows of a
batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from deltaclip.pipeline.model.scores import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    Read = Callable[[NDArray[np.int64]], Tensor]  # rising, distinct entries (K,) -> their vectors (K, D)


# ---- Batches of rows that lie in memory


# Further fields of a batch, each by target, with one value for each row.
Columns = Mapping[str, Mapping[str, "Tensor"]]


class TrainBatches(Protocol):
    """Where a training loop takes its batches from."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that every epoch gives."""

    def __call__(self, epoch: int, *, first: int = 0) -> Iterable[Batch]:
        """Return the batches of one epoch from batch `first` on; the same epoch gives the same batches again."""


def _of_rows(columns: Mapping[str, Tensor], rows_B: Tensor) -> dict[str, Tensor]:
    return {target: column_N.index_select(0, rows_B) for target, column_N in columns.items()}


@dataclass(frozen=True, kw_only=True)
class MemoryBatches:
    """Rows in memory: see `memory_batches`."""

    v_ID: Tensor
    t_MD: Tensor
    label_N: Mapping[str, Tensor]
    image_index_N: Tensor | None
    text_index_N: Tensor | None
    batch_size: int
    seed: int
    columns_N: Columns = field(default_factory=dict)
    explanation_index_N: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.v_ID if self.image_index_N is None else self.image_index_N)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch; the last rows are used too."""
        return math.ceil(self.num_rows / self.batch_size)

    def __call__(self, epoch: int, *, first: int = 0) -> Iterator[Batch]:
        """Return every row once, in an order drawn from (seed, epoch), but the rows of the batches before `first`."""
        for rows_B in self.order(epoch)[first:]:
            yield self.take(rows_B)

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """Return the numbers of the rows of each batch of an epoch."""
        order_N = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        # Equal parts: a last batch of one row would have the weight of a full one.
        return torch.from_numpy(order_N).to(self.v_ID.device).tensor_split(self.steps_per_epoch)

    def in_order(self, batch_size: int = 4096) -> Iterator[Batch]:
        """Return every row once as it lies, in blocks: for calibration and for scoring."""
        num_rows = self.num_rows
        for start in range(0, num_rows, batch_size):
            yield self.take(torch.arange(start, min(start + batch_size, num_rows), device=self.v_ID.device))

    def take(self, rows_B: Tensor) -> Batch:
        """Return some rows as a batch."""
        images_B = rows_B if self.image_index_N is None else self.image_index_N.index_select(0, rows_B)
        return Batch(
            v_BD=self.v_ID.index_select(0, images_B).float(),
            t_BD=self._texts(rows_B),
            label_B=_of_rows(self.label_N, rows_B),
            **{name: _of_rows(column, rows_B) for name, column in self.columns_N.items()},
            e_BD=None if self.explanation_index_N is None else self._explanations(self.explanation_index_N[rows_B]),
        )

    def _texts(self, rows_B: Tensor) -> Tensor:
        if self.text_index_N is None:
            return self.t_MD.index_select(0, rows_B).float()
        return taken(self.t_MD, self.text_index_N.index_select(0, rows_B), missing=0.0)

    def _explanations(self, texts_B: Tensor) -> Tensor:
        return taken(self.t_MD, texts_B, missing=torch.nan)


@dataclass(frozen=True, kw_only=True)
class PairedBatches:
    """Batches of rows with pairs beside them: each step sees a part of the rows and one of the pairs.

    `pair_P3` has by target the places of a and b among the rows, and the probability that a is preferred, float64. The
    rows of pairs follow those of the batch with their labels taken off, so that ratings count once an epoch.
    """

    rows: MemoryBatches
    pair_P3: Mapping[str, Tensor]
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch: that of the rows."""
        return self.rows.steps_per_epoch

    def __call__(self, epoch: int, *, first: int = 0) -> Iterator[Batch]:
        """Return every row and every pair once, in an order drawn from (seed, epoch)."""
        parts = {name: self._order(pairs, epoch) for name, pairs in self.pair_P3.items()}
        for step, rows_B in enumerate(self.rows.order(epoch)):
            if step >= first:
                yield self._take(rows_B, {name: pairs[step] for name, pairs in parts.items()})

    def in_order(self, batch_size: int = 4096) -> Iterator[Batch]:
        """Return every row once as it lies, without pairs."""
        return self.rows.in_order(batch_size)

    def _order(self, pair_P3: Tensor, epoch: int) -> tuple[Tensor, ...]:
        order_P = np.random.default_rng((self.seed, epoch, 1)).permutation(len(pair_P3))
        return pair_P3[torch.from_numpy(order_P).to(pair_P3.device)].tensor_split(self.steps_per_epoch)

    def _take(self, rows_B: Tensor, pairs: Mapping[str, Tensor]) -> Batch:
        extra, start = [rows_B], len(rows_B)
        placed: dict[str, Tensor] = {}
        for name, pair_P3 in pairs.items():
            extra += [pair_P3[:, 0].long(), pair_P3[:, 1].long()]
            places_P = torch.arange(start, start + len(pair_P3), device=pair_P3.device, dtype=pair_P3.dtype)
            placed[name] = torch.stack([places_P, places_P + len(pair_P3), pair_P3[:, 2]], dim=1)
            start += 2 * len(pair_P3)
        batch = self.rows.take(torch.cat(extra))
        labels = {name: label_B.clone() for name, label_B in batch.label_B.items()}
        for label_B in labels.values():
            label_B[len(rows_B) :] = torch.nan
        e_BD = batch.e_BD
        if e_BD is not None:
            e_BD[len(rows_B) :] = torch.nan
        return batch._replace(label_B=labels, e_BD=e_BD, pair_P3=placed)


def taken(t_MD: Tensor, entry_B: Tensor, *, missing: float) -> Tensor:
    """Return rows of embeddings in float32, (B, D), each of value `missing` where the entry is -1: there is no text."""
    none_B = entry_B < 0
    if not len(t_MD):
        return torch.full((len(entry_B), t_MD.shape[1]), missing, device=t_MD.device)
    t_BD = t_MD.index_select(0, entry_B.clamp(min=0)).float()
    # Elsewhere than on a CPU the answer to whether there is one costs more than to fill nothing.
    is_needed = none_B.device.type != "cpu" or none_B.any()
    return t_BD.masked_fill(none_B.unsqueeze(-1), missing) if is_needed else t_BD


def memory_batches(  # noqa: PLR0913 - three columns and what places them
    v_ID: Tensor,
    t_MD: Tensor,
    label_N: Mapping[str, Tensor],
    *,
    image_index_N: Tensor | None = None,
    text_index_N: Tensor | None = None,
    columns_N: Columns | None = None,
    explanation_index_N: Tensor | None = None,
    batch_size: int = 64,
    seed: int = 42,
) -> MemoryBatches:
    """Return shuffled batches, float32 whatever the embeddings are stored in.

    `label_N` has the labels of every target, in [0, 1], NaN = missing.

    With an index (int64) the embeddings come deduplicated: row n has v_ID[image_index_N[n]] and
    t_MD[text_index_N[n]]; without, they have one row per row. `columns_N` are further fields of `Batch`, such as
    std_B, by target, with one value per row; explanation_index_N finds e_BD in t_MD. An entry of -1 is no text: t is 0
    there, e is NaN. Nothing is copied here, and only one batch at a time later.
    """
    num_rows = len(v_ID) if image_index_N is None else len(image_index_N)
    lengths = {
        "text rows": len(t_MD) if text_index_N is None else len(text_index_N),
        **{f"labels of {target}": len(column_N) for target, column_N in label_N.items()},
        "explanations": num_rows if explanation_index_N is None else len(explanation_index_N),
        **{
            f"values of {name} of {target}": len(column_N)
            for name, by_target in (columns_N or {}).items()
            for target, column_N in by_target.items()
        },
    }
    for what, length in lengths.items():
        if length != num_rows:
            raise ValueError(f"{num_rows} image rows but {length} {what}")
    if num_rows == 0:
        raise ValueError("there is no row to train on")
    if v_ID.shape[1] != t_MD.shape[1]:
        raise ValueError(f"image embeddings have width {v_ID.shape[1]}, text embeddings {t_MD.shape[1]}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return MemoryBatches(
        v_ID=v_ID.contiguous(),
        t_MD=t_MD.contiguous(),
        label_N=label_N,
        image_index_N=image_index_N,
        text_index_N=text_index_N,
        batch_size=batch_size,
        seed=seed,
        columns_N=columns_N or {},
        explanation_index_N=explanation_index_N,
    )


# ---- Batches of rows whose vectors stay in a file: read in blocks, shuffled within large windows


BLOCKS_PER_WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class StreamBatches:
    """N rows whose vectors are read when their turn comes; a `TrainBatches`, and in order for scoring.

    Labels and columns are those of `MemoryBatches`; the indices (N,) int64 are arrays, since they decide what is read.
    At most `window_rows` rows have their vectors in memory, twice that while one window follows another.
    """

    read_images: Read
    read_texts: Read
    device: torch.device
    label_N: Mapping[str, Tensor]
    image_index_N: NDArray[np.int64]
    text_index_N: NDArray[np.int64]
    batch_size: int
    seed: int
    window_rows: int
    columns_N: Columns = field(default_factory=dict)
    explanation_index_N: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if not self.num_rows:
            raise ValueError("there is no row to train on")

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.image_index_N)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch; the last rows are used too."""
        return math.ceil(self.num_rows / self.batch_size)

    def __call__(self, epoch: int, *, first: int = 0) -> Iterator[Batch]:
        """Return every row once, in an order drawn from (seed, epoch), in equal parts as `MemoryBatches` has them."""
        return islice(self._all(epoch), first, None)

    def _all(self, epoch: int) -> Iterator[Batch]:
        num_rows, num_steps = self.num_rows, self.steps_per_epoch
        short, num_long = divmod(num_rows, num_steps)
        done, held, missing = 0, list[Batch](), short + (num_long > 0)
        for window, order_W in self._shuffled(epoch):
            first = 0
            while first < len(order_W):
                rows_B = order_W[first : first + missing]
                held.append(window.take(rows_B))
                first, missing = first + len(rows_B), missing - len(rows_B)
                if not missing:
                    yield held[0] if len(held) == 1 else Batch.joined(held)
                    done, held = done + 1, []
                    missing = short + (done < num_long)

    def in_order(self, batch_size: int = 4096) -> Iterator[Batch]:
        """Return every row once as it lies, in the blocks that `MemoryBatches.in_order` gives."""
        step = max(1, self.window_rows // batch_size) * batch_size
        for start in range(0, self.num_rows, step):
            yield from self._read(np.arange(start, min(start + step, self.num_rows))).in_order(batch_size)

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
            yield self._read(rows_W), order_W.to(self.device)

    def _read(self, rows_W: NDArray[np.int64]) -> MemoryBatches:
        """Return some rows with their vectors in memory."""
        images_K, image_W = np.unique(self.image_index_N[rows_W], return_inverse=True)
        explanation_W = None if self.explanation_index_N is None else self.explanation_index_N[rows_W]
        wanted = self.text_index_N[rows_W]
        if explanation_W is not None:
            wanted = np.concatenate([wanted, explanation_W])
        texts_K = np.unique(wanted[wanted >= 0])  # -1 is no text
        device = self.device
        rows = torch.from_numpy(rows_W).to(device)

        def places(entries: NDArray[np.int64]) -> Tensor:
            found = np.where(entries < 0, -1, np.searchsorted(texts_K, entries))
            return torch.from_numpy(found).to(device)

        return memory_batches(
            self.read_images(images_K),
            self.read_texts(texts_K),
            _of_rows(self.label_N, rows),
            image_index_N=torch.from_numpy(image_W).to(device),
            text_index_N=places(self.text_index_N[rows_W]),
            columns_N={name: _of_rows(column, rows) for name, column in self.columns_N.items()},
            explanation_index_N=None if explanation_W is None else places(explanation_W),
            batch_size=self.batch_size,
            seed=self.seed,
        )
