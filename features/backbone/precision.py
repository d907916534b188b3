"""Load a backbone in the fastest precision that keeps its embeddings, measured on images of the job itself.

Asked of it: bf16 against fp32 embeddings, cosine at least 0.999 on every image. Transformers keep it; a deep
convolutional tower may not (a MobileNetV2 reached 0.978), so `auto` looks before it trusts, also where towers train.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.device import Precision, PrecisionChoice, choose_precision
from deltaclip.features.backbone.decode_ahead import PROBE_IMAGES, default_workers, pixel_batches
from deltaclip.features.backbone.encode import Embeddings, encode_images, is_usable, try_images
from deltaclip.features.backbone.load import Backbone, load_backbone
from deltaclip.features.backbone.pixels import center_crops
from deltaclip.features.backbone.view_vectors import file_opener

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    import torch

    from deltaclip.features.backbone.decode_ahead import ImageFile
    from deltaclip.features.backbone.weights import WeightsSource
    from deltaclip.features.data.decoding import Decode


MIN_COSINE = 0.999
AS_ASKED, NO_UNITS, NO_IMAGE = "as asked", "no 16-bit units in this processor", "no image to measure on"
UNMEASURED = {None, AS_ASKED, NO_UNITS, NO_IMAGE}  # reasons that say nothing of the tower


class Choice(NamedTuple):
    """A number format, and one phrase that says why."""

    precision: Precision
    reason: str


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
        return load(precision=fast), AS_ASKED if precision != "auto" else NO_UNITS
    exact_backbone = load(precision="fp32")
    pixels = probe(exact_backbone)
    if pixels is None:
        return exact_backbone, NO_IMAGE
    fast_backbone = load(precision=fast)
    choice = _judged(fast, exact=encode_images(exact_backbone, pixels), close=try_images(fast_backbone, pixels))
    return exact_backbone if choice.precision == "fp32" else fast_backbone, choice.reason


def training_precision(
    backbone: Backbone,
    requested: PrecisionChoice,
    *,
    extracted: Mapping[str, Any],
    probe: Callable[[Backbone], torch.Tensor | None],
) -> Choice:
    """Return the number format of activations in which a tower trains, by the rule of `load_in_best_precision`.

    Args:
        backbone: in fp32, as its weights train.
        requested: what was asked for.
        extracted: facts of the cache: where its extraction has found that 16 bits harm the tower, they are not taken.
        probe: as in `load_in_best_precision`.
    """
    import torch

    fast = choose_precision(requested, backbone.device)
    if requested != "auto" or fast == "fp32":
        return Choice(fast, AS_ASKED if requested != "auto" else NO_UNITS)
    if extracted["precision"] == "fp32" and (found := extracted.get("precision_reason")) not in UNMEASURED:
        return Choice("fp32", f"as extract has found: {found}")
    if (pixels := probe(backbone)) is None:
        return Choice("fp32", NO_IMAGE)
    exact = encode_images(backbone, pixels)
    with torch.autocast(torch.device(backbone.device).type, autocast_type(fast)):
        close = try_images(backbone, pixels)
    return _judged(fast, exact=exact, close=close)


def autocast_type(precision: Precision) -> torch.dtype:
    """Return the type of activations where weights are fp32."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _judged(fast: Precision, *, exact: Embeddings, close: Embeddings) -> Choice:
    if not is_usable(close):
        return Choice("fp32", f"{fast} gives embeddings that are not finite")
    cosine = float((exact.unit_BD * close.unit_BD).sum(axis=1).min())
    measured = f"{fast} reaches a cosine of {cosine:.4f} with fp32 on {len(exact.unit_BD)} images"
    return Choice(fast if cosine >= MIN_COSINE else "fp32", measured)


def probe_pixels(backbone: Backbone, files: Sequence[ImageFile], root: Path | None) -> torch.Tensor | None:
    """Return what `backbone` takes of a few images to measure on, (P, 3, H, W), None where none can be read."""
    crops = center_crops(backbone)
    if not files:
        return None
    batches = pixel_batches(
        files,
        lambda image: crops(image)[0],
        root=root,
        batch_size=PROBE_IMAGES,
        workers=default_workers(),
        open_file=file_opener(backbone),
    )
    with contextlib.closing(batches):
        return next(batches).pixels_B3HW
