"""Views of images as vectors: pixels of each view, and what the backbone makes of them.

A view takes its pixels from a source that several views may share, so an image is decoded and resized once. Knows a
loaded backbone and images. Must not know caches.

Shapes: B images, K crops, D width of the backbone, W width of a view.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.base.errors import MachineError
from deltaclip.base.progress import say
from deltaclip.base.transfers import fetched
from deltaclip.features.backbone.block_means import StageTower, chunks_of_shape
from deltaclip.features.backbone.decode_ahead import dealt, image_batches
from deltaclip.features.backbone.device_decoding import OPTION, DeviceDecoder, missing_decoder
from deltaclip.features.backbone.encode import (
    Embeddings,
    encode_images,
    require_usable,
    run_images,
    unit_and_norm,
)
from deltaclip.features.backbone.pixels import as_batch, center_crops, input_size, normalise
from deltaclip.features.data.decoding import on_host, open_decoded
from deltaclip.features.data.images import decode_plain
from deltaclip.features.data.jpeg import PlainJpeg
from deltaclip.features.data.views import (
    CENTER,
    OF_TOWER,
    RECIPES,
    STAGES,
    STATISTICS,
    cut_tiles,
    fit_whole,
    whole_short_side,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from deltaclip.features.backbone.decode_ahead import ImageBatch, ImageFile
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.data.decoding import Decode

    Crops = dict[str, "torch.Tensor | PlainJpeg"]  # of a picture, by source
    Opened = Image.Image | PlainJpeg | tuple[Image.Image | PlainJpeg, ...]  # the latter by backbone


# Whole images go through a processor's caches best one or two at a time: MobileNetV2 at 384 pixels on one core does
# 10 to 13 images/s in chunks of two, 3 to 5 in chunks of eight and more.
INPUTS_OF_CPU = 8


@dataclass(frozen=True, kw_only=True)
class View:
    """One view, ready to encode.

    `recipe` is its identity beside the backbone's; `device` is where it is encoded; `crops` maps an RGB image to pixels
    (K, 3, H, W), `source` names them, and views of one source share them; `open_file` makes such an image of a file's
    bytes, for all views of a backbone in the same way; `encode` makes (B, W) vectors and (B,) lengths of the crops of
    B images. `with_center`, where there is one, makes those of `center` too, bit for bit, in the same forward pass.
    Where there is a `decoder`, `open_file` leaves files undecoded that are for it, and it makes their crops.
    """

    name: str
    recipe: Mapping[str, Any]
    width: int
    device: str
    source: str
    open_file: Callable[..., Image.Image | PlainJpeg]
    crops: Callable[[Image.Image], torch.Tensor]
    encode: Callable[[Sequence[torch.Tensor]], Embeddings]
    with_center: Callable[[Sequence[torch.Tensor]], tuple[Embeddings, Embeddings]] | None = None
    decoder: DeviceDecoder | None = None


class ViewBatch(NamedTuple):
    """What a batch gave for one view: `entries` rising, their vectors (B, W) and lengths (B,)."""

    entries: list[int]
    vector_BW: Any
    norm_B: Any


@dataclass(frozen=True)
class EncodedBatch:
    """The vectors of `num_images` images by view; `failed` and `passing` as in `ImageBatch`.

    `busy_s` says how long `read` and `decode` took, summed over threads, and how long the `forward` passes.
    """

    num_images: int
    found: dict[str, ViewBatch]
    failed: list[tuple[int, str]]
    passing: frozenset[int]
    busy_s: dict[str, float]


def make_views(backbone: Backbone, names: Sequence[str], *, batch_size: int) -> list[View]:
    """Return the views of these names for a backbone; at most `batch_size` tiles go through it at a time.

    Raises:
        UnfitBackboneError: `stages` of a tower without recognisable blocks.
    """
    preprocessed, decoder = center_crops(backbone), _decoder(backbone)
    open_file = decoder.open if decoder else file_opener(backbone)

    def view(name: str) -> View:
        if name == STATISTICS:
            found = statistics_view(backbone.decode, device=backbone.device)
        elif name == STAGES:
            found = _stages_view(backbone, preprocessed, open_file, batch_size=batch_size)
        else:
            source, crops, encode = known[name]
            found = View(
                name=name,
                recipe=RECIPES[name],
                width=backbone.dim,
                device=backbone.device,
                source=source,
                open_file=open_file,
                crops=crops,
                encode=encode,
            )
        # What has pixels of its own takes them from an image of the host.
        return replace(found, open_file=open_file, decoder=decoder if found.source == CENTER else None)

    known: dict[str, tuple[str, Any, Any]] = {
        CENTER: (CENTER, preprocessed, functools.partial(_encode_center, backbone)),
        "flip": (CENTER, preprocessed, functools.partial(_encode_flip, backbone)),
        "tiles": ("tiles", _tile_crops(backbone), functools.partial(_encode_tiles, backbone, batch_size=batch_size)),
    }
    return [view(name) for name in names]


def encoded_batches(
    files: Sequence[ImageFile],
    views: Sequence[View],
    wanted: Mapping[str, NDArray[np.bool_]],
    *,
    root: Path | None,
    batch_size: int,
    workers: int,
    replicas: Sequence[Sequence[View]] = (),
) -> Generator[EncodedBatch]:
    """Encode images, `batch_size` at a time, in order; batches are decoded, encoded and consumed at the same time.

    Args:
        files: images, each wanted by at least one view.
        views: what to compute.
        wanted: by view, for which entries it is to be computed, (I,) bool.
        root: folder that the files may not leave; None permits every place.
        batch_size: images a batch.
        workers: decoding threads.
        replicas: the same views of further replicas of the backbone, which take turns with the first.
    """

    def prepare(file: ImageFile, picture: Image.Image | PlainJpeg) -> Crops:
        return crops_by_source([view for view in views if wanted[view.name][file.entry]], picture)

    batches = image_batches(
        files, prepare, root=root, batch_size=batch_size, workers=workers, open_file=views[0].open_file
    )
    # Two lanes a GPU, each with a stream: the pixels of one batch arrive while another is computed.
    turns = [views, *replicas] * (2 if views[0].device.startswith("cuda") else 1)
    lanes = [functools.partial(_encode_batch, own, wanted, _own_stream(own[0].device)) for own in turns]
    with contextlib.closing(batches), contextlib.closing(dealt(batches, lanes)) as encoded:
        yield from encoded


def opener_of(backbones: Sequence[Backbone], views_of: Sequence[Sequence[View]]) -> Callable[..., Opened]:
    """Return what opens files for several backbones, each with its views: once for all, or once for each.

    A picture that one takes at a fraction of its size (`draft`) is none for another.
    """
    sizes = {input_size(backbone) if backbone.decode == "draft" else () for backbone in backbones}
    openers = [views[0].open_file for views in views_of]
    if len(sizes) > 1:
        return lambda content, **limits: tuple(opened(content, **limits) for opened in openers)
    return next((views[0].open_file for views in views_of if views[0].decoder), openers[0])


def crops_by_source(views: Sequence[View], picture: Image.Image | PlainJpeg) -> Crops:
    """Return what views need of a picture, by their sources: pixels, or the picture itself where a decoder takes it."""
    crops: Crops = {}
    image = None if isinstance(picture, PlainJpeg) else picture
    for view in views:
        if view.source in crops:
            continue
        if view.decoder and isinstance(picture, PlainJpeg):
            crops[view.source] = picture
            continue
        if image is None:
            assert isinstance(picture, PlainJpeg)
            image = decode_plain(picture)
        crops[view.source] = view.crops(image)
    return crops


def _own_stream(device: str) -> torch.cuda.Stream | None:
    import torch

    return torch.cuda.Stream(device) if device.startswith("cuda") else None


def _encode_batch(
    views: Sequence[View],
    wanted: Mapping[str, NDArray[np.bool_]],
    stream: torch.cuda.Stream | None,
    batch: ImageBatch[Crops],
) -> EncodedBatch:
    import torch

    started = time.perf_counter()
    crops_of = dict(zip(batch.entries, batch.prepared, strict=True))
    wanted_by = {view.name: [entry for entry in batch.entries if wanted[view.name][entry]] for view in views}
    with torch.cuda.stream(stream):  # does nothing without one
        vectors = None
        with contextlib.suppress(torch.OutOfMemoryError):
            vectors = encode_views(views, crops_of, wanted_by)
        if vectors is None:  # here nothing of that pass is held any more
            raise _too_many(views, crops_of, wanted_by)
    found = {name: ViewBatch(wanted_by[name], *vectors[name]) for name in vectors}
    busy_s = batch.busy_s | {"forward": time.perf_counter() - started}
    return EncodedBatch(len(batch.entries), found, batch.failed, batch.passing, busy_s)


def _too_many(
    views: Sequence[View], crops_of: Mapping[int, Crops], wanted_by: Mapping[str, Sequence[int]]
) -> MachineError:
    """Find by trying how many images the memory of a GPU holds, with all that others have there now."""
    import torch

    size = len(crops_of)
    words = f"the memory of {views[0].device} does not hold the views of {size} images at a time"
    while size := size // 2:
        torch.cuda.empty_cache()
        some = set(list(crops_of)[:size])
        with contextlib.suppress(torch.OutOfMemoryError):
            encode_views(views, crops_of, {name: [e for e in each if e in some] for name, each in wanted_by.items()})
            return MachineError(words, place="--batch-size", remedy=f"give --batch-size {size}, which fits")
    return MachineError(words, place="--batch-size", remedy="not one fits: give --device cpu, or free the GPU")


def encode_views(
    views: Sequence[View],
    crops_of: Mapping[int, Crops],
    entries_of: Mapping[str, Sequence[int]],
) -> dict[str, Embeddings]:
    """Return the vectors of images by view; views of the same images and pixels go through in one forward pass.

    Args:
        views: what to compute.
        crops_of: by entry and source, the pixels, or what a view's decoder makes them of.
        entries_of: by view, the images of which it is wanted; one that is wanted of none is left out.
    """
    wanted = [view for view in views if entries_of[view.name]]
    on_device = _on_device(wanted, crops_of, entries_of)

    def crops(view: View) -> list[torch.Tensor]:
        pictures = {(entry, view.source): crops_of[entry][view.source] for entry in entries_of[view.name]}
        return [on_device[place] if isinstance(one, PlainJpeg) else one for place, one in pictures.items()]

    found: dict[str, Embeddings] = {}
    for view in wanted:
        if view.with_center and entries_of[view.name] == entries_of.get(CENTER):
            found[CENTER], found[view.name] = view.with_center(crops(view))
    for view in wanted:
        if view.name not in found:
            found[view.name] = view.encode(crops(view))
    return {view.name: found[view.name] for view in wanted}


def _on_device(
    views: Sequence[View], crops_of: Mapping[int, Crops], entries_of: Mapping[str, Sequence[int]]
) -> dict[tuple[int, str], torch.Tensor]:
    """Return the pixels of pictures that were left to decoders, (1, 3, h, w) by entry and source, decoded once."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for view in views:
        places = [(entry, view.source) for entry in entries_of[view.name] if (entry, view.source) not in found]
        left = {place: crop for place in places if isinstance(crop := crops_of[place[0]][place[1]], PlainJpeg)}
        if left:
            assert view.decoder is not None, "only what has one leaves pictures to it"
            found |= dict(zip(left, view.decoder.pixels(list(left.values())).split(1), strict=True))
    return found


def _decoder(backbone: Backbone) -> DeviceDecoder | None:
    """Return what decodes on the backbone's device, None where it is the host that decodes: said if it should not."""
    if backbone.decode != "gpu":
        return None
    if missing := missing_decoder(backbone.device):
        say(f"{OPTION}, as the cache was made: {missing}, so pictures are decoded as by --decode fast")
        return None
    return DeviceDecoder(backbone)


def file_opener(backbone: Backbone, *, max_pixels: int | None = None) -> Callable[[bytes], Image.Image]:
    """Return what makes an RGB image of a file's bytes on the host, in the way that the backbone decodes."""
    return functools.partial(
        open_decoded, decode=on_host(backbone.decode), short_side=max(input_size(backbone)), max_pixels=max_pixels
    )


def _stages_view(
    backbone: Backbone,
    preprocessed: Callable[[Image.Image], torch.Tensor],
    open_file: Callable[..., Image.Image | PlainJpeg],
    *,
    batch_size: int,
) -> View:
    import torch

    (height, width), resample = input_size(backbone), _resample(backbone)
    short_side = whole_short_side(min(height, width))
    # One pixel longer than a square: whatever wants multiples of a patch or window takes one size only.
    tower = StageTower(backbone, other_size=(short_side, short_side + 1))
    found: dict[str, Any] = {"blocks": tower.blocks, "widths": tower.widths}
    source, crops = CENTER, preprocessed
    if tower.takes_any_size:
        source, found = STAGES, found | {"short_side": short_side}

        def crops(image: Image.Image) -> torch.Tensor:
            return torch.from_numpy(fit_whole(image, short_side, resample=resample))

        if backbone.device == "cpu":
            batch_size = min(batch_size, INPUTS_OF_CPU)

    return View(
        name=STAGES,
        recipe=RECIPES[STAGES] | {OF_TOWER: found},
        width=sum(tower.widths),
        device=backbone.device,
        source=source,
        open_file=open_file,
        crops=crops,
        # As many pixels at a time as a batch of `center` has at most, and so no more than about its memory.
        encode=functools.partial(_encode_stages, backbone, tower, most_pixels=batch_size * height * width),
        with_center=None if tower.takes_any_size else functools.partial(_encode_both, backbone, tower),
    )


def _encode_stages(
    backbone: Backbone, tower: StageTower, crops: Sequence[torch.Tensor], *, most_pixels: int
) -> Embeddings:
    """Return the means over each image of what the blocks give, and the lengths of these vectors."""
    chunks = chunks_of_shape([tuple(crop.shape) for crop in crops], most_pixels)
    batches = (as_batch(backbone, [crops[place] for place in places]) for places in chunks)
    found = [run_images(backbone, lambda part: tower(normalise(backbone, part)), pixels) for pixels in batches]
    mean_BW = np.empty((len(crops), sum(tower.widths)), dtype=np.float32)
    for places, mean_KW in zip(chunks, fetched(*found), strict=True):
        mean_BW[places] = mean_KW
    return _as_they_are(mean_BW, backbone)


def _encode_both(backbone: Backbone, tower: StageTower, crops: Sequence[torch.Tensor]) -> tuple[Embeddings, Embeddings]:
    """Return the embeddings of images of the model's input size, and what `_encode_stages` gives of them."""
    pixels = as_batch(backbone, crops)
    both = run_images(backbone, lambda part: tower.with_features(normalise(backbone, part)), pixels)
    features_BD, mean_BW = both.split([both.shape[1] - sum(tower.widths), sum(tower.widths)], dim=1)
    unit_BD, norm_B, found_BW = fetched(*unit_and_norm(features_BD), mean_BW)
    return require_usable(Embeddings(unit_BD, norm_B), backbone), _as_they_are(found_BW, backbone)


def _as_they_are(vector_BW: NDArray[np.float32], backbone: Backbone) -> Embeddings:
    return require_usable(Embeddings(vector_BW, np.linalg.norm(vector_BW, axis=1)), backbone)


def statistics_view(decode: Decode, *, device: str = "cpu") -> View:
    """Return the view that no model has a part in: it is whole once the decoding threads are done.

    Args:
        decode: how files are opened; not `draft`, which leaves out pixels.
        device: that of the other views it is computed beside.
    """
    import torch

    from deltaclip.features.data.statistics import NAMES, statistics_of

    def encode(crops: Sequence[torch.Tensor]) -> Embeddings:
        found_BS = torch.cat(list(crops)).numpy()
        return Embeddings(found_BS, np.linalg.norm(found_BS, axis=1))

    return View(
        name=STATISTICS,
        recipe=RECIPES[STATISTICS],
        width=len(NAMES),
        device=device,
        source=STATISTICS,
        open_file=functools.partial(open_decoded, decode=decode, short_side=0),
        crops=lambda image: torch.from_numpy(statistics_of(image)[None]),
        encode=encode,
    )


def _resample(backbone: Backbone) -> Image.Resampling:
    # As open_clip does: bilinear where the model says so, else bicubic.
    from PIL import Image

    bilinear = backbone.facts["preprocessing"]["interpolation"] == "bilinear"
    return Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC


def _tile_crops(backbone: Backbone) -> Callable[[Image.Image], torch.Tensor]:
    import torch

    (height, width), resample = input_size(backbone), _resample(backbone)
    # 8 bits until the forward pass: nine float tiles of 64 images would be 350 MB a batch.
    return lambda image: torch.from_numpy(cut_tiles(image, height, width, resample=resample))


def _encode_center(backbone: Backbone, crops: Sequence[torch.Tensor]) -> Embeddings:
    return encode_images(backbone, as_batch(backbone, crops))


def _encode_flip(backbone: Backbone, crops: Sequence[torch.Tensor]) -> Embeddings:
    return encode_images(backbone, normalise(backbone, as_batch(backbone, crops)).flip(-1))


def _encode_tiles(backbone: Backbone, crops: Sequence[torch.Tensor], *, batch_size: int) -> Embeddings:
    """Return the mean of each image's unit vectors, as it is: its length tells how much the tiles agree.

    The length given beside it is the mean of the tiles' lengths before they were normalised.
    """
    pixels_K3HW = as_batch(backbone, crops)
    parts = [
        encode_images(backbone, pixels_K3HW[start : start + batch_size])
        for start in range(0, len(pixels_K3HW), batch_size)
    ]
    unit_KD, norm_K = (np.concatenate([part[field] for part in parts]) for field in (0, 1))
    ends = list(itertools.accumulate(len(tiles) for tiles in crops))
    spans = list(zip([0, *ends], ends, strict=False))
    mean_BD = np.stack([unit_KD[start:end].mean(axis=0) for start, end in spans])
    return Embeddings(mean_BD, np.array([norm_K[start:end].mean() for start, end in spans], dtype=np.float32))
