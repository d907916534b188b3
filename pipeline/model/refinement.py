"""The second stage of direct heads: a small transformer that corrects a coarse consistency within a bound.

Knows the three tokens and the bound. Must not know which head gave the coarse score.

Shapes: N rows, D embedding width, W width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYERS, HEADS, WIDTH = 4, 8, 256
# Two rather than the usual four: half of the weights of a layer, and three tokens have little to store.
_FEED_FORWARD = 2 * WIDTH

# Largest correction, as large as that of the residual heads: the coarse score stays the main part.
BOUND = 0.2


class Refinement(nn.Module):
    """d = tanh(Linear(LayerNorm(last state of token c))) in [-1, 1] of Transformer(v, t, c); c is a token of its own.

    Pre-norm layers (Xiong et al., arXiv:2002.04745), which need no warm-up of their own. A new module gives d = 0, so
    that training starts at the coarse score.
    """

    bound: Tensor

    def __init__(self, dim: int, *, bound: float = BOUND, dropout: float = 0.1) -> None:
        super().__init__()
        self.v_token = nn.Linear(dim, WIDTH)
        self.t_token = nn.Linear(dim, WIDTH)
        self.c_token = nn.Linear(1, WIDTH)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    WIDTH,
                    HEADS,
                    dim_feedforward=_FEED_FORWARD,
                    dropout=dropout,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(LAYERS)
            )
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("bound", torch.tensor(float(bound)))

    def forward(self, v_ND: Tensor, t_ND: Tensor, c_N: Tensor) -> Tensor:
        """Return d_N; the refined score is c + bound * d.

        The tokens need no position: each has its own projection with a bias.
        """
        tokens_N3W = torch.stack((self.v_token(v_ND), self.t_token(t_ND), self.c_token(c_N.unsqueeze(-1))), dim=1)
        states_N3W = self.layers(tokens_N3W)
        return torch.tanh(self.out(self.norm(states_N3W[:, 2])).squeeze(-1))
