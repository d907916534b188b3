"""What goes into the trainable part of a tower, entry by entry: cached activations, or pixels and tokens themselves.

Entries are those of the feature cache: numbers of its distinct images and of its distinct texts. `epoch` draws a view
of each image; None is what validation and test see, the view `center`. Knows caches, boundary files, image files and
towers. Must not know heads or training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.base.files import require_space
from deltaclip.base.progress import say
from deltaclip.base.transfers import Sender, overlaps
from deltaclip.features.backbone.decode_ahead import ImageFile, image_batches
from deltaclip.features.backbone.pixels import input_size, normalise, pixels_ahead
from deltaclip.features.backbone.view_vectors import file_opener
from deltaclip.features.data.views import CENTER, FLIP, crop_box, view_pixels
from deltaclip.features.extraction.activation_job import (
    BoundaryFill,
    Images,
    boundary_identity,
    fill_boundary,
    fill_text_boundary,
    text_keys,
)
from deltaclip.features.store.activation_file import BoundaryReader, boundary_bytes, boundary_path
from deltaclip.features.store.shards import open_cache
from deltaclip.pipeline.training.tower_model import TowerSide

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.towers import CutTower
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.runs.run_backbone import ImageFiles
    from deltaclip.pipeline.training.processes import Processes


# ---- What goes into the trainable part of a tower, entry by entry


Augment = Literal["none", "views", "crops"]


class TowerInputs(Protocol):
    """Where a tower's inputs come from; `at_boundary` where the frozen part has been run already."""

    @property
    def at_boundary(self) -> bool:
        """Whether `read` gives activations at the cut."""

    def read(self, entries: NDArray[np.int64], epoch: int | None) -> Tensor:
        """Return of these entries what is to be brought to the device, (E, ...)."""

    def look_up(self, read: Tensor) -> Tensor:
        """Return the inputs themselves, (E, ...), once what `read` gave is on the device."""


class ActivationReader(Protocol):
    """What reads a boundary file."""

    def read(self, entries: NDArray[np.int64]) -> Tensor:
        """Return the activations of these entries as stored."""


@dataclass(frozen=True, kw_only=True)
class BoundaryInputs:
    """Cached activations at the cut, in one file for each view; row r of a file is entry `entries[r]`, rising."""

    readers: Mapping[str, ActivationReader]
    entries: NDArray[np.int64]
    seed: int = 0
    at_boundary: bool = True

    def read(self, entries: NDArray[np.int64], epoch: int | None) -> Tensor:
        """Return activations (E, ...) as stored."""
        views, rows = list(self.readers), np.searchsorted(self.entries, entries)
        if epoch is None or len(views) == 1:
            return self.readers[views[0]].read(rows)
        view_E = drawn_views(entries, len(views), seed=self.seed, epoch=epoch)
        parts, places = [], []
        for number in np.unique(view_E):
            chosen = np.flatnonzero(view_E == number)
            parts.append(self.readers[views[number]].read(rows[chosen]))
            places.append(chosen)
        back = np.argsort(np.concatenate(places), kind="stable")
        return torch.cat(parts)[torch.from_numpy(back)]

    def look_up(self, read: Tensor) -> Tensor:
        """Return what was read: it is all there."""
        return read


@dataclass(frozen=True, kw_only=True)
class ResidentInputs:
    """Cached activations at the cut, all on the device; those of view n begin at row n * len(entries)."""

    x: Tensor
    entries: NDArray[np.int64]
    num_views: int
    seed: int = 0
    at_boundary: bool = True

    def read(self, entries: NDArray[np.int64], epoch: int | None) -> Tensor:
        """Return the rows of `x`, (E,) int64."""
        rows = np.searchsorted(self.entries, entries)
        if epoch is not None and self.num_views > 1:
            rows = rows + len(self.entries) * drawn_views(entries, self.num_views, seed=self.seed, epoch=epoch)
        return torch.from_numpy(rows)

    def look_up(self, read: Tensor) -> Tensor:
        """Return activations (E, ...) as stored."""
        return self.x.index_select(0, read)


# Of what is free on a device with the model on it: the rest is for gradients, moments and what the blocks keep.
RESIDENT_SHARE = 0.4
LOADED_BYTES = 64 << 20  # at a time


def resident(inputs: BoundaryInputs, device: torch.device) -> BoundaryInputs | ResidentInputs:
    """Bring cached activations to a GPU where they fit, for good; else leave them in their files."""
    readers = [reader for reader in inputs.readers.values() if isinstance(reader, BoundaryReader)]
    size_bytes = sum(reader.size_bytes for reader in readers)
    if not overlaps(device) or size_bytes > RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        return inputs
    say(f"boundary      {size_bytes / 1e6:,.1f} MB of it stay on {device}")
    num_rows, sender = len(inputs.entries), Sender(device)
    at_once = max(1, LOADED_BYTES * len(readers) * num_rows // size_bytes)
    x: Tensor | None = None
    for number, reader in enumerate(readers):
        for start in range(0, num_rows, at_once):
            rows = np.arange(start, min(start + at_once, num_rows))
            (read,) = sender.send([reader.read(rows)]).here()
            if x is None:
                x = torch.empty((len(readers) * num_rows, *read.shape[1:]), dtype=read.dtype, device=device)
            x[number * num_rows + start :][: len(rows)].copy_(read)
    assert x is not None, "a boundary file of nothing"
    return ResidentInputs(x=x, entries=inputs.entries, num_views=len(readers), seed=inputs.seed)


@dataclass(frozen=True, kw_only=True)
class PixelInputs:
    """Images decoded from their files whenever they are asked for: no cache, any augmentation."""

    files: Mapping[int, ImageFile]
    open_file: Callable[[bytes], Any]
    preprocess: Callable[[Any], Tensor]
    normalise: Callable[[Tensor], Tensor]
    input_size: tuple[int, int]
    augment: Augment
    views: Sequence[str]
    root: Path | None
    workers: int
    seed: int = 0
    at_boundary: bool = False

    def read(self, entries: NDArray[np.int64], epoch: int | None) -> Tensor:
        """Return pixels (E, 3, H, W), float32 or what a device is to normalise.

        Raises:
            UserError: an image cannot be read, or is another than when it was extracted.
        """
        files = [self.files[entry] for entry in entries.tolist()]
        view_of = dict.fromkeys(entries.tolist(), CENTER)
        if epoch is not None and self.augment == "views":
            drawn = drawn_views(entries, len(self.views), seed=self.seed, epoch=epoch)
            view_of = {entry: self.views[view] for entry, view in zip(entries.tolist(), drawn.tolist(), strict=True)}

        def prepare(file: ImageFile, image: Image.Image) -> Tensor:
            if epoch is not None and self.augment == "crops":
                return self._crop(image, np.random.default_rng((self.seed, epoch, file.entry)))
            assert file.sha256 is not None
            size = self.input_size
            return view_pixels(view_of[file.entry], image, file.sha256, preprocess=self.preprocess, input_size=size)

        (batch,) = image_batches(
            files, prepare, root=self.root, batch_size=len(files), workers=self.workers, open_file=self.open_file
        )
        if batch.failed:
            entry, reason = batch.failed[0]
            raise UserError(
                f"cannot be read ({reason})",
                place=self.files[entry].path,
                remedy="give the images as they were extracted, or extract again",
            )
        return torch.stack(batch.prepared)

    def look_up(self, read: Tensor) -> Tensor:
        """Return normalised pixels, float32."""
        return self.normalise(read)

    def _crop(self, image: Image.Image, random: np.random.Generator) -> Tensor:
        """Return the pixels of a box as those of the fixed crops, at a place of its own, mirrored half of the time."""
        pixels = self.preprocess(
            image.crop(crop_box(image.size, random.bytes(32), input_size=self.input_size, number=1))
        )
        return pixels.flip(-1) if random.random() < 0.5 else pixels


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Prompts as token ids: for a text tower whose frozen part is run again and again."""

    tokens_TL: Tensor
    at_boundary: bool = False

    def read(self, entries: NDArray[np.int64], epoch: int | None) -> Tensor:
        """Return token ids (E, L) int64."""
        return self.tokens_TL[torch.from_numpy(entries)].long()

    def look_up(self, read: Tensor) -> Tensor:
        """Return what was read: it is all there."""
        return read


def drawn_views(entries: NDArray[np.int64], num_views: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return which view each entry has in an epoch: a hash, so that it is the same whichever rows come with it."""
    mixed = np.random.default_rng((seed, epoch)).integers(2**63, dtype=np.uint64)
    with np.errstate(over="ignore"):
        # The finalizer of SplitMix64 (Steele, Lea, Flood 2014) over entry and epoch.
        z = (entries.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ mixed
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z % np.uint64(num_views)).astype(np.int64)


# ---- The towers of a fine-tuning with what goes into them


@dataclass(frozen=True, kw_only=True)
class SideMaker:
    """Makes the sides of a fine-tuning.

    `precision` is the number format of cached activations; `crops` the number of those among the views of `augment`
    "views"; validation and test see the view `center` in any case.
    """

    backbone: Backbone
    rows: CacheRows
    files: ImageFiles
    processes: Processes
    boundary_cache: bool
    augment: Augment
    crops: int
    precision: Precision
    workers: int
    seed: int

    @property
    def views(self) -> tuple[str, ...]:
        """Views of training images, `center` first."""
        crops = (f"crop-{number}" for number in range(1, self.crops + 1))
        return (CENTER, FLIP, *crops) if self.augment == "views" else (CENTER,)

    def image(self, tower: CutTower) -> TowerSide:
        """Return the image tower with its inputs; fills boundary files that are missing."""
        if self.boundary_cache and tower.frozen_blocks:
            return TowerSide(tower=tower, inputs=self._image_boundaries(tower))
        inputs = PixelInputs(
            files=self.files.files,
            open_file=file_opener(self.backbone),
            preprocess=pixels_ahead(self.backbone),
            normalise=partial(normalise, self.backbone),
            input_size=input_size(self.backbone),
            augment=self.augment,
            views=self.views,
            root=self.files.root,
            workers=self.workers,
            seed=self.seed,
        )
        return TowerSide(tower=tower, inputs=inputs)

    def text(self, tower: CutTower) -> TowerSide | None:
        """Return the text tower with its inputs, None where all of it is frozen: its embeddings are in the cache."""
        if tower.all_frozen:
            return None
        with open_cache(self.rows.path) as store:
            texts = [str(text) for text in store.texts()]
        # Half of 64 bits, for millions of texts.
        tokens_TL = self.backbone.tokenizer(texts, context_length=self.backbone.context_length).int()
        inputs: TowerInputs = TokenInputs(tokens_TL=tokens_TL)
        if self.boundary_cache and tower.frozen_blocks:
            inputs = self._text_boundary(tower, texts)
        return TowerSide(tower=tower, inputs=inputs, tokens_TL=tokens_TL)

    def _image_boundaries(self, tower: CutTower) -> BoundaryInputs | ResidentInputs:
        entries = np.array(sorted(self.files.files), dtype=np.int64)
        files = [self.files.files[entry] for entry in entries.tolist()]
        images = Images(
            keys=np.array([list(file.sha256 or b"") for file in files], dtype=np.uint8),
            files=[file.path for file in files],
            root=self.files.root,
        )
        self._announce(tower, len(entries), self.views)

        def fill(view: str) -> BoundaryFill:
            return fill_boundary(
                self.rows.path,
                self.backbone,
                tower,
                images,
                view=view,
                precision=self.precision,
                workers=self.workers,
            )

        readers = {view: self._filled(tower, view, partial(fill, view), images.keys) for view in self.views}
        return resident(BoundaryInputs(readers=readers, entries=entries, seed=self.seed), tower.device)

    def _text_boundary(self, tower: CutTower, texts: list[str]) -> BoundaryInputs | ResidentInputs:
        entries = np.unique(self.rows.rows.prompt)  # explanations do not go through the tower
        entries = entries[entries >= 0]
        self._announce(tower, len(entries), (CENTER,))
        prompts = [texts[entry] for entry in entries.tolist()]

        def fill() -> BoundaryFill:
            return fill_text_boundary(self.rows.path, self.backbone, tower, prompts, precision=self.precision)

        reader = self._filled(tower, CENTER, fill, text_keys(prompts))
        return resident(BoundaryInputs(readers={CENTER: reader}, entries=entries), tower.device)

    def _filled(
        self, tower: CutTower, view: str, fill: Callable[[], BoundaryFill], keys: NDArray[np.uint8]
    ) -> BoundaryReader:
        """Let the first process fill a file, and open it in all."""
        path = self._path(tower, view)
        if self.processes.is_first:
            fill()
        self.processes.wait()
        identity = boundary_identity(self.backbone, tower, view=view, precision=self.precision)
        return BoundaryReader.open(path, identity, keys=keys)  # read by position: it must be these

    def _announce(self, tower: CutTower, num_entries: int, views: Sequence[str]) -> None:
        """Say what the files that are missing will take, before the first is written, and that the disk has it."""
        missing = [view for view in views if not self._path(tower, view).exists()]
        if not missing or not self.processes.is_first:
            return
        size = len(missing) * boundary_bytes(num_entries, tower.boundary_shape, self.precision)
        folder = self.rows.path.resolve().parent
        require_space(folder, size, "the boundary cache")
        what = (
            f"{num_entries:,} {tower.kind}s x {len(missing)} views"
            if len(views) > 1
            else f"{num_entries:,} {tower.kind}s"
        )
        line = f"boundary      {what} after block {tower.frozen_blocks}: {size / 1e6:,.1f} MB in {folder}"
        say(line)

    def _path(self, tower: CutTower, view: str) -> Path:
        return boundary_path(self.rows.path, tower.kind, tower.frozen_blocks, view=view, precision=self.precision)
