"""Pixels to image embeddings.

Knows a loaded backbone. Must not know files or caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.parts import in_parts
from deltaclip.features.backbone.pixels import normalise

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from deltaclip.features.backbone.load import Backbone


MIN_PART = 16  # images


class Embeddings(NamedTuple):
    """B embeddings of unit length and the lengths that they had before."""

    unit_BD: NDArray[np.float32]
    norm_B: NDArray[np.float32]


def encode_images(backbone: Backbone, pixels_B3HW: torch.Tensor) -> Embeddings:
    """Encode preprocessed images; as `try_images`, but what is unusable never gets out.

    Raises:
        UserError: an embedding is not finite or has no length.
    """
    return require_usable(try_images(backbone, pixels_B3HW), backbone)


def try_images(backbone: Backbone, pixels_B3HW: torch.Tensor) -> Embeddings:
    """Encode preprocessed images, whatever comes of it.

    Args:
        backbone: a loaded model.
        pixels_B3HW: (B, 3, H, W), uint8, or float32 as `backbone.preprocess` gives them.

    Returns:
        unit_BD float32 (B, D), L2 norm 1; norm_B float32 (B,), the length of open_clip's own output.
    """
    import torch

    encoder, dtype = backbone.encoder, next(backbone.model.parameters()).dtype

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return encoder.encode_image(normalise(backbone, pixels).to(dtype))  # type: ignore[no-any-return]

    with torch.inference_mode():
        is_packed = encoder is not backbone.model
        return to_unit_length(in_parts(encode, pixels_B3HW, smallest=MIN_PART) if is_packed else encode(pixels_B3HW))


def is_usable(found: Embeddings) -> bool:
    """Tell whether every embedding is finite and has a length."""
    return bool(np.isfinite(found.unit_BD).all() and np.isfinite(found.norm_B).all() and (found.norm_B > 0).all())


def require_usable(found: Embeddings, backbone: Backbone) -> Embeddings:
    """Return the embeddings as they are.

    Raises:
        UserError: one of them is not finite or has no length.
    """
    if is_usable(found):
        return found
    what = "of length zero" if np.isfinite(found.norm_B).all() else "that are not finite"
    remedy = "check the weights, or give --precision fp32"
    raise UserError(f"the backbone gives embeddings {what}", place=backbone.facts["backbone"], remedy=remedy)


def to_unit_length(features_BD: torch.Tensor) -> Embeddings:
    """Normalise in float32, whatever the model's precision: bf16 division alone would cost three digits."""
    import torch

    features = features_BD.float()
    norm_B = features.norm(dim=-1)
    unit_BD = torch.nn.functional.normalize(features, dim=-1)
    return Embeddings(unit_BD.cpu().numpy(), norm_B.cpu().numpy())
