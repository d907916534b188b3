"""Where a model has its two towers, their blocks and their parameters.

Knows the forms of open_clip's models. Must not know files or caches, nor what is frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from deltaclip.features.backbone.pixels import input_size
from deltaclip.features.backbone.stages import find_blocks
from deltaclip.features.backbone.twins import Enough, Given, stop_after, stop_before, twin_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from deltaclip.features.backbone.load import Backbone

Kind = Literal["image", "text"]
OF_NO_TEXT = ("visual.", "logit_")  # in a model that is its own text tower


def encode(model: torch.nn.Module, kind: Kind, inputs: torch.Tensor) -> torch.Tensor:
    """Return features (B, D), not normalised, of pixels (B, 3, H, W) or token ids (B, L)."""
    run = model.encode_image if kind == "image" else model.encode_text
    features: torch.Tensor = run(inputs, normalize=False)  # type: ignore[operator]  # CoCa normalises where not told
    return features


def encode_until(model: torch.nn.Module, kind: Kind, inputs: torch.Tensor) -> torch.Tensor:
    """Return what a hook of `model` ends the pass with, or the features where none does."""
    try:
        return encode(model, kind, inputs)
    except Enough as end:
        return end.output


def block_names(model: torch.nn.Module, kind: Kind) -> list[str]:
    """Return the names of a tower's blocks in the model, in their order; none where they are not recognised."""
    root = tower_root(model, kind)
    return [root + name for name in find_blocks(model.get_submodule(root.removesuffix(".")))]


def tower_root(model: torch.nn.Module, kind: Kind) -> str:
    """Return the beginning of all names in a tower: a plain CLIP is its own text tower, other models have one."""
    if kind == "image":
        return "visual."
    return "text." if hasattr(model, "text") else ""


def tower_depth(model: torch.nn.Module, kind: Kind) -> int:
    """Return the number of a tower's blocks, 0 where it is not known."""
    if names := block_names(model, kind):
        return len(names)
    # A transformer of Hugging Face says how many it has, but they have many names.
    config = getattr(getattr(model, "text", None), "config", None) if kind == "text" else None
    return int(getattr(config, "num_hidden_layers", 0))


def tower_parameters(model: torch.nn.Module, kind: Kind) -> dict[str, torch.nn.Parameter]:
    """Return a tower's parameters by their names in the model."""
    root = tower_root(model, kind)
    other = OF_NO_TEXT if not root else ()
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(root) and not name.startswith(other)
    }


def probe_inputs(backbone: Backbone, kind: Kind, count: int) -> torch.Tensor:
    """Return so many different inputs of a tower, always the same ones: pixels (B, 3, H, W) or token ids (B, L)."""
    import torch

    if kind == "text":
        texts = ["a red circle above a blue square" + " and a green star" * number for number in range(count)]
        return backbone.tokenizer(texts, context_length=backbone.context_length)
    return torch.randn(count, 3, *input_size(backbone), generator=torch.Generator().manual_seed(0))


def find_places(
    model: torch.nn.Module,
    kind: Kind,
    inputs: torch.Tensor,
) -> dict[str, int]:
    """Return where a tower's parameters stand: 0 before its blocks, 1 to depth in one, depth + 1 after them.

    What stands before and after, the graph of gradients says, so that no list of names must know every tower. A
    parameter that is part of no result is left out.
    """
    import torch

    named = tower_parameters(model, kind)
    needed = [parameter.requires_grad for parameter in named.values()]
    for parameter in named.values():
        parameter.requires_grad = True
    try:
        with torch.enable_grad():
            return _places(model, kind, inputs, named)
    finally:
        for parameter, before in zip(named.values(), needed, strict=True):
            parameter.requires_grad = before


def _places(
    model: torch.nn.Module, kind: Kind, inputs: torch.Tensor, named: dict[str, torch.nn.Parameter]
) -> dict[str, int]:
    import torch

    blocks = block_names(model, kind)
    if not blocks:
        return dict.fromkeys(_behind(encode(model, kind, inputs), named), 1)
    up_to, through, rest, given = twin_of(model), twin_of(model), twin_of(model), Given()
    up_to.get_submodule(blocks[0]).register_forward_pre_hook(stop_before)
    through.get_submodule(blocks[-1]).register_forward_hook(stop_after)
    stand_in(rest, blocks, given)
    places = dict.fromkeys(_behind(encode_until(up_to, kind, inputs), named), 0)
    for number, block in enumerate(blocks, start=1):
        places |= {name: number for name in named if name.startswith(f"{block}.")}
    with torch.no_grad():
        last = encode_until(through, kind, inputs)
    with given.giving(last):
        features = encode(rest, kind, inputs)
    return places | dict.fromkeys(_behind(features, named), len(blocks) + 1)


def stand_in(twin: torch.nn.Module, blocks: Sequence[str], given: Given) -> None:
    """Let `given` answer for these blocks of a twin."""
    for name in blocks:
        twin.get_submodule(name).forward = given


def _behind(output: torch.Tensor, named: dict[str, torch.nn.Parameter]) -> list[str]:
    import torch

    if not output.requires_grad:  # of nothing but what was given
        return []
    gradients = torch.autograd.grad(output.float().sum(), list(named.values()), allow_unused=True)
    return [name for name, gradient in zip(named, gradients, strict=True) if gradient is not None]
