"""Texts of many rows without an object for each: bytes end to end, and codes into distinct ones.

Ten million names are 10 million objects of 60 to 80 bytes as a list; here they are their own bytes and 8 more each.
Knows text and arrays. Must not know what a column means.

Shapes: N rows, K texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import h5py
    from numpy.typing import NDArray

BLOCK = 65_536  # texts that are objects at a time


class Texts:
    """K texts, held as UTF-8 end to end; text k are the bytes from `ends[k]` to `ends[k + 1]`."""

    def __init__(self, content: bytes, ends: NDArray[np.int64]) -> None:
        self._content, self._ends = content, ends

    @classmethod
    def of_blocks(cls, blocks: Iterable[Sequence[bytes]]) -> Texts:
        """Join blocks of encoded texts."""
        contents, lengths = [], [np.zeros(1, dtype=np.int64)]
        for block in blocks:
            contents.append(b"".join(block))
            lengths.append(np.fromiter(map(len, block), dtype=np.int64, count=len(block)))
        return cls(b"".join(contents), np.cumsum(np.concatenate(lengths)))

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """Return texts that are at hand."""
        return cls.of_blocks([[text.encode() for text in texts]])

    @classmethod
    def read(cls, dataset: h5py.Dataset) -> Texts:
        """Read a dataset of texts, (K,), a block of objects at a time."""
        return cls.of_blocks(dataset[start : start + BLOCK] for start in range(0, len(dataset), BLOCK))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, entry: int) -> str:
        return self._content[self._ends[entry] : self._ends[entry + 1]].decode()

    def take(self, entries_N: NDArray[np.integer[Any]]) -> NDArray[np.object_]:
        """Return texts by entry, (N,) str; entry -1 is ''. Of few texts, equal ones are one object."""
        if len(self) < len(entries_N):
            every = np.empty(len(self) + 1, dtype=object)
            every[:] = [*self.take(np.arange(len(self))), ""]
            return np.asarray(every[entries_N])
        content, found = self._content, np.empty(len(entries_N), dtype=object)
        firsts = np.where(entries_N < 0, 0, self._ends[entries_N])
        lasts = np.where(entries_N < 0, 0, self._ends[entries_N + 1])
        places = zip(firsts.tolist(), lasts.tolist(), strict=True)
        found[:] = [content[first:last].decode() for first, last in places]
        return found

    def blocks(self) -> Iterator[NDArray[np.object_]]:
        """Yield all texts in order, a block of objects at a time."""
        for start in range(0, len(self), BLOCK):
            yield self.take(np.arange(start, min(start + BLOCK, len(self))))


class TextColumn:
    """The texts of N rows: `codes` (N,) into `names`, -1 for ''. Indexing makes objects of the chosen rows alone."""

    def __init__(self, codes: NDArray[np.integer[Any]], names: Texts) -> None:
        self.codes, self.names = codes, names

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextColumn:
        """Return the column of texts that are at hand; names are sorted."""
        rows = list(texts)
        names = sorted(set(rows) - {""})
        code_of = {name: code for code, name in enumerate(names)} | {"": -1}
        return cls(np.array([code_of[text] for text in rows], dtype=np.int32), Texts.of(names))

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, rows: int) -> str: ...
    @overload
    def __getitem__(self, rows: slice | NDArray[Any] | Sequence[int]) -> NDArray[np.object_]: ...
    def __getitem__(self, rows: int | slice | NDArray[Any] | Sequence[int]) -> str | NDArray[np.object_]:
        """Return the text of a row, or of some rows (B,) str."""
        chosen = self.codes[rows]
        return str(self.names.take(np.array([chosen]))[0]) if np.ndim(chosen) == 0 else self.names.take(chosen)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def tolist(self) -> list[str]:
        """Return the text of every row."""
        return list(self)

    def some(self) -> bool:
        """Tell whether any row has a text that is not empty."""
        return bool((self.codes >= 0).any())
