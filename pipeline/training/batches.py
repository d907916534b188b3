"""Batches of rows that lie in memory.

Knows how rows are shuffled, once per epoch, from a seed. Must not know files: a streaming source gives the
same seam, a callable from the epoch (counted from 1) to its batches, with the number of steps.

Shapes: N rows, I distinct images, M distinct texts, D embedding width, B rows of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from deltaclip.pipeline.model.scores import Batch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor


class TrainBatches(Protocol):
    """Where a training loop takes its batches from."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches that every epoch gives."""

    def __call__(self, epoch: int) -> Iterable[Batch]:
        """Return the batches of one epoch; the same epoch gives the same batches again."""


@dataclass(frozen=True, kw_only=True)
class MemoryBatches:
    """Rows in memory: see `memory_batches`."""

    v_ID: Tensor
    t_MD: Tensor
    q_N: Tensor
    c_N: Tensor
    image_index_N: Tensor | None
    text_index_N: Tensor | None
    batch_size: int
    seed: int
    columns_N: Mapping[str, Tensor] = field(default_factory=dict)
    explanation_index_N: Tensor | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch; the last rows are used too."""
        return math.ceil(len(self.q_N) / self.batch_size)

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """Return every row once, in an order drawn from (seed, epoch)."""
        for rows_B in self.order(epoch):
            yield self.take(rows_B)

    def order(self, epoch: int) -> tuple[Tensor, ...]:
        """Return the numbers of the rows of each batch of an epoch."""
        order_N = np.random.default_rng((self.seed, epoch)).permutation(len(self.q_N))
        # Equal parts: a last batch of one row would have the weight of a full one.
        return torch.from_numpy(order_N).to(self.q_N.device).tensor_split(self.steps_per_epoch)

    def in_order(self, batch_size: int = 4096) -> Iterator[Batch]:
        """Return every row once as it lies, in blocks: for calibration and for scoring."""
        num_rows = len(self.q_N)
        for start in range(0, num_rows, batch_size):
            yield self.take(torch.arange(start, min(start + batch_size, num_rows), device=self.q_N.device))

    def take(self, rows_B: Tensor) -> Batch:
        """Return some rows as a batch."""
        images_B = rows_B if self.image_index_N is None else self.image_index_N.index_select(0, rows_B)
        return Batch(
            v_BD=self.v_ID.index_select(0, images_B).float(),
            t_BD=self._texts(rows_B),
            q_B=self.q_N.index_select(0, rows_B),
            c_B=self.c_N.index_select(0, rows_B),
            **{name: column_N.index_select(0, rows_B) for name, column_N in self.columns_N.items()},
            e_BD=None if self.explanation_index_N is None else self._explanations(self.explanation_index_N[rows_B]),
        )

    def _texts(self, rows_B: Tensor) -> Tensor:
        if self.text_index_N is None:
            return self.t_MD.index_select(0, rows_B).float()
        return taken(self.t_MD, self.text_index_N.index_select(0, rows_B), missing=0.0)

    def _explanations(self, texts_B: Tensor) -> Tensor:
        return taken(self.t_MD, texts_B, missing=torch.nan)


def taken(t_MD: Tensor, entry_B: Tensor, *, missing: float) -> Tensor:
    """Return rows of embeddings in float32, (B, D), each of value `missing` where the entry is -1: there is no text."""
    none_B = entry_B < 0
    if not len(t_MD):
        return torch.full((len(entry_B), t_MD.shape[1]), missing, device=t_MD.device)
    t_BD = t_MD.index_select(0, entry_B.clamp(min=0)).float()
    return t_BD.masked_fill(none_B.unsqueeze(-1), missing) if none_B.any() else t_BD


def memory_batches(  # noqa: PLR0913 - four columns and what places them
    v_ID: Tensor,
    t_MD: Tensor,
    q_N: Tensor,
    c_N: Tensor,
    *,
    image_index_N: Tensor | None = None,
    text_index_N: Tensor | None = None,
    columns_N: Mapping[str, Tensor] | None = None,
    explanation_index_N: Tensor | None = None,
    batch_size: int = 64,
    seed: int = 42,
) -> MemoryBatches:
    """Return shuffled batches, float32 whatever the embeddings are stored in; labels in [0, 1], NaN = missing.

    With an index (int64) the embeddings come deduplicated: row n has v_ID[image_index_N[n]] and
    t_MD[text_index_N[n]]; without, they have one row per row. `columns_N` are further fields of `Batch`, such as
    q_std_B, with one value per row; explanation_index_N finds e_BD in t_MD. An entry of -1 is no text: t is 0 there,
    e is NaN. Nothing is copied here, and only one batch at a time later.
    """
    num_rows = len(q_N)
    lengths = {
        "image rows": len(v_ID) if image_index_N is None else len(image_index_N),
        "text rows": len(t_MD) if text_index_N is None else len(text_index_N),
        "consistency labels": len(c_N),
        "explanations": num_rows if explanation_index_N is None else len(explanation_index_N),
        **{f"values of {name}": len(column_N) for name, column_N in (columns_N or {}).items()},
    }
    for what, length in lengths.items():
        if length != num_rows:
            raise ValueError(f"{num_rows} quality labels but {length} {what}")
    if num_rows == 0:
        raise ValueError("there is no row to train on")
    if v_ID.shape[1] != t_MD.shape[1]:
        raise ValueError(f"image embeddings have width {v_ID.shape[1]}, text embeddings {t_MD.shape[1]}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    return MemoryBatches(
        v_ID=v_ID.contiguous(),
        t_MD=t_MD.contiguous(),
        q_N=q_N,
        c_N=c_N,
        image_index_N=image_index_N,
        text_index_N=text_index_N,
        batch_size=batch_size,
        seed=seed,
        columns_N=columns_N or {},
        explanation_index_N=explanation_index_N,
    )
