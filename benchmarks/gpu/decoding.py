"""What decoding on a GPU would give: TorchCodec (nvJPEG there), then torchvision's resizing there, in batches.

Its rate against all processors' (`machine.decode_rate`); what moves against `--decode exact`, as `benchmarks.decode`
tells of the other ways: levels of 255 and the cosine of embeddings; and whether it refuses files that were cut short,
as Pillow does, since an extraction could not tell them from whole ones. Nothing else needs TorchCodec: without it
a figure says so. In a dry run it decodes on the CPU, with another decoder than a GPU's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from typing import TYPE_CHECKING

import torch

from benchmarks.machine import decode_rate
from benchmarks.models import drawn_jpegs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.scene import Scene

BATCH = 64
LEAST_COSINE = 0.999  # what `--decode fast` keeps


def measure(scene: Scene) -> None:
    """Print the figures, or that there are none."""
    if importlib.util.find_spec("torchcodec") is None:
        scene.figure("decoding by TorchCodec", "not measured: it is not installed (pip install torchcodec)")
        return
    from deltaclip.features.backbone.encode import encode_images
    from deltaclip.features.backbone.load import load_backbone
    from deltaclip.features.backbone.pixels import center_crops
    from deltaclip.features.backbone.view_vectors import file_opener
    from deltaclip.features.backbone.weights import find_weights

    what, files = f"decoding by TorchCodec on {scene.device}", drawn_jpegs(8 if scene.dry else BATCH)
    seconds = scene.timed(lambda: decoded(files, side=224, device=scene.device))
    rate = len(files) / seconds
    scene.figure(f"{what}: JPEG 512 decoded and resized, batches of {len(files)}", rate, "images/s")
    scene.figure(f"{what}: over all processors", rate / decode_rate(), "x")

    backbone = load_backbone(find_weights("tiny", None), device=scene.device, precision="fp32")
    crops, open_file = center_crops(backbone), file_opener(backbone)
    exact = torch.cat([crops(open_file(content)) for content in files])
    found = decoded(files, side=exact.shape[-1], device=scene.device).cpu()
    apart = (found.int() - exact.int()).abs()
    scene.figure(f"{what}: levels apart from exact, most", int(apart.max()))
    scene.figure(f"{what}: levels apart from exact, mean", float(apart.float().mean()))
    one, other = (encode_images(backbone, pixels).unit_BD for pixels in (exact, found))
    scene.figure(f"{what}: cosine with exact, least", float((one * other).sum(axis=1).min()), floor=LEAST_COSINE)
    scene.figure(f"{what}: files cut short that were taken for whole", _taken_short(files, scene.device), most=0)


def _taken_short(files: Sequence[bytes], device: str) -> int:
    count = 0
    for content, share in itertools.product(files[:4], (0.3, 0.6, 0.9, 0.99)):
        with contextlib.suppress(RuntimeError):  # what it raises of a file that it cannot decode
            decoded([content[: int(share * len(content))]], side=32, device=device)
            count += 1
    return count


def decoded(files: Sequence[bytes], *, side: int, device: str) -> torch.Tensor:
    """Return square JPEG files as pixels on a device, uint8 (B, 3, side, side), resized in 8 bits as by `fast`."""
    from torchcodec.decoders import decode_jpeg
    from torchvision.transforms.v2 import InterpolationMode, functional

    images = decode_jpeg(list(files), mode="RGB", device=device)
    bicubic = InterpolationMode.BICUBIC
    return torch.stack(
        [functional.resize(each, [side, side], interpolation=bicubic, antialias=True) for each in images]
    )
