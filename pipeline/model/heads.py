"""The heads: residual (a base from CLIP plus a bounded learned correction) and direct, each a head for every target.

Knows the formulas and the description from which heads are built again, which is the JSON header of a checkpoint. Must
not know data, files, settings or the training loop.

Shapes: N rows, D embedding width, M = 2D + 1 width of [v, t, s]; v_ND image and t_ND prompt embedding (L2-normalised),
s_N their cosine; W width of a token, H of a hidden layer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deltaclip.base.errors import did_you_mean
from deltaclip.base.vocabulary import CONSISTENCY, QUALITY, Sees
from deltaclip.pipeline.model.earlier import of_two_targets, with_bases
from deltaclip.pipeline.model.fitted_base import BaseShape, FittedBase
from deltaclip.pipeline.model.scores import HeadScores, TargetScores, cosine, head_name

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


class ImageHead(nn.Module):
    """y = clamp(base + scale * tanh(MLP(v)), 0, 1), base = sigmoid(w . v + b0), or clamp(f, 0, 1), f a `FittedBase`.

    The head of a target that sees the image alone; MLP: D -> H, GELU, dropout, -> 1.
    """

    def __init__(self, dim: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        self.base: nn.Linear | None = nn.Linear(dim, 1)
        self.mlp = image_mlp(dim, hidden, dropout)
        self.scale: Scale
        _start_at_zero(self.base, self.mlp[-1])

    def forward(self, v_ND: Tensor, fitted_N: Tensor | None = None) -> TargetScores:
        """Return the unclamped sums with their parts; `fitted_N` is what a fitted base says of the rows."""
        if fitted_N is not None:
            base_N = fitted_N.clamp(0, 1)
        else:
            assert self.base is not None, "the base is a fitted one"
            base_N = torch.sigmoid(self.base(v_ND).squeeze(-1))
        delta_N, scale = torch.tanh(self.mlp(v_ND).squeeze(-1)), self.scale()
        return TargetScores(base_N + scale * delta_N, base_N, delta_N, scale)


class PairHead(nn.Module):
    """y = clamp(base + scale * tanh(Fusion([v, t, s])), 0, 1), base = clamp(a (s + 1)/2 + b + f, 0, 1).

    The head of a target that sees image and prompt; f is a `FittedBase` or 0, a and b start at 1 and 0. `rationale`,
    where there is one, predicts the embedding of an explanation from the first layer of the Fusion.
    """

    def __init__(self, dim: int, *, hidden: tuple[int, int], dropout: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.0))
        self.offset = nn.Parameter(torch.tensor(0.0))
        self.fusion = fusion_mlp(dim, hidden, dropout)
        self.scale: Scale
        self.rationale: RationaleHead | None = None
        _start_at_zero(self.fusion[-1])

    def forward(
        self, v_ND: Tensor, t_ND: Tensor, s_N: Tensor, fitted_N: Tensor | None = None
    ) -> tuple[TargetScores, Tensor | None]:
        """Return the unclamped sums with their parts, and what the rationale predicts."""
        line_N = self.slope * ((s_N + 1) / 2) + self.offset
        base_N = clamp_straight(line_N if fitted_N is None else line_N + fitted_N)
        vts_NM = torch.cat((v_ND, t_ND, s_N.unsqueeze(-1)), dim=-1)
        logit_N, e_ND = fuse(self.fusion, self.rationale, vts_NM)
        delta_N, scale = torch.tanh(logit_N), self.scale()
        return TargetScores(base_N + scale * delta_N, base_N, delta_N, scale), e_ND


def _start_at_zero(*layers: nn.Module) -> None:
    # The last layers of corrections start at zero, so that training starts exactly at the (calibrated) base and the
    # first steps only improve on it; a random correction would first have to be unlearned. The base itself is a
    # logistic regression: convex, no symmetry to break, so it starts at zero as well.
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class ResidualHeads(nn.Module):
    """A head for each target, whose score is base + scale * delta, clamped; |score - base| <= scale always holds.

    A new module is the `identity` start: 0.5 of the image, (s + 1)/2 of a pair, no correction. After `use_bases` it has
    fitted bases.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.dim, self.scale_mode, self.targets = spec.dim, spec.scale_mode, spec.targets
        self.bases: BaseShape | None = None
        for target in spec.targets:
            head = (
                ImageHead(spec.dim, hidden=spec.hidden_image, dropout=spec.dropout)
                if target.sees == "image"
                else PairHead(spec.dim, hidden=spec.hidden_pair, dropout=spec.dropout)
            )
            head.scale = Scale(target.scale, spec.scale_mode)
            self.add_module(head_name(target.name), head)

    def head(self, target: str) -> ImageHead | PairHead:
        """Return the head of a target."""
        found = self.get_submodule(head_name(target))
        assert isinstance(found, (ImageHead, PairHead))
        return found

    def use_bases(self, shape: BaseShape) -> None:
        """Give the heads fitted bases, zero until they are fitted; an image head's takes the place of w and b0."""
        self.bases = shape
        for target in self.targets:
            head = self.head(target.name)
            head.fitted = FittedBase(shape.members[target.name], shape, self.dim)
            if isinstance(head, ImageHead):
                head.base = None

    def forward(self, v_ND: Tensor, t_ND: Tensor, fitted_N: Mapping[str, Tensor] | None = None) -> HeadScores:
        """Score rows of embeddings; returns the unclamped sums with their parts.

        Fitted bases need what they say of the rows (`base_terms`), which does not change while heads train.
        """
        if self.bases is not None and not fitted_N:
            raise ValueError("heads with fitted bases need fitted_N, see base_terms")
        s_N = cosine(v_ND, t_ND)
        found, e_ND = dict[str, TargetScores](), None
        for target in self.targets:
            head, term_N = self.head(target.name), (fitted_N or {}).get(target.name)
            if isinstance(head, ImageHead):
                found[target.name] = head(v_ND, term_N)
            else:
                found[target.name], said_ND = head(v_ND, t_ND, s_N, term_N)
                e_ND = said_ND if e_ND is None else e_ND
        return HeadScores(found, e_ND)

    def base_terms(self, views: Mapping[str, Tensor], v_ND: Tensor, t_ND: Tensor) -> dict[str, Tensor]:
        """Return what fitted bases say of rows, by target: `views` are (N, W) by name."""
        if self.bases is None:
            return {}
        s_N = cosine(v_ND, t_ND)
        inputs = {**views, "center": v_ND, "prompt": t_ND, "cosine": (s_N[:, None] + 1) / 2}
        said = {each.name: self._fitted(each.name)(inputs, s_N) for each in self.targets if each.sees == "image"}
        inputs["score"] = next(iter(said.values()), torch.zeros_like(s_N))[:, None]
        pairs = {each.name: self._fitted(each.name)(inputs, s_N) for each in self.targets if each.sees == "pair"}
        return said | pairs

    def _fitted(self, target: str) -> FittedBase:
        fitted = self.head(target).fitted
        assert isinstance(fitted, FittedBase)
        return fitted

    def scales(self) -> dict[str, float]:
        """Return the scale in force by target."""
        return {target.name: float(self.head(target.name).scale().detach()) for target in self.targets}

    def start_epoch(self, fraction: float) -> None:
        """Put `fraction` in [0, 1] of the given scales in force, where these follow a curriculum."""
        if self.scale_mode == "curriculum":
            self.set_scale_fraction(fraction)

    def set_scale_fraction(self, fraction: float) -> None:
        """Put `fraction` in [0, 1] of the given scales in force; only curriculum heads may be told."""
        if self.scale_mode != "curriculum":
            raise ValueError(f"only curriculum scales follow the epochs, these are {self.scale_mode}")
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], not {fraction}")
        for target in self.targets:
            scale = self.head(target.name).scale
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


def image_mlp(dim: int, hidden: int, dropout: float) -> nn.Sequential:
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
    # The value is clamp(x, 0, 1) to the last bit (x - x is exactly 0), the gradient is that of x. With the plain clamp,
    # rows whose base lies outside [0, 1] would never move a and b, and with a scale of 0 not learn at all. Leaving the
    # clamp out of the loss instead would train the correction against a base other than the reported one.
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


class DirectImageHead(nn.Module):
    """y = sigmoid(Linear(v))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 1)

    def forward(self, v_ND: Tensor) -> TargetScores:
        """Return the scores."""
        return TargetScores(torch.sigmoid(self.linear(v_ND).squeeze(-1)))


class DirectPairHead(nn.Module):
    """y = sigmoid(MLP([v, t, s])), the MLP being the Fusion of the residual heads: only the design is another.

    Two branches: y = (sigmoid(MLP([v, t, s])) + sigmoid(k s + m)) / 2. Refinement: y + bound * d, see `Refinement`.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.two_branch = spec.two_branch
        self.fusion = fusion_mlp(spec.dim, spec.hidden_pair, spec.dropout)
        if spec.two_branch:
            # A start for uncalibrated use: 0.5 at a cosine of 0.25, the middle of what CLIP gives to prompts and
            # images, and 0.27 to 0.73 between 0.15 and 0.35, its usual range.
            self.cosine_slope = nn.Parameter(torch.tensor(10.0))
            self.cosine_offset = nn.Parameter(torch.tensor(-2.5))
        self.refinement = (
            Refinement(spec.dim, bound=spec.refine_bound, dropout=spec.dropout) if spec.refinement else None
        )
        self.rationale: RationaleHead | None = None

    def forward(self, v_ND: Tensor, t_ND: Tensor, s_N: Tensor) -> tuple[TargetScores, Tensor | None]:
        """Return the scores, with refinement those of the coarse stage as the base, and what the rationale predicts."""
        vts_NM = torch.cat((v_ND, t_ND, s_N.unsqueeze(-1)), dim=-1)
        logit_N, e_ND = fuse(self.fusion, self.rationale, vts_NM)
        score_N = torch.sigmoid(logit_N)
        if self.two_branch:
            score_N = (score_N + torch.sigmoid(self.cosine_slope * s_N + self.cosine_offset)) / 2
        if self.refinement is None:
            return TargetScores(score_N), e_ND
        delta_N, bound = self.refinement(v_ND, t_ND, score_N), self.refinement.bound
        return TargetScores(score_N + bound * delta_N, score_N, delta_N, bound), e_ND


class DirectHeads(nn.Module):
    """A head for each target that scores straight from the embeddings, without a base."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.dim, self.targets, self.two_branch = spec.dim, spec.targets, spec.two_branch
        self.bases: BaseShape | None = None
        for target in spec.targets:
            head = DirectImageHead(spec.dim) if target.sees == "image" else DirectPairHead(spec)
            self.add_module(head_name(target.name), head)

    def head(self, target: str) -> DirectImageHead | DirectPairHead:
        """Return the head of a target."""
        found = self.get_submodule(head_name(target))
        assert isinstance(found, (DirectImageHead, DirectPairHead))
        return found

    def forward(self, v_ND: Tensor, t_ND: Tensor) -> HeadScores:
        """Score rows of embeddings."""
        s_N = cosine(v_ND, t_ND)
        found, e_ND = dict[str, TargetScores](), None
        for target in self.targets:
            head = self.head(target.name)
            if isinstance(head, DirectImageHead):
                found[target.name] = head(v_ND)
            else:
                found[target.name], said_ND = head(v_ND, t_ND, s_N)
                e_ND = said_ND if e_ND is None else e_ND
        return HeadScores(found, e_ND)

    def scales(self) -> dict[str, float]:
        """Return nothing: direct heads have no correction of a base, hence no scales."""
        return {}

    def start_epoch(self, fraction: float) -> None:
        """Do nothing: there are no scales to follow the epochs."""

    def base_terms(self, views: Mapping[str, Tensor], v_ND: Tensor, t_ND: Tensor) -> dict[str, Tensor]:
        """Return nothing: direct heads have no bases."""
        del views, v_ND, t_ND
        return {}


Heads = ResidualHeads | DirectHeads


# ---- The explanation head: what it predicts, and its loss


class RationaleHead(nn.Module):
    """[v, t, s] -> R^D through the first layer of a pair head: e = Linear(GELU(Linear(LayerNorm([v, t, s])))).

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


class TargetSpec(NamedTuple):
    """A target as heads need it: its name, what it sees, and the scale of its correction in [0, 1], if residual."""

    name: str
    sees: Sees
    scale: float = 0.2


QUALITY_AND_CONSISTENCY = tuple(TargetSpec(target.name, target.sees) for target in (QUALITY, CONSISTENCY))


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Everything that shapes heads.

    Scales in [0, 1] are read by residual heads only; `two_branch`, `refinement` and its bound by direct ones.
    """

    dim: int
    targets: tuple[TargetSpec, ...] = QUALITY_AND_CONSISTENCY
    kind: HeadKind = "residual"
    scale_mode: ScaleMode = "fixed"
    dropout: float = 0.1
    hidden_image: int = 128
    hidden_pair: tuple[int, int] = (256, 64)
    two_branch: bool = False
    refinement: bool = False
    refine_bound: float = BOUND
    rationale: bool = False
    bases: BaseShape | None = None

    def __post_init__(self) -> None:
        """Refuse values that no head can be built from."""
        for name, value, known in (
            ("kind", self.kind, get_args(HeadKind)),
            ("scale_mode", self.scale_mode, get_args(ScaleMode)),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; {did_you_mean(value, known)}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"heads need targets, each once, not {self.names}")
        shares = {f"scale of {target.name}": target.scale for target in self.targets}
        for name, share in (shares | {"refine_bound": self.refine_bound}).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {share}")
        for name, kind in (("two_branch", "direct"), ("refinement", "direct"), ("bases", "residual")):
            if self.kind != kind and getattr(self, name):
                raise ValueError(f"{name} needs {kind} heads, these are {self.kind}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if min(self.dim, self.hidden_image, *self.hidden_pair) < 1:
            raise ValueError("dim and hidden widths must be at least 1")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the targets, in their order."""
        return tuple(target.name for target in self.targets)

    @property
    def pairs(self) -> tuple[str, ...]:
        """Names of the targets that see the prompt."""
        return tuple(target.name for target in self.targets if target.sees == "pair")

    def with_scales(self, scales: Mapping[str, float]) -> HeadSpec:
        """Return the spec with other scales, by target."""
        return replace(self, targets=tuple(t._replace(scale=scales.get(t.name, t.scale)) for t in self.targets))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; floats survive exactly."""
        bases = None if self.bases is None else self.bases.to_json()
        targets = [target._asdict() for target in self.targets]
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"targets": targets, "hidden_pair": list(self.hidden_pair), "bases": bases}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeadSpec:
        """Return the spec that `to_json` wrote; unknown names are an error: they would change the heads."""
        values = with_bases(of_two_targets(values) if "targets" not in values else values)
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown head setting {name!r}; {did_you_mean(name, known)}")
        wide, narrow = values.get("hidden_pair", cls.hidden_pair)
        bases = values.get("bases")
        shape = None if bases is None else BaseShape.from_json(bases)
        targets = tuple(TargetSpec(**target) for target in values["targets"])
        return cls(**{**values, "targets": targets, "hidden_pair": (wide, narrow), "bases": shape})


def build_heads(spec: HeadSpec) -> Heads:
    """Return new heads; their random weights come from torch's global generator."""
    heads = DirectHeads(spec) if spec.kind == "direct" else ResidualHeads(spec)
    if spec.rationale:  # after the rest, whose random start is the same without
        if not spec.pairs:
            raise ValueError("a rationale needs a target that sees the prompt")
        first = heads.head(spec.pairs[0])
        assert isinstance(first, (PairHead, DirectPairHead))
        first.rationale = RationaleHead(spec.hidden_pair[0], spec.dim)
    if spec.bases and isinstance(heads, ResidualHeads):
        heads.use_bases(spec.bases)
    return heads
