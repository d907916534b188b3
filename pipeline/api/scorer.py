"""A trained run as a scorer of new images: backbone and heads together.

Images and prompts of a caller become pairs: what goes with what. Of a run that changed its backbone, the rows of its
own cache keep the scores that it recorded where these are right, all others are scored from their image files. Knows
runs, caches and backbones. Must not know metrics.

Shapes: N pairs of image and prompt, B images of a batch, D width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deltaclip.base.device import check_precision, choose_device, own_modes
from deltaclip.base.errors import UserError
from deltaclip.base.progress import Progress
from deltaclip.features.backbone.decode_ahead import ImageFile, MemoryImage, default_workers, image_batches, spread
from deltaclip.features.backbone.encode import text_batches
from deltaclip.features.backbone.view_vectors import crops_by_source, encode_views, make_views, opener_of
from deltaclip.features.backbone.weights import LOCAL_DIR
from deltaclip.features.data.addresses import RemotePath
from deltaclip.features.data.paths import understood
from deltaclip.features.data.prompts import prompt_fault
from deltaclip.features.data.views import CENTER, RECIPES
from deltaclip.features.store.schema import ViewLayout
from deltaclip.features.store.writer import STORED_DTYPE
from deltaclip.pipeline.api.pictures import (
    as_numpy,
    as_picture,
    image_column,
    is_array,
    is_one_image,
    named,
    plain,
)
from deltaclip.pipeline.model.scores import Batch, cosine
from deltaclip.pipeline.rows.cached_rows import text_keys
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.hub import place_of_run
from deltaclip.pipeline.runs.prediction_table import ScoreColumns, Scores, blank_untrained, read_predictions, score
from deltaclip.pipeline.runs.run_backbone import Recorded, image_files, load_recorded, put_tuned
from deltaclip.pipeline.runs.trust import COVERAGE, PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.view_vectors import Crops, Opened, View
    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.runs.run_backbone import ImageFiles
    from deltaclip.pipeline.runs.trust import Trust
    from deltaclip.pipeline.scoring.groups import KeyArray


# ---- A trained run as a scorer of new images: backbone and heads together


VIEW_BATCH = 64  # tiles of a view that go through the backbone at a time


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """Scores of N pairs; NaN in the rows of `failed`, which maps a row to the reason.

    `scores` has every target of the run with its base and correction; `q` and `c` are quality and consistency of it.
    """

    scores: Scores
    failed: dict[int, str]
    truncated_prompts: int

    @property
    def q(self) -> NDArray[np.float32]:
        """Quality, (N,) float32 in [0, 1]; NaN where the run has no such target."""
        return self.scores.of("quality")

    @property
    def c(self) -> NDArray[np.float32]:
        """Consistency, (N,) float32 in [0, 1]; NaN where the run has no such target."""
        return self.scores.of("consistency")


class Scorer:
    """Heads of a run with the backbone that they were trained on.

    It can be copied and pickled, whole: a copy holds the weights once more, and needs neither run nor checkpoint.
    """

    def __init__(
        self,
        heads: Heads,
        backbone: Backbone,
        labels: Sequence[str],
        *,
        others: Sequence[Backbone] = (),
        trust: Trust | None = None,
    ) -> None:
        """Put heads and backbones together; `others` are those of further caches, in their order."""
        self.heads, self.backbone, self.labels, self.trust = heads, backbone, tuple(labels), trust
        self.others = tuple(others)
        self._views = self._make_views()

    @property
    def of_image(self) -> tuple[str, ...]:
        """The trained targets that see the image alone: they can be scored without a prompt."""
        return tuple(each.name for each in self.heads.targets if each.sees == "image" and each.name in self.labels)

    @property
    def needs_prompts(self) -> bool:
        """Whether any score sees the prompt."""
        return len(self.of_image) < len(self.labels)

    @property
    def _backbones(self) -> tuple[Backbone, ...]:
        return (self.backbone, *self.others)

    @property
    def seen_views(self) -> list[list[str]]:
        """The views of each backbone that the heads see, `center` first."""
        bases = self.heads.bases
        return self._by_backbone(bases.views if bases else ())

    def _by_backbone(self, views: Iterable[str]) -> list[list[str]]:
        names: list[dict[str, None]] = [{CENTER: None} for _ in self._backbones]
        for name in views:
            number, _, view = name.rpartition(":")
            if view in RECIPES:
                names[int(number or 1) - 1][view] = None
        return [list(found) for found in names]

    def _make_views(self) -> list[list[View]]:
        """Return the views of each backbone that heads or trust see."""
        bases = self.heads.bases
        names = self._by_backbone((*(bases.views if bases else ()), *(self.trust.views if self.trust else ())))
        return [
            make_views(backbone, found, batch_size=VIEW_BATCH)
            for backbone, found in zip(self._backbones, names, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the views, which are functions around the backbone and are made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._views = self._make_views()

    @classmethod
    @own_modes(learns=True)
    def load(
        cls,
        run: Path | str,
        *,
        device: str | torch.device = "auto",
        backbone: str | None = None,
        pretrained: str | None = None,
        precision: Precision | None = None,
    ) -> Scorer:
        """Load a run directory.

        Args:
            run: made by `deltaclip train`, or `hf://ORG/NAME[@REVISION]`: what `deltaclip push` sent to a Hub.
            device: auto, cpu, cuda or cuda:N, or a device of torch.
            backbone: where the backbone lies now, if it has moved.
            pretrained: where its checkpoint lies now, if it has moved.
            precision: of the backbone; None takes the one of the run's cache.

        Raises:
            UserError: a damaged run, or a backbone whose weights are not those of the run.
        """
        check_precision(precision)
        folder = open_run(place_of_run(run))
        facts, request = folder.config["backbone"], folder.config["request"]
        if request.get("imported"):
            message = f"was trained on imported embeddings: nothing says which weights of {facts['backbone']} made them"
            remedy = "extract the images with `deltaclip extract` and train on that cache"
            raise UserError(message, place=run, remedy=remedy)
        chosen = choose_device(device)
        if folder.is_shared and backbone is None and pretrained is None:
            _check_there(facts, request, run)
        loaded = load_recorded(
            Recorded(facts, request, place=run, what="was trained on"),
            device=chosen,
            backbone=backbone,
            pretrained=pretrained,
            precision=precision or ("fp32" if folder.is_tuned else None),  # in which weights were tuned
        )
        if folder.is_tuned:
            put_tuned(loaded, folder)
        others = _others(folder, run, chosen)
        return cls(folder.heads.to(chosen), loaded, folder.config["labels"], others=others, trust=folder.trust)

    def nothing(self, num_rows: int) -> Scores:
        """Return scores of rows that are not there yet, with the columns that they will have."""
        parts = None if self.trust is None else self.trust.parts
        return Scores.nothing(num_rows, [target.name for target in self.heads.targets], parts=parts)

    def score(
        self,
        images: Any,
        prompts: Any = None,
        *,
        root: Path | None = None,
        batch_size: int = 64,
        coverage: float = COVERAGE,
    ) -> ScoredPairs:
        """Score N pairs of image and prompt.

        Args:
            images: one image or many. An image is a path; bytes of an image file, or an open one; a PIL image; pixels
                (H, W), (H, W, C) or (C, H, W) with C of 1, 3 (RGB) or 4 (RGBA), a numpy array or a tensor on any
                device, uint8 or floats in [0, 1]; or a row of `datasets`. Many are a list, a generator, a column of
                pandas or pyarrow, or a batch of pixels (N, ...). What cannot be read is listed in the result, never
                dropped.
            prompts: a text, or a list or column of texts; longer ones are cut at the context length and counted. Lists
                go pair by pair and must be of equal length; a single image or text goes with all of the others. None
                scores what sees the image alone: the other targets, such as consistency, are NaN.
            root: folder that files may not leave through links; None permits every place.
            batch_size: images per forward pass, at least 1.
            coverage: share of human scores that the intervals are to hold, in (0, 1).

        Raises:
            ValueError: lengths differ, a prompt is empty, there is none for a run all of whose targets see it, pixels
                have another shape, type or range, or the coverage is out of range.
            TypeError: something is neither image nor text.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        if not 0 < coverage < 1:
            raise ValueError(f"coverage is {coverage}: give a share between 0 and 1, such as 0.9")
        return self.score_pairs(pair(images, prompts), root=root, batch_size=batch_size, coverage=coverage)

    @own_modes()
    def score_pairs(
        self, pairs: Pairs, *, root: Path | None, batch_size: int, coverage: float = COVERAGE
    ) -> ScoredPairs:
        """Score pairs, of which some may have no prompt: see `score`."""
        if pairs.prompts is None and not self.of_image:
            what = " and ".join(self.labels)
            raise ValueError(f"this run has learned {what} alone, which needs prompts: give one an image")
        texts = list(dict.fromkeys(pairs.prompts or []))
        t_TD, truncated_T = self.embed_prompts(texts)
        text_entry = {text: entry for entry, text in enumerate(texts)}
        rows_of: list[list[int]] = [[] for _ in pairs.sources]
        for row, entry in enumerate(pairs.image_N):
            rows_of[entry].append(row)
        scores = self.nothing(len(pairs.image_N))
        source_N = None if pairs.made_by is None else text_keys(pairs.made_by)
        failed: dict[int, str] = {}
        batches = image_batches(
            pairs.sources,
            lambda _source, image: self.crops(image),
            root=root,
            batch_size=batch_size,
            workers=default_workers(),
            open_file=self.open_file,
        )
        with contextlib.closing(batches), Progress(len(pairs.sources), "scoring", unit="images") as progress:
            for batch in batches:
                failed |= {row: reason for entry, reason in batch.failed for row in rows_of[entry]}
                if batch.entries:
                    rows = [row for entry in batch.entries for row in rows_of[entry]]
                    place_of = [place for place, entry in enumerate(batch.entries) for _ in rows_of[entry]]
                    prompts = pairs.prompts
                    t_BD = None if prompts is None else t_TD[[text_entry[prompts[row]] for row in rows]]
                    own_B = None if source_N is None else source_N[rows]
                    scores.put(
                        rows, self.score_crops(batch.prepared, t_BD, place_of, coverage=coverage, source_B=own_B)
                    )
                progress.advance(len(batch.entries) + len(batch.failed))
        return ScoredPairs(scores=scores, failed=failed, truncated_prompts=int(truncated_T.sum()))

    @property
    def open_file(self) -> Callable[..., Opened]:
        """What makes of a file's bytes what `crops` takes, in any thread; raises `UnreadableImage`."""
        return opener_of(self._backbones, self._views)

    def crops(self, picture: Opened) -> Crops:
        """Return what the backbones need of an RGB image, or of what `open_file` gives; may be called in any thread."""
        pictures = picture if isinstance(picture, tuple) else (picture,) * len(self._views)
        found = [crops_by_source(views, each) for views, each in zip(self._views, pictures, strict=True)]
        return {f"{number}:{source}": each for number, crops in enumerate(found) for source, each in crops.items()}

    def score_crops(
        self,
        crops: Sequence[Crops],
        t_BD: Tensor | None,
        image_B: Sequence[int],
        *,
        coverage: float = COVERAGE,
        source_B: KeyArray | None = None,
    ) -> Scores:
        """Score B pairs: image `image_B[b]` of the `crops` with row b of `embed_prompts`; None: no prompts.

        Intervals hold the share `coverage`; `source_B` are keys of what made the images, where it is known.
        """
        vectors: dict[str, Tensor] = {}
        for number, (backbone, views) in enumerate(zip(self._backbones, self._views, strict=True)):
            own = {
                n: {view.source: image[f"{number}:{view.source}"] for view in views} for n, image in enumerate(crops)
            }
            found = encode_views(views, own, {view.name: list(range(len(crops))) for view in views})
            for view in views:
                vector_IW = self._as_cached(found[view.name].unit_BD, backbone, view)
                name = f"{number + 1}:{view.name}" if number else view.name
                vectors[name] = vector_IW[torch.as_tensor(image_B, device=vector_IW.device)]
        v_BD, labels = vectors[CENTER], self.labels
        if t_BD is None:
            # No score of the image alone looks at it.
            t_BD, labels = torch.zeros(len(v_BD), sum(each.dim for each in self._backbones)).to(v_BD), self.of_image
        t_BD = with_prompts(vectors, t_BD, self._backbones)
        terms = self.heads.base_terms(vectors, v_BD, t_BD)
        found_scores = score(self.heads, [Batch(v_BD, t_BD, {}, fitted_B=terms)])
        if self.trust is not None:
            parts = {name: vector_BW.cpu().numpy() for name, vector_BW in {**vectors, PROMPT: t_BD}.items()}
            seen = {target: found_scores.of(target) for target in found_scores.targets}
            columns = self.trust.judge(seen, parts, coverage=coverage, source_N=source_B)
            found_scores = Scores(found_scores.targets, columns)
        return blank_untrained(found_scores, labels)

    @own_modes()
    def embed_prompts(self, texts: Sequence[str]) -> tuple[Tensor, NDArray[np.bool_]]:
        """Return the embeddings of T texts as a cache holds them, (T, D) float32, and which were cut, (T,) bool.

        Those of several backbones stand side by side. An empty text is none: 0, which `score` takes for it.
        """
        parts, truncated_T = [], np.zeros(len(texts), dtype=bool)
        for backbone in self._backbones:
            t_TD = torch.zeros(len(texts), backbone.dim, device=self.backbone.device)
            for batch in text_batches(backbone, texts, [entry for entry, text in enumerate(texts) if text]):
                t_TD[batch.entries] = self._as_cached(batch.found.unit_BD, backbone)
                truncated_T[batch.entries] |= batch.truncated_B
            parts.append(t_TD)
        return torch.cat(parts, dim=1), truncated_T

    def _as_cached(self, vector_BW: Any, backbone: Backbone, view: View | None = None) -> Tensor:
        # Through the cache's number format, so that a picture scores here what it scores from a cache.
        stored = np.dtype(STORED_DTYPE[backbone.precision])
        if view is not None:
            stored = ViewLayout(width=view.width, recipe=view.recipe).stored_as(stored)
        return torch.from_numpy(vector_BW.astype(stored).astype(np.float32)).to(self.backbone.device)


def _check_there(facts: Mapping[str, Any], request: Mapping[str, Any], run: Path | str) -> None:
    """Refuse a shared folder whose backbone lay on the machine that shared it: of its place the last name is known.

    Raises:
        UserError: which weights are wanted.
    """
    name, file = str(facts["backbone"]), facts["pretrained"]
    lacks = name.startswith(LOCAL_DIR) and not Path(name.removeprefix(LOCAL_DIR)).is_dir()
    if lacks or (file and request["tag"] is None and not Path(file).exists()):
        message = f"needs its backbone {name}{f' {file}' if file else ''}, weights of SHA-256 {facts['weights_sha256']}"
        option = "--pretrained FILE" if file else f"--backbone {LOCAL_DIR}PATH"
        raise UserError(message, place=run, remedy=f"fetch it and give {option}")


def with_prompts(vectors: dict[str, Tensor], t_BD: Tensor, backbones: Sequence[Backbone]) -> Tensor:
    """Add to vectors what bases see of prompts by further backbones; return the first backbone's prompts.

    Args:
        vectors: (B, W) by name, as bases call them; `center` of each backbone is there.
        t_BD: prompts of all backbones side by side.
        backbones: in their order.
    """
    first_BD: Tensor
    first_BD, *further = t_BD.split([each.dim for each in backbones], dim=1)
    for number, other_BD in enumerate(further, start=2):
        vectors[f"{number}:prompt"] = other_BD
        vectors[f"{number}:cosine"] = (cosine(vectors[f"{number}:{CENTER}"], other_BD)[:, None] + 1) / 2
    return first_BD


def _others(folder: RunFolder, run: Path | str, device: str) -> list[Backbone]:
    """Return the backbones of the further caches of a run, where its bases see them."""
    bases, recorded = folder.spec.bases, folder.config.get("beside", [])
    if bases is None or not bases.sees_others:
        return []
    return [
        load_recorded(
            Recorded(each["backbone"], each["request"], place=run, what="was trained on"),
            device=device,
            precision=each["request"]["precision"],
        )
        for each in recorded
    ]


# ---- Images and prompts of a caller as pairs to score: what goes with what


@dataclass(frozen=True)
class Pairs:
    """N pairs: `sources` are the distinct images, their entries 0, 1, ...; pair n has source `image_N[n]`.

    `prompts` is None where there are none at all, and one of them '' where its pair has none. `made_by` are the names
    of what made the images, '' where nobody says so.
    """

    sources: list[ImageFile | MemoryImage]
    image_N: list[int]
    prompts: list[str] | None
    made_by: list[str] | None = None


def pair(images: Any, prompts: Any) -> Pairs:
    """Pair images and prompts.

    Lists go pair by pair and must be of equal length; a single image or a single prompt goes with every one of the
    others. One image that stands in several pairs (the same path, or the same object) is one source.

    Args:
        images: what `as_picture` takes, or a list, column, generator or batch (N, ...) of such.
        prompts: a text; or a list, column or generator of texts; or None for images alone.

    Raises:
        ValueError: lengths differ, an array is no image, or a prompt is empty.
        TypeError: something is neither image nor text.
    """
    given, lone_image = _images(images)
    texts, lone_prompt = texts_of(prompts)
    if texts is not None:
        if lone_image:
            given *= len(texts)
        elif lone_prompt:
            texts *= len(given)
        if len(given) != len(texts):
            message = (
                f"{len(given):,} images but {len(texts):,} prompts: give one prompt an image, or a single text for all"
            )
            raise ValueError(message)
    entry_of: dict[Hashable, int] = {}
    sources: list[ImageFile | MemoryImage] = []
    image_N = []
    for place, image in enumerate(given):
        key = str(as_picture(image, "")) if isinstance(image, (str, os.PathLike)) else id(image)
        if key not in entry_of:
            entry_of[key] = len(sources)
            sources.append(_source(len(sources), image, f"images[{place}]"))
        image_N.append(entry_of[key])
    return Pairs(sources, image_N, texts)


def _images(images: Any) -> tuple[list[Any], bool]:
    """Return images as a list, and whether a single one was given."""
    images = plain(images)
    if isinstance(images, Mapping) and (column := image_column(images)) and not is_one_image(images[column]):
        images = images[column]  # a batch of rows, by column
    if is_one_image(images):
        return [images], True
    if is_array(images):
        images = as_numpy(images)
    return _listed(images, "images", "an image or a list of images"), False


def texts_of(prompts: Any) -> tuple[list[str] | None, bool]:
    """Return prompts as a list, None where there are none, and whether it is a single one; refuse what is no text."""
    prompts = plain(prompts)
    if prompts is None:
        return None, False
    lone = isinstance(prompts, str)
    given = [prompts] if lone else _listed(prompts, "prompts", "a text or a list of texts")
    texts = []
    for number, text in enumerate(given):
        place = "prompts" if lone else f"prompts[{number}]"
        if not isinstance(text, str):
            raise TypeError(f"{place} is {named(text)}, not a text")
        if fault := prompt_fault(text):
            raise ValueError(f"{place} {fault}")
        texts.append(str(text))
    return texts, lone


def _listed(values: Any, name: str, wanted: str) -> list[Any]:
    # A table would give the names of its columns, a set its values in any order.
    if hasattr(values, "columns"):
        raise TypeError(f"{name} is a table, {named(values)}: give one of its columns")
    is_scalar = is_array(values) and not values.ndim
    if isinstance(values, (Mapping, Set, bytes)) or not isinstance(values, Iterable) or is_scalar:
        raise TypeError(f"{name} is {named(values)}: give {wanted}")
    return [plain(value) for value in values]


def _source(entry: int, image: Any, place: str) -> ImageFile | MemoryImage:
    picture = as_picture(image, place)
    if not isinstance(picture, Path):
        return MemoryImage(entry, picture)
    # The caller is the one who says where a file may lie: `root` holds for what is opened. An address stays one.
    is_address = isinstance(picture, RemotePath)
    path = picture if is_address else Path(understood(str(picture), Path(), allow_outside=True)[0])
    return ImageFile(entry, path, None)


# ---- Scores of a run that changed its backbone, on the rows of a cache whose embeddings its heads do not know


CLOSE = 2e-3  # how far a recorded score may be from what the run gives now
RECORDED, ANEW = "the scores that the run recorded", "scored from the images with the run's own tower"


SCORED_AT_ONCE = 64  # images


class TunedScores(NamedTuple):
    """Scores of the rows, and where they come from, in words."""

    scores: Scores
    origin: str


def tuned_scores(
    run: RunFolder, rows: CacheRows, *, image_root: Path | None, backbone: str | None, pretrained: str | None
) -> TunedScores:
    """Return the scores of all rows of a cache.

    Those that the run recorded are taken where a few of them, scored anew from their images, are the same; also where
    images or backbone are not there, which is said.

    Args:
        run: made by `finetune`.
        rows: of a cache of the backbone that the run started from.
        image_root: where the images lie; None takes the folder that the cache recorded.
        backbone: where the backbone lies now, if it has moved.
        pretrained: where its checkpoint lies now, if it has moved.

    Raises:
        UserError: an image that has to be scored is missing or cannot be read; the backbone is not the run's.
    """
    stored, few = _stored(run, rows), np.array(spread(len(rows.rows)))
    try:
        found = image_files(rows, image_root, allow_outside=False)
        scorer = Scorer.load(run.path, backbone=backbone, pretrained=pretrained)
        of_few = None if stored is None else score_images(scorer, rows, found, few)
    except UserError as error:
        if stored is None or image_root or backbone or pretrained:
            raise
        return TunedScores(stored, f"{RECORDED}, not checked ({error})")
    if stored is None or of_few is None:
        return TunedScores(score_images(scorer, rows, found, np.arange(len(rows.rows))), ANEW)
    apart = _apart(stored, of_few, few)
    if apart < CLOSE:
        return TunedScores(stored, f"{RECORDED}; {len(few)} of them, scored anew, differ by at most {apart:.1g}")
    everything = np.arange(len(rows.rows))
    anew = score_images(scorer, rows, found, everything)
    apart = _apart(stored, anew, everything)
    return TunedScores(anew, f"{ANEW}; those that the run recorded differ by up to {apart:.2g}")


def score_images(scorer: Scorer, rows: CacheRows, found: ImageFiles, chosen: NDArray[np.int64]) -> Scores:
    """Score some rows from their image files.

    Raises:
        UserError: one of the files cannot be read, or holds another picture than the one that was extracted.
    """
    entries, image_M = np.unique(rows.rows.image[chosen], return_inverse=True)
    files = [replace(found.files[entry], entry=place) for place, entry in enumerate(entries.tolist())]
    prompts = [str(prompt) for prompt in rows.rows.text["prompt"][chosen]]
    pairs = Pairs([*files], image_M.tolist(), prompts)
    scored = scorer.score_pairs(pairs, root=found.root, batch_size=SCORED_AT_ONCE)
    if scored.failed:
        row, reason = next(iter(scored.failed.items()))
        raise UserError(reason, place=files[image_M[row]].path, remedy="give the images as they were extracted")
    return scored.scores


def _apart(stored: Scores, anew: Scores, chosen: NDArray[np.int64]) -> float:
    """Return the largest difference of a score; heads that were not trained have none."""
    differences = [np.abs(stored.of(label)[chosen] - anew.of(label)) for label in stored.targets]
    return float(np.nan_to_num(np.concatenate(differences)).max())


def _stored(run: RunFolder, rows: CacheRows) -> Scores | None:
    """Return what the run recorded, if the cache has the very rows and images that it trained on."""
    if any(run.config["cache"][name] != rows.header[name] for name in ("request", "plan")):
        return None
    names = [target.name for target in run.spec.targets]
    parts = [f"{name}{part}" for name in names for part in ("", "_base", "_delta")]
    recorded = read_predictions(run.path / "predictions.csv", ("image", "prompt", *parts))
    pairs = list(zip(rows.rows.text["file"], rows.rows.text["prompt"], strict=True))
    if [(row["image"], row["prompt"]) for row in recorded] != pairs:
        return None  # the same plan, but images that could not be read at the time can be read now
    found = {name: np.array([float(row[name] or "nan") for row in recorded], dtype=np.float32) for name in parts}
    return Scores({name: ScoreColumns(found[name], found[f"{name}_base"], found[f"{name}_delta"]) for name in names})
