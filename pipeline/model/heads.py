"""Residual heads: a base from CLIP plus a bounded learned correction.

Knows the formulas of residual heads and the three ways a scale may behave. Must not know data, files or the
training loop.

Shapes: N rows, D embedding width, M = 2D + 1 width of [v, t, s]; v_ND image and t_ND prompt embedding
(L2-normalised), s_N their cosine, q quality, c consistency, dq and dc the corrections in [-1, 1].
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from deltaclip.pipeline.model.kernel import Kernel
from deltaclip.pipeline.model.scores import HeadScores, cosine

if TYPE_CHECKING:
    from deltaclip.pipeline.model.rationale import RationaleHead

ScaleMode = Literal["fixed", "learned", "curriculum"]

# A learned scale starts at most at this share of its upper bound; beyond, the sigmoid is too flat to move it.
_LEARNED_START_MAX = 0.99


def learned_upper(given: float) -> float:
    """Return the bound of a learned scale: 0.5 when it starts below (still a small correction), else 1."""
    return 0.5 if given < 0.5 else 1.0


class Scale(nn.Module):
    """The factor of one correction, `given` in [0, 1]; calling it returns the scalar in force.

    `learned` is upper * sigmoid(theta) and starts at `given`, at most at 99 % of upper; a start of 0 stays 0
    (pure base), as theta is then -inf. `fixed` and `curriculum` hold the value in a buffer, so a checkpoint
    carries the scale of the epoch it was taken at.
    """

    value: Tensor

    def __init__(self, given: float, mode: ScaleMode) -> None:
        super().__init__()
        if not 0 <= given <= 1:
            raise ValueError(f"a scale must lie in [0, 1], not {given}")
        self.given, self.mode, self.upper = given, mode, learned_upper(given)
        if mode == "learned":
            share = torch.tensor(min(given / self.upper, _LEARNED_START_MAX), dtype=torch.float64)
            self.theta = nn.Parameter(torch.logit(share).float())
        else:
            self.register_buffer("value", torch.tensor(float(given)))

    def forward(self) -> Tensor:
        """Return the scale in force, a scalar tensor."""
        return self.upper * torch.sigmoid(self.theta) if self.mode == "learned" else self.value


class KernelShape(NamedTuple):
    """What shapes the kernels of the bases: the view's name and width, and the landmarks of each."""

    view: str
    width: int
    points_q: int
    points_c: int


class ResidualHeads(nn.Module):
    """q = clamp(q_base + scale_q * dq, 0, 1) and c = clamp(c_base + scale_c * dc, 0, 1).

    |q - q_base| <= scale_q and |c - c_base| <= scale_c hold for every input and every state of the weights.
    A new module is the `identity` start: q_base = 0.5, c_base = (s + 1)/2, no correction. After `use_kernels`,
    q_base = clamp(f_q(x), 0, 1) and c_base = clamp(a (s + 1)/2 + b + f_c(x, t, f_q), 0, 1), f a `Kernel` on a further
    view x of the image: closed form, not trained here.
    """

    def __init__(
        self,
        dim: int,
        *,
        scale_q: float = 0.2,
        scale_c: float = 0.2,
        scale_mode: ScaleMode = "fixed",
        dropout: float = 0.1,
        hidden_q: int = 128,
        hidden_c: tuple[int, int] = (256, 64),
    ) -> None:
        super().__init__()
        self.dim, self.scale_mode = dim, scale_mode
        self.kernels: KernelShape | None = None
        self.q_base = nn.Linear(dim, 1)
        self.q_mlp = quality_mlp(dim, hidden_q, dropout)
        self.c_slope = nn.Parameter(torch.tensor(1.0))
        self.c_offset = nn.Parameter(torch.tensor(0.0))
        self.c_fusion = fusion_mlp(dim, hidden_c, dropout)
        self.scale_q = Scale(scale_q, scale_mode)
        self.scale_c = Scale(scale_c, scale_mode)
        self.rationale: RationaleHead | None = None
        # The last layers of both corrections start at zero, so that training starts exactly at the
        # (calibrated) base and the first steps only improve on it; a random correction would first have to be
        # unlearned. The base itself is a logistic regression: convex, no symmetry to break, so it starts at
        # zero as well.
        for module in (self.q_base, self.q_mlp[-1], self.c_fusion[-1]):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def use_kernels(self, shape: KernelShape) -> None:
        """Give the bases kernels, zero until they are fitted, in place of w and b0."""
        self.kernels = shape
        self.q_kernel = Kernel(shape.width, shape.points_q)
        self.c_kernel = Kernel(shape.width + self.dim + 1, shape.points_c)
        del self.q_base

    def forward(
        self, v_ND: Tensor, t_ND: Tensor, q_kernel_N: Tensor | None = None, c_kernel_N: Tensor | None = None
    ) -> HeadScores:
        """Score rows of embeddings; returns the unclamped sums with their parts.

        Heads with kernels need what these say of the rows (`kernel_terms`), which does not change while they train.
        """
        if self.kernels is not None and (q_kernel_N is None or c_kernel_N is None):
            raise ValueError("heads with kernels need q_kernel_N and c_kernel_N, see kernel_terms")
        s_N = cosine(v_ND, t_ND)
        scale_q, scale_c = self.scale_q(), self.scale_c()

        # q_base = sigmoid(w . v + b0);  q_sum = q_base + scale_q * tanh(MLP(v))
        q_base_N = self._quality_base(v_ND) if q_kernel_N is None else q_kernel_N.clamp(0, 1)
        dq_N = torch.tanh(self.q_mlp(v_ND).squeeze(-1))

        # c_base = clamp(a (s + 1)/2 + b, 0, 1);  c_sum = c_base + scale_c * tanh(Fusion([v, t, s]))
        line_N = self.c_slope * ((s_N + 1) / 2) + self.c_offset
        c_base_N = clamp_straight(line_N if c_kernel_N is None else line_N + c_kernel_N)
        vts_NM = torch.cat((v_ND, t_ND, s_N.unsqueeze(-1)), dim=-1)
        c_logit_N, e_ND = fuse(self.c_fusion, self.rationale, vts_NM)
        dc_N = torch.tanh(c_logit_N)

        return HeadScores(
            q_sum_N=q_base_N + scale_q * dq_N,
            c_sum_N=c_base_N + scale_c * dc_N,
            q_base_N=q_base_N,
            c_base_N=c_base_N,
            dq_N=dq_N,
            dc_N=dc_N,
            scale_q=scale_q,
            scale_c=scale_c,
            e_ND=e_ND,
        )

    def _quality_base(self, v_ND: Tensor) -> Tensor:
        return torch.sigmoid(self.q_base(v_ND).squeeze(-1))

    def kernel_terms(self, x_NF: Tensor, t_ND: Tensor) -> dict[str, Tensor]:
        """Return what the kernels say of rows, by the field of `Batch`: x_NF vectors of their view, t_ND prompts."""
        with torch.no_grad():
            q_N = self.q_kernel(x_NF)
            return {"q_kernel_B": q_N, "c_kernel_B": self.c_kernel(torch.cat((x_NF, t_ND, q_N[:, None]), dim=1))}

    def scales(self) -> tuple[float, float]:
        """Return (scale_q, scale_c) in force."""
        return float(self.scale_q().detach()), float(self.scale_c().detach())

    def set_scale_fraction(self, fraction: float) -> None:
        """Put `fraction` in [0, 1] of the given scales in force; only curriculum heads may be told."""
        if self.scale_mode != "curriculum":
            raise ValueError(f"only curriculum scales follow the epochs, these are {self.scale_mode}")
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], not {fraction}")
        for scale in (self.scale_q, self.scale_c):
            scale.value.fill_(fraction * scale.given)


class Dropout(nn.Module):
    """Inverted dropout: x * [U >= p] / (1 - p), U uniform in [0, 1) from torch's global generator.

    Unlike nn.Dropout, what is drawn does not depend on p, so that heads trained together in a sweep share U and each
    has the mask that it would have alone. With p = 0 nothing is drawn.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of its entries set to 0; x itself in evaluation mode."""
        if not self.training or self.p == 0:
            return x
        return x * dropout_factor(torch.rand_like(x), self.p)


def dropout_factor(uniform: Tensor, p: float) -> Tensor:
    """Return what dropout multiplies with: 1 / (1 - p) where the uniform number is at least p, else 0."""
    return (uniform >= p) * (1 / (1 - p))


def quality_mlp(dim: int, hidden: int, dropout: float) -> nn.Sequential:
    """Return D -> hidden, GELU, dropout, -> 1."""
    wide = nn.Linear(dim, hidden)
    return nn.Sequential(OrderedDict(wide=wide, gelu=nn.GELU(), dropout=Dropout(dropout), out=nn.Linear(hidden, 1)))


def fusion_mlp(dim: int, hidden: tuple[int, int], dropout: float) -> nn.Sequential:
    """Return LayerNorm, 2D+1 -> hidden[0], GELU, dropout, -> hidden[1], GELU, -> 1."""
    return nn.Sequential(
        OrderedDict(
            # No gain and bias of its own: the Linear behind it can express both, and without them the normalised rows
            # are the same for all heads, so a sweep computes them once.
            norm=nn.LayerNorm(2 * dim + 1, elementwise_affine=False),
            wide=nn.Linear(2 * dim + 1, hidden[0]),
            gelu=nn.GELU(),
            dropout=Dropout(dropout),
            narrow=nn.Linear(hidden[0], hidden[1]),
            gelu_2=nn.GELU(),
            out=nn.Linear(hidden[1], 1),
        )
    )


# Layers of `fusion_mlp` that a rationale head shares: up to the dropout.
_SHARED = 4


def fuse(fusion: nn.Sequential, rationale: RationaleHead | None, vts_NM: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the output of a `fusion_mlp`, and what the rationale head predicts from its first layer."""
    if rationale is None or not rationale.training:  # only the loss reads it, so scoring does not pay for it
        return fusion(vts_NM).squeeze(-1), None
    hidden_NH = fusion[:_SHARED](vts_NM)
    return fusion[_SHARED:](hidden_NH).squeeze(-1), rationale(hidden_NH)


def clamp_straight(x_N: Tensor) -> Tensor:
    """Return clamp(x, 0, 1) to the last bit, with the gradient of x."""
    # The value is clamp(x, 0, 1) to the last bit (x - x is exactly 0), the gradient is that of x. With the
    # plain clamp, rows whose base lies outside [0, 1] would never move a and b, and with scale_c = 0 not
    # learn at all. Leaving the clamp out of the loss instead would train dc against a base other than the
    # reported one.
    return x_N.detach().clamp(0, 1) + (x_N - x_N.detach())
