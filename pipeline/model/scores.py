"""What goes into the heads and what comes out of them.

Knows the records that heads, losses and the training loop share, and how the bound of a correction is kept in floating
point. Must not know any particular head.

Shapes: N or B rows, D embedding width; v image and t prompt embedding, s their cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn


class Batch(NamedTuple):
    """Rows to learn from: L2-normalised embeddings, and by target a label in [0, 1], NaN where the row lacks it.

    The rest is there only for what asks for it, by target too: SDs of the labels over raters (NaN where unknown),
    weights of the rows in the loss, what fitted bases say; and embeddings of explanations (NaN in rows that
    have none). `pair_P3` are pairs of these rows that people chose between: places of a and b, and the probability that
    a is preferred.
    """

    v_BD: Tensor
    t_BD: Tensor
    label_B: Mapping[str, Tensor]
    std_B: Mapping[str, Tensor] = {}
    weight_B: Mapping[str, Tensor] = {}
    fitted_B: Mapping[str, Tensor] = {}
    e_BD: Tensor | None = None
    pair_P3: Mapping[str, Tensor] = {}

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.v_BD)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with every tensor changed by a function."""
        return Batch(*(_mapped(part, change) for part in self))

    @classmethod
    def joined(cls, parts: Sequence[Batch]) -> Batch:
        """Return the rows of several batches, which have the same fields, as one."""
        return cls(*(_cat(column) for column in zip(*parts, strict=True)))


def _mapped(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if part is None:
        return None
    return {name: change(value) for name, value in part.items()} if isinstance(part, Mapping) else change(part)


def _cat(column: Sequence[Any]) -> Any:
    if column[0] is None:
        return None
    if isinstance(column[0], Mapping):
        return {name: torch.cat([part[name] for part in column]) for name in column[0]}
    return torch.cat(list(column))


class TargetScores(NamedTuple):
    """Scores of N rows for one target, with their parts.

    `sum_N` is what the loss sees: base + scale * delta, not clamped, so that no row loses its gradient. Direct heads
    have no base, delta or scale: these are None. Of a refined score, base is the coarse score and scale the bound.
    """

    sum_N: Tensor
    base_N: Tensor | None = None
    delta_N: Tensor | None = None
    scale: Tensor | None = None

    @property
    def reported(self) -> Tensor:
        """The score in [0, 1], within scale of its base."""
        if self.base_N is None or self.scale is None:
            return self.sum_N.clamp(0, 1)
        # base + scale * delta may round up by half a unit in the last place, and |score - base| <= scale would fail
        # by 3e-8. One machine epsilon of slack covers the rounding of the scale, of the sum and of a caller's
        # difference.
        reach = (self.scale - torch.finfo(self.sum_N.dtype).eps).clamp(min=0)
        return self.sum_N.clamp(self.base_N - reach, self.base_N + reach).clamp(0, 1)


class HeadScores(NamedTuple):
    """Scores of N rows by target; `e_ND`, the predicted explanation, is there in training with a rationale head."""

    targets: Mapping[str, TargetScores]
    e_ND: Tensor | None = None

    def of(self, target: str) -> Tensor:
        """Return the reported score of a target, (N,) in [0, 1]."""
        return self.targets[target].reported


# A head is the submodule `<target>_head` of the heads, so that the name of a parameter says whose it is.
_SUFFIX = "_head"


def head_name(target: str) -> str:
    """Return the name of the submodule that predicts a target."""
    return target + _SUFFIX


def head_of(name: str) -> str:
    """Return the target whose head a parameter or buffer belongs to, by its name.

    Heads share nothing, so gradients are clipped and the best epoch is chosen for each by itself.
    """
    first = name.partition(".")[0]
    if not first.endswith(_SUFFIX):
        raise ValueError(f"no head is known for {name!r}: a head is a submodule called TARGET{_SUFFIX}")
    return first.removesuffix(_SUFFIX)


def cosine(v_ND: Tensor, t_ND: Tensor) -> Tensor:
    """Return s_N = v . t of L2-normalised rows."""
    return (v_ND * t_ND).sum(dim=-1)


def run_heads(heads: nn.Module, batch: Batch) -> HeadScores:
    """Return what heads make of a batch, with what their fitted bases say where the batch has it."""
    scores: HeadScores = (
        heads(batch.v_BD, batch.t_BD, batch.fitted_B) if batch.fitted_B else heads(batch.v_BD, batch.t_BD)
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
    return HeadScores({target: _joined([part.targets[target] for part in parts]) for target in parts[0].targets})


def _joined(parts: Sequence[TargetScores]) -> TargetScores:
    # A scale is a scalar and the same in every part; everything else has a row dimension.
    columns = zip(*parts, strict=True)
    return TargetScores(*(c[0] if c[0] is None or c[0].ndim == 0 else torch.cat(c) for c in columns))
