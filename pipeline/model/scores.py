"""What goes into the heads and what comes out of them.

Knows the two records that heads, losses and the training loop share, and how the bound of a
correction is kept in floating point. Must not know any particular head.

Shapes: N or B rows, D embedding width; v image and t prompt embedding, s their cosine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn


class Batch(NamedTuple):
    """Rows to learn from: L2-normalised embeddings, labels in [0, 1]; NaN is a label that the row lacks.

    The rest is there only for what asks for it: SDs of the labels over raters (NaN where unknown), weights of the rows
    in the loss, embeddings of explanations (NaN in rows that have none), and what the kernels of the bases say.
    """

    v_BD: Tensor
    t_BD: Tensor
    q_B: Tensor
    c_B: Tensor
    q_std_B: Tensor | None = None
    c_std_B: Tensor | None = None
    q_weight_B: Tensor | None = None
    c_weight_B: Tensor | None = None
    e_BD: Tensor | None = None
    q_kernel_B: Tensor | None = None
    c_kernel_B: Tensor | None = None


class HeadScores(NamedTuple):
    """Scores of N rows with their parts.

    `q_sum_N`, `c_sum_N` are what the loss sees: base + scale * delta, not clamped, so that no row loses its
    gradient. `q`, `c` are what is reported. Direct heads have no base, delta or scale: these are None,
    but for c when it is refined: base is the coarse c then, and scale the bound.
    `e_ND`, the predicted embedding of the explanation, is there in training with a rationale head.
    """

    q_sum_N: Tensor
    c_sum_N: Tensor
    q_base_N: Tensor | None = None
    c_base_N: Tensor | None = None
    dq_N: Tensor | None = None
    dc_N: Tensor | None = None
    scale_q: Tensor | None = None
    scale_c: Tensor | None = None
    e_ND: Tensor | None = None

    @property
    def q(self) -> Tensor:
        """Quality in [0, 1], within scale_q of its base."""
        return _reported(self.q_sum_N, self.q_base_N, self.scale_q)

    @property
    def c(self) -> Tensor:
        """Consistency in [0, 1], within scale_c of its base."""
        return _reported(self.c_sum_N, self.c_base_N, self.scale_c)


HEADS = ("quality", "consistency")


def head_of(name: str) -> str:
    """Return which head a parameter or buffer belongs to, by its name.

    The two heads share nothing, so gradients are clipped and the best epoch is chosen for each by itself.
    """
    if name.startswith(("q_", "scale_q")):
        return "quality"
    if name.startswith(("c_", "scale_c", "cosine_", "refinement.", "rationale.")):
        return "consistency"
    raise ValueError(f"no head is known for {name!r}; add its prefix to head_of")


def cosine(v_ND: Tensor, t_ND: Tensor) -> Tensor:
    """Return s_N = v . t of L2-normalised rows."""
    return (v_ND * t_ND).sum(dim=-1)


def run_heads(heads: nn.Module, batch: Batch) -> HeadScores:
    """Return what heads make of a batch, with the terms of their kernels where the batch has them."""
    terms = {"q_kernel_N": batch.q_kernel_B, "c_kernel_N": batch.c_kernel_B}
    scores: HeadScores = heads(
        batch.v_BD, batch.t_BD, **{name: term for name, term in terms.items() if term is not None}
    )
    return scores


def score_rows(heads: nn.Module, batches: Iterable[Batch]) -> HeadScores:
    """Score all rows of `batches` in evaluation mode, without gradients; the mode of `heads` is restored."""
    was_training = heads.training
    heads.eval()
    try:
        with torch.no_grad():
            parts = [run_heads(heads, batch) for batch in batches]
    finally:
        heads.train(was_training)
    if not parts:
        raise ValueError("score_rows needs at least one batch")
    # Scales are scalars and the same in every part; everything else has a row dimension.
    columns = {name: [getattr(part, name) for part in parts] for name in HeadScores._fields}
    return HeadScores(**{name: _joined(column) for name, column in columns.items() if column[0] is not None})


def _joined(column: list[Tensor]) -> Tensor:
    return column[0] if column[0].ndim == 0 else torch.cat(column)


def _reported(sum_N: Tensor, base_N: Tensor | None, scale: Tensor | None) -> Tensor:
    if base_N is None or scale is None:
        return sum_N.clamp(0, 1)
    # base + scale * delta may round up by half a unit in the last place, and |q - base| <= scale would fail
    # by 3e-8. One machine epsilon of slack covers the rounding of the scale, of the sum and of a caller's
    # difference.
    reach = (scale - torch.finfo(sum_N.dtype).eps).clamp(min=0)
    return sum_N.clamp(base_N - reach, base_N + reach).clamp(0, 1)
