"""The making of one cache file, or of one shard after another: what is there is kept, what lacks is computed.

Knows manifests, the encoder and the store. Must not know settings or what is printed of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.base.lazy import LazySequence
from deltaclip.features.backbone.batches import spread
from deltaclip.features.data.content import ImageContent, hash_images
from deltaclip.features.data.images import is_image
from deltaclip.features.data.paths import GONE, MOST_NEAREST, explained
from deltaclip.features.data.sharding import part_of
from deltaclip.features.data.views import RECIPES
from deltaclip.features.extraction.encoder import Encoder
from deltaclip.features.extraction.pace import DEFAULT_BATCH
from deltaclip.features.store.plan import make_plan
from deltaclip.features.store.sets import find_sibling
from deltaclip.features.store.takeover import (
    check_data,
    check_recipes,
    check_request,
    open_left,
    open_writer,
    views_left,
)

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.base.device import PrecisionChoice
    from deltaclip.features.backbone.checkpoint import WeightsSource
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.data.decoding import Decode
    from deltaclip.features.data.manifest import Manifest
    from deltaclip.features.data.sharding import Part, Shard
    from deltaclip.features.store.schema import Plan
    from deltaclip.features.store.store import FeatureStore


@dataclass(kw_only=True)
class Work:
    """What was computed; `encode_seconds` are those of the images, `stages` the shares of time that each was busy."""

    new_images: int = 0
    new_texts: int = 0
    encode_seconds: float = 0.0
    batch_size: int | None = None
    workers: int | None = None
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Extraction:
    """All that the shards of a set have in common: manifest, weights, and the backbone once one of them has loaded it.

    `out` is the cache, that of the whole table; `is_strict` stops at an image that cannot be read; `local_rank` is the
    number of this process among those of its machine.
    """

    out: Path
    manifest: Manifest
    source: WeightsSource
    views: tuple[str, ...]
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
        return done, path


class _Job:
    """One extraction while it runs: the plan, and what is already on disk."""

    def __init__(self, work: Extraction, manifest: Manifest, out: Path, *, part: Part | None) -> None:
        self.work, self.manifest, self.out = work, manifest, out
        self.root = None if work.allow_outside else manifest.image_root
        contents = hash_images(LazySequence(len(manifest), manifest.image_path), self.root)
        contents = _with_causes(contents, manifest)
        if work.is_strict:
            for row, content in enumerate(contents):
                if content.reason:
                    raise _unreadable(manifest.images[row], content.reason, place=manifest.places[row])
        self.plan: Plan = make_plan(manifest, contents, part=part)
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
            check_recipes(sibling, {name: RECIPES[name] for name in self.work.views})
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
                check_request(store, request)
                check_recipes(store, {name: RECIPES[name] for name in self.work.views})
                if store.header == self.plan.header(request):
                    self._refuse(store.failed())
                    if store.path == self.out and store.is_current and store.holds_views(self.work.views):
                        return Work()
                elif store.path == self.out:
                    check_data(store, self.plan)
        return None

    def _refuse(self, failed: list[tuple[str, str]]) -> None:
        if failed and self.work.is_strict:
            raise _unreadable(*failed[0], place=self.manifest.path)

    def compute(self) -> Work:
        """Encode all that no earlier run has left, then publish the cache."""
        encoder = self._encoder()
        facts, layouts = self._previous_facts(), views_left(self.out, {})
        if facts is None:
            backbone = encoder.load(self.precision)
            facts = dict(backbone.facts)  # the next shard takes the backbone over, not what was measured on this one
            if self.work.batch_size is None and (measured := encoder.measured_batch_size(backbone)):
                facts["batch_size"] = measured  # a run that resumes cuts the same batches
        precision = facts["precision"]
        encoder.batch_size = self.work.batch_size or facts.get("batch_size", DEFAULT_BATCH)
        if not layouts.keys() >= set(self.work.views):
            layouts |= encoder.layouts(precision)
        request = self._request(precision)
        writer = open_writer(self.out, self.plan, request=request, facts=facts, views=layouts)
        done = Work()
        try:
            if writer.todo("texts").size or encoder.todo(writer):
                backbone = encoder.load(precision)
                self._check_loaded(facts, backbone)
                done.new_texts = encoder.encode_texts(writer, backbone)
                started = time.monotonic()
                done.new_images = encoder.encode_images(writer, backbone)
                done.encode_seconds = time.monotonic() - started
                done.stages, done.workers = encoder.shares, encoder.workers
                done.batch_size = encoder.batch_size
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

    def _encoder(self) -> Encoder:
        return Encoder(
            plan=self.plan,
            source=self.work.source,
            image_root=self.manifest.image_root,
            root=self.root,
            views=self.work.views,
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


def _with_causes(contents: list[ImageContent], manifest: Manifest) -> list[ImageContent]:
    """Say of the first images that are not there why; whatever ails the rest, it is mostly the same."""
    gone = [row for row, content in enumerate(contents) if content.reason == GONE]
    for row in gone[:MOST_NEAREST]:
        reason = explained(contents[row].reason, manifest.images[row], manifest.image_root)
        contents[row] = contents[row]._replace(reason=reason)
    return contents


def _unreadable(image: str, reason: str, *, place: Path | str) -> UserError:
    return UserError(f"image {image!r}: {reason}", place=place, remedy="repair or remove it, or give --on-error skip")
