"""What 16 bits cost: cosine with fp32 embeddings, and how far SROCC moves. Wanted: 0.999 on every image, 0.002.

The cosine of ViT-B-32 (random weights: only the number format counts) and of `tiny`; SROCC of `tiny` on the demo set:
of the zero-shot cosine with consistency, and of a ridge regression on the image embeddings with quality.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import Row, at_least, at_most, not_measured
from benchmarks.models import drawn_jpegs, vit_b_32
from deltaclip.base.device import Precision, choose_device, choose_precision
from deltaclip.features.backbone.encode import encode_images
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.scoring.agreement import srocc

IMAGES = 64


def measure() -> list[Row]:
    """Return the rows of the 16-bit format that this machine has units for."""
    device = choose_device("auto")
    half = choose_precision("auto", device)
    if half == "fp32":
        note = "no 16-bit units in this processor"
        return [not_measured("16 bits against fp32: smallest cosine", "at least 0.999", note)]
    return [_cosine_of_vit(device, half), *_of_tiny(half)]


def _cosine_of_vit(device: str, half: Precision) -> Row:
    exact, close = (load_backbone(vit_b_32(), device=device, precision=name) for name in ("fp32", half))
    images = [Image.open(io.BytesIO(content)) for content in drawn_jpegs(IMAGES)]
    pixels = torch.stack([exact.preprocess(image) for image in images])
    cosines = (encode_images(exact, pixels).unit_BD * encode_images(close, pixels).unit_BD).sum(axis=1)
    name = f"{half} against fp32, ViT-B-32: smallest cosine of {IMAGES} images"
    return at_least(0.999, name=name, value=float(cosines.min()), unit="")


def _of_tiny(half: Precision) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as folder:
        caches = {
            name: extract(
                ExtractConfig(data="demo", out=Path(folder) / f"{name}.h5", precision=name, views="center")
            ).cache
            for name in ("fp32", half)
        }
        stores = {}
        for name, cache in caches.items():
            with FeatureStore.open(cache) as store:
                stores[name] = store.embeddings("images").astype(np.float32)
        figures = {name: _figures(cache) for name, cache in caches.items()}
    cosine = float((stores["fp32"] * stores[half]).sum(axis=1).min())
    count = len(stores["fp32"])
    rows = [
        at_least(0.999, name=f"{half} against fp32, tiny: smallest cosine of {count} images", value=cosine, unit="")
    ]
    for what, before, after in zip(
        ("zero-shot consistency", "ridge quality"), figures["fp32"], figures[half], strict=True
    ):
        name = f"{half} against fp32, tiny, demo: SROCC of {what} moves by"
        rows.append(at_most(0.002, name=name, value=abs(before - after), unit="", note=f"{before:.4f}"))
    return rows


def _figures(cache: Path) -> tuple[float, float]:
    from sklearn.linear_model import Ridge

    rows = load_rows(cache, torch.device("cpu"))
    assert rows.v_ID is not None
    v_ND = rows.v_ID.numpy()[rows.rows.image].astype(np.float32)
    quality, consistency = rows.label("quality"), rows.label("consistency")
    half = np.arange(len(v_ND)) % 2 == 0
    ridge = Ridge(alpha=1.0).fit(v_ND[half], quality[half])
    return srocc(rows.cosine(), consistency), srocc(ridge.predict(v_ND[~half]), quality[~half])
