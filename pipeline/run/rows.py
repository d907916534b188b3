"""Rows of a cache as batches of tensors: small caches in memory, large ones read as they are needed.

Knows caches and tensors. Must not know heads or run directories.

Shapes: N rows, I distinct images, T distinct texts, D width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.targets import LABELS
from deltaclip.features.data.prompts import prompt_group
from deltaclip.features.data.views import RECIPES
from deltaclip.features.store.joined import open_cache
from deltaclip.features.store.near import near_copies
from deltaclip.pipeline.run.keys import FILES, VECTORS, RowKeys, name_keys, same_prompts
from deltaclip.pipeline.training.batches import MemoryBatches, memory_batches, taken
from deltaclip.pipeline.training.streaming import StreamBatches

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.features.store.rows import Rows
    from deltaclip.features.store.store import FeatureStore, Kind
    from deltaclip.pipeline.scoring.groups import KeyArray

MEMORY_BYTES = 1 << 30  # vectors up to this size are held in memory
WINDOW_BYTES = 128 << 20  # vectors of larger caches that are in memory at a time; twice that between two windows

Batches = MemoryBatches | StreamBatches


@dataclass(frozen=True, kw_only=True)
class CacheRows:
    """A cache: labels in [0, 1] with NaN where missing, names, and embeddings as stored (float32 or float16).

    `image_key_I`, uint64, are of the images' content, `tokens_T` of what the text tower is given (see `RowKeys`).

    The embeddings are in memory, or `store` is open to read them; `x_IF` are the vectors of a further view, where one
    was asked for: these are always in memory.
    """

    path: Path
    header: dict[str, Any]
    facts: dict[str, Any]
    dataset: dict[str, Any]
    rows: Rows
    dim: int
    device: torch.device
    image_key_I: KeyArray
    tokens_T: KeyArray
    v_ID: Tensor | None = None
    t_TD: Tensor | None = None
    x_IF: Tensor | None = None
    store: FeatureStore | None = None

    @cached_property
    def keys(self) -> RowKeys:
        """Return what the rows are, whatever they are called."""
        prompts = self.rows.text["prompt"]
        imported = self.facts.get("imported", {})
        image_N, has_prompt_N = self.image_key_I[self.rows.image], self.rows.prompt >= 0
        tokens_N = np.zeros(len(image_N), dtype=np.uint64)
        tokens_N[has_prompt_N] = self.tokens_T[self.rows.prompt[has_prompt_N]]
        return RowKeys(
            image_N=image_N,
            text_N=np.where(has_prompt_N, name_keys(prompts, prompt_group)[prompts.codes], image_N),
            tokens_N=tokens_N,
            known_by=VECTORS if imported.get("image_keys") == "embedding" else FILES,
        )

    @cached_property
    def prompt_codes(self) -> NDArray[np.int64]:
        """Return a code of the prompt of each row, (N,), equal where the text tower or a reader sees one prompt."""
        return same_prompts(self.keys.text_N, self.keys.tokens_N)

    @cached_property
    def near_copies(self) -> NDArray[np.int64]:
        """Return the pairs of images of the rows that are near copies, (P, 2)."""
        return near_copies(self.vectors, np.unique(self.rows.image))

    def vectors(self, entries_K: NDArray[np.int64]) -> NDArray[np.floating]:
        """Return the embeddings of some images as stored, (K, D); `entries_K` are rising."""
        if self.v_ID is None:
            return self._read("images", entries_K).cpu().numpy()
        return self.v_ID[torch.from_numpy(entries_K).to(self.device)].cpu().numpy()

    def label(self, name: str) -> NDArray[np.float32]:
        """Return a label column, (N,) float32 in [0, 1], NaN where missing."""
        return self.rows.numbers[name]

    def view(self) -> Tensor:
        """Return the vector of the further view of every row, (N, F) float32."""
        assert self.x_IF is not None
        return self.x_IF[torch.from_numpy(self.rows.image).to(self.device)].float()

    def prompts(self) -> Tensor:
        """Return the prompt embedding of every row, (N, D) float32, 0 without one; of rows with a further view."""
        assert self.t_TD is not None, "a further view has everything in memory"
        return taken(self.t_TD, torch.from_numpy(self.rows.prompt).to(self.device), missing=0.0)

    def cosine(self, chosen: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return s = v . t of some rows (all when None), (N,) float32 in [-1, 1]."""
        found, done = np.empty(len(self.rows) if chosen is None else len(chosen), dtype=np.float32), 0
        for batch in self.batches(chosen, batch_size=1).in_order() if len(found) else ():
            found[done : done + len(batch.q_B)] = (batch.v_BD * batch.t_BD).sum(dim=1).cpu().numpy()
            done += len(batch.q_B)
        return found

    def batches(
        self,
        rows: NDArray[np.int64] | None,
        *,
        batch_size: int,
        seed: int = 0,
        columns: Mapping[str, Tensor] | None = None,
        explanations: bool = False,
    ) -> Batches:
        """Return batches of some rows (all when None), in float32 whatever is stored; nothing is copied yet.

        `columns` are further fields of a batch, one value for each of these rows; `explanations` adds e_BD.
        """
        chosen = slice(None) if rows is None else rows
        quality, consistency = (torch.from_numpy(self.label(name)[chosen]).to(self.device) for name in LABELS)
        image, prompt = self.rows.image[chosen], self.rows.prompt[chosen]
        explanation = self.rows.explanation[chosen] if explanations else None
        columns = {name: column.to(self.device) for name, column in (columns or {}).items()}
        if self.v_ID is None or self.t_TD is None:
            return StreamBatches(
                read_images=lambda entries: self._read("images", entries),
                read_texts=lambda entries: self._read("texts", entries),
                q_N=quality,
                c_N=consistency,
                image_index_N=image,
                text_index_N=prompt,
                columns_N=columns,
                explanation_index_N=explanation,
                batch_size=batch_size,
                seed=seed,
                window_rows=self._window_rows(),
            )
        return memory_batches(
            self.v_ID,
            self.t_TD,
            quality,
            consistency,
            image_index_N=torch.from_numpy(image).to(self.device),
            text_index_N=torch.from_numpy(prompt).to(self.device),
            columns_N=columns,
            explanation_index_N=None if explanation is None else torch.from_numpy(explanation).to(self.device),
            batch_size=batch_size,
            seed=seed,
        )

    def _read(self, kind: Kind, entries_K: NDArray[np.int64]) -> Tensor:
        assert self.store is not None
        return torch.from_numpy(self.store.take(kind, entries_K)).to(self.device)

    def _window_rows(self) -> int:
        assert self.store is not None
        row_bytes = 2 * self.dim * self.store.group("images")["embedding"].dtype.itemsize  # an image and a text
        return max(1, WINDOW_BYTES // int(row_bytes))


def view_there(path: Path, view: str) -> str | None:
    """Return the name of a view if a cache has it, else None.

    Raises:
        UserError: see `FeatureStore.open`; or there is no view of that name, or some images lack it.
    """
    with open_cache(path) as store:
        if view in RECIPES and view not in store.view_names():
            return None
        store.check_view(view)
        return view


def image_keys(store: FeatureStore) -> KeyArray:
    """Return the first 64 bits of the content address of each image, (I,) uint64."""
    return np.ascontiguousarray(store.keys("images")[:, :8]).view("<u8")[:, 0].astype(np.uint64)


def load_rows(path: Path, device: str, *, view: str | None = None, in_memory: bool = False) -> CacheRows:
    """Read a cache: its embeddings into memory if they take at most `MEMORY_BYTES`, else when they are needed.

    The vectors of a view besides `center`, if one is named, are read into memory, and all others with them; so is
    everything where `in_memory` says so. A file that stays open is the one that was checked here, also when another
    takes its name.

    Raises:
        UserError: see `FeatureStore.open`; or images lack the view.
    """
    with contextlib.ExitStack() as opened:
        store = opened.enter_context(open_cache(path))
        in_memory = (
            in_memory or view is not None or store.size_bytes("images") + store.size_bytes("texts") <= MEMORY_BYTES
        )
        vectors = {} if view is None else {"x_IF": store.embeddings("images", view=view)}
        if in_memory:
            vectors |= {"v_ID": store.embeddings("images"), "t_TD": store.embeddings("texts")}
        rows = CacheRows(
            path=path,
            header=store.header,
            facts=store.facts,
            dataset=store.dataset,
            rows=store.rows(),
            dim=store.dim,
            device=torch.empty(0, device=device).device,
            image_key_I=image_keys(store),
            tokens_T=store.tokens(),
            store=None if in_memory else store,
            **{name: torch.from_numpy(vectors_KW).to(device) for name, vectors_KW in vectors.items()},
        )
        if not in_memory:
            opened.pop_all()  # open as long as the rows are there
        return rows
