"""64-bit keys of the texts of rows, each distinct text hashed once, a block of them at a time.

Knows text columns and how strings become keys. Must not know what the keys are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltaclip.pipeline.scoring.groups import group_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltaclip.features.store.texts import TextColumn
    from deltaclip.pipeline.scoring.groups import KeyArray

# Characters hashed at a time: a block of texts is as wide as its longest.
MAX_CHARACTERS = 4_000_000


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
    return np.concatenate(parts)
