"""One 64-bit key per row's group, the same whatever the order of the rows.

Knows how strings and integers become keys. Must not know what the groups mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    KeyArray = npt.NDArray[np.uint64]

# Rows of text hashed at a time: 8,192 rows of 200 characters are 13 MB in 64-bit integers.
CHUNK_ROWS = 8192


def group_keys(groups_N: npt.ArrayLike) -> KeyArray:
    """Return a key (N,) uint64 per row that depends on its group's value alone.

    Integers are their own keys; a string's is sum(character * multiplier of its place) mod 2^64, which does
    not depend on how wide the array stores it. Two strings share a key with a chance below 1e-17: groups
    could then be merged, never torn apart. Encode a column as integers yourself only if their meaning
    survives a reordering of the rows; `group_keys(names)[code_N]` does, and hashes each name once.

    Raises:
        ValueError: not 1-D, or neither strings nor integers.
    """
    groups = np.asarray(groups_N)
    if groups.dtype.kind == "O" and all(isinstance(value, str) for value in groups.flat):
        groups = groups.astype(np.str_)
    if groups.ndim != 1 or (groups.size and groups.dtype.kind not in "iuU"):
        message = f"groups must be a 1-D array of strings or integers, not {groups.dtype} {groups.shape}"
        raise ValueError(message)
    if groups.dtype.kind != "U":
        return groups.astype(np.int64).view(np.uint64) if groups.dtype.kind == "i" else groups.astype(np.uint64)
    return _text_keys(np.ascontiguousarray(groups))


def mix(keys_N: KeyArray, *, seed: int) -> KeyArray:
    """Return the keys scattered over 64 bits by a seed, one to one (splitmix64's finisher, Steele 2014)."""
    spread = np.array([(seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    # The seed is scattered before it meets the keys, so that seed 1 of key 2 is not seed 2 of key 1.
    return _finish(keys_N ^ _finish(spread))


def _finish(z_N: KeyArray) -> KeyArray:
    z = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def _text_keys(text_N: npt.NDArray[np.str_]) -> KeyArray:
    width = text_N.dtype.itemsize // 4
    # Odd multipliers: a difference in one character always changes the sum.
    multiplier = _finish(np.arange(1, width + 1, dtype=np.uint64)) | np.uint64(1)
    keys = np.empty(text_N.size, dtype=np.uint64)
    characters = text_N.view(np.uint32).reshape(text_N.size, width)
    for first in range(0, text_N.size, CHUNK_ROWS):
        chunk = slice(first, first + CHUNK_ROWS)
        keys[chunk] = characters[chunk].astype(np.uint64) @ multiplier
    return keys
