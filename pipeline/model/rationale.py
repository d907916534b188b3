"""The explanation head: what it predicts, and its loss. Training only; no score reads it.

Knows the hidden layer that it shares with the consistency head. Must not know where explanations come from.

Shapes: N rows, H width of the shared layer, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RationaleHead(nn.Module):
    """[v, t, s] -> R^D through the first layer of the consistency head: e = Linear(GELU(Linear(LayerNorm([v, t, s])))).

    The layer is shared because v and t are frozen: a head with layers of its own would learn beside the scores and
    change none of them.
    """

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(hidden, dim)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return e_ND, the predicted embedding of the explanation."""
        predicted_ND: Tensor = self.out(hidden_NH)
        return predicted_ND


def rationale_loss(predicted_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Return the mean over explained rows and D of (predicted - target)^2; target rows of NaN have no explanation.

    0 with a zero gradient when no row has one.
    """
    present_N = ~torch.isnan(target_ND[:, 0])
    error_ND = torch.where(present_N[:, None], predicted_ND - target_ND, 0.0)
    return error_ND.square().sum() / (present_N.sum().clamp(min=1) * target_ND.shape[1])
