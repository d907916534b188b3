"""Images per second of `extract` against a plain open_clip loop and against the forward pass alone.

ViT-B-32 on 512 px JPEG files made here. Wanted: at least 4 times the plain fp32 loop, and at least 80 % of the
same forward pass on images that lie in memory, where the processor has 16-bit units.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from benchmarks.machine import decode_rate, share_of_products
from benchmarks.measuring import Row, at_least, not_measured, seconds
from benchmarks.models import drawn_jpegs, vit_b_32
from deltaclip.base.device import choose_device, choose_precision
from deltaclip.features.backbone.encode import encode_images
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.pixels import center_crops
from deltaclip.features.extract import extract
from deltaclip.features.extraction.pace import share_words
from deltaclip.features.settings import ExtractConfig

IMAGES, PLAIN_IMAGES, REPEATS = 512, 128, 3  # a loop takes as long for every image
BATCH = 64


def measure() -> list[Row]:
    """Return rates and their ratios; the sides take turns."""
    import open_clip

    device = choose_device("auto")
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as name:
        folder = Path(name)
        files = _write_images(folder)
        source = vit_b_32()
        plain, _, preprocess = open_clip.create_model_and_transforms(
            "ViT-B-32", pretrained=str(source.weights), device=device
        )
        plain.eval()
        rates: dict[str, list[float]] = {"plain": [], "exact": [], "fast": [], "forward": []}
        shares: dict[str, float] = {}
        for repeat in range(REPEATS):
            rates["plain"].append(
                PLAIN_IMAGES / seconds(lambda: _plain_loop(plain, preprocess, files[:PLAIN_IMAGES], device))
            )
            for decode in ("exact", "fast"):
                config = ExtractConfig(
                    data=str(folder / "manifest.csv"),
                    backbone="ViT-B-32",
                    pretrained=str(source.weights),
                    out=folder / f"{decode}{repeat}.h5",
                    decode=decode,  # type: ignore[arg-type], views="center",
                )
                result = extract(config)
                rates[decode].append(result.images_per_s or 0.0)
                shares = result.stages if decode == "exact" else shares
            backbone = load_backbone(source, device=device, precision=result.facts["precision"])
            crop = center_crops(
                backbone
            )  # 8 bits, as they go to the device: floats would take four times as long to copy
            pixels = torch.cat([crop(Image.open(file).convert("RGB")) for file in files[:BATCH]])
            encode_images(backbone, pixels)
            forward = seconds(lambda b=backbone, p=pixels: [encode_images(b, p) for _ in range(IMAGES // BATCH)])
            rates["forward"].append(IMAGES / forward)
    return _rows(rates, shares, precision=result.facts["precision"], device=device)


def _rows(rates: dict[str, list[float]], shares: dict[str, float], *, precision: str, device: str) -> list[Row]:
    middle = {name: median(values) for name, values in rates.items()}

    def ratio(name: str, over: str) -> float:
        return median(a / b for a, b in zip(rates[name], rates[over], strict=True))

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    unit, words = "images/s", {"plain": "plain open_clip loop, fp32", "forward": f"forward pass alone, {precision}"}
    words |= {"exact": "extract, files to cache", "fast": "extract --decode fast"}
    rows = [
        Row(
            name=f"ViT-B-32, {words[name]}",
            value=rate,
            unit=unit,
            ceiling_share=share_of_products(rate, torch.float32 if name == "plain" else dtype),
            note=share_words(shares) if name == "exact" else "",
        )
        for name, rate in middle.items()
    ]
    # What is possible where decoding and the model share the processors: both costs, one after the other.
    both = 1 / (1 / middle["forward"] + 1 / decode_rate()) if device == "cpu" else middle["forward"]
    rows.append(Row(name="ViT-B-32, forward and decoding one after the other", value=both, unit=unit))
    name, goal = "extract over forward pass alone", 0.8
    if choose_precision("auto", device) == "fp32":
        rows.append(not_measured(name, f"at least {goal}", "no 16-bit units in this processor"))
    else:
        rows.append(
            at_least(goal, name=name, value=ratio("exact", "forward"), unit="x", ceiling_share=middle["exact"] / both)
        )
    rows.append(at_least(4, name="extract over plain fp32 loop", value=ratio("exact", "plain"), unit="x"))
    return rows


def _write_images(folder: Path) -> list[Path]:
    files = [folder / f"{number}.jpg" for number in range(IMAGES)]
    for file, content in zip(files, drawn_jpegs(IMAGES), strict=True):
        file.write_bytes(content)
    lines = ["image,prompt", *(f"{file.name},picture {file.stem}" for file in files)]
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return files


def _plain_loop(model: torch.nn.Module, preprocess: object, files: list[Path], device: str) -> None:
    # As open_clip's own README encodes images, a batch of 64 at a time, loading in this thread.
    with torch.no_grad():
        for start in range(0, len(files), BATCH):
            images = torch.stack([preprocess(Image.open(file)) for file in files[start : start + BATCH]])
            model.encode_image(images.to(device), normalize=True).cpu()
