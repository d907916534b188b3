"""The rows of a cache: which embeddings they have, their labels, their texts.

Knows the groups `rows`, `texts` and `names` of the file. Must not know vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.features.store.schema import CODE_COLUMNS, DONE, NUMBER_COLUMNS
from deltaclip.features.store.texts import TextColumn, Texts

if TYPE_CHECKING:
    import h5py
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a cache, by default the usable ones: those whose image has an embedding.

    `image`, `prompt`, `explanation` (N,) int64 index the embeddings (-1: no such text); `numbers` (N,) float32
    labels in [0, 1] and their SDs, NaN where missing; `text` columns: file, prompt, group, source, split.
    """

    image: NDArray[np.int64]
    prompt: NDArray[np.int64]
    explanation: NDArray[np.int64]
    numbers: dict[str, NDArray[np.float32]]
    text: dict[str, TextColumn]

    def __len__(self) -> int:
        return len(self.image)


def usable_rows(file: h5py.File, status_I: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell of every row of the manifest whether its image has an embedding, (N,) bool."""
    return np.asarray((status_I == DONE)[np.asarray(file["rows/image"])])


def read_rows(file: h5py.File, usable_N: NDArray[np.bool_] | None) -> Rows:
    """Read rows in manifest order, all or those that are usable; 85 bytes a row, and the names."""
    rows = file["rows"]
    chosen = slice(None) if usable_N is None or usable_N.all() else np.flatnonzero(usable_N)

    def column(name: str) -> NDArray[np.generic]:
        return np.asarray(rows[name])[chosen]

    prompt = np.asarray(column("prompt"), dtype=np.int64)
    text = {
        "file": TextColumn(np.arange(len(rows["file"]))[chosen], Texts.read(rows["file"])),
        "prompt": TextColumn(prompt, Texts.read(file["texts/text"])),
    }
    for name in CODE_COLUMNS:
        text[name] = TextColumn(np.asarray(column(name), dtype=np.int32), Texts.read(file[f"names/{name}"]))
    return Rows(
        image=np.asarray(column("image"), dtype=np.int64),
        prompt=prompt,
        explanation=np.asarray(column("explanation"), dtype=np.int64),
        numbers={name: np.asarray(column(name), dtype=np.float32) for name in NUMBER_COLUMNS},
        text=text,
    )
