"""Who is who: 64-bit keys of what rows show and ask for, the same in every cache and run, whatever things are called.

Knows text columns, rows of caches and how keys become codes. Must not know splits or what the keys are for.

Shapes: N rows, K texts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.prompts import prompt_group
from deltaclip.pipeline.scoring.groups import group_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.store.texts import TextColumn
    from deltaclip.pipeline.scoring.groups import KeyArray

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
        raise UserError(f"cannot be read ({error})", place=path, remedy="train again") from error
    if {len(image_N), len(text_N), len(tokens_N)} != {num_rows}:
        return None  # rows of the table beside it were taken out or put in
    return RowKeys(image_N=image_N, text_N=text_N, tokens_N=tokens_N, known_by=known_by)
