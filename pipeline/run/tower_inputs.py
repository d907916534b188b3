"""What goes into the trainable part of a tower, entry by entry: cached activations, or pixels and tokens themselves.

Knows boundary files, image files and views. Must not know heads or training.

Entries are those of the feature cache: numbers of its distinct images and of its distinct texts. `epoch` draws a view
of each image; None is what validation and test see, the view `center`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.batches import image_batches
from deltaclip.features.data.boundary_views import crop_box, view_pixels
from deltaclip.features.data.views import CENTER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from deltaclip.features.backbone.batches import ImageFile

Augment = Literal["none", "views", "crops"]


class TowerInputs(Protocol):
    """Where a tower's inputs come from; `at_boundary` where the frozen part has been run already."""

    @property
    def at_boundary(self) -> bool:
        """Whether `read` gives activations at the cut."""

    def read(self, entries: NDArray[np.int64], epoch: int | None) -> Tensor:
        """Return the inputs of these entries, (E, ...)."""


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


@dataclass(frozen=True, kw_only=True)
class PixelInputs:
    """Images decoded from their files whenever they are asked for: no cache, any augmentation."""

    files: Mapping[int, ImageFile]
    open_file: Callable[[bytes], Any]
    preprocess: Callable[[Any], Tensor]
    input_size: tuple[int, int]
    augment: Augment
    views: Sequence[str]
    root: Path | None
    workers: int
    seed: int = 0
    at_boundary: bool = False

    def read(self, entries: NDArray[np.int64], epoch: int | None) -> Tensor:
        """Return pixels (E, 3, H, W) float32.

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
