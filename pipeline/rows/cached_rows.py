"""Rows of a cache as batches of tensors: small caches in memory, large ones read as they are needed; and who is who.

Rows have 64-bit keys of what they show and ask for, the same in every cache and run, whatever things are called. Knows
caches and tensors. Must not know heads, splits or run directories.

Shapes: N rows, K texts, I distinct images, T distinct texts, D width.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import refuse_other
from deltaclip.base.vocabulary import CONSISTENCY, QUALITY, Target
from deltaclip.features.data.prompts import prompt_group
from deltaclip.features.data.views import CENTER, RECIPES, STAGES, STATISTICS, of_images
from deltaclip.features.store.near import near_copies
from deltaclip.features.store.shards import open_cache
from deltaclip.pipeline.loop.batches import MemoryBatches, StreamBatches, memory_batches, taken
from deltaclip.pipeline.scoring.groups import group_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.features.store.reader import FeatureStore, Kind, Rows
    from deltaclip.features.store.schema import StoredPairs
    from deltaclip.features.store.texts import TextColumn
    from deltaclip.pipeline.loop.batches import Columns
    from deltaclip.pipeline.scoring.groups import KeyArray


# ---- Rows of a cache as batches of tensors: small caches in memory, large ones read as they are needed


MEMORY_BYTES = 1 << 30  # vectors up to this size are held in memory
WINDOW_BYTES = 128 << 20  # vectors of larger caches that are in memory at a time; twice that between two windows

Batches = MemoryBatches | StreamBatches


@dataclass(frozen=True, kw_only=True)
class CacheRows:
    """A cache: labels in [0, 1] with NaN where missing, names, and embeddings as stored (float32 or float16).

    `image_key_I`, uint64, are of the images' content, `tokens_T` of what the text tower is given (see `RowKeys`).

    The embeddings are in memory, or `store` is open to read them; `views` has further views of the images, where some
    were asked for: (I, W) each, or None where they are read too. `others` are caches of the same rows by other
    backbones.
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
    views: Mapping[str, Tensor | None] = field(default_factory=dict)
    anchors: Tensor | None = None
    others: tuple[Beside, ...] = ()
    store: FeatureStore | None = None
    targets: tuple[Target, ...] = (QUALITY, CONSISTENCY)
    pairs: StoredPairs | None = None  # that people chose between

    @property
    def has_text(self) -> bool:
        """Whether the backbone has a text tower: without one, `targets` are those that see no prompt."""
        return has_text_tower(self.facts)

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

    def inputs(self) -> dict[str, RowVectors]:
        """Return what bases may see of rows, by name: `center` (v), `prompt` (t), `cosine` and the further views.

        Of the second cache and others the names begin with its number: `2:center`.
        """
        found = {"center": RowVectors(self, self._images), "prompt": RowVectors(self, self._texts)}
        found["cosine"] = RowVectors(self, self._cosines)
        if self.anchors is not None:
            found["anchors"] = RowVectors(self, self._anchor_cosines)
        for name in self.views:
            found[name] = RowVectors(self, functools.partial(self._images, view=name))
        for number, other in enumerate(self.others, start=2):
            seen = other.rows.inputs()
            if not other.rows.has_text:
                seen = {name: vectors for name, vectors in seen.items() if name not in OF_TEXT}
            found |= {f"{number}:{name}": RowVectors(self, other.reader(v)) for name, v in seen.items()}
        return found

    def _images(self, rows: NDArray[np.int64], *, view: str = CENTER) -> Tensor:
        image_B = self.rows.image[rows]
        held = self.v_ID if view == CENTER else self.views[view]
        if held is not None:
            return held[torch.from_numpy(image_B).to(self.device)].float()
        entries, place_B = np.unique(image_B, return_inverse=True)
        return self._read("images", entries, view=view)[torch.from_numpy(place_B).to(self.device)].float()

    def _texts(self, rows: NDArray[np.int64]) -> Tensor:
        prompt_B = self.rows.prompt[rows]
        if self.t_TD is not None:
            return taken(self.t_TD, torch.from_numpy(prompt_B).to(self.device), missing=0.0)
        entries, place_B = np.unique(prompt_B[prompt_B >= 0], return_inverse=True)
        found = torch.zeros(len(rows), self.dim, device=self.device)
        if len(entries):
            known = torch.from_numpy(prompt_B >= 0).to(self.device)
            found[known] = self._read("texts", entries)[torch.from_numpy(place_B).to(self.device)].float()
        return found

    def _anchor_cosines(self, rows: NDArray[np.int64]) -> Tensor:
        assert self.anchors is not None
        return self._images(rows) @ self.anchors.T

    def _cosines(self, rows: NDArray[np.int64]) -> Tensor:
        return ((self._images(rows) * self._texts(rows)).sum(dim=1, keepdim=True) + 1) / 2

    def cosine(self, chosen: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return s = v . t of some rows (all when None), (N,) float32 in [-1, 1]."""
        found, done = np.empty(len(self.rows) if chosen is None else len(chosen), dtype=np.float32), 0
        for batch in self.batches(chosen, batch_size=1).in_order() if len(found) else ():
            found[done : done + batch.num_rows] = (batch.v_BD * batch.t_BD).sum(dim=1).cpu().numpy()
            done += batch.num_rows
        return found

    def batches(
        self,
        rows: NDArray[np.int64] | None,
        *,
        batch_size: int,
        seed: int = 0,
        columns: Columns | None = None,
        explanations: bool = False,
    ) -> Batches:
        """Return batches of some rows (all when None), in float32 whatever is stored; nothing is copied yet.

        `columns` are further fields of a batch by target, one value for each of these rows; `explanations` adds e_BD.
        """
        chosen = slice(None) if rows is None else rows
        labels = {each.name: torch.from_numpy(self.label(each.name)[chosen]).to(self.device) for each in self.targets}
        image, prompt = self.rows.image[chosen], self.rows.prompt[chosen]
        explanation = self.rows.explanation[chosen] if explanations else None
        columns = {
            name: {target: column.to(self.device) for target, column in by_target.items()}
            for name, by_target in (columns or {}).items()
        }
        if self.v_ID is None or self.t_TD is None:
            return StreamBatches(
                read_images=lambda entries: self._read("images", entries),
                read_texts=lambda entries: self._read("texts", entries),
                device=self.device,
                label_N=labels,
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
            labels,
            image_index_N=torch.from_numpy(image).to(self.device),
            text_index_N=torch.from_numpy(prompt).to(self.device),
            columns_N=columns,
            explanation_index_N=None if explanation is None else torch.from_numpy(explanation).to(self.device),
            batch_size=batch_size,
            seed=seed,
        )

    def _read(self, kind: Kind, entries_K: NDArray[np.int64], *, view: str = CENTER) -> Tensor:
        assert self.store is not None
        return torch.from_numpy(self.store.take(kind, entries_K, view=view)).to(self.device)

    def _window_rows(self) -> int:
        assert self.store is not None
        row_bytes = 2 * self.dim * self.store.group("images")["embedding"].dtype.itemsize  # an image and a text
        return max(1, WINDOW_BYTES // int(row_bytes))


@dataclass(frozen=True)
class Beside:
    """A cache of the same rows by another backbone: `row_N` says which of its rows each of the first cache is."""

    rows: CacheRows
    row_N: Tensor

    def reader(self, vectors: RowVectors) -> Callable[[NDArray[np.int64]], Tensor]:
        """Return what reads numbers of its rows for those of the first cache."""
        return lambda rows: vectors[self.row_N[torch.from_numpy(rows)]]


class RowVectors:
    """Numbers (N, W) of the rows of a cache, read for the rows that are asked for; float32."""

    def __init__(self, rows: CacheRows, read: Callable[[NDArray[np.int64]], Tensor]) -> None:
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return len(self._rows.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return some rows, (B, W) float32 on the device of the cache."""
        return self._read(rows.cpu().numpy())


OF_TEXT = ("prompt", "cosine")  # inputs that a backbone without a text tower does not give


def has_text_tower(facts: Mapping[str, Any]) -> bool:
    """Tell whether a backbone with these facts has a text tower."""
    return bool(facts.get("text_tower", True))


def _seen_targets(store: FeatureStore) -> tuple[Target, ...]:
    """Return the targets that can be learned of a cache: without a text tower, those that see no prompt."""
    return tuple(each for each in store.targets if each.sees == "image" or has_text_tower(store.facts))


def _seen_pairs(store: FeatureStore) -> StoredPairs | None:
    """Return the pairs that speak for targets which the backbone sees, numbered as these are."""
    stored, seen = store.preferences(), _seen_targets(store)
    if stored is None:
        return None
    place_T = np.array([seen.index(target) if target in seen else -1 for target in store.targets], dtype=np.int32)
    target_P = place_T[stored.target_P]
    known = target_P >= 0
    columns = {name: getattr(stored, name)[known] for name in ("a_P", "b_P", "preferred_P")}
    return replace(stored, target_P=target_P[known], **columns)


def views_there(path: Path) -> list[str]:
    """Return the names of the views besides `center` that all images of a cache have.

    Raises:
        UserError: see `FeatureStore.open`.
    """
    with open_cache(path) as store:
        return [name for name in store.view_names() if name != CENTER and store.holds_views([name])]


def view_there(path: Path, view: str) -> str | None:
    """Return the name of a view if a cache has it, else None.

    Raises:
        UserError: see `FeatureStore.open`; or there is no view of that name, or some images lack it.
    """
    with open_cache(path) as store:
        if view in of_images(RECIPES) and view not in store.view_names():
            return None
        store.check_view(view)
        return view


def image_keys(store: FeatureStore) -> KeyArray:
    """Return the first 64 bits of the content address of each image, (I,) uint64."""
    return np.ascontiguousarray(store.keys("images")[:, :8]).view("<u8")[:, 0].astype(np.uint64)


def image_key(content: bytes) -> int:
    """Return the key of one image, as `image_keys`, by its content address."""
    return int.from_bytes(content[:8], "little")


VECTORS_OF: dict[str, Kind] = {"v_ID": "images", "t_TD": "texts"}


def lacking_views(rows: CacheRows) -> list[str]:
    """Return the views that a cache could gain from its images, and that bases were shown to profit from.

    `statistics` are of any image; where they are there, what else lacks was not possible or not wanted. None of a cache
    that was imported.
    """
    there = views_there(rows.path)
    if rows.facts.get("imported") or STATISTICS in there:
        return []
    return [name for name in (STATISTICS, STAGES) if name not in there]


def load_rows(path: Path, device: str, *, views: Sequence[str] = (), in_memory: bool = False) -> CacheRows:
    """Read a cache: its embeddings into memory if they take at most `MEMORY_BYTES`, else when they are needed.

    So are the vectors of `views` besides `center`, each by itself; with `in_memory` all is read. A file that stays open
    is the one that was checked here, also when another takes its name.

    Raises:
        UserError: see `FeatureStore.open`; or images lack a view.
    """
    with contextlib.ExitStack() as opened:
        store = opened.enter_context(open_cache(path))
        further = [name for name in dict.fromkeys(views) if name != CENTER]
        for name in further:
            store.check_view(name)
        size = store.size_bytes("images") + store.size_bytes("texts")
        holds = in_memory or size <= MEMORY_BYTES
        held: dict[str, Tensor | None] = {}
        for name in further:
            size += store.size_bytes("images", view=name)
            fits = in_memory or size <= MEMORY_BYTES
            held[name] = torch.from_numpy(store.embeddings("images", view=name)).to(device) if fits else None
        vectors = {
            name: torch.from_numpy(store.embeddings(kind)).to(device) for name, kind in VECTORS_OF.items() if holds
        }
        anchors = store.anchors()
        keeps_open = not holds or any(value is None for value in held.values())
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
            targets=_seen_targets(store),
            pairs=_seen_pairs(store),
            views=held,
            store=store if keeps_open else None,
            v_ID=vectors.get("v_ID"),
            t_TD=vectors.get("t_TD"),
            anchors=None if anchors is None else torch.from_numpy(anchors[1]).to(device).float(),
        )
        if keeps_open:
            opened.pop_all()  # open as long as the rows are there
        return rows


# ---- Who is who


# Characters hashed at a time: a block of texts is as wide as its longest.
MAX_CHARACTERS = 4_000_000
FILE = "rows.safetensors"  # of a run
FILES, VECTORS, NAMES = "files", "vectors", "names"


def name_keys(column: TextColumn, of: Callable[[str], str] = str) -> KeyArray:
    """Return the key of `of` of each distinct text, and last that of the empty one: (K + 1,) uint64."""
    keys = [text_keys([of(text) for text in block]) for block in column.names.blocks()]
    return np.concatenate([*keys, text_keys([of("")])])


def row_keys(column: TextColumn) -> KeyArray:
    """Return the key of each row's text, (N,) uint64: what `group_keys` says of the texts themselves."""
    return np.asarray(name_keys(column)[column.codes])  # code -1 finds the last


def text_keys(texts: list[str]) -> KeyArray:
    """Return the key of each text, (B,) uint64, in bounded memory however long one of them is."""
    step = max(1, MAX_CHARACTERS // max(map(len, texts), default=1)) if any(texts) else len(texts)
    parts = [group_keys(np.array(texts[start : start + step], dtype=np.str_)) for start in range(0, len(texts), step)]
    return np.concatenate([np.empty(0, dtype=np.uint64), *parts])


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """What N rows show and ask for, each (N,) uint64.

    `image_N` is of the image's content: the first 64 bits of the SHA-256 of its file, or (`known_by` VECTORS) of its
    vector, in a cache that was imported without files; or (NAMES) of its name, where nothing else is known. `text_N` is
    of the prompt's `prompt_group`, or the image's own in a row without one; `tokens_N` is of what the text tower is
    given, 0 where nobody knows.
    """

    image_N: KeyArray
    text_N: KeyArray
    tokens_N: KeyArray
    known_by: str = FILES

    def __len__(self) -> int:
        return len(self.image_N)

    def of(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> RowKeys:
        """Return the keys of some rows."""
        return replace(self, image_N=self.image_N[chosen], text_N=self.text_N[chosen], tokens_N=self.tokens_N[chosen])

    def named(self, files: list[str]) -> RowKeys:
        """Return the keys with images by their names."""
        return replace(self, image_N=text_keys(files), known_by=NAMES)


class Codes(NamedTuple):
    """Small numbers in the place of keys, (N,) int64 each: equal in rows of one image, of one prompt, of both."""

    image: NDArray[np.int64]
    prompt: NDArray[np.int64]
    pair: NDArray[np.int64]


def keys_of_names(files: list[str], prompts: list[str]) -> RowKeys:
    """Return the keys of rows of which only names and prompts are known."""
    nothing = np.zeros(len(files), dtype=np.uint64)
    text_N = text_keys([prompt_group(prompt) if prompt else file for file, prompt in zip(files, prompts, strict=True)])
    return RowKeys(image_N=nothing, text_N=text_N, tokens_N=nothing).named(files)


def same_prompts(text_K: KeyArray, tokens_K: KeyArray) -> NDArray[np.int64]:
    """Return a code (K,) int64 for each text, equal where the group or the tokens of two are, or of others between."""
    texts, code_K = np.unique(text_K, return_inverse=True)
    known = np.flatnonzero(tokens_K)
    tokens, token_code = np.unique(tokens_K[known], return_inverse=True)
    if len(np.unique(np.stack([token_code, code_K[known]], axis=1), axis=0)) == len(tokens):  # none is of two groups
        return code_K.astype(np.int64)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = len(texts) + len(tokens)
    edges = (np.ones(len(known), dtype=np.int8), (code_K[known], len(texts) + token_code))
    _, component = connected_components(coo_array(edges, shape=(size, size)), directed=False)
    return np.asarray(component[code_K], dtype=np.int64)


def common_codes(tables: Sequence[RowKeys]) -> list[Codes]:
    """Return the codes of the rows of several tables, which mean the same in all of them."""
    ends = np.cumsum([len(table) for table in tables])[:-1]

    def joined(name: str) -> KeyArray:
        return np.concatenate([getattr(table, name) for table in tables])

    image = np.unique(joined("image_N"), return_inverse=True)[1].astype(np.int64)
    prompt = same_prompts(joined("text_N"), joined("tokens_N"))
    pair = np.unique(image * (int(prompt.max(initial=0)) + 1) + prompt, return_inverse=True)[1].astype(np.int64)
    return [Codes(*parts) for parts in zip(*(np.split(codes, ends) for codes in (image, prompt, pair)), strict=True)]


def write_keys(path: Path, keys: RowKeys) -> None:
    """Write the keys of the rows of a run, 24 bytes each."""
    from safetensors.numpy import save_file

    columns = {"image": keys.image_N, "prompt": keys.text_N, "tokens": keys.tokens_N}
    arrays = {name: np.ascontiguousarray(values) for name, values in columns.items()}
    save_file(arrays, path, metadata={"images": keys.known_by})


def read_keys(path: Path, *, num_rows: int) -> RowKeys | None:
    """Return what `write_keys` wrote; None where there is no such file, or it is not of as many rows.

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            known_by = (file.metadata() or {})["images"]
            image_N, text_N, tokens_N = (file.get_tensor(name) for name in ("image", "prompt", "tokens"))
    except (SafetensorError, KeyError, OSError) as error:
        refuse_other(path, {"safetensors"}, what="safetensors file")
        raise UserError(f"cannot be read ({error})", place=path, remedy="train again") from error
    if {len(image_N), len(text_N), len(tokens_N)} != {num_rows}:
        return None  # rows of the table beside it were taken out or put in
    return RowKeys(image_N=image_N, text_N=text_N, tokens_N=tokens_N, known_by=known_by)
