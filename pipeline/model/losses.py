"""Losses over rows that may lack a label.

Knows each loss by name, its mask and its weight. Must not know heads or the training loop. Spec section 2. A
new loss is one function with the signature of `mse_loss` and one line in LOSSES; losses over pairs or over
the whole batch (plcc, rank, fidelity) fit, as a loss sees all rows of the batch and the mask.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltaclip.base.errors import did_you_mean
from deltaclip.pipeline.model.scores import Batch, HeadScores

# (prediction_B, label_B with NaN where the row lacks it) -> scalar; 0 with a zero gradient when all are
# missing.
Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[HeadScores, Batch], Tensor]


def mse_loss(prediction_B: Tensor, label_B: Tensor) -> Tensor:
    """Return the mean over the labelled rows of (prediction - label)^2."""
    # False for NaN only, in one kernel.
    present_B = label_B == label_B  # noqa: PLR0124
    # `where` selects before the square, so a missing label gives neither a NaN value nor a NaN gradient,
    # while a NaN prediction on a labelled row still shows.
    error_B = torch.where(present_B, prediction_B - label_B, 0.0)
    return torch.dot(error_B, error_B) / present_B.sum().clamp(min=1)


LOSSES: dict[str, Loss] = {"mse": mse_loss}


def weighted_loss(name: str = "mse", *, w_q: float = 0.5, w_c: float = 0.5) -> Objective:
    """Return w_q * L(q) + w_c * L(c) on the unclamped sums; a head of weight 0 is left out: no gradient."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; {did_you_mean(name, LOSSES)}")
    if min(w_q, w_c) < 0 or max(w_q, w_c) == 0:
        raise ValueError(f"loss weights must not be negative nor both 0, got w_q={w_q} and w_c={w_c}")
    loss = LOSSES[name]

    def objective(scores: HeadScores, batch: Batch) -> Tensor:
        if w_c == 0:
            return w_q * loss(scores.q_sum_N, batch.q_B)
        if w_q == 0:
            return w_c * loss(scores.c_sum_N, batch.c_B)
        return w_q * loss(scores.q_sum_N, batch.q_B) + w_c * loss(scores.c_sum_N, batch.c_B)

    return objective
