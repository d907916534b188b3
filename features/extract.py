"""STAGE extract: images and prompts to a feature cache; computes only what is new. Spec sections 6 and 8."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.features.backbone.checkpoint import WeightsSource, find_weights
from deltaclip.features.data.adapters import data_name, read_manifest
from deltaclip.features.data.content import hash_images
from deltaclip.features.data.views import RECIPES, check_decode, parse_views
from deltaclip.features.extraction.encoder import Encoder
from deltaclip.features.extraction.pace import DEFAULT_BATCH, bottleneck, share_words
from deltaclip.features.store.plan import make_plan
from deltaclip.features.store.schema import DONE
from deltaclip.features.store.store import FeatureStore
from deltaclip.features.store.takeover import (
    check_data,
    check_recipes,
    check_request,
    open_left,
    open_writer,
    views_left,
)

if TYPE_CHECKING:
    from deltaclip.features.data.manifest import Manifest
    from deltaclip.features.settings import ExtractConfig
    from deltaclip.features.store.schema import Plan

FAILURES_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What an extraction did; counts are of distinct images and texts, times in seconds.

    `views` says how many images have each view; `new_images` are those of which any view was computed;
    `first_frames` counts those whose file has more frames than the one that was taken; `notes` is what reading the data
    left out or put in.
    """

    cache: Path
    rows: int
    usable_rows: int
    images: int
    views: dict[str, int]
    new_images: int
    texts: int
    new_texts: int
    truncated_texts: int
    first_frames: int
    failed: list[tuple[str, str]]
    label_ranges: dict[str, str]
    notes: tuple[str, ...]
    facts: dict[str, Any]
    seconds: float
    images_per_s: float | None
    batch_size: int | None
    workers: int | None
    stages: dict[str, float]
    bottleneck: str | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"cache": str(self.cache)}

    def summary(self) -> str:
        """Return what is in the cache now, what was computed, and what could not be read."""
        from deltaclip.features.backbone.load import preprocessing_words

        facts = self.facts
        images, activation = self.images - len(self.failed), "QuickGELU" if facts["quick_gelu"] else "GELU"
        work = f"nothing to compute, {self.seconds:.1f} s"
        if self.new_images or self.new_texts:
            rate = f", {self.images_per_s:,.1f} images/s" if self.images_per_s else ""
            work = f"computed {self.new_images:,} images and {self.new_texts:,} texts in {self.seconds:.1f} s{rate}"
        lines = [
            f"{self.cache}: {self.usable_rows:,} rows of {images:,} images and {self.texts:,} texts",
            work,
            *self._pace(),
            *(
                [f"views: {', '.join(f'{name} {n:,}' for name, n in self.views.items())}"]
                if len(self.views) > 1
                else []
            ),
            f"backbone: {facts['backbone']}, D = {facts['dim']}, {activation}, weights {facts['weights_sha256'][:12]}",
            f"preprocessing: {preprocessing_words(facts['preprocessing'])}",
            f"precision: {facts['precision']} ({facts['precision_reason']})",
            *([facts["quick_gelu_note"]] if "quick_gelu_note" in facts else []),
            *(f"{label}: range {words}" for label, words in self.label_ranges.items()),
            *self.notes,
        ]
        if self.truncated_texts:
            lines.append(f"{self.truncated_texts:,} texts were cut at {facts['context_length']} tokens")
        if self.first_frames:
            lines.append(f"{self.first_frames:,} images have several frames or pages; the first was taken")
        if self.failed:
            lines.append(f"{len(self.failed):,} images could not be read:")
            lines += [f"  {file}: {reason}" for file, reason in self.failed[:FAILURES_SHOWN]]
            if len(self.failed) > FAILURES_SHOWN:
                lines.append(f"  ... and {len(self.failed) - FAILURES_SHOWN:,} more, all listed in the cache")
        return "\n".join(lines)

    def _pace(self) -> list[str]:
        if not self.stages:
            return []
        how = f"batches of {self.batch_size}, {self.workers} decoding threads"
        return [f"stages: {share_words(self.stages)} (bottleneck: {self.bottleneck}; {how})"]


def default_cache(data: str, backbone: str, pretrained: str | None) -> Path:
    """Return where `extract` writes when not told: one file per data set (`data_name`) and backbone."""
    parts = [Path(part.rpartition(":")[2] or part).name for part in (backbone, pretrained) if part]
    parts = [data_name(data), *(re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in parts)]
    return Path("cache") / f"{'_'.join(parts)}.h5"


def extract(config: ExtractConfig) -> ExtractResult:
    """Bring a feature cache up to date with a manifest.

    Raises:
        UserError: anything wrong with manifest, backbone, cache or disk; nothing half-written is left under the
            cache's name, and what was computed is kept for the next run.
    """
    started = time.monotonic()
    out = config.out or default_cache(config.data, config.backbone, config.pretrained)
    if out.is_dir():
        raise UserError("is a folder", place=out, remedy="give --out the name of a file in it")
    views = parse_views(config.views)
    check_decode(config.decode, views)
    source = find_weights(config.backbone, config.pretrained)
    manifest = read_manifest(
        config.data,
        image_root=config.image_root,
        label_range=config.label_range,
        allow_outside=config.allow_outside,
    )
    with one_writer(out):
        job = _Job(config, manifest, source, out, views=views)
        done = job.nothing_to_do() or job.compute()
    with FeatureStore.open(out) as store:
        return _result(store, done, out, notes=manifest.notes, seconds=time.monotonic() - started)


@dataclass
class _Done:
    new_images: int = 0
    new_texts: int = 0
    encode_seconds: float = 0.0
    batch_size: int | None = None
    workers: int | None = None
    stages: dict[str, float] = field(default_factory=dict)


class _Job:
    """One extraction while it runs: the plan, and what is already on disk."""

    def __init__(
        self, config: ExtractConfig, manifest: Manifest, source: WeightsSource, out: Path, *, views: tuple[str, ...]
    ) -> None:
        self.config, self.manifest, self.source, self.out, self.views = config, manifest, source, out, views
        self.root = None if config.allow_outside else manifest.image_root
        contents = hash_images([manifest.image_path(row) for row in range(len(manifest))], self.root)
        if config.on_error == "fail":
            for row, content in enumerate(contents):
                if content.reason:
                    raise _unreadable(manifest.images[row], content.reason, place=manifest.places[row])
        self.plan: Plan = make_plan(manifest, contents)
        if all(self.plan.image_reasons):
            raise self._nothing_readable(self.plan.image_reasons[0])

    def _nothing_readable(self, reason: str) -> UserError:
        remedy = f"check the paths or give --image-root (now {self.manifest.image_root})"
        message = f"none of the {self.plan.num_images} images can be read ({reason})"
        return UserError(message, place=self.manifest.path, remedy=remedy)

    def nothing_to_do(self) -> _Done | None:
        """Check what is on disk against the request; return at once if it is exactly what was asked for."""
        for store in open_left(self.out):
            with store:
                request = self._request(self._known_precision(store))
                check_request(store, request)
                check_recipes(store, {name: RECIPES[name] for name in self.views})
                if store.header == {"request": request, "plan": self.plan.digest()}:
                    self._refuse(store.failed())
                    if store.path == self.out and store.is_current and store.holds_views(self.views):
                        return _Done()
                elif store.path == self.out:
                    check_data(store, self.plan)
        return None

    def _refuse(self, failed: list[tuple[str, str]]) -> None:
        if failed and self.config.on_error == "fail":
            raise _unreadable(*failed[0], place=self.manifest.path)

    def compute(self) -> _Done:
        """Encode all that no earlier run has left, then publish the cache."""
        config, encoder = self.config, self._encoder()
        facts, layouts = self._previous_facts(), views_left(self.out, {})
        if facts is None:
            backbone = encoder.load(config.precision)
            facts = backbone.facts
            if config.batch_size is None and (measured := encoder.measured_batch_size(backbone)):
                facts["batch_size"] = measured  # a run that resumes cuts the same batches
        precision = facts["precision"]
        encoder.batch_size = config.batch_size or facts.get("batch_size", DEFAULT_BATCH)
        if not layouts.keys() >= set(self.views):
            layouts |= encoder.layouts(precision)
        request = self._request(precision)
        writer = open_writer(self.out, self.plan, request=request, facts=facts, views=layouts)
        done = _Done()
        try:
            if writer.todo("texts").size or encoder.todo(writer):
                backbone, started = encoder.load(precision), time.monotonic()
                done.new_texts = encoder.encode_texts(writer, backbone)
                done.new_images = encoder.encode_images(writer, backbone)
                done.encode_seconds = time.monotonic() - started
                done.stages, done.workers = encoder.shares, encoder.workers
                done.batch_size = encoder.batch_size
            if not writer.has_images():
                reason = writer.first_reason()
                writer.discard()
                raise self._nothing_readable(reason)
            writer.finish(self.out)
        finally:
            writer.close()
        return done

    def _encoder(self) -> Encoder:
        return Encoder(
            plan=self.plan,
            source=self.source,
            image_root=self.manifest.image_root,
            root=self.root,
            views=self.views,
            device=self.config.device,
            quick_gelu=self.config.quick_gelu,
            decode=self.config.decode,
            batch_size=self.config.batch_size or DEFAULT_BATCH,
            workers=self.config.workers,
            refuse=self._refuse,
        )

    def _request(self, precision: Any) -> dict[str, Any]:
        from deltaclip.features.backbone.load import request_facts

        quick_gelu, decode = self.config.quick_gelu, self.config.decode
        return request_facts(self.source, precision, quick_gelu=quick_gelu, decode=decode)

    def _known_precision(self, store: FeatureStore) -> str:
        # `auto` goes on in the precision that a cache has, also on a machine that would choose another.
        return str(store.header["request"]["precision"]) if self.config.precision == "auto" else self.config.precision

    def _previous_facts(self) -> dict[str, Any] | None:
        for store in open_left(self.out):
            with store:
                return store.facts
        return None


def _unreadable(image: str, reason: str, *, place: Path | str) -> UserError:
    return UserError(f"image {image!r}: {reason}", place=place, remedy="repair or remove it, or give --on-error skip")


def _result(store: FeatureStore, done: _Done, out: Path, *, notes: tuple[str, ...], seconds: float) -> ExtractResult:
    failed = store.failed()
    return ExtractResult(
        cache=out,
        rows=store.num_rows,
        usable_rows=store.num_usable_rows(),
        images=len(store.status()),
        views={name: int((store.status(name) == DONE).sum()) for name in store.view_names()},
        new_images=done.new_images,
        texts=len(store.truncated()),
        new_texts=done.new_texts,
        truncated_texts=int(store.truncated().sum()),
        first_frames=int(store.more_frames()[store.status() == DONE].sum()),
        failed=failed,
        label_ranges=store.dataset["label_ranges"],
        notes=notes,
        facts=store.facts,
        seconds=round(seconds, 3),
        images_per_s=round(done.new_images / done.encode_seconds, 2) if done.new_images else None,
        batch_size=done.batch_size,
        workers=done.workers,
        stages=done.stages,
        bottleneck=bottleneck(done.stages) if done.stages else None,
    )
