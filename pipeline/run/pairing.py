"""Images and prompts of a caller as pairs to score: what is an image, and what goes with what.

Knows the kinds of images that people hold. Must not know heads or backbones.

Shapes: N pairs of image and prompt.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.features.backbone.batches import ImageFile, MemoryImage

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(frozen=True)
class Pairs:
    """N pairs: `sources` are the distinct images, their entries 0, 1, ...; pair n has source `image_N[n]`."""

    sources: list[ImageFile | MemoryImage]
    image_N: list[int]
    prompts: list[str]


def pair(images: Any, prompts: Any) -> Pairs:
    """Pair images and prompts.

    Lists go pair by pair and must be of equal length; a single image or a single prompt goes with every one of the
    others. One image that stands in several pairs (the same path, or the same object) is one source.

    Args:
        images: a path, a Pillow image or RGB pixels (H, W, 3) uint8; or a list of these; or pixels (N, H, W, 3).
        prompts: a text or a list of texts.

    Raises:
        ValueError: lengths differ, or an array is no image.
        TypeError: something is neither image nor text.
    """
    lone_image, lone_prompt = _is_one_image(images), isinstance(prompts, str)
    given, texts = [images] if lone_image else list(images), [prompts] if lone_prompt else list(prompts)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompts[{place}] is {_named(text)}, not a text")
    if lone_image:
        given *= len(texts)
    elif lone_prompt:
        texts *= len(given)
    if len(given) != len(texts):
        message = (
            f"{len(given):,} images but {len(texts):,} prompts: give one prompt an image, or a single text for all"
        )
        raise ValueError(message)
    entry_of: dict[Hashable, int] = {}
    sources: list[ImageFile | MemoryImage] = []
    image_N = []
    for place, image in enumerate(given):
        key = Path(image) if isinstance(image, (str, os.PathLike)) else id(image)
        if key not in entry_of:
            entry_of[key] = len(sources)
            sources.append(_source(len(sources), image, f"images[{place}]"))
        image_N.append(entry_of[key])
    return Pairs(sources, image_N, texts)


def _is_one_image(images: Any) -> bool:
    from PIL import Image

    if isinstance(images, np.ndarray):
        return images.ndim != 4
    return isinstance(images, (str, os.PathLike, Image.Image))


def _source(entry: int, image: Any, place: str) -> ImageFile | MemoryImage:
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return ImageFile(entry, Path(image), None)
    if isinstance(image, Image.Image):
        return MemoryImage(entry, image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{place} is {_named(image)}: give a path, a PIL image or uint8 pixels (H, W, 3)")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{place} is {_named(image)}: pixels must be uint8 (H, W, 3), RGB")
    return MemoryImage(entry, image)


def _named(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    return f"of type {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
