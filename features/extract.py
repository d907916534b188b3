"""STAGE extract: images and prompts to a feature cache; computes only what is new."""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.options import option_name
from deltaclip.base.progress import say
from deltaclip.features.backbone.device_decoding import check_decoder
from deltaclip.features.backbone.weights import LOCAL_DIR, find_weights
from deltaclip.features.data.adapters import data_name, read_manifest
from deltaclip.features.data.addresses import as_place
from deltaclip.features.data.remote import begin, tally
from deltaclip.features.data.sharding import Shard, local_rank, read_shard
from deltaclip.features.data.views import ANCHORS, choose_views, left_out_lines
from deltaclip.features.extraction.cache_job import Extraction, Work
from deltaclip.features.extraction.on_ray import run_on_ray
from deltaclip.features.extraction.pace import bottleneck, share_words
from deltaclip.features.store.near import near_words
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import DONE
from deltaclip.features.store.shards import find_shards, open_shards, read_mark, set_size, whole_path
from deltaclip.features.store.writer import part_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltaclip.features.settings import ExtractConfig

FAILURES_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """What an extraction did; counts are of distinct images and texts, times in seconds.

    `views` says how many images have each view, `anchors` how many anchor prompts there are; `new_images` are those of
    which any view was computed; `first_frames` counts those whose file has more frames than the one that was taken;
    `near_copies` are pairs of files, looked for where images were computed; `pairs` counts those that people chose
    between; `notes` is what reading the data left out or put in. `shard` is I/N where the cache is one of N shards;
    `shards` are their number where it is all.
    """

    cache: Path
    rows: int
    usable_rows: int
    images: int
    views: dict[str, int]
    new_images: int
    anchors: int
    texts: int
    new_texts: int
    truncated_texts: int
    first_frames: int
    near_copies: list[tuple[str, str]]
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
    shard: str | None = None
    shards: int | None = None
    pairs: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"cache": str(self.cache)}

    def summary(self) -> str:
        """Return what is in the cache now, what was computed, and what could not be read."""
        from deltaclip.features.backbone.load import loading_notes, preprocessing_words

        facts = self.facts
        images, activation = self.images - len(self.failed), "QuickGELU" if facts["quick_gelu"] else "GELU"
        if not facts.get("text_tower", True):
            activation = "image tower alone (scores of image and prompt need a second cache, of a CLIP)"
        work = f"nothing to compute, {self.seconds:.1f} s"
        if self.new_images or self.new_texts:
            rate = f", {self.images_per_s:,.1f} images/s" if self.images_per_s else ""
            work = f"computed {self.new_images:,} images and {self.new_texts:,} texts in {self.seconds:.1f} s{rate}"
        pairs = f", {self.pairs:,} pairs" if self.pairs else ""
        lines = [
            f"{self.cache}: {self.usable_rows:,} rows of {images:,} images and {self.texts:,} texts{pairs}",
            *([f"shard {self.shard} of {whole_path(self.cache)}"] if self.shard else []),
            *([f"in {self.shards:,} shards that read as one"] if self.shards else []),
            work,
            *self._pace(),
            *([f"views: {', '.join(self._views())}"] if len(self.views) > 1 or self.anchors else []),
            *left_out_lines(facts, [*self.views, *([ANCHORS] if self.anchors else [])]),
            f"backbone: {facts['backbone']}, D = {facts['dim']}, {activation}, weights {facts['weights_sha256'][:12]}",
            f"preprocessing: {preprocessing_words(facts['preprocessing'])}",
            f"precision: {facts['precision']} ({facts['precision_reason']})",
            *(f"loaded: {note}" for note in loading_notes(facts)),
            *(f"{label}: range {words}" for label, words in self.label_ranges.items()),
            *self.notes,
        ]
        if self.truncated_texts:
            lines.append(f"{self.truncated_texts:,} texts were cut at {facts['context_length']} tokens")
        if self.first_frames:
            lines.append(f"{self.first_frames:,} images have several frames or pages; the first was taken")
        if self.near_copies:
            lines.append(f"{near_words(self.near_copies)}: a grouped split keeps few on one side")
        if self.failed:
            lines.append(f"{len(self.failed):,} images could not be read:")
            lines += [f"  {file}: {reason}" for file, reason in self.failed[:FAILURES_SHOWN]]
            if len(self.failed) > FAILURES_SHOWN:
                lines.append(f"  ... and {len(self.failed) - FAILURES_SHOWN:,} more, all listed in the cache")
        return "\n".join(lines)

    def _views(self) -> list[str]:
        anchors = [f"anchors of {self.anchors} prompts"] if self.anchors else []
        return [*(f"{name} {count:,}" for name, count in self.views.items()), *anchors]

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
    started, earlier = time.monotonic(), begin()
    out = config.out or default_cache(config.data, config.backbone, config.pretrained)
    if out.is_dir():
        raise UserError("is a folder", place=out, remedy="give --out the name of a file in it")
    _check_ray(config)
    if config.ray:
        return _extract_on_ray(config, out, started=started)
    if not config.shard:
        _refuse_beside_shards(out)
    shard, named_by = read_shard(config.shard, os.environ) if config.shard else (None, "")
    if named_by:
        say(f"shard {shard}, by {named_by}")
    extraction = _extraction(config, out)
    _refuse_pairs_in_shards(extraction, config)
    done, path = extraction.run(shard)
    with FeatureStore.open(path) as store:
        notes = (*extraction.manifest.notes, *done.notes, *tally().since(earlier))
        return _result(store, done, path, notes=notes, seconds=time.monotonic() - started)


def _check_ray(config: ExtractConfig) -> None:
    if config.ray and config.shard:
        raise UserError("--ray makes all shards", place="--shard", remedy="give one of the two")
    if not config.ray:
        for field in fields(config):
            if field.name in {"ray_workers", "ray_shards"} and getattr(config, field.name) != field.default:
                place = option_name(field.name)
                raise UserError("has no effect without --ray", place=place, remedy="give --ray local, or leave it out")


def _refuse_beside_shards(out: Path) -> None:
    """Refuse to compute anew, in one file, what lies there complete in shards and is read by the same name."""
    sets = {} if out.exists() or part_path(out).exists() else find_shards(out)
    if [len(paths) for paths in sets.values()] == list(sets) and len(sets) == 1:
        count = next(iter(sets))
        remedy = f"use it by this name; give --shard I/{count} to bring it up to date, another --out for one file"
        raise UserError(f"lies there already, in shards of {count}", place=out, remedy=remedy)


def _refuse_pairs_in_shards(extraction: Extraction, config: ExtractConfig) -> None:
    if extraction.manifest.preferences is not None and (config.shard or config.ray):
        option = "--ray" if config.ray else "--shard"
        message = "makes shards, and the images of a pair may lie in two"
        raise UserError(
            message, place=option, remedy="extract the images in shards without pairs, merge, then add --pairs"
        )


@dataclass(frozen=True)
class _MakeShards:
    """What an actor of Ray keeps: the table and, once loaded, the backbone."""

    config: ExtractConfig
    out: Path
    count: int

    def __call__(self) -> Callable[[int], dict[str, Any]]:
        extraction = _extraction(self.config, self.out)

        def work(number: int) -> dict[str, Any]:
            try:
                done, _ = extraction.run(Shard(number, self.count))
            except UserError as error:
                return {"error": [error.message, str(error.place or ""), error.remedy or ""]}
            return {"new_images": done.new_images, "new_texts": done.new_texts}

        return work


def _extract_on_ray(config: ExtractConfig, out: Path, *, started: float) -> ExtractResult:
    """Make all shards in a pool of actors; what lies there, finished or begun, goes on."""
    assert config.ray is not None
    count = config.ray_shards or set_size(out) or 4 * config.ray_workers
    workers = min(config.ray_workers, count)
    extraction = _extraction(config, out)  # here too: what is wrong with the input is said before Ray starts
    _refuse_pairs_in_shards(extraction, config)
    say(f"{count} shards of {out}, {workers} workers")
    said = run_on_ray(
        _MakeShards(_everywhere(config), out.resolve(), count),
        range(1, count + 1),
        address=config.ray,
        workers=workers,
        use_gpus=config.device != "cpu",
    )
    seconds = time.monotonic() - started
    done = Work(encode_seconds=seconds)
    for part in said:
        done.new_images, done.new_texts = done.new_images + part["new_images"], done.new_texts + part["new_texts"]
    with open_shards([Shard(number, count).path(out) for number in range(1, count + 1)]) as store:
        return _result(store, done, out, notes=extraction.manifest.notes, seconds=seconds, shards=count)


def _everywhere(config: ExtractConfig) -> ExtractConfig:
    """Return the settings with paths that mean the same in every folder."""
    root, tag = as_place(config.image_root).resolve() if config.image_root else None, config.pretrained
    return replace(
        config,
        data=config.data if config.data == "demo" else _resolved(config.data),
        backbone=_resolved(config.backbone) if config.backbone.startswith(LOCAL_DIR) else config.backbone,
        pretrained=_resolved(tag) if tag and Path(tag).is_file() else tag,
        image_root=root,
        ray=None,
        ray_workers=2,
        ray_shards=None,
    )


def _resolved(text: str) -> str:
    """Return a path, or what has one behind a colon, with that path absolute; anything else as it is."""
    name, colon, path = ("", "", text) if Path(text).exists() else text.partition(":")
    return f"{name}{colon}{Path(path).resolve()}" if path and Path(path).exists() else text


def _extraction(config: ExtractConfig, out: Path) -> Extraction:
    check_decoder(config.decode, config.device)
    return Extraction(
        out=out,
        views=choose_views(config.views, decode=config.decode),
        source=find_weights(config.backbone, config.pretrained),
        manifest=read_manifest(
            config.data,
            image_root=config.image_root,
            label_range=config.label_range,
            targets=config.target,
            allow_outside=config.allow_outside,
            raters=config.raters,
            pairs=config.pairs,
            pairs_target=config.pairs_target,
        ),
        device=config.device,
        precision=config.precision,
        quick_gelu=config.quick_gelu,
        decode=config.decode,
        batch_size=config.batch_size,
        workers=config.workers,
        allow_outside=config.allow_outside,
        is_strict=config.on_error == "fail",
        local_rank=local_rank(os.environ) if config.shard == "auto" else None,
    )


def _result(
    store: FeatureStore, done: Work, out: Path, *, notes: tuple[str, ...], seconds: float, shards: int | None = None
) -> ExtractResult:
    failed, mark = store.failed(), read_mark(store)
    return ExtractResult(
        cache=out,
        rows=store.num_rows,
        usable_rows=store.num_usable_rows(),
        images=len(store.status()),
        views={name: int((store.status(name) == DONE).sum()) for name in store.view_names()},
        anchors=len(anchors[0]) if (anchors := store.anchors()) else 0,
        new_images=done.new_images,
        texts=len(store.truncated()),
        new_texts=done.new_texts,
        truncated_texts=int(store.truncated().sum()),
        first_frames=int(store.more_frames()[store.status() == DONE].sum()),
        near_copies=store.near_copies() if done.new_images else [],
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
        shard=str(mark.shard) if mark else None,
        pairs=len(pairs.a_P) if (pairs := store.preferences(usable=False)) else 0,
        shards=shards,
    )
