"""Twins of a model: modules of our own over the same weights, to be hooked and rewired while the model stays as it is.

Knows modules. Must not know files, images or caches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    Product = Callable[[torch.Tensor], torch.Tensor]

MOST_SHAPES = 64  # of grids whose positions are kept: pictures may go through at their own aspect
Module = TypeVar("Module", bound="torch.nn.Module")


class Enough(Exception):  # noqa: N818 - ends a forward pass that has given all that is wanted
    """Carries the output of the module that the pass ended at; the rest of it is not run."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output


class Given:
    """Stands in for the forward pass of modules, and gives what it was told to give."""

    def __init__(self) -> None:
        self._output: torch.Tensor | None = None

    def __call__(self, *_: object, **__: object) -> torch.Tensor | None:
        """Return it, whatever goes in."""
        return self._output

    @contextlib.contextmanager
    def giving(self, output: torch.Tensor) -> Iterator[None]:
        """Give `output` inside the block."""
        self._output = output
        try:
            yield
        finally:
            self._output = None


def twin_of(module: Module) -> Module:
    """Return a copy of the modules, in evaluation mode, whose parameters and buffers are those of `module` itself."""
    twin = copy.deepcopy(module, {id(part): part for part in (*module.parameters(), *module.buffers())}).eval()
    for part in twin.modules():
        if hasattr(part, "get_embed") and not any(True for _ in part.parameters()):
            part.get_embed = KeptPositions(part)  # type: ignore[assignment]
    return twin


class KeptPositions:
    """Gives the rotary positions of a timm module that has nothing to learn, made once for each shape, type and device.

    Such a module makes them anew in each pass, from numbers that may lie on the host: on a GPU that is a wait a pass.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._kind: Any = type(module)  # whose function is the module's own
        self._made: dict[object, Any] = {}

    def __call__(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Any:
        """Return what the module's own function does, for a grid of this shape (of None its own) and this type."""
        import torch

        module, kind = self._module, self._kind
        make = functools.partial(kind.get_embed, module, shape, dtype=dtype)
        if module.training:  # then it may move them at random
            return make()
        devices = tuple(buffer.device for buffer in module.buffers())
        key = (None if shape is None else tuple(shape), dtype, devices)
        if key not in self._made:
            if len(self._made) == MOST_SHAPES:
                del self._made[next(iter(self._made))]
            with torch.inference_mode(mode=False), torch.no_grad():  # whoever is first, others may want gradients
                self._made[key] = make()
        return self._made[key]


def around(model: Module, name: str, part: torch.nn.Module) -> Module:
    """Return the same model with another module in the place of its child `name`; nothing of it is copied."""
    other = copy.copy(model)
    vars(other)["_modules"] = model._modules | {name: part}
    return other


def stop_before(_module: torch.nn.Module, given: tuple[Any, ...]) -> None:
    """Forward pre-hook: end the pass with what would go into the module."""
    raise Enough(_tensor(given[0]))


def stop_after(_module: torch.nn.Module, _given: Any, output: Any) -> None:
    """Forward hook: end the pass with what the module gave."""
    raise Enough(_tensor(output))


def _tensor(value: Any) -> torch.Tensor:
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"its blocks hand on a {type(value).__name__}, not one tensor")
    return value


def fold_attention(block: torch.nn.Module) -> None:
    """Free the self-attention in a block of a twin from the frozen-backbone trap.

    torch's Linear with a weight that needs no gradient turns a 3-D input that is not contiguous into B products with B
    copies of the weight, and `MultiheadAttention(batch_first=True)` hands it exactly that.
    """
    import torch

    for module in block.modules():
        if isinstance(module, torch.nn.MultiheadAttention) and is_plain_attention(module):
            module.forward = FoldedAttention(module)  # type: ignore[method-assign, assignment]


def fold_pools(tower: torch.nn.Module) -> None:
    """Free attention of other queries than keys in a twin, whose weights are frozen, from the same trap."""
    for module in tower.modules():
        if _is_pool(module):
            module.forward = functools.partial(_pool, module)


def _is_pool(module: Any) -> bool:
    import torch

    if not isinstance(module, torch.nn.MultiheadAttention) or "forward" in vars(module):
        return False
    nothing_more: Any = module.bias_k is None and not module.add_zero_attn and module.dropout == 0
    return bool(module.batch_first and nothing_more)


def _pool(
    attention: Any,
    q_BQC: torch.Tensor,
    k_BSK: torch.Tensor,
    v_BSK: torch.Tensor,
    *,
    need_weights: bool,
    attn_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Do what the module's own forward does with these arguments, by products of two matrices."""
    from torch.nn import functional as F

    assert not need_weights, "the weights are never made"
    assert attn_mask is None, "a pool sees all"
    heads, joint, biases = attention.num_heads, attention.in_proj_weight, attention.in_proj_bias
    apart = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    weights = apart if joint is None else joint.chunk(3)
    products = []
    for x, weight, bias in zip(
        (q_BQC, k_BSK, v_BSK), weights, (None,) * 3 if biases is None else biases.chunk(3), strict=True
    ):
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        products.append(y.view(*x.shape[:2], heads, -1).transpose(1, 2))
    q, k, v = products
    mixed_BHQC = F.scaled_dot_product_attention(q, k, v)
    mixed = mixed_BHQC.transpose(1, 2).flatten(2).flatten(0, 1)
    out = F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
    return out.view(*q_BQC.shape[:2], -1), None


def is_plain_attention(module: torch.nn.MultiheadAttention) -> bool:
    """Tell whether it is as in open_clip's blocks: one matrix for all three, nothing added to the keys, no dropout."""
    return (
        module.in_proj_weight is not None
        and module.batch_first
        and module.dropout == 0
        and module.bias_k is None
        and not module.add_zero_attn
    )


class FoldedAttention:
    """The forward pass of self-attention by products of two matrices, each of which can be exchanged."""

    def __init__(self, module: torch.nn.MultiheadAttention) -> None:
        self._module = module
        self.to_qkv: Product = self._qkv
        self.to_out: Product = self._out

    def __call__(
        self,
        x_BSC: torch.Tensor,
        key_BSC: torch.Tensor,
        value_BSC: torch.Tensor,
        *,
        need_weights: bool,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Do what the module's own forward does with these arguments.

        Key and value are `x_BSC` itself; the mask is added to the products, (S, S) or (B heads, S, S).
        """
        from torch.nn import functional as F

        assert key_BSC is x_BSC, "self-attention only"
        assert value_BSC is x_BSC, "self-attention only"
        assert not need_weights, "the weights are never made"
        (B, S, C), heads = x_BSC.shape, self._module.num_heads
        qkv = self.to_qkv(x_BSC.reshape(B * S, C))
        q, k, v = qkv.view(B, S, 3, heads, C // heads).permute(2, 0, 3, 1, 4)  # each (B, heads, S, C / heads)
        if attn_mask is not None:
            attn_mask = (attn_mask if attn_mask.dim() == 2 else attn_mask.view(B, heads, S, S)).to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.to_out(mixed.transpose(1, 2).reshape(B * S, C)).view(B, S, C), None

    def _qkv(self, x_NC: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional as F

        return F.linear(x_NC, self._module.in_proj_weight, self._module.in_proj_bias)

    def _out(self, x_NC: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional as F

        return F.linear(x_NC, self._module.out_proj.weight, self._module.out_proj.bias)
