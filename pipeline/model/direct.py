"""Direct heads: scores straight from the embeddings, the ablation of the residual design.

Knows the direct formulas. Must not know data, files or the training loop.

Shapes: N rows, D embedding width, M = 2D + 1 width of [v, t, s].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltaclip.pipeline.model.heads import fuse, fusion_mlp
from deltaclip.pipeline.model.refinement import BOUND, Refinement
from deltaclip.pipeline.model.scores import HeadScores, cosine

if TYPE_CHECKING:
    from deltaclip.pipeline.model.rationale import RationaleHead


class DirectHeads(nn.Module):
    """q = sigmoid(Linear(v)), c = sigmoid(MLP([v, t, s])).

    The MLP is the Fusion of the residual heads, so that the ablation changes the design and not the capacity.
    Two branches: c = (sigmoid(MLP([v, t, s])) + sigmoid(k s + m)) / 2. Refinement: c + bound * d, see `Refinement`.
    """

    def __init__(
        self,
        dim: int,
        *,
        dropout: float = 0.1,
        hidden_c: tuple[int, int] = (256, 64),
        two_branch: bool = False,
        refinement: bool = False,
        refine_bound: float = BOUND,
    ) -> None:
        super().__init__()
        self.dim, self.two_branch = dim, two_branch
        self.q_linear = nn.Linear(dim, 1)
        self.c_fusion = fusion_mlp(dim, hidden_c, dropout)
        if two_branch:
            # A start for uncalibrated use: 0.5 at a cosine of 0.25, the middle of what CLIP gives to prompts and
            # images, and 0.27 to 0.73 between 0.15 and 0.35, its usual range.
            self.cosine_slope = nn.Parameter(torch.tensor(10.0))
            self.cosine_offset = nn.Parameter(torch.tensor(-2.5))
        self.refinement = Refinement(dim, bound=refine_bound, dropout=dropout) if refinement else None
        self.rationale: RationaleHead | None = None

    def forward(self, v_ND: Tensor, t_ND: Tensor) -> HeadScores:
        """Score rows of embeddings; with refinement the coarse c is the base of the correction."""
        s_N = cosine(v_ND, t_ND)
        q_N = torch.sigmoid(self.q_linear(v_ND).squeeze(-1))
        vts_NM = torch.cat((v_ND, t_ND, s_N.unsqueeze(-1)), dim=-1)
        c_logit_N, e_ND = fuse(self.c_fusion, self.rationale, vts_NM)
        c_N = torch.sigmoid(c_logit_N)
        if self.two_branch:
            c_N = (c_N + torch.sigmoid(self.cosine_slope * s_N + self.cosine_offset)) / 2
        if self.refinement is None:
            return HeadScores(q_sum_N=q_N, c_sum_N=c_N, e_ND=e_ND)
        d_N, bound = self.refinement(v_ND, t_ND, c_N), self.refinement.bound
        c_sum_N = c_N + bound * d_N
        return HeadScores(q_sum_N=q_N, c_sum_N=c_sum_N, c_base_N=c_N, dc_N=d_N, scale_c=bound, e_ND=e_ND)
