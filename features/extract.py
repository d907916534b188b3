"""STAGE extract: images and prompts to a feature cache; computes only what is new. Spec sections 6 and 8."""

from __future__ import annotations

import importlib.metadata
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.device import choose_device
from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.base.progress import Progress
from deltaclip.features.backbone.batches import ImageFile, default_workers, pixel_batches
from deltaclip.features.backbone.checkpoint import WeightsSource, find_weights
from deltaclip.features.data.adapters import data_name, read_manifest
from deltaclip.features.data.content import hash_images
from deltaclip.features.store.plan import make_plan
from deltaclip.features.store.store import FeatureStore
from deltaclip.features.store.takeover import check_data, check_request, open_left, open_writer

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.data.manifest import Manifest
    from deltaclip.features.settings import ExtractConfig
    from deltaclip.features.store.schema import Plan
    from deltaclip.features.store.writer import StoreWriter

PROBE_IMAGES = 16
TEXT_BATCH = 256
FAILURES_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What an extraction did; counts are of distinct images and texts, times in seconds."""

    cache: Path
    rows: int
    usable_rows: int
    images: int
    new_images: int
    texts: int
    new_texts: int
    truncated_texts: int
    failed: list[tuple[str, str]]
    label_ranges: dict[str, str]
    facts: dict[str, Any]
    seconds: float
    images_per_s: float | None

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
            f"backbone: {facts['backbone']}, D = {facts['dim']}, {activation}, weights {facts['weights_sha256'][:12]}",
            f"preprocessing: {preprocessing_words(facts['preprocessing'])}",
            f"precision: {facts['precision']} ({facts['precision_reason']})",
            *([facts["quick_gelu_note"]] if "quick_gelu_note" in facts else []),
            *(f"{label}: range {words}" for label, words in self.label_ranges.items()),
        ]
        if self.truncated_texts:
            lines.append(f"{self.truncated_texts:,} texts were cut at {facts['context_length']} tokens")
        if self.failed:
            lines.append(f"{len(self.failed):,} images could not be read:")
            lines += [f"  {file}: {reason}" for file, reason in self.failed[:FAILURES_SHOWN]]
            if len(self.failed) > FAILURES_SHOWN:
                lines.append(f"  ... and {len(self.failed) - FAILURES_SHOWN:,} more, all listed in the cache")
        return "\n".join(lines)


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
    source = find_weights(config.backbone, config.pretrained)
    manifest = read_manifest(
        config.data,
        image_root=config.image_root,
        label_range=config.label_range,
        allow_outside=config.allow_outside,
    )
    with one_writer(out):
        job = _Job(config, manifest, source, out)
        done = job.nothing_to_do() or job.compute()
    with FeatureStore.open(out) as store:
        return _result(store, done, out, seconds=time.monotonic() - started)


@dataclass
class _Done:
    new_images: int = 0
    new_texts: int = 0
    encode_seconds: float = 0.0


class _Job:
    """One extraction while it runs: the plan, and what is already on disk."""

    def __init__(self, config: ExtractConfig, manifest: Manifest, source: WeightsSource, out: Path) -> None:
        self.config, self.manifest, self.source, self.out = config, manifest, source, out
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
                if store.header == {"request": request, "plan": self.plan.digest()}:
                    self._refuse(store.failed())
                    if store.path == self.out:
                        return _Done()
                elif store.path == self.out:
                    check_data(store, self.plan)
        return None

    def _refuse(self, failed: list[tuple[str, str]]) -> None:
        if failed and self.config.on_error == "fail":
            raise _unreadable(*failed[0], place=self.manifest.path)

    def compute(self) -> _Done:
        """Encode all that no earlier run has left, then publish the cache."""
        facts, backbone = self._previous_facts(), None
        if facts is None:
            backbone = self._load(self.config.precision)
            facts = backbone.facts
        request = self._request(facts["precision"])
        writer = open_writer(self.out, self.plan, request=request, facts=facts)
        done, started = _Done(), time.monotonic()
        try:
            if writer.todo("texts").size or writer.todo("images").size:
                backbone = backbone or self._load(facts["precision"])
                started = time.monotonic()
                done.new_texts = _encode_texts(writer, backbone, self.plan.texts)
                done.new_images = self._encode_images(writer, backbone)
            done.encode_seconds = time.monotonic() - started
            if not writer.has_images():
                reason = writer.first_reason()
                writer.discard()
                raise self._nothing_readable(reason)
            writer.finish(self.out)
        finally:
            writer.close()
        return done

    def _request(self, precision: Any) -> dict[str, Any]:
        from deltaclip.features.backbone.load import request_facts

        return request_facts(self.source, precision, quick_gelu=self.config.quick_gelu)

    def _known_precision(self, store: FeatureStore) -> str:
        # `auto` goes on in the precision that a cache has, also on a machine that would choose another.
        return str(store.header["request"]["precision"]) if self.config.precision == "auto" else self.config.precision

    def _previous_facts(self) -> dict[str, Any] | None:
        for store in open_left(self.out):
            with store:
                return store.facts
        return None

    def _load(self, precision: Any) -> Backbone:
        from deltaclip.features.backbone.choose import load_in_best_precision

        backbone, reason = load_in_best_precision(
            self.source,
            device=choose_device(self.config.device),
            precision=precision,
            quick_gelu=self.config.quick_gelu,
            probe=self._probe,
        )
        libraries = ("deltaclip", "torch", "open_clip_torch", "pillow", "h5py")
        backbone.facts["versions"] = {name: importlib.metadata.version(name) for name in libraries}
        backbone.facts["precision_reason"] = reason
        return backbone

    def _files(self, entries: Any) -> list[ImageFile]:
        plan, root = self.plan, self.manifest.image_root
        return [ImageFile(int(i), root / plan.image_files[i], plan.image_keys[i].tobytes()) for i in entries]

    def _batches(self, entries: Any, preprocess: Callable[[Any], torch.Tensor], batch_size: int) -> Any:
        workers = self.config.workers or default_workers()
        return pixel_batches(self._files(entries), preprocess, root=self.root, batch_size=batch_size, workers=workers)

    def _probe(self, preprocess: Callable[[Any], torch.Tensor]) -> torch.Tensor | None:
        readable = [entry for entry, reason in enumerate(self.plan.image_reasons) if not reason]
        spread = np.linspace(0, len(readable) - 1, min(PROBE_IMAGES, len(readable))).astype(int)
        batch = next(self._batches([readable[i] for i in spread], preprocess, PROBE_IMAGES))
        pixels: torch.Tensor | None = batch.pixels_B3HW
        return pixels

    def _encode_images(self, writer: StoreWriter, backbone: Backbone) -> int:
        from deltaclip.features.backbone.encode_images import encode_images

        todo, num_encoded, later = writer.todo("images"), 0, []
        with Progress(len(todo), "encoding images", unit="images") as progress:
            for batch in self._batches(todo, backbone.preprocess, self.config.batch_size):
                self._refuse([(self.plan.image_files[entry], reason) for entry, reason in batch.failed])
                pixels = batch.pixels_B3HW
                vectors = encode_images(backbone, pixels) if pixels is not None else None
                for_good = [failure for failure in batch.failed if failure[0] not in batch.passing]
                if batch.entries or for_good:
                    writer.put_images(batch.entries, vectors, for_good)
                later += [failure for failure in batch.failed if failure[0] in batch.passing]
                num_encoded += len(batch.entries)
                progress.advance(len(batch.entries) + len(batch.failed))
        if later:  # they stay to do: what could not be read now says nothing of the image
            first = f"{self.plan.image_files[later[0][0]]}: {later[0][1]}"
            message = f"{len(later):,} images could not be read just now (first: {first})"
            raise UserError(message, remedy="give the same command again")
        return num_encoded


def _encode_texts(writer: StoreWriter, backbone: Backbone, texts: list[str]) -> int:
    from deltaclip.features.backbone.encode_texts import encode_texts, find_truncated

    todo = writer.todo("texts")
    with Progress(len(todo), "encoding prompts", unit="prompts") as progress:
        for start in range(0, len(todo), TEXT_BATCH):
            entries = todo[start : start + TEXT_BATCH]
            batch = [texts[entry] for entry in entries]
            writer.put_truncated(entries, find_truncated(backbone, batch))
            writer.put("texts", entries, *encode_texts(backbone, batch))
            progress.advance(len(entries))
    return len(todo)


def _unreadable(image: str, reason: str, *, place: Path | str) -> UserError:
    return UserError(f"image {image!r}: {reason}", place=place, remedy="repair or remove it, or give --on-error skip")


def _result(store: FeatureStore, done: _Done, out: Path, *, seconds: float) -> ExtractResult:
    failed = store.failed()
    return ExtractResult(
        cache=out,
        rows=store.num_rows,
        usable_rows=len(store.rows()),
        images=len(store.group("images")["status"]),
        new_images=done.new_images,
        texts=len(store.truncated()),
        new_texts=done.new_texts,
        truncated_texts=int(store.truncated().sum()),
        failed=failed,
        label_ranges=store.dataset["label_ranges"],
        facts=store.facts,
        seconds=round(seconds, 3),
        images_per_s=round(done.new_images / done.encode_seconds, 2) if done.new_images else None,
    )
