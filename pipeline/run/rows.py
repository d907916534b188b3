"""Rows of a cache as tensors, ready to train on or to score.

Knows caches and tensors. Must not know heads or run directories. Spec section 6.

Shapes: N rows, I distinct images, T distinct texts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from deltaclip.features.data.views import RECIPES
from deltaclip.features.store.store import FeatureStore, Rows
from deltaclip.pipeline.training.batches import MemoryBatches, memory_batches

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

LABELS = ("quality", "consistency")


@dataclass(frozen=True, kw_only=True)
class CacheRows:
    """A cache in memory: embeddings as stored (float32 or float16), labels in [0, 1] with NaN where missing.

    `x_IF` are the vectors of a further view, where one was asked for.
    """

    path: Path
    header: dict[str, Any]
    facts: dict[str, Any]
    dataset: dict[str, Any]
    rows: Rows
    v_ID: Tensor
    t_TD: Tensor
    x_IF: Tensor | None = None

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return int(self.v_ID.shape[1])

    def label(self, name: str) -> NDArray[np.float32]:
        """Return a label column, (N,) float32 in [0, 1], NaN where missing."""
        return self.rows.numbers[name]

    def view(self) -> Tensor:
        """Return the vector of the further view of every row, (N, F) float32."""
        assert self.x_IF is not None
        return self.x_IF[torch.from_numpy(self.rows.image).to(self.x_IF.device)].float()

    def prompts(self) -> Tensor:
        """Return the prompt embedding of every row, (N, D) float32."""
        return self.t_TD[torch.from_numpy(self.rows.prompt).to(self.t_TD.device)].float()

    def cosine(self) -> NDArray[np.float32]:
        """Return s = v . t of every row, (N,) float32 in [-1, 1]."""
        parts = [(batch.v_BD * batch.t_BD).sum(dim=1) for batch in self.batches(None, batch_size=1).in_order()]
        return torch.cat(parts).cpu().numpy()

    def batches(
        self,
        rows: NDArray[np.int64] | None,
        *,
        batch_size: int,
        seed: int = 0,
        columns: Mapping[str, Tensor] | None = None,
        explanations: bool = False,
    ) -> MemoryBatches:
        """Return batches of some rows (all when None), in float32 whatever is stored; nothing is copied yet.

        `columns` are further fields of a batch, one value for each of these rows; `explanations` adds e_BD.
        """
        chosen = slice(None) if rows is None else rows
        device = self.v_ID.device
        explanation_N = torch.from_numpy(self.rows.explanation[chosen]).to(device) if explanations else None
        return memory_batches(
            self.v_ID,
            self.t_TD,
            torch.from_numpy(self.label("quality")[chosen]).to(device),
            torch.from_numpy(self.label("consistency")[chosen]).to(device),
            image_index_N=torch.from_numpy(self.rows.image[chosen]).to(device),
            text_index_N=torch.from_numpy(self.rows.prompt[chosen]).to(device),
            columns_N={name: column.to(device) for name, column in (columns or {}).items()},
            explanation_index_N=explanation_N,
            batch_size=batch_size,
            seed=seed,
        )


def view_there(path: Path, view: str) -> str | None:
    """Return the name of a view if a cache has it, else None.

    Raises:
        UserError: see `FeatureStore.open`; or there is no view of that name, or some images lack it.
    """
    with FeatureStore.open(path) as store:
        if view in RECIPES and view not in store.view_names():
            return None
        store.check_view(view)
        return view


def load_rows(path: Path, device: str, *, view: str | None = None) -> CacheRows:
    """Read a cache into memory, and the vectors of a view besides `center` if one is named.

    Raises:
        UserError: see `FeatureStore.open`; or images lack the view.
    """
    with FeatureStore.open(path) as store:
        x_IF = None if view is None else torch.from_numpy(store.embeddings("images", view=view)).to(device)
        return CacheRows(
            path=path,
            header=store.header,
            facts=store.facts,
            dataset=store.dataset,
            rows=store.rows(),
            v_ID=torch.from_numpy(store.embeddings("images")).to(device),
            t_TD=torch.from_numpy(store.embeddings("texts")).to(device),
            x_IF=x_IF,
        )
