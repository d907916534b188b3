"""Cut towers against open_clip's own code with free weights, in every mode that fine-tuning uses.

Freezing must cost nothing, and a step from the boundary must cost the share of the whole step
that its blocks have of all blocks. A step of low-rank additions must not cost more than one that trains the weights.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.frozen import MAX_RATIO, PROMPTS
from benchmarks.measuring import Row, paired_ratio
from benchmarks.models import vit_b_32
from deltaclip.base.device import choose_device, cpu_has_bf16_units
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.low_rank import LowRank
from deltaclip.features.backbone.towers import cut_towers

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.towers import CutTower

FROZEN = 9  # of 12
MAX_STEP = 1.25
LORA = LowRank(rank=8, alpha=8.0)
BATCHES = (1, 32)


def measure() -> list[Row]:
    """Return the rows of ViT-B-32 in fp32 and, where there are units for it, under bf16 autocast."""
    device = choose_device("auto")
    with_bf16 = device != "cpu" or cpu_has_bf16_units()
    rows = []
    for bf16 in (False, True) if with_bf16 else (False,):
        rows += _measure_mode(device, bf16=bf16)
    return rows


def _measure_mode(device: str, *, bf16: bool) -> list[Row]:
    cut, free = (load_backbone(vit_b_32(), device=device, precision="fp32") for _ in range(2))
    image, text = cut_towers(cut, freeze_layers=FROZEN, freeze_text_layers=FROZEN)
    name = "bf16 autocast" if bf16 else "fp32"
    mode = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=bf16)
    rows = []
    for batch_size in BATCHES:
        pixels = torch.rand(batch_size, 3, 224, 224, device=device)
        ids = free.tokenizer(PROMPTS[:batch_size]).to(device)
        work = {
            "frozen and trainable part, images": (_through(image, pixels), partial(_encode_image, free, pixels)),
            "frozen and trainable part, prompts": (_through(text, ids, ids), partial(_encode_text, free, ids)),
        }
        for what, (ours, plain) in work.items():
            ratio = paired_ratio(_in(mode, _ungraded(ours)), _in(mode, _ungraded(plain)))
            rows.append(_row(f"{what}, {name}, batch {batch_size}", ratio))
        at = image.to_boundary(pixels)
        ratio = paired_ratio(_in(mode, _step(partial(image.from_boundary, at))), _in(mode, _step(_rest(free, at))))
        rows.append(_row(f"step of the trainable part, images, {name}, batch {batch_size}", ratio))
    whole = _step(partial(_encode_image, free, pixels))
    share = 1 - FROZEN / image.depth
    ratio = paired_ratio(_in(mode, _step(partial(image.from_boundary, at))), _in(mode, whole)) / share
    title = f"step from the boundary over its share of the whole step: {name}, batch {batch_size}"
    rows.append(Row(name=title, value=ratio, unit="x", goal=f"at most {MAX_STEP}", met=ratio <= MAX_STEP))
    return [*rows, *_low_rank(image, at, mode, title=f"{name}, batch {batch_size}")]


def _low_rank(
    image: CutTower, at: torch.Tensor, mode: Callable[[], contextlib.AbstractContextManager[object]], *, title: str
) -> list[Row]:
    """Return steps of AdamW over low-rank additions, over those over the weights of the same blocks, images."""
    backbone = load_backbone(vit_b_32(), device=str(at.device), precision="fp32")
    added, _ = cut_towers(backbone, freeze_layers=FROZEN, freeze_text_layers=FROZEN, low_rank=LORA)
    added.draw_additions(0)
    steps = [_in(mode, _tuned_step(tower, at)) for tower in (added, image)]
    ratio = paired_ratio(*steps)
    name = f"step of additions of rank {LORA.rank} over a step of the weights, images: {title}"
    return [Row(name=name, value=ratio, unit="x", goal="at most 1", met=ratio <= 1)]


def _tuned_step(tower: CutTower, at: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(tower.named_trainable().values(), lr=1e-6, fused=True)

    def step() -> None:
        tower.from_boundary(at).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _through(tower: CutTower, inputs: torch.Tensor, ids: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
    return lambda: tower.from_boundary(tower.to_boundary(inputs), ids)


def _encode_image(backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
    return backbone.model.encode_image(pixels)  # type: ignore[operator]


def _encode_text(backbone: Backbone, ids: torch.Tensor) -> torch.Tensor:
    return backbone.model.encode_text(ids)  # type: ignore[operator]


def _rest(backbone: Backbone, at_BSC: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return open_clip's own last blocks of the image tower, with free weights."""
    tower = backbone.model.visual

    def run() -> torch.Tensor:
        x = at_BSC
        for block in tower.transformer.resblocks[FROZEN:]:
            x = block(x)
        return tower.ln_post(x)[:, 0] @ tower.proj

    return run


def _step(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    return lambda: forward().square().sum().backward()


def _ungraded(work: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(work)


def _in(
    mode: Callable[[], contextlib.AbstractContextManager[object]], work: Callable[[], object]
) -> Callable[[], None]:
    def run() -> None:
        with mode():
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _row(mode: str, ratio: float) -> Row:
    name = f"cut and frozen over open_clip's own, free: {mode}"
    return Row(name=name, value=ratio, unit="x", goal=f"at most {MAX_RATIO}", met=ratio <= MAX_RATIO)


if __name__ == "__main__":
    for row in measure():
        print(f"{row.name:100}{row.value:>8.3f} {row.goal}")
