"""What other ways to decode cost and move: `python -m benchmarks.decode --set ../agiqa-3k [--backbone local-dir:DIR]`.

`gpu` here is that way's own code with TorchCodec's decoder for a CPU; `make bench-gpu ONLY=ceilings` has a GPU's.
Milliseconds of a processor an image; levels of 255 by which pixels differ; cosine with the embeddings of `exact`; and
by how much SROCC moves, of the zero-shot cosine with consistency and of a ridge regression with quality.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from deltaclip.features.backbone.device_decoding import DeviceDecoder
from deltaclip.features.backbone.encode import encode_images, encode_texts
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.pixels import center_crops
from deltaclip.features.backbone.view_vectors import file_opener
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.jpeg import PlainJpeg
from deltaclip.pipeline.scoring.agreement import srocc

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltaclip.features.backbone.load import Backbone

WAYS = ("exact", "fast", "draft", "gpu")
BATCH = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", default="../agiqa-3k", help="folder of AGIQA-3K")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--images", type=int, default=1000, help="evenly spread over the set")
    options = parser.parse_args()
    manifest = read_manifest(f"agiqa-3k:{options.set}", image_root=None, label_range=None, allow_outside=False)
    rows = np.linspace(0, len(manifest) - 1, min(options.images, len(manifest))).astype(int)
    files = [manifest.image_path(row).read_bytes() for row in rows]
    quality, consistency = (np.asarray(manifest.labels[name])[rows] for name in ("quality", "consistency"))
    source = find_weights(options.backbone, None)
    pixels, vectors, milliseconds = {}, {}, {}
    for way in WAYS:
        backbone = load_backbone(source, device="cpu", precision="fp32", decode=way)  # type: ignore[arg-type]
        pixels_of = _of_device(backbone) if way == "gpu" else _of_host(backbone)
        started = time.thread_time()
        pixels[way] = torch.cat([pixels_of(content) for content in files])
        milliseconds[way] = (time.thread_time() - started) / len(files) * 1e3
        parts = [encode_images(backbone, part).unit_BD for part in pixels[way].split(BATCH)]
        vectors[way] = np.concatenate(parts)
    prompts = [manifest.prompts[row] for row in rows]
    unique = list(dict.fromkeys(prompts))
    t_ND = encode_texts(backbone, unique).unit_BD[[unique.index(prompt) for prompt in prompts]]
    print(f"{options.backbone}, {len(rows):,} images of {options.set}, ridge trained on every second one\n")
    for way in WAYS:
        apart = (pixels[way].int() - pixels["exact"].int()).abs()
        cosine = (vectors[way] * vectors["exact"]).sum(axis=1)
        zero_shot, ridge = _figures(vectors[way], vectors["exact"], t_ND, (quality, consistency))
        print(
            f"{way:6} {milliseconds[way]:5.2f} ms, "
            f"levels apart at most {int(apart.max())}, mean {float(apart.float().mean()):.3f}; "
            f"cosine {cosine.min():.5f} to {cosine.max():.5f}, mean {cosine.mean():.6f}; "
            f"SROCC zero-shot consistency {zero_shot:.4f}, ridge quality {ridge:.4f}"
        )


def _of_host(backbone: Backbone) -> Callable[[bytes], torch.Tensor]:
    crops, open_file = center_crops(backbone), file_opener(backbone)
    return lambda content: crops(open_file(content))


def _of_device(backbone: Backbone) -> Callable[[bytes], torch.Tensor]:
    decoder, crops = DeviceDecoder(backbone), center_crops(backbone)

    def pixels_of(content: bytes) -> torch.Tensor:
        picture = decoder.open(content)
        return decoder.pixels([picture]) if isinstance(picture, PlainJpeg) else crops(picture)

    return pixels_of


def _figures(
    v_ND: np.ndarray, exact_ND: np.ndarray, t_ND: np.ndarray, labels: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float]:
    # The regression has learned from exact pixels: what moves is what it is given.
    from sklearn.linear_model import Ridge

    quality, consistency = labels
    train = np.arange(len(v_ND)) % 2 == 0
    ridge = Ridge(alpha=0.1).fit(exact_ND[train], quality[train])
    return srocc((v_ND * t_ND).sum(axis=1), consistency), srocc(ridge.predict(v_ND[~train]), quality[~train])


if __name__ == "__main__":
    main()
