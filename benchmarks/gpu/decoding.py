"""What `--decode gpu` gives, by its own code: rate, what moves against `exact`, and whom it believes.

Its rate against all processors' (`machine.decode_rate`); levels of 255 and the cosine of embeddings by how chroma is
sampled, as `benchmarks.decode` tells of the other ways; and whether files that are cut short or damaged get the verdict
that `exact` gives them. Nothing else needs TorchCodec: without it a figure says so. In a dry run it decodes on the CPU,
with another decoder than a GPU's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.scene import Check
from benchmarks.machine import decode_rate
from benchmarks.models import drawn_jpegs
from deltaclip.features.backbone.decode_ahead import default_workers
from deltaclip.features.data.jpeg import PlainJpeg
from deltaclip.features.data.sources import UnreadableImage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.scene import Scene
    from deltaclip.features.backbone.device_decoding import DeviceDecoder

BATCH = 64
LEAST_COSINE = 0.999  # what `--decode fast` keeps
CUTS = (0.05, 0.3, 0.6, 0.9, 0.99, 0.9999)


def measure(scene: Scene) -> None:
    """Print the figures, or that there are none."""
    if importlib.util.find_spec("torchcodec") is None:
        scene.figure("decoding by TorchCodec", "not measured: it is not installed (pip install 'deltaclip[gpu]')")
        return
    from deltaclip.features.backbone.device_decoding import DeviceDecoder
    from deltaclip.features.backbone.load import load_backbone
    from deltaclip.features.backbone.weights import find_weights

    backbone = load_backbone(find_weights("tiny", None), device=scene.device, precision="fp32", decode="gpu")
    decoder, files = DeviceDecoder(backbone), drawn_jpegs(8 if scene.dry else BATCH)
    _rate(scene, decoder, files)
    _apart(scene, decoder, files)
    with Check(scene, "decoding: files cut short"):
        _cut_short(scene, decoder, files[:4])
    with Check(scene, "decoding: damaged files"):  # last: who knows what they do to a driver
        _damaged(scene, decoder, files[:4])


def _rate(scene: Scene, decoder: DeviceDecoder, files: Sequence[bytes]) -> None:
    what = f"decoding on {scene.device}"
    with ThreadPoolExecutor(default_workers()) as pool:
        seconds = scene.timed(lambda: decoder.pixels(list(pool.map(_plain(decoder), files))))
    rate = len(files) / seconds
    scene.figure(f"{what}: JPEG 512 looked at, decoded and resized, batches of {len(files)}", rate, "images/s")
    scene.figure(f"{what}: over all processors", rate / decode_rate(), "x")
    started = time.thread_time()
    for content in files:
        decoder.open(content)
    looked_s = (time.thread_time() - started) / len(files)
    scene.figure(f"{what}: the host's look at a file, one thread", looked_s * 1e6, "us")


def _plain(decoder: DeviceDecoder) -> Callable[[bytes], PlainJpeg]:
    def opened(content: bytes) -> PlainJpeg:
        found = decoder.open(content)
        assert isinstance(found, PlainJpeg), "a drawn JPEG is plain"
        return found

    return opened


def _apart(scene: Scene, decoder: DeviceDecoder, files: Sequence[bytes]) -> None:
    """Print levels and cosine by sampling of chroma: a decoder that repeats it instead of blending differs in 4:2:0."""
    from deltaclip.features.backbone.encode import encode_images
    from deltaclip.features.backbone.load import load_backbone
    from deltaclip.features.backbone.pixels import center_crops
    from deltaclip.features.backbone.view_vectors import file_opener
    from deltaclip.features.backbone.weights import find_weights

    backbone = load_backbone(find_weights("tiny", None), device=scene.device, precision="fp32")
    crops, open_file = center_crops(backbone), file_opener(backbone)
    for kind, options in {"4:2:0": 2, "4:2:2": 1, "4:4:4": 0, "grey": None}.items():
        some = [_saved(content, options) for content in files]
        found = decoder.pixels([_plain(decoder)(content) for content in some]).cpu()
        exact = torch.cat([crops(open_file(content)) for content in some])
        apart = (found.int() - exact.int()).abs()
        one, other = (encode_images(backbone, pixels).unit_BD for pixels in (exact, found))
        what = f"decoding {kind} on {scene.device}"
        scene.figure(f"{what}: levels apart from exact, most", int(apart.max()))
        scene.figure(f"{what}: levels apart from exact, mean", float(apart.float().mean()))
        scene.figure(f"{what}: more than 2 levels apart", float((apart > 2).float().mean()), "share")
        scene.figure(f"{what}: cosine with exact, least", float((one * other).sum(axis=1).min()), floor=LEAST_COSINE)
    scene.figure(f"decoding on {scene.device}: whole files that it did not decode", decoder.failed, most=0)


def _saved(content: bytes, sampling: int | None) -> bytes:
    file, image = io.BytesIO(), Image.open(io.BytesIO(content))
    if sampling is None:
        image.convert("L").save(file, "JPEG", quality=90)
    else:
        image.save(file, "JPEG", quality=90, subsampling=sampling)
    return file.getvalue()


def _cut_short(scene: Scene, decoder: DeviceDecoder, files: Sequence[bytes]) -> None:
    """Print how many files without their ends were taken; and, to be known, how many the decoder alone would take."""
    from deltaclip.features.backbone.device_decoding import decode_streams

    cut = [content[: int(share * len(content))] for content, share in itertools.product(files, CUTS)]
    what = f"{len(cut)} files cut short"
    taken = sum(_verdict(decoder, content) for content in cut)
    scene.figure(f"decoding on {scene.device}: of {what}, taken for whole", taken, most=0)
    alone = 0
    for content in cut:
        with contextlib.suppress(RuntimeError):
            decode_streams([content], scene.device)
            alone += 1
    scene.figure(f"decoding on {scene.device}: of {what}, taken by the decoder alone, which is given none", alone)


def _damaged(scene: Scene, decoder: DeviceDecoder, files: Sequence[bytes]) -> None:
    """Print how many files with changed bytes get another verdict than by `exact`, and how many the host decoded."""
    from deltaclip.features.data.images import open_image

    rng, differ, before = np.random.default_rng(0), 0, decoder.failed
    damaged = []
    for content in files * (2 if scene.dry else 16):
        changed = bytearray(content)
        for place in rng.integers(200, len(content) - 2, 4):
            changed[place] = int(rng.integers(256))
        damaged.append(bytes(changed))
    for content in damaged:
        try:
            open_image(content)
            is_taken = True
        except UnreadableImage:
            is_taken = False
        differ += _verdict(decoder, content) != is_taken
    what = f"decoding on {scene.device}: of {len(damaged)} damaged files"
    scene.figure(f"{what}, those with another verdict than by exact", differ, most=0)
    scene.figure(f"{what}, those that the host decoded instead", decoder.failed - before)


def _verdict(decoder: DeviceDecoder, content: bytes) -> bool:
    """Tell whether a file gives pixels."""
    try:
        picture = decoder.open(content)
    except UnreadableImage:
        return False
    if isinstance(picture, PlainJpeg):
        decoder.pixels([picture]).cpu()
    return True
