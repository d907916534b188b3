"""The image tower of a backbone up to its last block, and what its blocks give on average over an image.

Blocks are found by the names that open_clip and timm give them. Knows towers. Must not know files, images or caches.

Shapes: B images, W all channels of the blocks together.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from typing import TYPE_CHECKING, Any

from deltaclip.features.backbone.packed import EarlyPool, mean_of_tokens
from deltaclip.features.backbone.twins import Enough, around, twin_of
from deltaclip.features.data.views import MAX_BLOCKS, UnfitBackboneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from deltaclip.features.backbone.load import Backbone


# Modules whose children are the blocks: open_clip's transformers; timm's transformers and EfficientNets; its ConvNeXt.
CONTAINERS = ("transformer.resblocks", "trunk.blocks", "trunk.stages")
RESNETS = ("", "trunk.")  # where layer1 to layer4 are: open_clip's ResNets, timm's
# How towers of one input size say so: a sum of tensors that do not match, timm's assertions, a view that is impossible.
OTHER_SIZE = (RuntimeError, AssertionError, ValueError)


class StageTower:
    """The blocks of an image tower that are read, and the way to read them.

    `blocks` are their names, `widths` their channels; `takes_any_size` says whether images of other sizes than the
    model's input go through.
    """

    def __init__(self, backbone: Backbone, *, other_size: tuple[int, int]) -> None:
        """Find the blocks and try which sizes the tower takes.

        Args:
            backbone: a loaded model.
            other_size: (H, W) that is not the model's input size.

        Raises:
            UnfitBackboneError: the tower has no blocks under a known name, or gives neither maps nor tokens.
        """
        import torch

        self._name, tower = backbone.facts["backbone"], backbone.encoder.visual
        assert isinstance(tower, torch.nn.Module)
        self.blocks = spread(find_blocks(tower))
        if not self.blocks:
            raise self._refusal(f"its {type(tower).__name__} has none of {', '.join(CONTAINERS)} and layer1 to layer4")
        # Hooks sit on modules of our own that share the weights: the model stays as it is, for other threads too.
        twin = twin_of(tower)
        for name in self.blocks:
            block = twin.get_submodule(name)
            pool = vars(block).get("forward")
            if isinstance(pool, EarlyPool):
                block.forward = functools.partial(self._keep_and_pool, pool)
            else:
                block.register_forward_hook(self._keep_mean)
        self._twin, self._encoder = twin, backbone.encoder
        self._channels_last = getattr(getattr(tower, "trunk", None), "output_fmt", "NCHW") == "NHWC"
        self._pass = threading.local()  # parts of a batch, and batches on two streams, go through at the same time
        parameter = next(tower.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        size = backbone.facts["preprocessing"]["size"]
        try:
            self.widths, self.takes_any_size = self._widths(other_size), True
        except torch.OutOfMemoryError:  # says nothing of the tower
            raise
        except OTHER_SIZE:
            self.widths = self._widths(size if isinstance(size, list) else (size, size))
            self.takes_any_size = False

    @property
    def twin(self) -> torch.nn.Module:
        """The tower that is run: modules of its own over the model's weights."""
        return self._twin

    def __call__(self, pixels_B3HW: torch.Tensor, *, differentiable: bool = False) -> torch.Tensor:
        """Return the means of all blocks' outputs over space or tokens, one block after the other, (B, W) float32.

        `differentiable` keeps what gradients need, where the encoder has plain weights.
        """
        import torch

        return torch.cat(self._means(pixels_B3HW, differentiable=differentiable), dim=1)

    def with_features(self, pixels_B3HW: torch.Tensor, *, differentiable: bool = False) -> torch.Tensor:
        """Return the image features of the model, bit for bit, and behind them what a call gives, (B, D + W) float32.

        One forward pass for both.
        """
        import torch

        model = around(self._encoder, "visual", self._twin)
        self._begin(is_all=True)
        with torch.inference_mode(not differentiable):
            features_BD = model.encode_image(pixels_B3HW.to(self._device, self._dtype))
        return torch.cat([features_BD.float(), *self._pass.means], dim=1)

    def _widths(self, size: Sequence[int]) -> list[int]:
        import torch

        return [mean.shape[1] for mean in self._means(torch.zeros(1, 3, *size))]

    def _means(self, pixels_B3HW: torch.Tensor, *, differentiable: bool = False) -> list[torch.Tensor]:
        import torch

        self._begin(is_all=False)
        with torch.inference_mode(not differentiable), contextlib.suppress(Enough):
            # An attention pool after the last block takes one size only: the pass ends before it.
            self._twin(pixels_B3HW.to(self._device, self._dtype))
        means: list[torch.Tensor] = self._pass.means
        return means

    def _begin(self, *, is_all: bool) -> None:
        self._pass.means, self._pass.is_all = [], is_all

    def _keep_mean(self, _module: torch.nn.Module, _given: Any, output: Any) -> None:
        import torch

        if not isinstance(output, torch.Tensor) or output.dim() not in {3, 4}:
            raise self._refusal("its blocks give neither maps nor tokens")
        if output.dim() == 3:
            self._keep(mean_of_tokens(output), output)
            return
        # Sums in float32, whatever the model's precision: 36,864 places of a 384-pixel map.
        self._keep(output.mean((1, 2) if self._channels_last else (2, 3), dtype=torch.float32), output)

    def _keep_and_pool(self, pool: EarlyPool, *given: Any, **options: Any) -> torch.Tensor:
        first, mean_BC = pool.with_mean(*given, **options)
        self._keep(mean_BC, first)
        return first

    def _keep(self, mean_BC: torch.Tensor, output: torch.Tensor) -> None:
        self._pass.means.append(mean_BC)
        if len(self._pass.means) == len(self.blocks) and not self._pass.is_all:
            raise Enough(output)

    def _refusal(self, why: str) -> UnfitBackboneError:
        words = f"has no blocks that can be read: {why}"
        return UnfitBackboneError(words, place=self._name, remedy="leave stages out of --views")


def find_blocks(tower: torch.nn.Module) -> list[str]:
    """Return the names of an image tower's blocks or stages in their order, none where they are not recognised."""
    modules = dict(tower.named_modules())
    for place in CONTAINERS:
        if place in modules and (names := [name for name, _ in modules[place].named_children()]):
            return [f"{place}.{name}" for name in names]
    for place in RESNETS:
        layers = [f"{place}layer{number}" for number in range(1, 5)]
        if modules.keys() >= set(layers):
            return layers
    return []


def spread(blocks: Sequence[str]) -> list[str]:
    """Return at most `MAX_BLOCKS` of these, evenly spaced, the last one included."""
    count = min(len(blocks), MAX_BLOCKS)
    return [blocks[number * len(blocks) // count - 1] for number in range(1, count + 1)]


def chunks_of_shape(shapes: Sequence[tuple[int, ...]], most_pixels: int) -> list[list[int]]:
    """Return the places of images that can go through together: of equal shape, at most so many pixels, at least one.

    Args:
        shapes: (..., H, W) of every image.
        most_pixels: H W of all images of a chunk together.
    """
    chunks = []
    places = sorted(range(len(shapes)), key=lambda place: (shapes[place], place))
    for shape, equal in itertools.groupby(places, key=lambda place: shapes[place]):
        of_shape, count = list(equal), max(1, most_pixels // (shape[-2] * shape[-1]))
        chunks += [of_shape[start : start + count] for start in range(0, len(of_shape), count)]
    return chunks
