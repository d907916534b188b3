"""The towers of a model: where their blocks are, and cut after N of them: what is frozen runs once.

The model's own code runs on both sides of the cut: before it, the pass ends where block N has given its output; after
it, the first N blocks give what they are told. So masks, pools and projections are not written a second time, and every
tower whose blocks `find_blocks` knows can be cut. Knows the forms of open_clip's models. Must not know files, caches or
heads, nor what is frozen.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.block_means import find_blocks
from deltaclip.features.backbone.compiled import compile_blocks, first_pass
from deltaclip.features.backbone.low_rank import A, B, attach, find_weights, weight_deltas
from deltaclip.features.backbone.pixels import input_size
from deltaclip.features.backbone.twins import (
    Enough,
    Given,
    fold_attention,
    fold_pools,
    stop_after,
    stop_before,
    twin_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.low_rank import Addition, LowRank


# ---- Cut a backbone's towers after N blocks: what is frozen runs once, what trains runs every epoch


KINDS: tuple[Kind, Kind] = ("image", "text")
OPTIONS: dict[Kind, str] = {"image": "--freeze-layers", "text": "--freeze-text-layers"}
# How far a cut tower may be from the whole one, of its largest value: rounding of 32 and of 16 bits. A cut in the wrong
# place gives another vector altogether.
MOST_ROUNDING = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.3}
MISFITS = (RuntimeError, TypeError, AssertionError, ValueError, IndexError)


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """How many numbers of a tower train and how many do not, and both in `words`."""

    trainable: int
    frozen: int
    words: str


class CutTower:
    """One tower of a model, cut after `frozen_blocks` of its `depth` blocks (stages, where it is no transformer).

    With 0 everything trains, embeddings included; from 1 on the patch, token, class and position embeddings are frozen
    too; at `depth` the final norm and projection train, unless nothing does (`all_frozen`). An entry at the boundary
    has `boundary_shape`: (S, C) tokens or (C, H, W) maps; what goes in where nothing is frozen; (D,) where all is.

    Weights, `device` and `dtype` are those of the backbone's model, which must not be moved to another afterwards.
    Dropout stays off and batch norms keep their statistics. Each method is for one thread at a time.
    """

    def __init__(self, backbone: Backbone, kind: Kind, *, frozen_blocks: int, all_frozen: bool) -> None:
        """Cut, freeze, and prove on two inputs that the parts give what the whole gives; see `cut_towers`.

        Raises:
            UserError: the tower cannot be cut.
        """
        self.kind, self.frozen_blocks, self.all_frozen = kind, frozen_blocks, all_frozen
        self.low_rank: LowRank | None = None
        self._additions: dict[str, Addition] = {}
        self._backbone_name = str(backbone.facts["backbone"])
        self._named = tower_parameters(backbone.model, kind)
        first = next(iter((*self._named.values(), *backbone.model.parameters())))  # a text tower may be none
        self.device, self.dtype = first.device, first.dtype
        self._blocks, self.depth = block_names(backbone.model, kind), tower_depth(backbone.model, kind)
        self._before, self._after, self._given = twin_of(backbone.model), twin_of(backbone.model), Given()
        self._rewire()
        self._one_input, self._probe = (self._moved(probe_inputs(backbone, kind, count)) for count in (1, 2))
        self._place = {} if all_frozen else find_places(backbone.model, kind, self._probe)
        first_free = frozen_blocks + 1 if frozen_blocks else 0
        for name, parameter in self._named.items():
            trains = name in self._place and self._place[name] >= first_free
            parameter.requires_grad = trains and parameter.requires_grad
        self.boundary_shape = self._prove(backbone, self._probe)

    def to_boundary(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run the frozen part, without gradients.

        Args:
            inputs: preprocessed pixels (B, 3, H, W), or token ids (B, L) int64.

        Returns:
            (B, *boundary_shape) in the model's type (autocast's where that is on); `inputs` where nothing is frozen.
        """
        import torch

        inputs = self._moved(inputs)
        if not self.frozen_blocks and not self.all_frozen:
            return inputs
        with torch.no_grad():
            return encode_until(self._before, self.kind, inputs)

    def from_boundary(self, x: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Run the trainable part, with gradients.

        Args:
            x: (B, *boundary_shape) of any float type; where nothing is frozen, what goes into the tower.
            token_ids: (B, L) int64, for a text tower, which masks and pools by them.

        Returns:
            features (B, D), not normalised.

        Raises:
            ValueError: a text tower got no `token_ids`.
        """
        x = self._moved(x)
        if self.all_frozen:
            return x
        if not self.frozen_blocks:
            return encode(self._after, self.kind, x)
        if self.kind == "text" and token_ids is None:
            raise ValueError("a text tower needs token_ids")
        # Of one empty image no more than the embedding is computed: the model's code has to come to its blocks.
        inputs = self._one_input if token_ids is None else self._moved(token_ids)
        with self._given.giving(x):
            return encode(self._after, self.kind, inputs)

    def use_checkpointing(self) -> None:
        """From now on keep only what goes into each trainable block; its backward pass computes the rest again."""
        from torch.utils.checkpoint import checkpoint

        for name in self._blocks[self.frozen_blocks :]:
            block = self._after.get_submodule(name)
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def use_compiling(self, autocast: torch.dtype | None = None, *, backend: str = "inductor") -> None:
        """From now on run the trainable blocks compiled by torch; a pass is made here, and compared with the plain one.

        Args:
            autocast: type of the activations that training will have, None for that of the weights.
            backend: which of torch's compilers.

        Raises:
            UserError: no block is known or free; torch cannot compile them here, or what it made gives something else.
        """
        import torch

        blocks = [self._after.get_submodule(name) for name in self._blocks[self.frozen_blocks :]]
        if not blocks:
            why = f"all {self.depth} of them are frozen" if self._blocks else "none has a known name"
            message = f"there are no blocks to compile in the {self.kind} tower of {self._backbone_name}: {why}"
            raise UserError(message, place="--compile", remedy="leave it out")
        x, ids = self.to_boundary(self._probe), self._probe if self.kind == "text" else None
        with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
            expected = self.from_boundary(x, ids).detach().float()
            compile_blocks(blocks, backend=backend)
            found = first_pass(lambda: self.from_boundary(x, ids), list(self.named_trainable().values())).float()
        if not apart(found, expected) <= MOST_ROUNDING["fp32" if autocast in {None, torch.float32} else "bf16"]:
            message = f"the compiled {self.kind} tower gives another result (by {apart(found, expected):.2g})"
            raise UserError(message, place="--compile", remedy="leave it out")

    def add_low_rank(self, plan: LowRank) -> None:
        """From now on train additions to the linear layers of the blocks that are not frozen, and nothing else.

        They are 0 until `draw_additions` and a step. The model's own weights stay as they are.

        Raises:
            UserError: no block is free or known, or has such layers; the rank is larger than a layer.
        """
        if self._blocks and self.frozen_blocks == self.depth:
            message = f"all {self.depth} blocks of the {self.kind} tower are frozen: nothing is left to add to"
            raise UserError(message, place="--lora-rank", remedy=f"give {OPTIONS[self.kind]} below {self.depth}")
        places = find_weights(self._after, self._blocks[self.frozen_blocks :], plan.layers)
        if not places:
            raise self._no_layers(plan)
        narrow = min(places, key=lambda place: min(place.shape))
        if plan.rank > min(narrow.shape):
            message = f"{plan.rank} is more than {narrow.full} of the {self.kind} tower has, {min(narrow.shape)}"
            raise UserError(message, place="--lora-rank", remedy=f"give at most {min(narrow.shape)}")
        for parameter in self._named.values():
            parameter.requires_grad = False
        self.low_rank = plan
        fold_pools(self._after.get_submodule(tower_root(self._after, self.kind).removesuffix(".")))
        self._additions = attach(places, plan, self._run_once)

    def _run_once(self) -> None:
        import torch

        with torch.no_grad():
            self.from_boundary(self.to_boundary(self._one_input), self._one_input if self.kind == "text" else None)

    def _no_layers(self, plan: LowRank) -> UserError:
        remedy, what = "leave out --lora-rank", "no blocks under a known name"
        if free := self._blocks[self.frozen_blocks :]:
            what = f"no linear layers in its blocks {self.frozen_blocks + 1} to {self.depth}"
            if find_weights(self._after, free, "all"):
                what, remedy = what.replace("linear", plan.layers), "give --lora-layers all"
        if self.kind == "text":
            remedy += f", or give {OPTIONS['text']} {self.depth} to freeze all of it"
        message = f"low-rank additions have no place in the {self.kind} tower of {self._backbone_name}: {what}"
        return UserError(message, place="--lora-rank", remedy=remedy)

    def draw_additions(self, seed: int) -> None:
        """Set all additions to 0 and draw what trains of them anew: A as torch draws linear layers, B is 0."""
        import numpy as np
        import torch

        generator = np.random.default_rng((seed, KINDS.index(self.kind)))
        for addition in self._additions.values():
            drawn = generator.uniform(-1, 1, tuple(addition.a.shape)) * addition.a.shape[1] ** -0.5
            with torch.no_grad():
                addition.a.copy_(torch.from_numpy(drawn))
                addition.b.zero_()

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Have the additions in the model's own weights meanwhile; afterwards these are what they were, bit for bit."""
        import torch

        plan = self.low_rank
        if plan is None:
            yield
            return
        deltas = weight_deltas({name: part.detach() for name, part in self.named_trainable().items()}, plan)
        before = {name: self._named[name].detach().clone() for name in deltas}
        with torch.no_grad():
            for name, delta in deltas.items():
                self._named[name].add_(delta)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    self._named[name].copy_(weight)

    def named_trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return what trains, by the name in the model's state dict; A and B of an addition by that of its weight."""
        if self.low_rank:
            return {
                name + suffix: part
                for name, addition in self._additions.items()
                for suffix, part in ((A, addition.a), (B, addition.b))
            }
        return {name: parameter for name, parameter in self._named.items() if parameter.requires_grad}

    def named_frozen(self) -> dict[str, torch.nn.Parameter]:
        """Return all other parameters of the tower, by the name in the model's state dict."""
        return {name: parameter for name, parameter in self._named.items() if not parameter.requires_grad}

    def block_of(self, name: str) -> int:
        """Return the block of a parameter, from 1; 0 for embeddings, `depth` + 1 for what stands after the blocks.

        Raises:
            ValueError: the tower has no such parameter.
        """
        name = name.removesuffix(A).removesuffix(B)
        if name not in self._named:
            raise ValueError(f"the {self.kind} tower has no parameter {name!r}")
        return self._place.get(name, self.depth + 1)

    def count_parameters(self) -> ParameterCount:
        """Count the numbers in the parameters."""
        parts = (self.named_trainable(), self.named_frozen())
        trainable, frozen = (sum(parameter.numel() for parameter in part.values()) for part in parts)
        what = "all frozen" if self.all_frozen else f"{self.frozen_blocks} of {self.depth} blocks frozen"
        if self.frozen_blocks and not self.all_frozen:
            what += ", embeddings too"
        if self.low_rank:
            what += ", additions to the others"
        share = trainable / max(1, trainable + frozen)
        shown = f"{share:.2%}" if self.low_rank else f"{share:.0%}"
        words = f"{self.kind} tower: {what}; {trainable:,} parameters train ({shown}), {frozen:,} do not"
        return ParameterCount(trainable=trainable, frozen=frozen, words=words)

    def addition_words(self) -> str:
        """Say which layers of which blocks have additions, empty where none has."""
        if not self._additions:
            return ""
        layers = dict[str, None]()
        for name in self._additions:
            block = max((block for block in self._blocks if name.startswith(f"{block}.")), key=len)
            layers[re.sub(r"\b\d+\b", "*", name.removeprefix(f"{block}.").removesuffix(".weight"))] = None
        first = self.frozen_blocks + 1
        blocks = f"block {first}" if first == self.depth else f"blocks {first} to {self.depth}"
        return f"{self.kind} tower, {blocks}: {', '.join(layers)}"

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device, self.dtype if x.is_floating_point() else None, non_blocking=True)

    def _rewire(self) -> None:
        for twin in (self._before, self._after):
            for name in self._blocks:
                fold_attention(twin.get_submodule(name))
        frozen = self._blocks[: self.frozen_blocks]
        stand_in(self._after, frozen, self._given)
        if frozen and not self.all_frozen:
            self._before.get_submodule(frozen[-1]).register_forward_hook(stop_after)

    def _prove(self, backbone: Backbone, probe: torch.Tensor) -> tuple[int, ...]:
        import torch

        with torch.no_grad():
            expected = encode(backbone.model, self.kind, probe).float()
            try:
                boundary = self.to_boundary(probe)
                found = self.from_boundary(boundary, probe if self.kind == "text" else None).float()
                difference = apart(found, expected)
            except torch.OutOfMemoryError:  # says nothing of the tower
                raise
            except MISFITS as error:
                raise self._refusal(str(error).partition("\n")[0]) from error
        if not difference <= MOST_ROUNDING[backbone.precision]:
            raise self._refusal(f"its parts give another result than the whole (by {difference:.2g})")
        return tuple(boundary.shape[1:])

    def _refusal(self, why: str) -> UserError:
        message = f"the {self.kind} tower cannot be cut after block {self.frozen_blocks}: {why}"
        return UserError(message, place=self._backbone_name, remedy="give 0 to train all of it, or another backbone")


def cut_towers(
    backbone: Backbone,
    *,
    freeze_layers: int,
    freeze_text_layers: int | None,
    train_text: bool = True,
    low_rank: LowRank | None = None,
) -> tuple[CutTower, CutTower]:
    """Cut and freeze the image and the text tower of a model.

    What is frozen in the model already stays so: fixed position embeddings, and what an earlier cut froze. What belongs
    to neither tower (the logit scale) is frozen.

    Args:
        backbone: loaded, on its device.
        freeze_layers: first blocks of the image tower to freeze, 0 to its depth.
        freeze_text_layers: those of the text tower, whose depth freezes all of it; None takes as many as of the image
            tower, at most that depth.
        train_text: False freezes all of the text tower, whatever `freeze_text_layers` says.
        low_rank: train additions to the layers of the other blocks, and no weight of the model.

    Raises:
        UserError: a tower has fewer blocks, or cannot be cut, or has no layers to add to.
    """
    image_depth, text_depth = (tower_depth(backbone.model, kind) for kind in KINDS)
    _check_range(backbone, "image", freeze_layers, image_depth)
    train_text = train_text and backbone.has_text
    wanted = min(freeze_layers, text_depth) if freeze_text_layers is None else freeze_text_layers
    _check_range(backbone, "text", wanted, text_depth)
    all_frozen = wanted == text_depth if text_depth else freeze_text_layers is None and freeze_layers > 0
    if not train_text:
        wanted, all_frozen = text_depth, True
    if wanted and not all_frozen and not block_names(backbone.model, "text"):
        form = type(backbone.model.text).__name__
        remedy = f"give {OPTIONS['text']} {text_depth} to freeze all of it, or 0"
        message = f"the text tower ({form}) cannot be cut after block {wanted}"
        raise UserError(message, place=backbone.facts["backbone"], remedy=remedy)
    image = CutTower(backbone, "image", frozen_blocks=freeze_layers, all_frozen=False)
    text = CutTower(backbone, "text", frozen_blocks=wanted, all_frozen=all_frozen)
    if low_rank:
        for tower in (image, *([] if text.all_frozen else [text])):
            tower.add_low_rank(low_rank)
    trainable = image.named_trainable() | text.named_trainable()
    for name, parameter in backbone.model.named_parameters():
        if name not in trainable:
            parameter.requires_grad = False
    return image, text


def _check_range(backbone: Backbone, kind: Kind, number: int, depth: int) -> None:
    if 0 <= number <= depth:
        return
    name = backbone.facts["backbone"]
    if not depth:
        form = type(backbone.model.get_submodule(tower_root(backbone.model, kind).removesuffix("."))).__name__
        message = f"the {kind} tower ({form}) has no blocks under a known name and cannot be cut"
        raise UserError(message, place=name, remedy=f"give {OPTIONS[kind]} 0 to train all of it, or another backbone")
    message = f"the {kind} tower of {name} has {depth} blocks, {number} cannot be frozen"
    raise UserError(message, place=OPTIONS[kind], remedy=f"give 0 to {depth}")


# ---- Where a model has its two towers, their blocks and their parameters


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


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of two tensors of one shape, of the largest value that is expected."""
    import torch

    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / largest)


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
