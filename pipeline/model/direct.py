"""Direct heads: scores straight from the embeddings, the ablation of the residual design.

Knows the direct formulas of spec section 2. Must not know data, files or the training loop. Variants that
average `c` with the cosine or refine it belong here and in `refinement.py`: they wrap `c_logit_N` below.

Shapes: N rows, D embedding width, M = 2D + 1 width of [v, t, s].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaclip.pipeline.model.heads import fusion_mlp
from deltaclip.pipeline.model.scores import HeadScores, cosine


class DirectHeads(nn.Module):
    """q = sigmoid(Linear(v)), c = sigmoid(MLP([v, t, s])).

    The MLP is the Fusion of the residual heads, so that the ablation changes the design and not the capacity.
    """

    def __init__(self, dim: int, *, dropout: float = 0.1, hidden_c: tuple[int, int] = (256, 64)) -> None:
        super().__init__()
        self.dim = dim
        self.q_linear = nn.Linear(dim, 1)
        self.c_fusion = fusion_mlp(dim, hidden_c, dropout)

    def forward(self, v_ND: Tensor, t_ND: Tensor) -> HeadScores:
        """Score rows of embeddings; there is no base, delta or scale."""
        s_N = cosine(v_ND, t_ND)
        q_logit_N = self.q_linear(v_ND).squeeze(-1)
        vts_NM = torch.cat((v_ND, t_ND, s_N.unsqueeze(-1)), dim=-1)
        c_logit_N = self.c_fusion(vts_NM).squeeze(-1)
        return HeadScores(q_sum_N=torch.sigmoid(q_logit_N), c_sum_N=torch.sigmoid(c_logit_N))
