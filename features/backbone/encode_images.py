"""Pixels to image embeddings. Spec sections 2 and 6.

Knows a loaded backbone. Must not know files or caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from deltaclip.features.backbone.load import Backbone


class Embeddings(NamedTuple):
    """B embeddings of unit length and the lengths that they had before."""

    unit_BD: NDArray[np.float32]
    norm_B: NDArray[np.float32]


def encode_images(backbone: Backbone, pixels_B3HW: torch.Tensor) -> Embeddings:
    """Encode preprocessed images.

    Args:
        backbone: a loaded model.
        pixels_B3HW: float32 (B, 3, H, W) as `backbone.preprocess` gives them.

    Returns:
        unit_BD float32 (B, D), L2 norm 1; norm_B float32 (B,), the length of open_clip's own output.
    """
    import torch

    with torch.inference_mode():
        pixels = pixels_B3HW.to(backbone.device, next(backbone.model.parameters()).dtype, non_blocking=True)
        return to_unit_length(backbone.model.encode_image(pixels))  # type: ignore[operator]


def to_unit_length(features_BD: torch.Tensor) -> Embeddings:
    """Normalise in float32, whatever the model's precision: bf16 division alone would cost three digits."""
    import torch

    features = features_BD.float()
    norm_B = features.norm(dim=-1)
    unit_BD = torch.nn.functional.normalize(features, dim=-1)
    return Embeddings(unit_BD.cpu().numpy(), norm_B.cpu().numpy())
