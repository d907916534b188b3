"""Images per second of `extract` against a plain open_clip loop and against the forward pass alone.

ViT-B-32 on 512 px JPEG files made here. Spec section 9: at least 4 times the plain fp32 loop, and at least 80 % of the
same forward pass on images that lie in memory, where the processor has 16-bit units.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import Row, seconds
from benchmarks.models import vit_b_32
from deltaclip.features.backbone.encode_images import encode_images
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig

IMAGES, REPEATS = 256, 3


def measure() -> list[Row]:
    """Return rates and their ratios; the sides take turns."""
    import open_clip

    folder = Path(tempfile.mkdtemp(prefix="deltaclip-bench-"))
    files = _write_images(folder)
    source = vit_b_32()
    plain, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=str(source.weights))
    plain.eval()
    rates: dict[str, list[float]] = {"plain": [], "extract": [], "forward": []}
    for repeat in range(REPEATS):
        rates["plain"].append(len(files) / seconds(lambda: _plain_loop(plain, preprocess, files)))
        cache = folder / f"{repeat}.h5"
        config = ExtractConfig(
            data=str(folder / "manifest.csv"), backbone="ViT-B-32", pretrained=str(source.weights), out=cache
        )
        result = extract(config)
        rates["extract"].append(result.images_per_s or 0.0)
        backbone = load_backbone(source, device="cpu", precision=result.facts["precision"])
        pixels = torch.stack([preprocess(Image.open(file)) for file in files[:64]])
        encode_images(backbone, pixels)
        rates["forward"].append(
            4 * len(pixels) / seconds(lambda b=backbone, p=pixels: [encode_images(b, p) for _ in range(4)])
        )
    median = {name: statistics.median(values) for name, values in rates.items()}
    speedup = statistics.median(a / b for a, b in zip(rates["extract"], rates["plain"], strict=True))
    share = statistics.median(a / b for a, b in zip(rates["extract"], rates["forward"], strict=True))
    return [
        Row(name="ViT-B-32, plain open_clip loop, fp32", value=median["plain"], unit="images/s"),
        Row(name="ViT-B-32, extract, files to cache", value=median["extract"], unit="images/s"),
        Row(name="ViT-B-32, forward pass alone", value=median["forward"], unit="images/s"),
        Row(name="extract over plain loop", value=speedup, unit="x", goal="at least 4", met=speedup >= 4),
        Row(name="extract over forward pass alone", value=share, unit="x", goal="at least 0.8", met=share >= 0.8),
    ]


def _write_images(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    files = []
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        files.append(folder / f"{number}.jpg")
        coarse.resize((512, 512), Image.Resampling.BICUBIC).save(files[-1], quality=90)
    lines = ["image,prompt", *(f"{file.name},picture {file.stem}" for file in files)]
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return files


def _plain_loop(model: torch.nn.Module, preprocess: object, files: list[Path]) -> None:
    # As open_clip's own README encodes images, a batch of 64 at a time, loading in this thread.
    with torch.no_grad():
        for start in range(0, len(files), 64):
            images = torch.stack([preprocess(Image.open(file)) for file in files[start : start + 64]])
            model.encode_image(images, normalize=True)
