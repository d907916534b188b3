"""Pixels of an image as a backbone is given them: 8 bits until the device, then normalised there.

Bit for bit what the backbone's own transform gives, unless it decodes `fast` or on a GPU. Knows open_clip's transforms.
Must not know files.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.transfers import overlaps
from deltaclip.features.data.decoding import on_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from PIL import Image

    from deltaclip.features.backbone.load import Backbone

MAX_LEVELS = 255.0


def center_crops(backbone: Backbone) -> Callable[[Image.Image], torch.Tensor]:
    """Return what cuts an RGB image to the model's input: uint8 (1, 3, H, W) for `normalise`.

    A transform whose end is not conversion and normalisation gives its own float32 instead.

    Raises:
        UserError: `fast` has no way to resize as this model needs.
    """
    import torchvision.transforms as tv

    if on_host(backbone.decode) == "fast":
        fit = _fitted(backbone, _resized_by_torchvision)
        return lambda image: fit(_as_tensor(image)[None])
    steps = _geometric_steps(backbone)
    if steps is None:
        return lambda image: backbone.preprocess(image)[None]
    before = tv.Compose(_own_crops(steps))
    return lambda image: _as_tensor(before(image)).contiguous()[None]


def device_crops(backbone: Backbone) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what cuts images of one size on a device to the model's input: uint8 (K, 3, H, W) to (K, 3, h, w).

    Raises:
        UserError: see `center_crops`.
    """
    return _fitted(backbone, _resized_in_passes)


def _geometric_steps(backbone: Backbone) -> list[Any] | None:
    """Return the steps of a transform before conversion and normalisation, None of one that does not end in these."""
    import torchvision.transforms as tv
    from open_clip.transform import MaybeToTensor

    steps = list(getattr(backbone.preprocess, "transforms", []))
    ends_known = len(steps) > 2 and isinstance(steps[-1], tv.Normalize)
    return steps[:-2] if ends_known and isinstance(steps[-2], (tv.ToTensor, MaybeToTensor)) else None


def transform_of(cfg: Mapping[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """Return the transform of a preprocessing that open_clip has no words for, of parts that are known here.

    Args:
        cfg: as in the facts of a backbone; `resize_to` is the side before the cut where that is not the size, and
            `crop_corner` "down" says that half a pixel goes to the right and below, as transformers cuts.
    """
    import torchvision.transforms as tv
    from open_clip.transform import MaybeToTensor

    resize_to, size = cfg.get("resize_to", cfg["size"]), list(cfg["size"])
    if cfg["resize_mode"] == "shortest":
        resize_to = min(resize_to) if isinstance(resize_to, list) else resize_to
    elif not isinstance(resize_to, list):
        resize_to = [resize_to, resize_to]
    steps: list[Any] = [tv.Resize(resize_to, interpolation=tv.InterpolationMode(cfg["interpolation"]))]
    if cfg["resize_mode"] == "shortest" or "resize_to" in cfg:
        crop = tv.CenterCrop(size)
        crop.corner = int if cfg.get("crop_corner") == "down" else round
        steps.append(crop)
    normalise_step = tv.Normalize(mean=cfg["mean"], std=cfg["std"])
    return tv.Compose([*steps, MaybeToTensor(), normalise_step])  # type: ignore[no-any-return]


def single_pixels(backbone: Backbone) -> Callable[[Image.Image], torch.Tensor]:
    """Return what makes the model's input of one RGB image, float32 (3, H, W), resized as the backbone decodes.

    Raises:
        UserError: see `center_crops`.
    """
    if on_host(backbone.decode) != "fast":
        import torchvision.transforms as tv

        steps = getattr(backbone.preprocess, "transforms", [backbone.preprocess])
        whole: Callable[[Image.Image], torch.Tensor] = tv.Compose(_own_crops(steps))
        return whole
    crops = center_crops(backbone)
    return lambda image: normalise(backbone, crops(image))[0]


def pixels_ahead(backbone: Backbone) -> Callable[[Image.Image], torch.Tensor]:
    """Return what threads make of one RGB image ahead of the model, (3, H, W), whose batches `normalise` takes.

    For a GPU 8 bits: it normalises faster than processors, and a quarter goes over the bus. For a CPU all that is to be
    done, float32.

    Raises:
        UserError: see `center_crops`.
    """
    if not overlaps(backbone.device):
        return single_pixels(backbone)
    crops = center_crops(backbone)
    return lambda image: crops(image)[0]


def normalise(backbone: Backbone, pixels_K3HW: torch.Tensor) -> torch.Tensor:
    """Return float32 pixels on the device; what is float already was normalised by the backbone's transform.

    The operations of the transform in its order, so that equal pixels give equal bits, on a GPU too: there a division
    by a number would become a product with its reciprocal, one by a tensor does not.
    """
    import torch

    pixels = pixels_K3HW.to(backbone.device, non_blocking=True)
    if pixels.dtype != torch.uint8:
        return pixels
    cfg = backbone.facts["preprocessing"]
    most, mean, std = _constants(backbone.device, tuple(cfg["mean"]), tuple(cfg["std"]))
    return pixels.float().div_(most).sub_(mean).div_(std)


@functools.lru_cache(maxsize=32)
def _constants(
    device: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest level (), mean and SD (3, 1, 1), made once: to make a tensor on a GPU is to wait for it."""
    import torch

    with torch.inference_mode(mode=False):  # whoever is first, others may want gradients
        levels = torch.tensor(MAX_LEVELS, device=device)
        return levels, *(torch.tensor(each, device=device)[:, None, None] for each in (mean, std))  # type: ignore[return-value]


def as_batch(backbone: Backbone, crops: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put crops (K, 3, H, W) of one shape into one tensor, for a GPU in pinned memory, from which copies overlap.

    On the GPU itself where some of them are there already.
    """
    import torch

    if not backbone.device.startswith("cuda"):
        return torch.cat(list(crops))
    of_host = [crop for crop in crops if crop.device.type == "cpu"]
    if len(of_host) < len(crops):
        parts: Iterator[torch.Tensor] = iter(())
        if of_host:
            moved = as_batch(backbone, of_host).to(backbone.device, non_blocking=True)
            parts = iter(moved.split([len(crop) for crop in of_host]))
        return torch.cat([next(parts) if crop.device.type == "cpu" else crop for crop in crops])
    # torch keeps pinned blocks and hands them out again once their copy is done: after the first batches none is made.
    shape = (sum(len(crop) for crop in crops), *crops[0].shape[1:])
    return torch.cat(list(crops), out=torch.empty(shape, dtype=crops[0].dtype, pin_memory=True))


def input_size(backbone: Backbone) -> tuple[int, int]:
    """Return the height and width of the model's input."""
    size = backbone.facts["preprocessing"]["size"]
    height, width = size if isinstance(size, list) else (size, size)
    return height, width


def _own_crops(steps: Sequence[Any]) -> list[Any]:
    """Return a transform's steps with crops that no switch of Pillow's refuses; the pixels are the same."""
    import torchvision.transforms as tv

    return [functools.partial(_center_cut, step) if isinstance(step, tv.CenterCrop) else step for step in steps]


def _center_cut(step: Any, image: Image.Image) -> Image.Image:
    from deltaclip.features.data.pillow import cut

    height, width = step.size
    if image.width < width or image.height < height:
        padded: Image.Image = step(image)
        return padded
    left, top = cut_corner(step, image.width - width), cut_corner(step, image.height - height)
    return cut(image, (left, top, left + width, top + height))


def cut_corner(step: Any, spare: int) -> int:
    """Return where a cut begins that leaves out so many pixels; torchvision's rounding unless the step has its own."""
    return int(getattr(step, "corner", round)(spare / 2.0))


def _fitted(
    backbone: Backbone, resized: Callable[[torch.Tensor, Any], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the steps of a backbone's transform on pixels, `resized` by its first: uint8 (K, 3, H, W) to (K, 3, h, w).

    Raises:
        UserError: it has other steps than resizing and cuts.
    """
    import torchvision.transforms as tv
    from torchvision.transforms.v2 import functional

    steps = _geometric_steps(backbone) or [None]
    resize, cuts = steps[0], [step for step in steps[1:] if isinstance(step, tv.CenterCrop)]
    known = isinstance(resize, tv.Resize) and resize.interpolation.value in {"bilinear", "bicubic"}
    if not known or any("Pad" in type(step).__name__ for step in steps):
        raise _refusal(backbone)

    def fit(pixels_K3HW: torch.Tensor) -> torch.Tensor:
        pixels = resized(pixels_K3HW, resize)
        for step in cuts:
            (height, width), (tall, wide) = step.size, pixels.shape[-2:]
            if tall < height or wide < width:
                pixels = functional.center_crop(pixels, list(step.size))
            else:
                top, left = cut_corner(step, tall - height), cut_corner(step, wide - width)
                pixels = functional.crop(pixels, top, left, height, width)
        return pixels.contiguous()

    return fit


def _resized_by_torchvision(pixels: torch.Tensor, resize: Any) -> torch.Tensor:
    from torchvision.transforms.v2 import functional

    size: Any = resize.size if isinstance(resize.size, int) else list(resize.size)
    resized: torch.Tensor = functional.resize(pixels, size, interpolation=resize.interpolation, antialias=True)
    return resized


def _resized_in_passes(pixels: torch.Tensor, resize: Any) -> torch.Tensor:
    """Resize as Pillow does: across, to 8 bits, then down, to 8 bits.

    Both ways in one pass would keep what lies beyond black and white in between: up to 8 levels from Pillow's.
    """
    import torch

    (height, width), size = pixels.shape[-2:], resize.size
    if isinstance(size, int):
        short, long = min(height, width), max(height, width)
        longer = int(size * long / short)
        size = (size, longer) if height <= width else (longer, size)
    found = pixels.float()
    for sides in ((height, size[1]), tuple(size)):
        if tuple(found.shape[-2:]) != sides:
            scaled = torch.nn.functional.interpolate(found, sides, mode=resize.interpolation.value, antialias=True)
            found = scaled.add_(0.5).floor_().clamp_(0, MAX_LEVELS)  # a half goes up, as there
    return found.to(torch.uint8)


def _as_tensor(image: Image.Image) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _refusal(backbone: Backbone) -> UserError:
    mode = backbone.facts["preprocessing"]["resize_mode"]
    message = f"cannot resize as {backbone.facts['backbone']} needs ({mode})"
    return UserError(message, place=f"--decode {backbone.decode}", remedy="give --decode exact")
