"""The frozen-backbone trap: a frozen encoder must not be slower than an unfrozen one, in every mode that we offer.

A Linear whose weight needs no gradient takes another path in torch for some inputs, which has been seen 2 to 30 times
slower. Wanted: encode time frozen over unfrozen at most 1.2.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.measuring import Row, paired_ratio
from benchmarks.models import vit_b_32
from deltaclip.base.device import choose_device, cpu_has_bf16_units
from deltaclip.features.backbone.encode import encode_images, encode_texts
from deltaclip.features.backbone.load import load_backbone

if TYPE_CHECKING:
    from deltaclip.base.device import Precision

MAX_RATIO = 1.2
PROMPTS = [f"a photo of {count} cats on a chair" for count in range(256)]  # fewer are a matter of milliseconds


def measure() -> list[Row]:
    """Return one row per tower and precision."""
    device = choose_device("auto")
    modes: list[Precision] = ["fp32", "bf16"] if device != "cpu" or cpu_has_bf16_units() else ["fp32"]
    if device != "cpu":
        modes.append("fp16")
    rows = []
    for precision in modes:
        rows += _measure_precision(device, precision)
    return rows


def _measure_precision(device: str, precision: Precision) -> list[Row]:
    frozen = load_backbone(vit_b_32(), device=device, precision=precision)
    free = load_backbone(vit_b_32(), device=device, precision=precision)
    frozen.model.requires_grad_(requires_grad=False)
    free.model.requires_grad_(requires_grad=True)
    rows = []
    for batch_size in (1, 64):
        pixels = torch.rand(batch_size, 3, 224, 224)
        ratio = paired_ratio(partial(encode_images, frozen, pixels), partial(encode_images, free, pixels))
        rows.append(_row(f"images, {precision}, batch {batch_size}", ratio))
    ratio = paired_ratio(partial(encode_texts, frozen, PROMPTS), partial(encode_texts, free, PROMPTS))
    return [*rows, _row(f"prompts, {precision}, batch {len(PROMPTS)}", ratio)]


def _row(mode: str, ratio: float) -> Row:
    name = f"encode time, frozen over unfrozen: {mode}"
    return Row(name=name, value=ratio, unit="x", goal=f"at most {MAX_RATIO}", met=ratio <= MAX_RATIO)
