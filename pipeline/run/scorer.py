"""A trained run as a scorer of new images: backbone and heads together.

Shapes: N pairs of image and prompt, B images of a batch, D width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.device import choose_device
from deltaclip.base.errors import UserError
from deltaclip.base.progress import Progress
from deltaclip.base.targets import need_prompts
from deltaclip.features.backbone.batches import default_workers, image_batches
from deltaclip.features.backbone.encode_texts import text_batches
from deltaclip.features.backbone.views import file_opener, make_views
from deltaclip.features.data.views import CENTER
from deltaclip.features.store.schema import ViewLayout
from deltaclip.features.store.writer import STORED_DTYPE
from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.model.scores import Batch
from deltaclip.pipeline.run.folder import open_run
from deltaclip.pipeline.run.pairing import Pairs, pair
from deltaclip.pipeline.run.predictions import Scores, blank_untrained, score
from deltaclip.pipeline.run.recorded_backbone import Recorded, load_recorded, put_tuned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor, nn

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.views import View

VIEW_BATCH = 64  # tiles of a view that go through the backbone at a time


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """Scores of N pairs; NaN in the rows of `failed`, which maps a row to the reason.

    `scores` has quality and consistency with their bases and corrections; `q` and `c` are the first two of it.
    """

    scores: Scores
    failed: dict[int, str]
    truncated_prompts: int

    @property
    def q(self) -> NDArray[np.float32]:
        """Quality, (N,) float32 in [0, 1]."""
        return self.scores.q

    @property
    def c(self) -> NDArray[np.float32]:
        """Consistency, (N,) float32 in [0, 1]."""
        return self.scores.c


class Scorer:
    """Heads of a run with the backbone that they were trained on.

    It can be copied and pickled, whole: a copy holds the weights once more, and needs neither run nor checkpoint.
    """

    def __init__(self, heads: nn.Module, backbone: Backbone, labels: Sequence[str]) -> None:
        self.heads, self.backbone, self.labels = heads, backbone, tuple(labels)
        self.needs_prompts = need_prompts(self.labels)
        self._views = self._make_views()

    def _make_views(self) -> list[View]:
        kernels = self.heads.kernels if isinstance(self.heads, ResidualHeads) else None
        names = dict.fromkeys([CENTER, *([kernels.view] if kernels else [])])
        return make_views(self.backbone, list(names), batch_size=VIEW_BATCH)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the views, which are functions around the backbone and are made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._views = self._make_views()

    @classmethod
    def load(
        cls,
        run: Path | str,
        *,
        device: str = "auto",
        backbone: str | None = None,
        pretrained: str | None = None,
        precision: Precision | None = None,
    ) -> Scorer:
        """Load a run directory.

        Args:
            run: made by `deltaclip train`.
            device: auto, cpu, cuda or cuda:N.
            backbone: where the backbone lies now, if it has moved.
            pretrained: where its checkpoint lies now, if it has moved.
            precision: of the backbone; None takes the one of the run's cache.

        Raises:
            UserError: a damaged run, or a backbone whose weights are not those of the run.
        """
        folder = open_run(Path(run))
        facts, request = folder.config["backbone"], folder.config["request"]
        if request.get("imported"):
            message = f"was trained on imported embeddings: nothing says which weights of {facts['backbone']} made them"
            remedy = "extract the images with `deltaclip extract` and train on that cache"
            raise UserError(message, place=run, remedy=remedy)
        chosen = choose_device(device)
        loaded = load_recorded(
            Recorded(facts, request, place=run, what="was trained on"),
            device=chosen,
            backbone=backbone,
            pretrained=pretrained,
            precision=precision or ("fp32" if folder.is_tuned else None),  # in which weights were tuned
        )
        if folder.is_tuned:
            put_tuned(loaded, folder)
        return cls(folder.heads.to(chosen), loaded, folder.config["labels"])

    def score(self, images: Any, prompts: Any = None, *, root: Path | None = None, batch_size: int = 64) -> ScoredPairs:
        """Score N pairs of image and prompt.

        Args:
            images: one image or many. An image is a path; bytes of an image file, or an open one; a PIL image; pixels
                (H, W), (H, W, C) or (C, H, W) with C of 1, 3 (RGB) or 4 (RGBA), a numpy array or a tensor on any
                device, uint8 or floats in [0, 1]; or a row of `datasets`. Many are a list, a generator, a column of
                pandas or pyarrow, or a batch of pixels (N, ...). What cannot be read is listed in the result, never
                dropped.
            prompts: a text, or a list or column of texts; longer ones are cut at the context length and counted. Lists
                go pair by pair and must be of equal length; a single image or text goes with all of the others. None
                scores quality alone: consistency is NaN.
            root: folder that files may not leave through links; None permits every place.
            batch_size: images per forward pass, at least 1.

        Raises:
            ValueError: lengths differ, a prompt is empty, there is none for a run that learned consistency alone, or
                pixels have another shape, type or range.
            TypeError: something is neither image nor text.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        return self.score_pairs(pair(images, prompts), root=root, batch_size=batch_size)

    def score_pairs(self, pairs: Pairs, *, root: Path | None, batch_size: int) -> ScoredPairs:
        """Score pairs, of which some may have no prompt: see `score`."""
        if pairs.prompts is None and all(need_prompts([label]) for label in self.labels):
            raise ValueError("this run has learned consistency alone, which needs prompts: give one an image")
        texts = list(dict.fromkeys(pairs.prompts or []))
        t_TD, truncated_T = self.embed_prompts(texts)
        text_entry = {text: entry for entry, text in enumerate(texts)}
        rows_of: list[list[int]] = [[] for _ in pairs.sources]
        for row, entry in enumerate(pairs.image_N):
            rows_of[entry].append(row)
        columns = {name: np.full(len(pairs.image_N), np.nan, dtype=np.float32) for name in Scores.__dataclass_fields__}
        failed: dict[int, str] = {}
        batches = image_batches(
            pairs.sources,
            lambda _source, image: self.crops(image),
            root=root,
            batch_size=batch_size,
            workers=default_workers(),
            open_file=file_opener(self.backbone),
        )
        with contextlib.closing(batches), Progress(len(pairs.sources), "scoring", unit="images") as progress:
            for batch in batches:
                failed |= {row: reason for entry, reason in batch.failed for row in rows_of[entry]}
                if batch.entries:
                    rows = [row for entry in batch.entries for row in rows_of[entry]]
                    place_of = [place for place, entry in enumerate(batch.entries) for _ in rows_of[entry]]
                    prompts = pairs.prompts
                    t_BD = None if prompts is None else t_TD[[text_entry[prompts[row]] for row in rows]]
                    for name, values in self.score_crops(batch.prepared, t_BD, place_of).columns().items():
                        columns[name][rows] = values
                progress.advance(len(batch.entries) + len(batch.failed))
        return ScoredPairs(scores=Scores(**columns), failed=failed, truncated_prompts=int(truncated_T.sum()))

    def crops(self, image: Image) -> dict[str, Tensor]:
        """Return what the backbone needs of an RGB image, by source of the views; may be called in any thread."""
        crops: dict[str, Tensor] = {}
        for view in self._views:
            if view.source not in crops:
                crops[view.source] = view.crops(image)
        return crops

    def score_crops(self, crops: Sequence[dict[str, Tensor]], t_BD: Tensor | None, image_B: Sequence[int]) -> Scores:
        """Score B pairs: image `image_B[b]` of the `crops` with the embedding `t_BD[b]`; without prompts, quality."""
        vectors = {}
        for view in self._views:
            vector_IW = self._as_cached(view.encode([image[view.source] for image in crops])[0], view)
            vectors[view.name] = vector_IW[torch.as_tensor(image_B, device=vector_IW.device)]
        v_BD, terms, labels = vectors[CENTER], {}, self.labels
        if t_BD is None:
            # No score of quality looks at it.
            t_BD, labels = torch.zeros_like(v_BD), tuple(label for label in labels if not need_prompts([label]))
        if isinstance(self.heads, ResidualHeads) and self.heads.kernels:
            terms = self.heads.kernel_terms(vectors[self.heads.kernels.view], t_BD)
        unlabelled = torch.full((len(v_BD),), torch.nan, device=v_BD.device)
        batch = Batch(v_BD, t_BD, unlabelled, unlabelled, **terms)
        return blank_untrained(score(self.heads, [batch]), labels)

    def embed_prompts(self, texts: Sequence[str]) -> tuple[Tensor, NDArray[np.bool_]]:
        """Return the embeddings of T texts as a cache holds them, (T, D) float32, and which were cut, (T,) bool.

        An empty text is none: 0, which `score` takes for it.
        """
        t_TD = torch.zeros(len(texts), self.backbone.dim, device=self.backbone.device)
        truncated_T = np.zeros(len(texts), dtype=bool)
        for batch in text_batches(self.backbone, texts, [entry for entry, text in enumerate(texts) if text]):
            t_TD[batch.entries] = self._as_cached(batch.found.unit_BD)
            truncated_T[batch.entries] = batch.truncated_B
        return t_TD, truncated_T

    def _as_cached(self, vector_BW: Any, view: View | None = None) -> Tensor:
        # Through the cache's number format, so that a picture scores here what it scores from a cache.
        stored = np.dtype(STORED_DTYPE[self.backbone.precision])
        if view is not None:
            stored = ViewLayout(width=view.width, recipe=view.recipe).stored_as(stored)
        return torch.from_numpy(vector_BW.astype(stored).astype(np.float32)).to(self.backbone.device)
