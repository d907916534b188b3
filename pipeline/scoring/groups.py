"""One 64-bit key per row's group, the same whatever the order of the rows.

Knows how strings and integers become keys. Must not know what the groups mean.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    KeyArray = npt.NDArray[np.uint64]

# Rows of text hashed at a time: 8,192 rows of 200 characters are 13 MB in 64-bit integers.
CHUNK_ROWS = 8192
FLOATS = (float, np.floating)


def group_keys(groups_N: npt.ArrayLike, *, name: str = "groups") -> KeyArray:
    """Return a key (N,) uint64 per row that depends on its group's value alone.

    Integers are their own keys; a string's is sum(character * multiplier of its place) mod 2^64, which does
    not depend on how wide the array stores it. Two strings share a key with a chance below 1e-17: groups
    could then be merged, never torn apart. Encode a column as integers yourself only if their meaning
    survives a reordering of the rows; `group_keys(names)[code_N]` does, and hashes each name once.

    Raises:
        ValueError: see `known_groups`.
    """
    groups = known_groups(groups_N, name=name)
    if groups.dtype.kind != "U":
        return groups.astype(np.int64).view(np.uint64) if groups.dtype.kind == "i" else groups.astype(np.uint64)
    return _text_keys(np.ascontiguousarray(groups))


def known_groups(groups_N: npt.ArrayLike, *, name: str = "groups") -> npt.NDArray[Any]:
    """Return groups as an array (N,) of strings or integers.

    Whole numbers may come as floats, as they do from a column that once lacked some. `name` is what messages call the
    values.

    Raises:
        ValueError: not 1-D, neither strings nor integers, or some are missing (None, NaN): nobody knows with which
            others such a row belongs.
    """
    groups = np.asarray(groups_N)
    if groups.ndim == 1 and groups.dtype.kind in "Of":
        groups = _without_objects(groups, name)
    if groups.ndim != 1 or (groups.size and groups.dtype.kind not in "iuU"):
        message = f"{name} must be a 1-D array of strings or integers, not {groups.dtype} {groups.shape}"
        raise ValueError(message)
    return groups


def _without_objects(groups_N: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Return objects as strings or integers where all are, whole floats as integers, anything else as it is."""
    values = groups_N.tolist()
    missing = [row for row, value in enumerate(values) if _is_missing(value)]
    if missing:
        message = f"{name}: {len(missing):,} of {len(values):,} rows have none, the first is row {missing[0] + 1}"
        raise ValueError(f"{message}; give every row one, or leave these rows out")
    if all(isinstance(value, str) for value in values):
        return groups_N.astype(np.str_)
    whole = all(
        isinstance(value, int | np.integer) or (isinstance(value, FLOATS) and value.is_integer()) for value in values
    )
    return groups_N.astype(np.int64) if whole else groups_N


def _is_missing(value: object) -> bool:
    # pandas has missing values of its own, which equal nothing and are no truth values.
    return (
        value is None
        or type(value).__name__ in {"NAType", "NaTType"}
        or (isinstance(value, FLOATS) and math.isnan(value))
    )


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
