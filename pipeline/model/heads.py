"""Residual, direct, refinement, rationale heads and HeadSpec: the paper in one file.

Residual heads: a base from CLIP plus a bounded learned correction.

Knows the formulas of residual heads and the three ways a scale may behave. Must not know data, files or the
training loop.

Shapes: N rows, D embedding width, M = 2D + 1 width of [v, t, s]; v_ND image and t_ND prompt embedding
(L2-normalised), s_N their cosine, q quality, c consistency, dq and dc the corrections in [-1, 1].

Direct heads: scores straight from the embeddings, the ablation of the residual design.

Knows the direct formulas. Must not know data, files or the training loop.

Shapes: N rows, D embedding width, M = 2D + 1 width of [v, t, s].

The second stage of direct heads: a small transformer that corrects a coarse consistency within a bound.

Knows the three tokens and the bound. Must not know which head gave the coarse score.

Shapes: N rows, D embedding width, W width of a token.

The explanation head: what it predicts, and its loss. Training only; no score reads it.

Knows the hidden layer that it shares with the consistency head. Must not know where explanations come from.

Shapes: N rows, H width of the shared layer, D embedding width.

The description from which heads are built again, exactly.

Knows which heads exist and what shapes them; it is the JSON header of a checkpoint. Must not know files or
training settings.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deltaclip.base.errors import did_you_mean
from deltaclip.pipeline.model.kernel import Kernel
from deltaclip.pipeline.model.scores import HeadScores, cosine

if TYPE_CHECKING:
    from collections.abc import Mapping


# ---- Residual heads: a base from CLIP plus a bounded learned correction


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


# ---- The second stage of direct heads: a small transformer that corrects a coarse consistency within a bound


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


# ---- Direct heads: scores straight from the embeddings, the ablation of the residual design


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


# ---- The explanation head: what it predicts, and its loss


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


# ---- The description from which heads are built again, exactly


HeadKind = Literal["residual", "direct"]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Everything that shapes heads.

    Scales in [0, 1] are read by residual heads only; `two_branch`, `refinement` and its bound by direct ones.
    """

    dim: int
    kind: HeadKind = "residual"
    scale_q: float = 0.2
    scale_c: float = 0.2
    scale_mode: ScaleMode = "fixed"
    dropout: float = 0.1
    hidden_q: int = 128
    hidden_c: tuple[int, int] = (256, 64)
    two_branch: bool = False
    refinement: bool = False
    refine_bound: float = BOUND
    rationale: bool = False
    kernels: KernelShape | None = None

    def __post_init__(self) -> None:
        """Refuse values that no head can be built from."""
        for name, value, known in (
            ("kind", self.kind, get_args(HeadKind)),
            ("scale_mode", self.scale_mode, get_args(ScaleMode)),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; {did_you_mean(value, known)}")
        for name in ("scale_q", "scale_c", "refine_bound"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        for name, kind in (("two_branch", "direct"), ("refinement", "direct"), ("kernels", "residual")):
            if self.kind != kind and getattr(self, name):
                raise ValueError(f"{name} needs {kind} heads, these are {self.kind}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        for width in (self.dim, self.hidden_q, *self.hidden_c):
            if width < 1:
                raise ValueError(f"dim and hidden widths must be at least 1, not {width}")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; floats survive exactly."""
        kernels = None if self.kernels is None else self.kernels._asdict()
        return asdict(self) | {"hidden_c": list(self.hidden_c), "kernels": kernels}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeadSpec:
        """Return the spec that `to_json` wrote; unknown names are an error: they would change the heads."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown head setting {name!r}; {did_you_mean(name, known)}")
        wide, narrow = values.get("hidden_c", cls.hidden_c)
        kernels = values.get("kernels")
        shape = None if kernels is None else KernelShape(**kernels)
        return cls(**{**values, "hidden_c": (wide, narrow), "kernels": shape})


def build_heads(spec: HeadSpec) -> ResidualHeads | DirectHeads:
    """Return new heads; their random weights come from torch's global generator."""
    heads = _build_scores(spec)
    if spec.rationale:  # after the rest, whose random start is the same without
        heads.rationale = RationaleHead(spec.hidden_c[0], spec.dim)
    if spec.kernels and isinstance(heads, ResidualHeads):
        heads.use_kernels(spec.kernels)
    return heads


def _build_scores(spec: HeadSpec) -> ResidualHeads | DirectHeads:
    if spec.kind == "direct":
        return DirectHeads(
            spec.dim,
            dropout=spec.dropout,
            hidden_c=spec.hidden_c,
            two_branch=spec.two_branch,
            refinement=spec.refinement,
            refine_bound=spec.refine_bound,
        )
    return ResidualHeads(
        spec.dim,
        scale_q=spec.scale_q,
        scale_c=spec.scale_c,
        scale_mode=spec.scale_mode,
        dropout=spec.dropout,
        hidden_q=spec.hidden_q,
        hidden_c=spec.hidden_c,
    )
