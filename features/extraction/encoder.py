"""Encode what a cache lacks: the backbone is loaded when it is first needed, batches go to the writer as they come.

Knows backbones and a writer's methods. Must not know manifests, settings or where caches lie.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.device import PrecisionChoice, choose_devices
from deltaclip.base.errors import UserError
from deltaclip.base.lazy import LazySequence
from deltaclip.base.progress import Progress
from deltaclip.features.backbone.batches import ImageFile, default_workers, spread
from deltaclip.features.data.content import hash_images
from deltaclip.features.extraction.pace import (
    MIN_IMAGES,
    StageClock,
    fastest_batch,
    is_fed_by_processors,
    needed_workers,
    share_words,
)
from deltaclip.features.store.schema import ViewLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from deltaclip.features.backbone.checkpoint import WeightsSource
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.views import EncodedBatch, View
    from deltaclip.features.data.decoding import Decode
    from deltaclip.features.store.schema import Plan
    from deltaclip.features.store.writer import Failure, StoreWriter

TRIAL_BATCHES = 3  # of each replica


@dataclass(kw_only=True)
class Encoder:
    """A backbone for the images and texts of a plan.

    `image_root` is where the files of the plan lie, `root` the folder that they may not leave (None permits every
    place); `views` names the views to compute; `refuse` is told of every image that cannot be read, and may raise.
    `workers` None picks their number by the first batches; `shares` then says how busy the stages were. `probe` are
    the images to measure on where they are not to be the plan's; `local_rank` numbers this process on its machine.
    """

    plan: Plan
    source: WeightsSource
    image_root: Path
    root: Path | None
    views: tuple[str, ...]
    device: str
    quick_gelu: bool | None
    decode: Decode
    batch_size: int
    workers: int | None
    refuse: Callable[[list[tuple[str, str]]], None]
    shares: dict[str, float] = field(default_factory=dict, init=False)
    probe: Sequence[str] = ()
    local_rank: int | None = None
    backbone: Backbone | None = None

    def load(self, precision: PrecisionChoice) -> Backbone:
        """Return the backbone, loaded at the first call and where the one that is there has another precision.

        Raises:
            UserError: the weights do not fit, or there is no such device.
        """
        if self.backbone is None or precision not in {"auto", self.backbone.precision}:
            from deltaclip.features.backbone.choose import load_in_best_precision

            self.backbone, reason = load_in_best_precision(
                self.source,
                device=choose_devices(self.device, local_rank=self.local_rank)[0],
                precision=precision,
                quick_gelu=self.quick_gelu,
                decode=self.decode,
                probe=self._probe,
            )
            libraries = ("deltaclip", "torch", "open_clip_torch", "pillow", "h5py")
            self.backbone.facts["versions"] = {name: importlib.metadata.version(name) for name in libraries}
            self.backbone.facts["precision_reason"] = reason
        return self.backbone

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
                writer.put_tokens(batch.entries, batch.truncated_B, batch.tokens_B)
                writer.put("texts", batch.entries, *batch.found)
                progress.advance(len(batch.entries))
        return len(todo)

    def encode_images(self, writer: StoreWriter, backbone: Backbone) -> int:
        """Encode the views that the cache lacks and return the number of images.

        Raises:
            UserError: some could not be read just now; the others are stored.
        """
        from deltaclip.features.backbone.load import replicate

        wanted, num_encoded = self.todo(writer), 0
        if not wanted:
            return 0
        later: list[Failure] = []
        files = self._files(np.flatnonzero(np.any(list(wanted.values()), axis=0)))
        replicas = [backbone, *(replicate(backbone, device) for device in self._other_devices())]
        sets = [[view for view in self._make_views(own) if view.name in wanted] for own in replicas]
        clock = StageClock(workers=self.workers or default_workers(), lanes=len(sets))
        batches = self._encoded(files, sets, wanted, clock)
        with (
            contextlib.closing(batches),  # its threads end with this run, also where an image stops it
            Progress(len(files), "encoding images", unit="images") as progress,
        ):
            for batch in batches:
                self.refuse([(self.plan.image_files[entry], reason) for entry, reason in batch.failed])
                started = time.perf_counter()
                writer.put_images(batch.found, [pair for pair in batch.failed if pair[0] not in batch.passing])
                clock.add(batch.busy_s | {"write": time.perf_counter() - started})
                self.shares, self.workers = clock.shares(), clock.workers
                later += [failure for failure in batch.failed if failure[0] in batch.passing]
                num_encoded += batch.num_images
                progress.advance(batch.num_images + len(batch.failed), share_words(self.shares))
        if later:  # they stay to do: what could not be read now says nothing of the image
            first = f"{self.plan.image_files[later[0][0]]}: {later[0][1]}"
            message = f"{len(later):,} images could not be read just now (first: {first})"
            raise UserError(message, remedy="give the same command again")
        return num_encoded

    def _encoded(
        self,
        files: Sequence[ImageFile],
        sets: list[list[View]],
        wanted: dict[str, NDArray[np.bool_]],
        clock: StageClock,
    ) -> Generator[EncodedBatch]:
        """Yield all batches; for a GPU, unless their number was given, threads are as many as the first batches say."""
        from deltaclip.features.backbone.views import encoded_batches

        run = functools.partial(
            encoded_batches,
            views=sets[0],
            wanted=wanted,
            root=self.root,
            batch_size=self.batch_size,
            replicas=sets[1:],
        )
        first = TRIAL_BATCHES * len(sets) * self.batch_size
        if self.workers is not None or not is_fed_by_processors(sets[0][0].device) or len(files) < 8 * first:
            yield from run(files, workers=clock.workers)
            return
        last = None
        with contextlib.closing(run(files[:first], workers=clock.workers)) as trial:
            for last in trial:
                yield last
        assert last is not None, "a trial has batches"
        clock.workers = needed_workers(last.busy_s, lanes=len(sets), processors=default_workers())
        yield from run(files[first:], workers=clock.workers)

    def measured_batch_size(self, backbone: Backbone) -> int | None:
        """Return the batch size that goes fastest, None where the images are too few to measure or cannot be read."""
        if self.plan.num_images < MIN_IMAGES or (pixels := self._probe(backbone)) is None:
            return None
        from deltaclip.features.backbone.encode_images import encode_images

        return fastest_batch(
            functools.partial(encode_images, backbone), pixels, on_gpu=backbone.device.startswith("cuda")
        )

    def _make_views(self, backbone: Backbone) -> list[View]:
        from deltaclip.features.backbone.views import make_views

        return make_views(backbone, self.views, batch_size=self.batch_size)

    def _files(self, entries: Sequence[int] | NDArray[np.int64]) -> Sequence[ImageFile]:
        files, keys = self.plan.image_files, self.plan.image_keys

        def file(place: int) -> ImageFile:
            entry = int(entries[place])
            return ImageFile(entry, self.image_root / files[entry], keys[entry].tobytes())

        return LazySequence(len(entries), file)

    def _other_devices(self) -> list[str]:
        return choose_devices(self.device, local_rank=self.local_rank)[1:]

    def _probe_files(self) -> Sequence[ImageFile]:
        if self.probe:
            paths = [self.image_root / self.probe[place] for place in spread(len(self.probe))]
            contents = hash_images(paths, self.root)
            return [ImageFile(n, paths[n], c.sha256) for n, c in enumerate(contents) if c.sha256]
        reasons = self.plan.image_reasons
        readable = np.flatnonzero(np.fromiter((not reason for reason in reasons), dtype=bool, count=len(reasons)))
        return self._files(readable[spread(len(readable))])

    def _probe(self, backbone: Backbone) -> torch.Tensor | None:
        from deltaclip.features.backbone.choose import probe_pixels

        return probe_pixels(backbone, self._probe_files(), self.root)
