"""STAGE import: embeddings that another program computed to a cache; what made them is what the user says.

`docs/cache.md` says what is checked and what such a cache may be used for.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import check_place, one_writer
from deltaclip.base.lazy import LazySequence
from deltaclip.base.progress import Progress
from deltaclip.features.data.foreign import read_source
from deltaclip.features.data.images import ImageContent, hash_images
from deltaclip.features.data.manifest import manifest_from_table, parse_label_ranges
from deltaclip.features.data.targets import AskedTarget, parse_targets
from deltaclip.features.store.schema import make_plan
from deltaclip.features.store.writer import STORED_DTYPE, StoreWriter, draft_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.data.foreign import Source, Vectors
    from deltaclip.features.data.manifest import Manifest
    from deltaclip.features.settings import ImportConfig
    from deltaclip.features.store.reader import Kind
    from deltaclip.features.store.schema import Plan

BLOCK_ROWS = 16_384  # 100 MB in float64 at D = 768
UNIT = 2e-3  # how far float16 leaves a unit vector from length 1, at most, up to D = 1024 and with room
SAME = 0.999  # cosine of two embeddings of one image: what different batches and 16 bits change is below 1 - this


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What an import wrote; `images` and `texts` are distinct ones, `were_unit` says whether lengths were 1 already."""

    cache: Path
    layout: str
    rows: int
    images: int
    texts: int
    dim: int
    were_unit: dict[str, bool]
    explanations_left_out: int
    label_ranges: dict[str, str]
    notes: tuple[str, ...]
    request: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"cache": str(self.cache)}

    def summary(self) -> str:
        """Return what is in the cache now, and what is known of its embeddings."""
        request = self.request
        made_by = " ".join(str(part) for part in (request["model"], request["pretrained"]) if part)
        lines = [
            f"{self.cache}: {self.rows:,} rows of {self.images:,} images and {self.texts:,} texts, D = {self.dim}",
            f"imported from {self.layout}; made by {made_by} in {request['precision']}, which nothing here can check",
            *(
                f"{kind}: {'were normalised' if unit else 'were not normalised; they are now, their lengths are kept'}"
                for kind, unit in self.were_unit.items()
            ),
            *(f"{label}: range {words}" for label, words in self.label_ranges.items()),
            *self.notes,
        ]
        if self.explanations_left_out:
            lines.append(f"{self.explanations_left_out:,} explanations are left out: there are no embeddings of them")
        return "\n".join(lines)


def import_embeddings(config: ImportConfig) -> ImportResult:
    """Write a cache from embeddings and a table whose rows are theirs; it appears whole or not at all.

    Raises:
        UserError: anything wrong with the source or its table, vectors that are not finite or have no length, rows of
            one image or text whose vectors disagree, `out` exists, the disk is full.
    """
    check_place(config.out)
    with one_writer(config.out):
        if config.out.exists():
            raise UserError("already exists", place=config.out, remedy="give another --out or remove it first")
        asked = parse_targets(config.target)
        source = read_source(config.source, texts=config.texts, table=config.manifest, targets=asked)
        given = _manifest(config, source, asked)
        manifest = replace(given, explanations=[""] * len(given))
        dtype = np.dtype(STORED_DTYPE[config.precision])
        prompted = np.array([bool(prompt) for prompt in manifest.prompts])
        images = _Measured(source.images, dtype)
        texts = _Measured(source.texts, dtype, of=prompted)
        plan = make_plan(manifest, _contents(config, manifest, images))
        for measured, entries in ((images, plan.row_image), (texts, plan.row_prompt)):
            _check_agreement(measured.vectors, entries)
        request = {
            "imported": True,
            "model": config.backbone,
            "pretrained": config.pretrained,
            "precision": config.precision,
        }
        were_unit = {"images": images.are_unit, "texts": texts.are_unit}
        facts = _facts(config, source, were_unit)
        cache = _write(config.out, plan, images, texts, request=request, facts=facts)
    return ImportResult(
        cache=cache,
        layout=source.layout,
        rows=len(manifest),
        images=plan.num_images,
        texts=len(plan.texts),
        dim=source.images.width,
        were_unit=were_unit,
        explanations_left_out=sum(bool(text) for text in given.explanations),
        label_ranges=plan.dataset["label_ranges"],
        notes=manifest.notes,
        request=request,
    )


def _manifest(config: ImportConfig, source: Source, asked: tuple[AskedTarget, ...]) -> Manifest:
    named = {each.target.name for each in asked}
    said = [target for target in source.targets if target.name not in named and target.name in source.table.columns]
    asked = (*asked, *(AskedTarget(target, target.name) for target in said))
    # Without an image root no file is opened, so that a path may lead wherever it led where it was written.
    return manifest_from_table(
        source.table,
        name=config.source.stem,
        image_root=config.image_root or source.table.path.parent,
        targets=asked,
        label_ranges=parse_label_ranges(config.label_range, asked),
        allow_outside=config.image_root is None,
        raters=None,  # row by row, as the embeddings are
    )


def _facts(config: ImportConfig, source: Source, were_unit: dict[str, bool]) -> dict[str, Any]:
    return {
        "backbone": config.backbone,
        "pretrained": config.pretrained,
        "precision": config.precision,
        "dim": source.images.width,
        "normalised": True,
        "imported": {
            "layout": source.layout,
            "were_normalised": were_unit,
            "image_keys": "file" if config.image_root else "embedding",
        },
    }


class _Measured:
    """Vectors whose lengths are known; refuses those that are none, but in rows that are not `of` any."""

    def __init__(self, vectors: Vectors, dtype: np.dtype[Any], *, of: NDArray[np.bool_] | None = None) -> None:
        self.vectors, self.dtype = vectors, dtype
        self.length_N = np.empty(len(vectors))
        for rows in _blocks(len(vectors)):
            with np.errstate(over="ignore"):  # then it is infinite, and refused below
                length = np.linalg.norm(vectors.take(rows), axis=1)
            length = self.length_N[rows] = length if of is None else np.where(of[rows], length, 1)
            for wrong, words in ((~np.isfinite(length), "is not finite"), (length == 0, "has length zero")):
                if wrong.any():
                    place = vectors.place(int(rows[np.flatnonzero(wrong)[0]]))
                    remedy = "compute it again, or leave the row out"
                    raise UserError(f"vector {words} ({wrong.sum():,} in this block)", place=place, remedy=remedy)
        self.are_unit = bool((np.abs(self.length_N - 1) <= UNIT).all())

    def stored(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows as the cache has them, of length 1; what was so already keeps its bits."""
        found = self.vectors.take(rows)
        return (found if self.are_unit else found / self.length_N[rows, None]).astype(self.dtype)


def _blocks(count: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, count, BLOCK_ROWS):
        yield np.arange(start, min(start + BLOCK_ROWS, count))


def _contents(config: ImportConfig, manifest: Manifest, images: _Measured) -> list[ImageContent]:
    """Return the content address of each row's image: of its file where there is a root, else of its embedding."""
    if config.image_root is not None:
        contents = hash_images(LazySequence(len(manifest), manifest.image_path), config.image_root)
        for row, content in enumerate(contents):
            if content.reason:
                message = f"image {manifest.images[row]!r}: {content.reason}"
                remedy = "leave --image-root out to do without files"
                raise UserError(message, place=manifest.places[row], remedy=remedy)
        return contents
    # The same name is the same image; two names with one vector are copies of it, which must not get onto two sides.
    key_of: dict[str, ImageContent] = {}
    for rows in _blocks(len(manifest)):
        for row, vector in zip(rows.tolist(), images.stored(rows), strict=True):
            if (name := manifest.images[row]) not in key_of:
                key_of[name] = ImageContent(hashlib.sha256(vector.tobytes()).digest(), "")
    return [key_of[name] for name in manifest.images]


def _check_agreement(vectors: Vectors, entries: NDArray[np.int64]) -> None:
    """Refuse rows of one image, or of one text, that have different vectors: rows are out of step with the table."""
    first = _first_rows(entries)
    for block in _blocks(len(entries)):
        present = block[entries[block] >= 0]
        rows = present[first[entries[present]] != present]
        here, there = vectors.take(rows), vectors.take(first[entries[rows]])
        cosine = (here * there).sum(axis=1) / (np.linalg.norm(here, axis=1) * np.linalg.norm(there, axis=1))
        if (wrong := np.flatnonzero(cosine < SAME)).size:
            row = int(rows[wrong[0]])
            other = vectors.place(int(first[entries[row]])).rpartition(", ")[2]
            message = (
                f"has another vector than {other}, which the table says is of the same (cosine {cosine[wrong[0]]:.3f})"
            )
            raise UserError(message, place=vectors.place(row), remedy="check that rows and table are in one order")


def _first_rows(entries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first row of each entry; -1 is none."""
    rows = np.flatnonzero(entries >= 0)
    return rows[np.unique(entries[rows], return_index=True)[1]].astype(np.int64)


def _write(
    out: Path,
    plan: Plan,
    images: _Measured,
    texts: _Measured,
    *,
    request: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    writer = StoreWriter.create(draft_path(out), plan, request=request, facts=facts, views={})
    parts: list[tuple[Kind, _Measured, NDArray[np.int64]]] = [
        ("texts", texts, _first_rows(plan.row_prompt)),
        ("images", images, _first_rows(plan.row_image)),
    ]
    try:
        with Progress(sum(len(first) for _, _, first in parts), "importing", unit="vectors") as progress:
            for kind, measured, first in parts:
                for entries in _blocks(len(first)):
                    rows = first[entries]
                    writer.put(kind, entries, measured.stored(rows), measured.length_N[rows])
                    progress.advance(len(rows))
        return writer.finish(out, is_new=True)
    except BaseException:
        writer.discard()
        raise
