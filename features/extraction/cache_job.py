"""The making of one cache file, or of one shard after another: what is there is kept, what lacks is computed.

The backbone is loaded when it is first needed, and batches go to the writer as they come. Knows manifests, backbones
and the store. Must not know settings or what is printed of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from deltaclip.base.device import PrecisionChoice, choose_devices
from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.base.lazy import LazySequence
from deltaclip.base.progress import Progress
from deltaclip.features.backbone.decode_ahead import ImageFile, default_workers, spread
from deltaclip.features.data.addresses import address
from deltaclip.features.data.anchors import ANCHOR_TEXTS
from deltaclip.features.data.images import ImageContent, hash_images, is_image
from deltaclip.features.data.paths import GONE, explained_rows
from deltaclip.features.data.preferences import folded, readable
from deltaclip.features.data.sharding import part_of
from deltaclip.features.data.views import ANCHORS, LEFT_OUT, RECIPES, STATISTICS, UnfitBackboneError, of_images
from deltaclip.features.extraction.pace import (
    DEFAULT_BATCH,
    MIN_IMAGES,
    StageClock,
    fastest_batch,
    is_fed_by_processors,
    needed_workers,
    share_words,
)
from deltaclip.features.store.schema import ViewLayout, make_plan
from deltaclip.features.store.shards import find_sibling
from deltaclip.features.store.writer import (
    check_data,
    check_recipes,
    check_request,
    open_left,
    open_writer,
    views_left,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Generator, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.view_vectors import EncodedBatch, View
    from deltaclip.features.backbone.weights import WeightsSource
    from deltaclip.features.data.decoding import Decode
    from deltaclip.features.data.manifest import Manifest
    from deltaclip.features.data.sharding import Part, Shard
    from deltaclip.features.data.views import ViewChoice
    from deltaclip.features.store.reader import FeatureStore
    from deltaclip.features.store.schema import Plan
    from deltaclip.features.store.writer import Failure, StoreWriter


# ---- The making of one cache file, or of one shard after another: what is there is kept, what lacks is computed


@dataclass(kw_only=True)
class Work:
    """What was computed; `encode_seconds` are those of the images, `stages` the shares of time that each was busy.

    `notes` are on what the content of files showed.
    """

    new_images: int = 0
    new_texts: int = 0
    encode_seconds: float = 0.0
    batch_size: int | None = None
    workers: int | None = None
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Extraction:
    """All that the shards of a set have in common: manifest, weights, and the backbone once one of them has loaded it.

    `out` is the cache, that of the whole table; `is_strict` stops at an image that cannot be read; `local_rank` is the
    number of this process among those of its machine.
    """

    out: Path
    manifest: Manifest
    source: WeightsSource
    views: ViewChoice
    device: str
    precision: PrecisionChoice
    quick_gelu: bool | None
    decode: Decode
    batch_size: int | None
    workers: int | None
    allow_outside: bool
    is_strict: bool
    local_rank: int | None = None
    backbone: Backbone | None = None

    def run(self, shard: Shard | None) -> tuple[Work, Path]:
        """Bring the cache up to date, or one shard of it; return what was done and the file.

        Raises:
            UserError: anything wrong with images, backbone, cache or disk.
        """
        manifest, part, path = self.manifest, None, self.out
        if shard:
            manifest, part = part_of(manifest, shard)
            path = shard.path(self.out)
        with one_writer(path):
            job = _Job(self, manifest, path, part=part)
            done = job.nothing_to_do() or job.compute()
            done.notes += job.notes
        return done, path


class _Job:
    """One extraction while it runs: the plan, and what is already on disk."""

    def __init__(self, work: Extraction, manifest: Manifest, out: Path, *, part: Part | None) -> None:
        self.work, self.out = work, out
        self.root = None if work.allow_outside else manifest.image_root
        contents = hash_images(LazySequence(len(manifest), manifest.image_path), self.root)
        contents = _with_causes(contents, manifest)
        if work.is_strict:
            for row, content in enumerate(contents):
                if content.reason:
                    raise _unreadable(manifest.images[row], content.reason, place=manifest.places[row])
        self.manifest, contents = folded(manifest, contents)
        self.notes = _torn_pairs(self.manifest, contents)
        self.plan: Plan = make_plan(self.manifest, contents, part=part)
        if contents and all(self.plan.image_reasons) and not self._others_are_images():
            raise self._nothing_readable(self.plan.image_reasons[0])
        self.precision = self._common_precision(part) if part else work.precision

    def _common_precision(self, part: Part) -> PrecisionChoice:
        """Return the precision of the other shards of the set; refuse to make one that would not fit to them."""
        asked = self.work.precision
        sibling = find_sibling(self.work.out, part.shard)
        if sibling is None:
            return asked
        with sibling:
            precision = sibling.header["request"]["precision"] if asked == "auto" else asked
            check_request(sibling, self._request(precision))
            check_recipes(sibling, {name: RECIPES[name] for name in self.work.views.names})
        return cast("PrecisionChoice", precision)

    def _others_are_images(self) -> bool:
        """Tell of a shard whether others of the table can be read: its own few may well all be broken."""
        whole = self.work.manifest
        return self.plan.part is not None and any(
            is_image(whole.image_path(row), self.root) for row in spread(len(whole))
        )

    def _nothing_readable(self, reason: str) -> UserError:
        remedy = f"check the paths or give --image-root (now {self.manifest.image_root})"
        message = f"none of the {self.plan.num_images} images can be read ({reason})"
        return UserError(message, place=self.manifest.path, remedy=remedy)

    def nothing_to_do(self) -> Work | None:
        """Check what is on disk against the request; return at once if it is exactly what was asked for."""
        for store in open_left(self.out):
            with store:
                request = self._request(self._known_precision(store))
                known = store.facts.get(LEFT_OUT, {})
                views = self.work.views.without(known)
                check_request(store, request)
                check_recipes(store, {name: RECIPES[name] for name in views.names})
                if store.header == self.plan.header(request):
                    self._refuse(store.failed())
                    is_said = views.left_out.keys() <= known.keys()
                    if store.path == self.out and store.is_current and store.holds_views(views.names) and is_said:
                        return Work()
                elif store.path == self.out:
                    check_data(store, self.plan)
        return None

    def _refuse(self, failed: list[tuple[str, str]]) -> None:
        if failed and self.work.is_strict:
            raise _unreadable(*failed[0], place=self.manifest.path)

    def compute(self) -> Work:
        """Encode all that no earlier run has left, then publish the cache."""
        facts, layouts = self._previous_facts(), views_left(self.out, {})
        encoder = self._encoder((facts or {}).get(LEFT_OUT, {}))
        if facts is None:
            backbone = encoder.load(self.precision)
            facts = dict(backbone.facts)  # the next shard takes the backbone over, not what was measured on this one
            if self.work.batch_size is None and (measured := encoder.measured_batch_size(backbone)):
                facts["batch_size"] = measured  # a run that resumes cuts the same batches
        precision = facts["precision"]
        encoder.batch_size = self.work.batch_size or facts.get("batch_size", DEFAULT_BATCH)
        if lacking := [name for name in encoder.views.names if name not in layouts]:
            layouts |= encoder.layouts(precision, lacking)
        facts = _with_left_out(facts, encoder.views, layouts)
        request = self._request(precision)
        writer = open_writer(self.out, self.plan, request=request, facts=facts, views=layouts)
        done = Work()
        try:
            of_texts, of_views = writer.todo("texts").size or writer.todo(ANCHORS).size, encoder.todo(writer).keys()
            if of_texts or of_views:
                model = encoder.load(precision) if of_texts or of_views != {STATISTICS} else None
                if model:
                    self._check_loaded(facts, model)
                    encoder.encode_anchors(writer, model)
                    done.new_texts = encoder.encode_texts(writer, model)
                started = time.monotonic()
                done.new_images = encoder.encode_images(writer, model)
                done.encode_seconds = time.monotonic() - started
                done.stages, done.workers = encoder.shares, encoder.workers
                done.batch_size = encoder.batch_size
                done.notes += encoder.notes
            if self.plan.num_images and not writer.has_images() and not self._others_are_images():
                reason = writer.first_reason()
                writer.discard()
                raise self._nothing_readable(reason)
            writer.finish(self.out)
        finally:
            writer.close()
            self.work.backbone = encoder.backbone
        return done

    def _check_loaded(self, facts: dict[str, Any], backbone: Backbone) -> None:
        from deltaclip.features.backbone.load import check_same

        check_same(facts, backbone, place=self.out, remedy="give another --out")

    def _encoder(self, left_out: Mapping[str, str]) -> Encoder:
        return Encoder(
            plan=self.plan,
            source=self.work.source,
            image_root=self.manifest.image_root,
            root=self.root,
            views=self.work.views.without(left_out),
            device=self.work.device,
            quick_gelu=self.work.quick_gelu,
            decode=self.work.decode,
            batch_size=self.work.batch_size or DEFAULT_BATCH,
            workers=self.work.workers,
            refuse=self._refuse,
            # Shards measure on the same images, or they could come to different precisions.
            probe=self.work.manifest.images if self.plan.part else (),
            local_rank=self.work.local_rank,
            backbone=self.work.backbone,
        )

    def _request(self, precision: Any) -> dict[str, Any]:
        from deltaclip.features.backbone.load import request_facts

        quick_gelu, decode = self.work.quick_gelu, self.work.decode
        return request_facts(self.work.source, precision, quick_gelu=quick_gelu, decode=decode)

    def _known_precision(self, store: FeatureStore) -> str:
        # `auto` goes on in the precision that a cache has, also on a machine that would choose another.
        return str(store.header["request"]["precision"]) if self.work.precision == "auto" else self.work.precision

    def _previous_facts(self) -> dict[str, Any] | None:
        for store in open_left(self.out):
            with store:
                return store.facts
        return None


def _with_left_out(facts: dict[str, Any], views: ViewChoice, there: Container[str]) -> dict[str, Any]:
    """Return the facts with what the cache lacks of the views it would have by default."""
    lacking = {**facts.get(LEFT_OUT, {}), **views.left_out}
    lacking = {name: reason for name, reason in lacking.items() if name not in there}
    rest = {name: value for name, value in facts.items() if name != LEFT_OUT}
    return rest | ({LEFT_OUT: lacking} if lacking else {})


def _with_causes(contents: list[ImageContent], manifest: Manifest) -> list[ImageContent]:
    """Say of the first images that are not there why; whatever ails the rest, it is mostly the same."""
    gone = {row: content.reason for row, content in enumerate(contents) if content.reason == GONE}
    for row, reason in explained_rows(gone, manifest.images, manifest.image_root).items():
        contents[row] = contents[row]._replace(reason=reason)
    return contents


def _torn_pairs(manifest: Manifest, contents: Sequence[ImageContent]) -> list[str]:
    """Say how many pairs have lost an image: they stay in the cache and are learned from once it can be read."""
    if manifest.preferences is None:
        return []
    _, places = readable(manifest.preferences, (not content.reason for content in contents))
    count, first = len(places), places[:1]
    words = (
        "1 pair has an image that cannot be read and is"
        if count == 1
        else f"{count:,} pairs have an image that cannot be read and are"
    )
    return [f"{words} left out ({'at' if count == 1 else 'the first at'} {first[0]})"] if count else []


def _unreadable(image: str, reason: str, *, place: Path | str) -> UserError:
    return UserError(f"image {image!r}: {reason}", place=place, remedy="repair or remove it, or give --on-error skip")


# ---- Encode what a cache lacks


TRIAL_BATCHES = 3  # of each replica


@dataclass(kw_only=True)
class Encoder:
    """A backbone for the images and texts of a plan.

    `image_root` is where the files of the plan lie, `root` the folder that they may not leave (None permits every
    place); `views` names the views to compute, and learns from `layouts` which of the default the backbone cannot give;
    `refuse` is told of every image that cannot be read, and may raise.
    `workers` None picks their number by the first batches; `shares` then says how busy the stages were, and `notes`
    what was decoded otherwise than asked for. `probe` are
    the images to measure on where they are not to be the plan's; `local_rank` numbers this process on its machine.
    """

    plan: Plan
    source: WeightsSource
    image_root: Path
    root: Path | None
    views: ViewChoice
    device: str
    quick_gelu: bool | None
    decode: Decode
    batch_size: int
    workers: int | None
    refuse: Callable[[list[tuple[str, str]]], None]
    shares: dict[str, float] = field(default_factory=dict, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    probe: Sequence[str] = ()
    local_rank: int | None = None
    backbone: Backbone | None = None

    def load(self, precision: PrecisionChoice) -> Backbone:
        """Return the backbone, loaded at the first call and where the one that is there has another precision.

        Raises:
            UserError: the weights do not fit, or there is no such device.
        """
        if self.backbone is None or precision not in {"auto", self.backbone.precision}:
            from deltaclip.features.backbone.device_decoding import require_decoder
            from deltaclip.features.backbone.precision import load_in_best_precision

            devices = choose_devices(self.device, local_rank=self.local_rank)
            for device in devices:
                require_decoder(self.decode, device)
            self.backbone, reason = load_in_best_precision(
                self.source,
                device=devices[0],
                precision=precision,
                quick_gelu=self.quick_gelu,
                decode=self.decode,
                probe=self._probe,
            )
            libraries = ["deltaclip", "torch", "open_clip_torch", "pillow", "h5py"]
            libraries += ["torchcodec"] if self.decode == "gpu" else []
            self.backbone.facts["versions"] = {name: importlib.metadata.version(name) for name in libraries}
            self.backbone.facts["precision_reason"] = reason
        return self.backbone

    def layouts(self, precision: PrecisionChoice, names: Sequence[str]) -> dict[str, ViewLayout]:
        """Return width and recipe of these views; how wide one is, the model says of all but `statistics`.

        Raises:
            UnfitBackboneError: the backbone cannot give one that somebody named; of the default it is left out.
        """
        backbone = self.load(precision) if set(names) != {STATISTICS} else None
        found = {}
        for name in names:
            try:
                found[name] = self._layout(backbone, name)
            except UnfitBackboneError as error:
                if not self.views.is_default:
                    raise
                self.views = self.views.without({name: f"the backbone {error.message}"})
        return found

    def _layout(self, backbone: Backbone | None, name: str) -> ViewLayout:
        if name == ANCHORS:
            from deltaclip.features.backbone.encode import require_whole

            assert backbone is not None
            require_whole(backbone, ANCHOR_TEXTS, view=ANCHORS)
            return ViewLayout(width=backbone.dim, recipe=RECIPES[ANCHORS])
        (view,) = self._make_views(backbone, [name])
        return ViewLayout(width=view.width, recipe=view.recipe)

    def todo(self, writer: StoreWriter) -> dict[str, NDArray[np.bool_]]:
        """Return by view for which images it is to be computed, (I,) bool; a view without any is left out."""
        todo = {}
        for name in of_images(self.views.names):
            entries = writer.todo("images", name)
            if entries.size:
                todo[name] = np.zeros(self.plan.num_images, dtype=bool)
                todo[name][entries] = True
        return todo

    def encode_texts(self, writer: StoreWriter, backbone: Backbone) -> int:
        """Encode the texts that the cache lacks and return their number."""
        from deltaclip.features.backbone.encode import text_batches

        todo = writer.todo("texts")
        with Progress(len(todo), "encoding prompts", unit="prompts") as progress:
            for batch in text_batches(backbone, self.plan.texts, todo):
                writer.put_tokens(batch.entries, batch.truncated_B, batch.tokens_B)
                writer.put("texts", batch.entries, *batch.found)
                progress.advance(len(batch.entries))
        return len(todo)

    def encode_anchors(self, writer: StoreWriter, backbone: Backbone) -> None:
        """Encode the anchors that the cache has room for and lacks."""
        from deltaclip.features.backbone.encode import text_batches

        for batch in text_batches(backbone, ANCHOR_TEXTS, writer.todo(ANCHORS)):
            writer.put(ANCHORS, batch.entries, *batch.found)

    def encode_images(self, writer: StoreWriter, backbone: Backbone | None) -> int:
        """Encode the views that the cache lacks and return the number of images; `statistics` need no backbone.

        Raises:
            UserError: some could not be read just now; the others are stored.
        """
        from deltaclip.features.backbone.device_decoding import decoding_notes
        from deltaclip.features.backbone.load import replicate

        wanted, num_encoded = self.todo(writer), 0
        if not wanted:
            return 0
        later: list[Failure] = []
        files = self._files(np.flatnonzero(np.any(list(wanted.values()), axis=0)))
        others = [replicate(backbone, device) for device in self._other_devices()] if backbone else []
        sets = [self._make_views(own, list(wanted)) for own in (backbone, *others)]
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
        self.notes += decoding_notes(view.decoder for view in itertools.chain(*sets))
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
        from deltaclip.features.backbone.view_vectors import encoded_batches

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
        from deltaclip.features.backbone.encode import encode_images

        return fastest_batch(
            functools.partial(encode_images, backbone), pixels, on_gpu=backbone.device.startswith("cuda")
        )

    def _make_views(self, backbone: Backbone | None, names: Sequence[str]) -> list[View]:
        from deltaclip.features.backbone.view_vectors import make_views, statistics_view

        if backbone is None:
            return [statistics_view(self.decode)]
        return make_views(backbone, names, batch_size=self.batch_size)

    def _files(self, entries: Sequence[int] | NDArray[np.int64]) -> Sequence[ImageFile]:
        files, keys = self.plan.image_files, self.plan.image_keys

        def file(place: int) -> ImageFile:
            entry = int(entries[place])
            return ImageFile(entry, address(self.image_root, files[entry]), keys[entry].tobytes())

        return LazySequence(len(entries), file)

    def _other_devices(self) -> list[str]:
        return choose_devices(self.device, local_rank=self.local_rank)[1:]

    def _probe_files(self) -> Sequence[ImageFile]:
        if self.probe:
            paths = [address(self.image_root, self.probe[place]) for place in spread(len(self.probe))]
            contents = hash_images(paths, self.root)
            return [ImageFile(n, paths[n], c.sha256) for n, c in enumerate(contents) if c.sha256]
        reasons = self.plan.image_reasons
        readable = np.flatnonzero(np.fromiter((not reason for reason in reasons), dtype=bool, count=len(reasons)))
        return self._files(readable[spread(len(readable))])

    def _probe(self, backbone: Backbone) -> torch.Tensor | None:
        from deltaclip.features.backbone.precision import probe_pixels

        return probe_pixels(backbone, self._probe_files(), self.root)
