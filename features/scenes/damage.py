"""Damage of graded strength, and the quality label it leaves; knows pixels, no scenes.

Quality label:

    quality = product over damages of (1 - WEIGHTS[kind] * strength),   strength in [0, 1]

A product, because damages add up but each takes from what is left, and because the label then never leaves
[0, 1]. The weights follow how much of the picture full strength destroys: blur 0.85 and low resolution 0.80
leave no detail; noise 0.75 and warped shapes 0.70 leave the things in place; JPEG 0.60 and bad colours 0.55
leave the outlines.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.random import Generator

WEIGHTS: dict[str, float] = {
    "warp": 0.70,
    "colours": 0.55,
    "low_resolution": 0.80,
    "blur": 0.85,
    "noise": 0.75,
    "jpeg": 0.60,
}
# In the order in which a camera would do them: the shape of things first, the file last.
DAMAGES: tuple[str, ...] = tuple(WEIGHTS)

WORDS: dict[str, str] = {
    "warp": "its shapes are warped",
    "colours": "its colours are off",
    "low_resolution": "it is low in resolution",
    "blur": "it is blurry",
    "noise": "it is noisy",
    "jpeg": "it has compression blocks",
}
# Weaker than this a damage is not worth a word.
NAMED_FROM = 0.25


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One damage: `kind` of DAMAGES and `strength` in [0, 1]."""

    kind: str
    strength: float


def quality_label(damages: Sequence[Damage]) -> float:
    """Return the product of (1 - weight * strength) over the damages; see the head of this file."""
    return math.prod(1.0 - WEIGHTS[d.kind] * d.strength for d in damages)


def damage_words(damages: Sequence[Damage]) -> list[str]:
    """Return one clause per damage that can be seen, in the order of DAMAGES."""
    return [WORDS[kind] for kind in DAMAGES for d in damages if d.kind == kind and d.strength >= NAMED_FROM]


def _warp(image: Image.Image, strength: float, rng: Generator) -> Image.Image:
    """Move the inner corners of a 6 x 6 grid by up to 7.5 % of the side, the rest smoothly; the rim stays."""
    cells, side = 6, image.width
    grid = np.stack(np.meshgrid(*[np.linspace(0, side, cells + 1)] * 2, indexing="xy"), axis=-1)
    moved = grid.copy()
    moved[1:-1, 1:-1] += strength * 0.075 * side * rng.uniform(-1, 1, size=(cells - 1, cells - 1, 2))
    mesh = []
    for row in range(cells):
        for column in range(cells):
            box = (
                *grid[row, column].round().astype(int).tolist(),
                *grid[row + 1, column + 1].round().astype(int).tolist(),
            )
            corners = [
                moved[row, column],
                moved[row + 1, column],
                moved[row + 1, column + 1],
                moved[row, column + 1],
            ]
            mesh.append((box, tuple(np.concatenate(corners).tolist())))
    return image.transform(image.size, Image.Transform.MESH, mesh, resample=Image.Resampling.BILINEAR)


def _colours(image: Image.Image, strength: float, rng: Generator) -> Image.Image:
    """Take saturation and contrast away and lay a cast over all: a 3 x 4 matrix on the colour channels."""
    cast = rng.uniform(-1, 1, size=3)
    cast = (cast - cast.mean()) * 40 * strength
    keep = 1 - 0.6 * strength * rng.uniform(0.6, 1.0)
    contrast = 1 - 0.5 * strength * rng.uniform(0.6, 1.0)
    grey = np.array([0.299, 0.587, 0.114])
    matrix = contrast * (keep * np.eye(3) + (1 - keep) * np.tile(grey, (3, 1)))
    offset = (1 - contrast) * 128 + cast
    rows = np.concatenate([matrix, offset[:, None]], axis=1)
    return image.convert("RGB", tuple(rows.ravel().tolist()))


def _low_resolution(image: Image.Image, strength: float, _rng: Generator) -> Image.Image:
    side = max(8, round(image.width / (1 + 6 * strength)))
    small = image.resize((side, side), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BILINEAR)


def _blur(image: Image.Image, strength: float, _rng: Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.03 * image.width * strength))


def _noise(image: Image.Image, strength: float, rng: Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(70 * strength)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, strength: float, _rng: Generator) -> Image.Image:
    buffer = io.BytesIO()
    # Quality 30 shows first blocks on flat colours, 3 is the worst that still shows the things.
    image.save(buffer, "JPEG", quality=round(3 + 27 * (1 - strength) ** 1.6))
    with Image.open(io.BytesIO(buffer.getvalue())) as read:
        return read.convert("RGB")


_APPLY: dict[str, Callable[[Image.Image, float, Generator], Image.Image]] = {
    "warp": _warp,
    "colours": _colours,
    "low_resolution": _low_resolution,
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
}


def damage_image(image: Image.Image, damages: Sequence[Damage], seed: int | Sequence[int]) -> Image.Image:
    """Return the square RGB image, damaged in the order of DAMAGES; strength 0 does nothing."""
    rng = np.random.default_rng(seed)
    for kind in DAMAGES:
        for damage in damages:
            if damage.kind == kind and damage.strength > 0:
                image = _APPLY[kind](image, damage.strength, rng)
    return image
