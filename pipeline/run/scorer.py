"""A trained run as a scorer of new images: backbone and heads together. Spec sections 8 and 11.

Shapes: N pairs of image and prompt, B images of a batch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.device import choose_device
from deltaclip.base.errors import UserError
from deltaclip.base.progress import Progress
from deltaclip.features.backbone.batches import ImageFile, default_workers
from deltaclip.features.backbone.checkpoint import find_weights
from deltaclip.features.backbone.encode_texts import text_batches
from deltaclip.features.backbone.load import load_backbone, request_facts
from deltaclip.features.backbone.views import encoded_batches, make_views
from deltaclip.features.data.views import CENTER
from deltaclip.features.store.schema import ViewLayout
from deltaclip.features.store.takeover import differences
from deltaclip.features.store.writer import STORED_DTYPE
from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.model.scores import Batch
from deltaclip.pipeline.run.folder import open_run
from deltaclip.pipeline.run.predictions import Scores, blank_untrained, score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.views import View


@dataclass(frozen=True, kw_only=True)
class FileScores:
    """Scores of N files; NaN in the rows of `failed`, which maps a row to the reason."""

    scores: Scores
    failed: dict[int, str]
    truncated_prompts: int


class Scorer:
    """Heads of a run with the backbone that they were trained on."""

    def __init__(self, heads: nn.Module, backbone: Backbone, labels: Sequence[str]) -> None:
        self.heads, self.backbone, self.labels = heads, backbone, tuple(labels)

    @classmethod
    def load(
        cls,
        run: Path | str,
        *,
        device: str = "auto",
        backbone: str | None = None,
        pretrained: str | None = None,
    ) -> Scorer:
        """Load a run directory.

        Args:
            run: made by `deltaclip train`.
            device: auto, cpu, cuda or cuda:N.
            backbone: where the backbone lies now, if it has moved.
            pretrained: where its checkpoint lies now, if it has moved.

        Raises:
            UserError: a damaged run, or a backbone whose weights are not those of the run.
        """
        folder = open_run(Path(run))
        facts, request = folder.config["backbone"], folder.config["request"]
        if request.get("imported"):
            message = f"was trained on imported embeddings: nothing says which weights of {facts['backbone']} made them"
            remedy = "extract the images with `deltaclip extract` and train on that cache"
            raise UserError(message, place=run, remedy=remedy)
        source = find_weights(
            backbone or facts["backbone"], pretrained if backbone or pretrained else facts["pretrained"]
        )
        found = request_facts(source, request["precision"], quick_gelu=request["quick_gelu_asked"])
        if wrong := differences(request, found):
            remedy = "give --backbone and --pretrained of the run's own backbone"
            raise UserError(f"was trained on another backbone: {'; '.join(wrong)}", place=run, remedy=remedy)
        chosen = choose_device(device)
        loaded = load_backbone(
            source, device=chosen, precision=request["precision"], quick_gelu=request["quick_gelu_asked"]
        )
        return cls(folder.heads.to(chosen), loaded, folder.config["labels"])

    def score_files(
        self, paths: Sequence[Path], prompts: Sequence[str], *, root: Path | None = None, batch_size: int = 64
    ) -> FileScores:
        """Score image files against prompts, N of each.

        Args:
            paths: image files; what cannot be read is listed in the result, never dropped.
            prompts: longer ones are cut at the context length and counted.
            root: folder that the files may not leave through links; None permits every place.
            batch_size: images per forward pass.
        """
        texts = list(dict.fromkeys(prompts))
        t_TD, truncated = self._embed_texts(texts)
        text_entry = {text: entry for entry, text in enumerate(texts)}
        columns = {name: np.full(len(paths), np.nan, dtype=np.float32) for name in Scores.__dataclass_fields__}
        failed: dict[int, str] = {}
        files = [ImageFile(row, path, None) for row, path in enumerate(paths)]
        views = make_views(self.backbone, self._view_names(), batch_size=batch_size)
        wanted = {view.name: np.ones(len(paths), dtype=bool) for view in views}
        batches = encoded_batches(files, views, wanted, root=root, batch_size=batch_size, workers=default_workers())
        with Progress(len(paths), "scoring", unit="images") as progress:
            for batch in batches:
                failed.update(batch.failed)
                if batch.num_images:
                    entries = batch.found[CENTER].entries
                    t_BD = t_TD[[text_entry[prompts[row]] for row in entries]]
                    vectors = {view.name: self._as_cached(batch.found[view.name].vector_BW, view) for view in views}
                    for name, values in self._score(vectors, t_BD).columns().items():
                        columns[name][entries] = values
                progress.advance(batch.num_images + len(batch.failed))
        return FileScores(scores=Scores(**columns), failed=failed, truncated_prompts=truncated)

    def _view_names(self) -> list[str]:
        kernels = self.heads.kernels if isinstance(self.heads, ResidualHeads) else None
        return list(dict.fromkeys([CENTER, *([kernels.view] if kernels else [])]))

    def _score(self, vectors: dict[str, Tensor], t_BD: Tensor) -> Scores:
        v_BD, terms = vectors[CENTER], {}
        if isinstance(self.heads, ResidualHeads) and self.heads.kernels:
            terms = self.heads.kernel_terms(vectors[self.heads.kernels.view], t_BD)
        unlabelled = torch.full((len(v_BD),), torch.nan, device=v_BD.device)
        batch = Batch(v_BD, t_BD, unlabelled, unlabelled, **terms)
        return blank_untrained(score(self.heads, [batch]), self.labels)

    def _embed_texts(self, texts: list[str]) -> tuple[Tensor, int]:
        t_TD, truncated = torch.empty(len(texts), self.backbone.dim, device=self.backbone.device), 0
        for batch in text_batches(self.backbone, texts, range(len(texts))):
            t_TD[batch.entries] = self._as_cached(batch.found.unit_BD)
            truncated += int(batch.truncated_B.sum())
        return t_TD, truncated

    def _as_cached(self, vector_BW: Any, view: View | None = None) -> Tensor:
        # Through the cache's number format, so that a picture scores here what it scores from a cache.
        stored = np.dtype(STORED_DTYPE[self.backbone.precision])
        if view is not None:
            stored = ViewLayout(width=view.width, recipe=view.recipe).stored_as(stored)
        return torch.from_numpy(vector_BW.astype(stored).astype(np.float32)).to(self.backbone.device)
