"""Prompts per second against a plain open_clip loop over the same prompts, all 77 places. Wanted: 5 times.

Both in the precision that `auto` takes, and ours against the loop in fp32, as open_clip's README has it.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks.measuring import Row, at_least, seconds
from benchmarks.models import drawn_prompts, vit_b_32
from deltaclip.base.device import choose_device, choose_precision
from deltaclip.features.backbone.encode import text_batches
from deltaclip.features.backbone.load import Backbone, load_backbone

PROMPTS, REPEATS, BATCH = 256, 3, 64


def measure() -> list[Row]:
    """Return rates and their ratios; the sides take turns."""
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    prompts = drawn_prompts(PROMPTS)
    exact = load_backbone(vit_b_32(), device=device, precision="fp32")
    close = exact if precision == "fp32" else load_backbone(vit_b_32(), device=device, precision=precision)
    works = {"ours": partial(_ours, close, prompts), "plain": partial(_plain_loop, exact, prompts)}
    works["plain, same precision"] = partial(_plain_loop, close, prompts)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            rates[name].append(PROMPTS / seconds(work))

    def over(name: str) -> float:
        return median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))

    apart = np.abs(_ours(exact, prompts) - _plain_loop(exact, prompts)).max()
    return [
        Row(name=f"prompts, ViT-B-32, {precision}, distinct", value=median(rates["ours"]), unit="prompts/s"),
        Row(name="prompts, plain loop at 77 tokens, fp32", value=median(rates["plain"]), unit="prompts/s"),
        at_least(5, name="prompts over the plain loop", value=over("plain"), unit="x"),
        Row(name=f"prompts over the plain loop, both {precision}", value=over("plain, same precision"), unit="x"),
        Row(
            name="prompts, largest difference from all 77 places, fp32",
            value=float(apart),
            unit="",
            goal="at most 1e-6",
            met=bool(apart <= 1e-6),
        ),
    ]


def _ours(backbone: Backbone, prompts: list[str]) -> np.ndarray:
    found = np.empty((len(prompts), backbone.dim), dtype=np.float32)
    for batch in text_batches(backbone, prompts, range(len(prompts))):
        found[batch.entries] = batch.found.unit_BD
    return found


def _plain_loop(backbone: Backbone, prompts: list[str]) -> np.ndarray:
    found = []
    with torch.no_grad():
        for start in range(0, len(prompts), BATCH):
            tokens = backbone.tokenizer(prompts[start : start + BATCH]).to(backbone.device)
            found.append(backbone.model.encode_text(tokens, normalize=True).float().cpu())
    return torch.cat(found).numpy()
