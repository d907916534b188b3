"""A twin of a 16-bit model for a CPU, whose weights lie in memory as the processor's units multiply them.

torch brings a weight into that order at every product, which costs a fifth of it, and runs bias, activation and
attention as passes of their own: this twin of ViT-B-32 does 1.3 times as many images. The operators are those that
`torch.compile` calls, and have no public name; where they lack or are wrong, the model stays as it is. Knows modules of
open_clip and timm. Must not know files, images or caches.

Shapes: B images or texts, S tokens, C channels, H heads.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

from deltaclip.base.device import cpu_has_bf16_units
from deltaclip.features.backbone.twins import is_plain_attention, twin_of

if TYPE_CHECKING:
    import torch

# Attention runs in parts of a batch whose weights take at most this many bytes: more would fall out of the caches.
ATTENTION_BYTES = 8 << 20
MEAN_IMAGES = 4  # whose 16-bit tokens are brought to 32 at a time: 0.6 MB at 50 tokens of 768


def packed_twin(model: torch.nn.Module) -> torch.nn.Module:
    """Return a bfloat16 model on a CPU once more, for inference without gradients; `model` where that is impossible.

    It shares the parameters, and holds the weights of all linear layers a second time, as they are now.
    """
    if not can_pack():
        return model
    try:
        twin = twin_of(model)
    except RuntimeError:  # weights that are computed from others, which torch does not copy
        return model
    uses = Counter(id(module) for _, module in twin.named_modules(remove_duplicate=False))
    for module in twin.modules():
        if _is_half(module):
            _pack(module, uses)
    _pool_early(getattr(twin, "visual", twin))
    return twin


@functools.cache
def can_pack() -> bool:
    """Tell whether the processor has units for it, and torch the operators: one product of each kind is looked at."""
    import torch
    from torch.nn import functional as F

    if not cpu_has_bf16_units():
        return False
    try:
        weight, bias, x = (torch.linspace(-1, 2, size).sin().bfloat16() for size in (48 * 64, 48, 5 * 64))
        weight, x = weight.view(48, 64), x.view(5, 64)
        with torch.inference_mode():
            plain = F.linear(x.float(), weight.float(), bias.float())
            pairs = [(_PackedLinear(weight, bias), plain)]
            pairs += [(_PackedLinear(weight, bias, gelu), gelu(plain)) for gelu in map(torch.nn.GELU, ("none", "tanh"))]
            return all(torch.allclose(found(x).float(), wanted, atol=0.02, rtol=0.01) for found, wanted in pairs)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # another torch, or a processor without
        return False


class _PackedLinear:
    """The forward pass of a linear layer, and of an activation behind it, from packed weights."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gelu: torch.nn.GELU | None = None) -> None:
        import torch

        operators: Any = torch.ops.mkldnn
        self._product = operators._linear_pointwise
        self._weight = operators._reorder_linear_weight(weight.detach().contiguous(), None)
        self._bias = None if bias is None else bias.detach()
        self._then: tuple[Any, ...] = ("none", [], "") if gelu is None else ("gelu", [], gelu.approximate)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, self._weight, self._bias, *self._then)  # type: ignore[no-any-return]

    def __deepcopy__(self, _memo: dict[int, Any]) -> _PackedLinear:
        return self  # it never changes, and packed tensors cannot be copied


def _pool_early(tower: Any) -> None:
    """Let the last block of an image tower that pools its class token compute that token alone: exact, a block's work.

    Only open_clip's own tower and block, whose code is known to look at nothing else.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(tower) is not VisionTransformer or tower.pool_type != "tok":
        return
    block = tower.transformer.resblocks[-1]
    looks_at_more = tower.attn_pool is not None or tower.output_tokens or hasattr(block, "ln_1_kv")
    if type(block) is ResidualAttentionBlock and isinstance(block.attn.forward, _PackedAttention) and not looks_at_more:
        _run_as(block, EarlyPool(block))


class EarlyPool:
    """The forward pass of a tower's last block, of whose tokens only the first is looked at."""

    def __init__(self, block: Any) -> None:
        self._block, self._attend = block, _LastAttention(block.attn)

    def __call__(self, x_BSC: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        """Return what the block gives for its first token, (B, 1, C); for all, where anything else is given."""
        if _says_more(given, options):  # a mask, or keys from elsewhere
            return type(self._block).forward(self._block, x_BSC, *given, **options)  # type: ignore[no-any-return]
        normed_BSC = self._block.ln_1(x_BSC)
        return self._first(x_BSC, normed_BSC, self._attend.keys_and_values(normed_BSC))

    def with_mean(self, x_BSC: torch.Tensor, *given: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a call gives, bit for bit, and the mean over what the block gives for all tokens, float32 (B, C).

        A mean goes through a linear layer as well as each token does: the block's last one sees one vector an image.
        """
        from torch.nn import functional as F

        block = self._block
        if _says_more(given, options):
            output = self(x_BSC, *given, **options)
            return output, mean_of_tokens(output)
        normed_BSC = block.ln_1(x_BSC)
        kv = self._attend.keys_and_values(normed_BSC)
        seen_BSC = x_BSC + block.ls_1(self._attend.all_tokens(normed_BSC, kv))
        hidden_BSE = block.mlp.gelu(block.mlp.c_fc(block.ln_2(seen_BSC)))
        mean_BE, last = mean_of_tokens(hidden_BSE), block.mlp.c_proj
        added_BC = F.linear(mean_BE, last.weight.float(), last.bias.float())
        return self._first(x_BSC, normed_BSC, kv), mean_of_tokens(seen_BSC) + block.ls_2(added_BC)

    def _first(self, x_BSC: torch.Tensor, normed_BSC: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        block = self._block
        x_B1C = x_BSC[:, :1] + block.ls_1(self._attend.first_token(normed_BSC, kv))
        return x_B1C + block.ls_2(block.mlp(block.ln_2(x_B1C)))  # type: ignore[no-any-return]


def mean_of_tokens(x_BSC: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens, float32 (B, C), its sums in float32 whatever goes in."""
    import torch

    if x_BSC.dtype == torch.float32 or x_BSC.device.type != "cpu":
        return x_BSC.mean(dim=1, dtype=torch.float32)
    # A copy of all tokens in 32 bits would be new memory for every block, which costs more than the sums.
    return torch.cat([few.mean(dim=1, dtype=torch.float32) for few in x_BSC.split(MEAN_IMAGES)])


def _says_more(given: tuple[Any, ...], options: dict[str, Any]) -> bool:
    return any(each is not None for each in (*given, *options.values()))


def _is_half(module: torch.nn.Module) -> bool:
    import torch

    return all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


def _pack(module: torch.nn.Module, uses: Counter[int]) -> None:
    """Give a module of a twin, not those in it, the faster way to do what it does."""
    from open_clip.transformer import QuickGELU
    from timm.layers.mlp import Mlp
    from torch import nn

    if isinstance(module, nn.MultiheadAttention) and is_plain_attention(module):
        _run_as(module, _PackedAttention(module))
    elif type(module) is nn.Linear and not isinstance(module.forward, _PackedLinear):
        _run_as(module, _PackedLinear(module.weight, module.bias))
    elif type(module) is nn.Conv2d and _cuts_patches(module):
        layer = _PackedLinear(module.weight.flatten(1), module.bias)
        _run_as(module, functools.partial(_project_patches, module, layer))
    elif isinstance(module, QuickGELU):
        _run_as(module, _quick_gelu)
    elif type(module) is nn.Sequential:
        for first, second in itertools.pairwise(module):
            _fuse(first, second, uses)
    elif type(module) is Mlp:
        _fuse(module.fc1, module.act, uses)


def _fuse(layer: torch.nn.Module, activation: torch.nn.Module, uses: Counter[int]) -> None:
    """Let a layer do the activation behind it, where neither stands anywhere else too."""
    from torch import nn

    if type(layer) is nn.Linear and type(activation) is nn.GELU and uses[id(layer)] == uses[id(activation)] == 1:
        _run_as(layer, _PackedLinear(layer.weight, layer.bias, activation))
        _run_as(activation, _unchanged)


def _run_as(module: Any, forward: Any) -> None:
    module.forward = forward


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    # open_clip's operations in its order, so the same bits, without a new tensor for each.
    gate = 1.702 * x
    return gate.sigmoid_().mul_(x)


def _cuts_patches(module: torch.nn.Conv2d) -> bool:
    """Tell whether every pixel goes into one place: then the convolution is a product of two matrices."""
    return (
        module.kernel_size == module.stride != (1, 1)
        and module.padding in {(0, 0), "valid"}
        and module.dilation == (1, 1)
        and module.groups == 1
    )


def _project_patches(module: torch.nn.Conv2d, layer: _PackedLinear, x_B3HW: torch.Tensor) -> torch.Tensor:
    """Return (B, C, rows, columns) of patches of (height, width) pixels; what is left at the edges is not looked at."""
    tall, wide = module.kernel_size[:2]
    if x_B3HW.dim() != 4 or x_B3HW.shape[2] < tall or x_B3HW.shape[3] < wide:
        return type(module).forward(module, x_B3HW)
    batch, colours, height, width = x_B3HW.shape
    rows, columns = height // tall, width // wide
    whole = x_B3HW[:, :, : rows * tall, : columns * wide]
    patches = whole.reshape(batch, colours, rows, tall, columns, wide).permute(0, 2, 4, 1, 3, 5)
    found_BSC: Any = layer(patches.reshape(batch, rows * columns, colours * tall * wide))
    return found_BSC.transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-any-return]


class _PackedAttention:
    """The forward pass of torch's attention where it is self-attention as in open_clip's blocks, else the module's own.

    Twice as fast as torch's fused kernel for the 50 to 257 tokens of an image; scores are rounded to 16 bits as in
    torch's own path for inference.
    """

    def __init__(self, module: torch.nn.MultiheadAttention) -> None:
        self._module = module
        self._to_qkv = _PackedLinear(module.in_proj_weight, module.in_proj_bias)
        self._to_out = _PackedLinear(module.out_proj.weight, module.out_proj.bias)

    def __call__(self, *given: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = options.get("attn_mask")
        is_known = (
            len(given) == 3
            and given[0] is given[1] is given[2]
            and options.get("need_weights") is False
            and options.keys() <= {"need_weights", "attn_mask"}
            and (mask is None or mask.is_floating_point())
        )
        if is_known:
            return self._to_out(self._mixed(given[0], mask)), None
        as_it_is: Any = type(self._module).forward
        return as_it_is(self._module, *given, **options)  # type: ignore[no-any-return]

    def _mixed(self, x_BSC: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return what the heads give, (B, S, C); `mask` is added to the scores, (S, S) or (B H, S, S)."""
        import torch

        (B, S, C), H = x_BSC.shape, self._module.num_heads
        qkv = self._to_qkv(x_BSC)
        mixed_BSC = torch.empty_like(x_BSC, memory_format=torch.contiguous_format)
        count = max(1, ATTENTION_BYTES // (H * S * S * qkv.element_size()))
        for start in range(0, B, count):
            part = slice(start, start + count)
            q, k, v = qkv[part].view(-1, S, 3, H, C // H).permute(2, 0, 3, 1, 4).contiguous().view(3, -1, S, C // H)
            added = mask if mask is None or mask.dim() == 2 else mask[start * H : start * H + len(q)]
            mixed = _attended(q, k, v, added=added).view(-1, H, S, C // H)
            mixed_BSC[part].view(-1, S, H, C // H).copy_(mixed.transpose(1, 2))
        return mixed_BSC


class _LastAttention:
    """Self-attention of the first token, or of all, over the same keys and values, (2, B H, S, C / H)."""

    def __init__(self, module: torch.nn.MultiheadAttention) -> None:
        width, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
        parts = [slice(0, width), slice(width, None)]
        self._heads = module.num_heads
        self._to_q, self._to_kv = (_PackedLinear(weight[part], None if bias is None else bias[part]) for part in parts)
        self._to_out = _PackedLinear(module.out_proj.weight, module.out_proj.bias)

    def keys_and_values(self, x_BSC: torch.Tensor) -> torch.Tensor:
        (B, S, C), H = x_BSC.shape, self._heads
        return self._to_kv(x_BSC).view(B, S, 2, H, C // H).permute(2, 0, 3, 1, 4).reshape(2, B * H, S, C // H)

    def first_token(self, x_BSC: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        (B, _, C), H = x_BSC.shape, self._heads
        q = self._to_q(x_BSC[:, :1]).reshape(B * H, 1, C // H)
        return self._to_out(_attended(q, *kv).view(B, 1, C))

    def all_tokens(self, x_BSC: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        import torch

        (B, S, C), H = x_BSC.shape, self._heads
        q = self._to_q(x_BSC).view(B, S, H, C // H).transpose(1, 2).reshape(B * H, S, C // H)
        count = H * max(1, ATTENTION_BYTES // (H * S * S * q.element_size()))
        mixed = torch.cat(
            [_attended(*part) for part in zip(q.split(count), *(each.split(count) for each in kv), strict=True)]
        )
        return self._to_out(mixed.view(B, H, S, C // H).transpose(1, 2).reshape(B, S, C))


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, added: torch.Tensor | None = None) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(width) + added) v of every head of every item, as many rows as `q` has."""
    import torch

    scores = torch.baddbmm(
        q.new_empty(1) if added is None else added.to(q.dtype),
        q,
        k.transpose(1, 2),
        beta=0 if added is None else 1,
        alpha=q.shape[-1] ** -0.5,
    )
    return torch.bmm(scores.softmax(-1), v)
