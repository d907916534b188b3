"""Pictures as float tensors to the vectors of views, with gradients: what `view_vectors.py` does with files.

The steps are those of the backbone's own transform, on floats. Knows loaded backbones and tensors. Must not know files,
caches or heads.

Shapes: B pictures, H and W their pixels, K crops, D width of the backbone, W width of a view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.block_means import StageTower
from deltaclip.features.backbone.pixels import MAX_LEVELS, cut_corner, input_size
from deltaclip.features.backbone.twins import around, fold_attention, twin_of
from deltaclip.features.data.views import CENTER, STAGES, STATISTICS, fitted_size, tile_corners, whole_short_side

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from deltaclip.features.backbone.load import Backbone

FLIP, TILES = "flip", "tiles"


class DifferentiableViews:
    """The views of a backbone of pictures as they are in memory.

    It reads the weights that the model has when it is called. `without_gradient` names the views that are computed, but
    that nothing flows back through: `statistics` are counts and sorted numbers of 8-bit pixels.
    """

    def __init__(self, backbone: Backbone, names: Sequence[str], *, rounds: bool) -> None:
        """Prepare views of a backbone whose weights are plain, as they are in fp32.

        `rounds` resizes to 8 bits as Pillow does; the gradient goes straight through the rounding.

        Raises:
            UserError: the backbone's transform is none that floats can take.
        """
        import torch

        self._backbone, self._names = backbone, tuple(names)
        self.without_gradient = tuple(name for name in names if name == STATISTICS)
        self._crop = FloatCrop(backbone, rounds=rounds)
        self._stages: StageTower | None = None
        if STAGES in names:
            height, width = input_size(backbone)
            self._short_side = whole_short_side(min(height, width))
            self._stages = StageTower(backbone, other_size=(self._short_side, self._short_side + 1))
            fold_attention(self._stages.twin)
        tower = twin_of(torch.nn.Module.get_submodule(backbone.model, "visual"))
        fold_attention(tower)
        self._model: Any = around(backbone.model, "visual", tower)

    def __call__(self, picture_B3HW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the vectors of each view, (B, W) float32, on the backbone's device.

        Args:
            picture_B3HW: float32 in [0, 1], RGB, of any size; on any device.
        """
        picture = picture_B3HW.to(self._backbone.device)
        found: dict[str, torch.Tensor] = {}
        crop = self._crop(picture) if {*self._names} - {STATISTICS, TILES} else picture
        if self._stages and not self._stages.takes_any_size and CENTER in self._names:
            both = self._stages.with_features(self._crop.normalised(crop), differentiable=True)
            features_BD, found[STAGES] = both.split(
                [both.shape[1] - sum(self._stages.widths), sum(self._stages.widths)], 1
            )
            found[CENTER] = _unit(features_BD)
        for name in self._names:
            if name not in found:
                found[name] = self._view(name, picture, crop)
        return {name: found[name] for name in self._names}

    def _view(self, name: str, picture: torch.Tensor, crop: torch.Tensor) -> torch.Tensor:
        import torch

        if name == CENTER:
            return self._unit_vectors(crop)
        if name == FLIP:
            return self._unit_vectors(crop.flip(-1))
        if name == TILES:
            tiles_K3HW, count = self._crop.tiles(picture)
            mean_BD: torch.Tensor = self._unit_vectors(tiles_K3HW).unflatten(0, (count, -1)).mean(dim=0)
            return mean_BD
        if name == STATISTICS:
            return _statistics(picture)
        assert self._stages is not None, name
        if self._stages.takes_any_size:
            tall, wide = picture.shape[-2:]
            size = fitted_size(tall, wide, self._short_side)
            crop = self._crop.resized(picture, size)
        means: torch.Tensor = self._stages(self._crop.normalised(crop), differentiable=True)
        return means.to(torch.float32)

    def _unit_vectors(self, crop_K3HW: torch.Tensor) -> torch.Tensor:
        pixels = self._crop.normalised(crop_K3HW)
        return _unit(self._model.encode_image(pixels.to(next(self._model.parameters()).dtype)))


class FloatCrop:
    """A backbone's transform, of floats in [0, 1]: resize, crop, normalise."""

    def __init__(self, backbone: Backbone, *, rounds: bool) -> None:
        """Read the transform's steps; `rounds` puts 8 bits behind each pass of a resize.

        Raises:
            UserError: it has steps other than resizing and cropping.
        """
        import torch
        import torchvision.transforms as tv

        steps = list(getattr(backbone.preprocess, "transforms", []))
        cfg = backbone.facts["preprocessing"]
        resize, cuts = steps[0] if steps else None, [step for step in steps[1:] if isinstance(step, tv.CenterCrop)]
        if not isinstance(resize, tv.Resize) or any("Pad" in type(step).__name__ for step in steps):
            message = f"resizes in a way that has no gradient here ({cfg['resize_mode']})"
            raise UserError(message, place=backbone.facts["backbone"], remedy="use Scorer, which has no gradients")
        self._size: Any = resize.size if isinstance(resize.size, int) else list(resize.size)
        self._mode, self._cuts, self._rounds = resize.interpolation.value, cuts, rounds
        self._input = input_size(backbone)
        self._mean, self._std = (
            torch.tensor(cfg[name], device=backbone.device)[:, None, None] for name in ("mean", "std")
        )

    def __call__(self, picture_B3HW: torch.Tensor) -> torch.Tensor:
        """Return the pixels that the model sees, in [0, 1]."""
        from torchvision.transforms.v2 import functional

        size = self._size
        if isinstance(size, int):  # of the shorter side, as torchvision rounds the longer
            shortest = min(picture_B3HW.shape[-2:])
            size = [size if side == shortest else int(size * side / shortest) for side in picture_B3HW.shape[-2:]]
        pixels = self.resized(picture_B3HW, size)
        for cut in self._cuts:
            (height, width), (tall, wide) = cut.size, pixels.shape[-2:]
            if tall < height or wide < width:
                pixels = functional.center_crop(pixels, [height, width])  # which pads
                continue
            top, left = (cut_corner(cut, free) for free in (tall - height, wide - width))
            pixels = pixels[..., top : top + height, left : left + width]
        return pixels

    def resized(self, picture_B3HW: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Return pictures of another height and width, the width first as Pillow does."""
        import torch

        for axis in (-1, -2):
            if picture_B3HW.shape[axis] != size[axis]:
                step = [*picture_B3HW.shape[-2:]]
                step[axis] = size[axis]
                # An overshoot of the resampling is cut off, as 8 bits do.
                picture_B3HW = torch.nn.functional.interpolate(
                    picture_B3HW, size=step, mode=self._mode, antialias=True, align_corners=False
                ).clamp(0, 1)
                if self._rounds:
                    level = (picture_B3HW.detach() * MAX_LEVELS).round() / MAX_LEVELS
                    picture_B3HW = picture_B3HW + (level - picture_B3HW.detach())
        return picture_B3HW

    def tiles(self, picture_B3HW: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the tiles of all pictures, tile by tile, and how many each has."""
        import torch

        height, width = self._input
        tall, wide = picture_B3HW.shape[-2:]
        if (factor := max(height / tall, width / wide)) > 1:
            picture_B3HW = self.resized(
                picture_B3HW, [max(height, round(tall * factor)), max(width, round(wide * factor))]
            )
        tall, wide = picture_B3HW.shape[-2:]
        tops, lefts = tile_corners(tall, wide, height, width)
        tiles = [picture_B3HW[..., top : top + height, left : left + width] for top in tops for left in lefts]
        return torch.cat(tiles), len(tiles)

    def normalised(self, pixels_K3HW: torch.Tensor) -> torch.Tensor:
        """Return pixels as the tower takes them."""
        return (pixels_K3HW - self._mean) / self._std


def _unit(features_BD: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.normalize(features_BD.float(), dim=-1)


def _statistics(picture_B3HW: torch.Tensor) -> torch.Tensor:
    """Return the statistics of pictures rounded to 8 bits, (B, S) float32: constants to the gradient."""
    import numpy as np
    import torch
    from PIL import Image

    from deltaclip.features.data.statistics import statistics_of

    level_BHW3 = (
        (picture_B3HW.detach() * MAX_LEVELS).round().clamp(0, MAX_LEVELS).byte().permute(0, 2, 3, 1).cpu().numpy()
    )
    found_BS = np.stack([statistics_of(Image.fromarray(level_HW3)) for level_HW3 in level_BHW3])
    return torch.from_numpy(found_BS).to(picture_B3HW.device)
