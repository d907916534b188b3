"""Low-rank additions to linear layers of a tower (LoRA): W becomes W + (alpha / R) B A, and only A and B train.

Hu et al., arXiv:2106.09685. Where a layer multiplies by itself, its output gets (alpha / R) B (A x), which spares the
gradient of W. Where another module takes its weight, the sum of weights is
computed in every pass. Knows modules and names. Must not know files, heads, or how a tower is cut.

Shapes: R rank, I inputs of a layer, O outputs, P projections that lie in one weight (q, k, v: 3), N rows.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from deltaclip.features.backbone.twins import FoldedAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

Layers = Literal["attention", "mlp", "all"]
A, B = ".lora_a", ".lora_b"  # behind the name of a weight
STACKED = {"in_proj_weight": 3, "qkv": 3, "kv": 2}  # projections that lie in one weight, by its name or its layer's


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What is added: products of rank `rank`, times `alpha` / `rank`, to which layers of a block."""

    rank: int
    alpha: float
    layers: Layers = "all"

    @property
    def scale(self) -> float:
        """The factor on B A."""
        return self.alpha / self.rank

    def to_json(self) -> dict[str, Any]:
        """Return what `LowRank(**...)` takes."""
        return asdict(self)


class Addition:
    """A (P R, I) and B (O, R) of one weight (O, I): each projection in it has an addition of its own."""

    def __init__(self, weight: torch.Tensor, parts: int, plan: LowRank) -> None:
        import torch

        (num_out, num_in), device = weight.shape, weight.device
        self.parts, self.scale = parts, plan.scale
        self.a = torch.nn.Parameter(torch.zeros(parts * plan.rank, num_in, device=device))
        self.b = torch.nn.Parameter(torch.zeros(num_out, plan.rank, device=device))

    def beside(self, product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return (..., O): the product of (..., I) with the weight, and the addition."""
        import torch
        from torch.nn import functional as F

        x_NI = x.reshape(-1, x.shape[-1])  # also keeps a frozen weight out of B products with B copies of it
        b = self.b if self.parts == 1 else torch.block_diag(*self.b.chunk(self.parts))
        y_NO = torch.addmm(product(x_NI), F.linear(x_NI, self.a), b.t(), alpha=self.scale)
        return y_NO.view(*x.shape[:-1], -1)

    def delta(self) -> torch.Tensor:
        """Return what stands beside the weight, (O, I)."""
        return self.scale * _product(self.a, self.b)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    parts = len(a) // b.shape[1]
    return torch.cat([rows @ columns for rows, columns in zip(b.chunk(parts), a.chunk(parts), strict=True)])


def weight_deltas(tensors: Mapping[str, torch.Tensor], plan: LowRank) -> dict[str, torch.Tensor]:
    """Return what to add to weights, (O, I) float32 by the names of the weights, of the A and B that stand for it.

    Raises:
        ValueError: names that are none of additions, or an A without its B.
    """
    names = {name.removesuffix(A) for name in tensors if name.endswith(A)}
    if tensors.keys() != {name + suffix for name in names for suffix in (A, B)}:
        raise ValueError("not pairs of A and B")
    wrong = [
        name for name in names if tensors[name + B].shape[1:] != (plan.rank,) or len(tensors[name + A]) % plan.rank
    ]
    if wrong:
        raise ValueError(f"{wrong[0]} has not rank {plan.rank}")
    return {name: plan.scale * _product(tensors[name + A].float(), tensors[name + B].float()) for name in names}


# ---- Where additions go


@dataclass(frozen=True, kw_only=True)
class Place:
    """A weight (O, I) of a twin that can have an addition: of `module`, under `name` there; `full` is its name."""

    full: str
    module: torch.nn.Module
    name: str
    parts: int
    is_attention: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(O / P, I): of each projection in it."""
        rows, columns = self.weight.shape
        return rows // self.parts, columns

    @property
    def weight(self) -> torch.Tensor:
        """The weight itself."""
        weight: torch.Tensor = getattr(self.module, self.name)
        return weight


def find_weights(twin: torch.nn.Module, blocks: list[str], layers: Layers) -> list[Place]:
    """Return the weights of the linear layers in some blocks of a twin, those of attention and the others, or both."""
    found = [place for block in blocks for place in _of_block(twin.get_submodule(block), block)]
    return [place for place in found if layers in {"all", "attention" if place.is_attention else "mlp"}]


def _of_block(block: torch.nn.Module, root: str) -> Iterator[Place]:
    import torch

    for inner, module in block.named_modules():
        for name in ("in_proj_weight", "weight"):
            weight = getattr(module, name, None)
            is_linear = name == "in_proj_weight" or isinstance(module, torch.nn.Linear)
            if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not is_linear:
                continue
            last = name if name == "in_proj_weight" else inner.rpartition(".")[2]
            parts = STACKED.get(last, 1)
            yield Place(
                full=f"{root}.{inner}.{name}" if inner else f"{root}.{name}",
                module=module,
                name=name,
                parts=1 if len(weight) % parts else parts,
                is_attention=_is_in_attention(block, inner),
            )


def _is_in_attention(block: torch.nn.Module, inner: str) -> bool:
    """Tell whether a module of a block is attention or stands in one: by its name, or the form of what it is in."""
    names = inner.split(".")
    around = [block.get_submodule(".".join(names[:count])) for count in range(1, len(names) + 1)]
    words = (*names, *(type(each).__name__ for each in around))
    return any("attn" in word.lower() or "attention" in word.lower() for word in words)


# ---- How a twin comes to compute with them


def attach(places: list[Place], plan: LowRank, run: Callable[[], object]) -> dict[str, Addition]:
    """Let a twin add to its weights from now on, and return the additions, all zero, by the names of the weights.

    Args:
        places: weights of it.
        plan: what to add.
        run: passes something through the twin, by which it is seen which layers multiply by themselves.
    """
    called = _called(places, run)
    additions = {}
    for place in places:
        addition = additions[place.full] = Addition(place.weight, place.parts, plan)
        if place.module in called:
            product = place.module.forward
            place.module.forward = functools.partial(addition.beside, product)
        elif not _in_folded(place, places, addition):
            _parametrize(place, addition)
    return additions


def _called(places: list[Place], run: Callable[[], object]) -> set[torch.nn.Module]:
    called = set[Any]()
    linear = [place.module for place in places if place.name == "weight"]
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in linear]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _in_folded(place: Place, places: list[Place], addition: Addition) -> bool:
    """Add in a folded attention, which multiplies by weights of its own and of its last layer; False elsewhere."""
    for other in places:
        folded = vars(other.module).get("forward")
        if isinstance(folded, FoldedAttention):
            if place.module is other.module:
                folded.to_qkv = functools.partial(addition.beside, folded.to_qkv)
                return True
            if place.module is getattr(other.module, "out_proj", None):
                folded.to_out = functools.partial(addition.beside, folded.to_out)
                return True
    return False


def _parametrize(place: Place, addition: Addition) -> None:
    import torch
    from torch.nn.utils import parametrize

    class Sum(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + addition.delta()

    parametrize.register_parametrization(place.module, place.name, Sum(), unsafe=True)
