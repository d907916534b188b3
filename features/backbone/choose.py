"""Load a backbone in the fastest precision that keeps its embeddings, measured on images of the job itself.

Asked of it: bf16 against fp32 embeddings, cosine at least 0.999 on every image. Transformers keep it; a deep
convolutional tower may not (a MobileNetV2 reached 0.978), so `auto` looks before it trusts.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from deltaclip.base.device import PrecisionChoice, choose_precision
from deltaclip.features.backbone.encode_images import encode_images, is_usable, try_images
from deltaclip.features.backbone.load import Backbone, load_backbone

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from deltaclip.features.backbone.checkpoint import WeightsSource
    from deltaclip.features.data.decoding import Decode

MIN_COSINE = 0.999


def load_in_best_precision(
    source: WeightsSource,
    *,
    device: str,
    precision: PrecisionChoice,
    quick_gelu: bool | None,
    decode: Decode = "exact",
    probe: Callable[[Backbone], torch.Tensor | None],
) -> tuple[Backbone, str]:
    """Load a backbone; with `auto`, in 16 bits only if a probe of the images agrees with fp32.

    Args:
        source: resolved weights.
        device: a torch device.
        precision: what was asked for.
        quick_gelu: as in `load_backbone`.
        decode: how image files become pixels.
        probe: given a backbone, returns pixels (P, 3, H, W) for it of some images, or None if none can be read.

    Returns:
        the backbone and one phrase that says why it has its precision.
    """
    load = functools.partial(load_backbone, source, device=device, quick_gelu=quick_gelu, decode=decode)
    fast = choose_precision(precision, device)
    if precision != "auto" or fast == "fp32":
        reason = "as asked" if precision != "auto" else "no 16-bit units in this processor"
        return load(precision=fast), reason
    exact_backbone = load(precision="fp32")
    pixels = probe(exact_backbone)
    if pixels is None:
        return exact_backbone, "no image to measure on"
    fast_backbone = load(precision=fast)
    exact, close = encode_images(exact_backbone, pixels), try_images(fast_backbone, pixels)
    if not is_usable(close):
        return exact_backbone, f"{fast} gives embeddings that are not finite"
    cosine = float((exact.unit_BD * close.unit_BD).sum(axis=1).min())
    measured = f"{fast} reaches a cosine of {cosine:.4f} with fp32 on {len(pixels)} images"
    return (fast_backbone, measured) if cosine >= MIN_COSINE else (exact_backbone, measured)
