"""Encode what a cache lacks: the backbone is loaded when it is first needed, batches go to the writer as they come.

Knows backbones and a writer's methods. Must not know manifests, settings or where caches lie. Spec section 6.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.device import PrecisionChoice, choose_device
from deltaclip.base.errors import UserError
from deltaclip.base.progress import Progress
from deltaclip.features.backbone.batches import ImageFile, default_workers, pixel_batches
from deltaclip.features.store.schema import ViewLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from deltaclip.features.backbone.checkpoint import WeightsSource
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.views import View
    from deltaclip.features.store.schema import Plan
    from deltaclip.features.store.writer import Failure, StoreWriter

PROBE_IMAGES = 16


@dataclass(kw_only=True)
class Encoder:
    """A backbone for the images and texts of a plan.

    `image_root` is where the files of the plan lie, `root` the folder that they may not leave (None permits every
    place); `views` names the views to compute; `refuse` is told of every image that cannot be read, and may raise.
    """

    plan: Plan
    source: WeightsSource
    image_root: Path
    root: Path | None
    views: tuple[str, ...]
    device: str
    quick_gelu: bool | None
    batch_size: int
    workers: int | None
    refuse: Callable[[list[tuple[str, str]]], None]
    _backbone: Backbone | None = field(default=None, init=False)

    def load(self, precision: PrecisionChoice) -> Backbone:
        """Return the backbone, loaded at the first call.

        Raises:
            UserError: the weights do not fit, or there is no such device.
        """
        if self._backbone is None:
            from deltaclip.features.backbone.choose import load_in_best_precision

            self._backbone, reason = load_in_best_precision(
                self.source,
                device=choose_device(self.device),
                precision=precision,
                quick_gelu=self.quick_gelu,
                probe=self._probe,
            )
            libraries = ("deltaclip", "torch", "open_clip_torch", "pillow", "h5py")
            self._backbone.facts["versions"] = {name: importlib.metadata.version(name) for name in libraries}
            self._backbone.facts["precision_reason"] = reason
        return self._backbone

    def layouts(self, precision: PrecisionChoice) -> dict[str, ViewLayout]:
        """Return width and recipe of the views; how wide one is, the model says."""
        views = self._make_views(self.load(precision))
        return {view.name: ViewLayout(width=view.width, recipe=view.recipe) for view in views}

    def todo(self, writer: StoreWriter) -> dict[str, NDArray[np.bool_]]:
        """Return by view for which images it is to be computed, (I,) bool; a view without any is left out."""
        todo = {}
        for name in self.views:
            entries = writer.todo("images", name)
            if entries.size:
                todo[name] = np.zeros(self.plan.num_images, dtype=bool)
                todo[name][entries] = True
        return todo

    def encode_texts(self, writer: StoreWriter, backbone: Backbone) -> int:
        """Encode the texts that the cache lacks and return their number."""
        from deltaclip.features.backbone.encode_texts import text_batches

        todo = writer.todo("texts")
        with Progress(len(todo), "encoding prompts", unit="prompts") as progress:
            for batch in text_batches(backbone, self.plan.texts, todo):
                writer.put_truncated(batch.entries, batch.truncated_B)
                writer.put("texts", batch.entries, *batch.found)
                progress.advance(len(batch.entries))
        return len(todo)

    def encode_images(self, writer: StoreWriter, backbone: Backbone) -> int:
        """Encode the views that the cache lacks and return the number of images.

        Raises:
            UserError: some could not be read just now; the others are stored.
        """
        from deltaclip.features.backbone.views import encoded_batches

        wanted, num_encoded = self.todo(writer), 0
        later: list[Failure] = []
        views = [view for view in self._make_views(backbone) if view.name in wanted]
        files = self._files(np.flatnonzero(np.any(list(wanted.values()), axis=0)).tolist())
        batches = encoded_batches(
            files, views, wanted, root=self.root, batch_size=self.batch_size, workers=self._num_workers
        )
        with (
            contextlib.closing(batches),  # its threads end with this run, also where an image stops it
            Progress(len(files), "encoding images", unit="images") as progress,
        ):
            for batch in batches:
                self.refuse([(self.plan.image_files[entry], reason) for entry, reason in batch.failed])
                for_good = [failure for failure in batch.failed if failure[0] not in batch.passing]
                writer.put_images(batch.found, for_good)
                later += [failure for failure in batch.failed if failure[0] in batch.passing]
                num_encoded += batch.num_images
                progress.advance(batch.num_images + len(batch.failed))
        if later:  # they stay to do: what could not be read now says nothing of the image
            first = f"{self.plan.image_files[later[0][0]]}: {later[0][1]}"
            message = f"{len(later):,} images could not be read just now (first: {first})"
            raise UserError(message, remedy="give the same command again")
        return num_encoded

    def _make_views(self, backbone: Backbone) -> list[View]:
        from deltaclip.features.backbone.views import make_views

        return make_views(backbone, self.views, batch_size=self.batch_size)

    @property
    def _num_workers(self) -> int:
        return self.workers or default_workers()

    def _files(self, entries: Iterable[int]) -> list[ImageFile]:
        files, keys = self.plan.image_files, self.plan.image_keys
        return [ImageFile(entry, self.image_root / files[entry], keys[entry].tobytes()) for entry in entries]

    def _probe(self, preprocess: Callable[[Any], torch.Tensor]) -> torch.Tensor | None:
        readable = [entry for entry, reason in enumerate(self.plan.image_reasons) if not reason]
        spread = np.linspace(0, len(readable) - 1, min(PROBE_IMAGES, len(readable))).astype(int)
        files = self._files([readable[place] for place in spread])
        batches = pixel_batches(files, preprocess, root=self.root, batch_size=PROBE_IMAGES, workers=self._num_workers)
        return next(batches).pixels_B3HW
