"""Names, types and versions of the feature cache: `docs/cache.md` as code.

N rows, I distinct images, T distinct texts, D width. Everything has its full size from the start and is
contiguous: a killed writer then leaves a readable file, and the status bytes say what in it counts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from deltaclip.features.data.sharding import Part

FORMAT = "deltaclip-features"
SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 had one view and no recipe
KEY_BYTES = 32  # SHA-256
REASON_BYTES = 96  # fixed, so that a failure is recorded without touching HDF5's heap

BLOCK_TEXTS = 65_536  # texts whose bytes are in memory at a time

PENDING, DONE, FAILED = 0, 1, 2

NUMBER_COLUMNS = ("quality", "consistency", "quality_std", "consistency_std")
CODE_COLUMNS = ("group", "source", "split")
NO_TEXT = -1  # the text of a row that has none
MISSING_KEY = bytes(KEY_BYTES)  # of an image file that could not be read at all


def text_key(text: str) -> bytes:
    """Return the content address of a text."""
    return hashlib.sha256(text.encode()).digest()


@dataclass(frozen=True, kw_only=True)
class ViewLayout:
    """A view as a cache has it: `width` of its vectors, and `recipe`, JSON values that say what made them."""

    width: int
    recipe: Mapping[str, Any]

    def stored_as(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the type of the vectors in a cache of `dtype`: the recipe's where it names one."""
        name = self.recipe.get("dtype")
        return np.dtype(str(name)) if name else dtype


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache is to hold, all but the embeddings.

    `image_keys` (I, 32) and `text_keys` (T, 32) are uint8 SHA-256; `row_image`, `row_prompt`, `row_explanation`
    (N,) int64 index images and texts, -1 (`NO_TEXT`) where a row has no such text; `numbers` holds (N,) float32 labels,
    NaN where missing; `codes` holds (N,) int32 into `names`, -1 where a cell is empty.
    """

    image_keys: NDArray[np.uint8]
    image_files: list[str]
    image_reasons: list[str]  # why a file could not be read, '' where it could
    image_frames: NDArray[np.uint8]  # 1 where a file has more frames than the one that is taken
    text_keys: NDArray[np.uint8]
    texts: list[str]
    row_files: list[str]
    row_image: NDArray[np.int64]
    row_prompt: NDArray[np.int64]
    row_explanation: NDArray[np.int64]
    numbers: dict[str, NDArray[np.float32]]
    codes: dict[str, NDArray[np.int32]]
    names: dict[str, list[str]]
    dataset: dict[str, Any]  # name, label ranges
    part: Part | None = None  # of a shard: what it has of the table

    @property
    def num_images(self) -> int:
        """Number of distinct images I."""
        return len(self.image_files)

    def digest(self) -> str:
        """Return a fingerprint of everything here: equal digests, equal caches but for the backbone."""
        state = hashlib.sha256()
        for field in fields(self):
            if field.name != "part":
                _feed(state, field.name, getattr(self, field.name))
        if self.part:
            _feed(state, "part", self.part.to_json() | {"position": self.part.position})
        return state.hexdigest()

    def header(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what identifies a cache of this plan that is made as `request` says."""
        shard = {"shard": self.part.to_json()} if self.part else {}
        return {"request": request, "plan": self.digest(), **shard}


def _feed(state: Any, name: str, value: Any) -> None:
    # Each part goes in with its name and length, so that no two different plans give one byte stream.
    if isinstance(value, dict):
        for key in sorted(value):
            _feed(state, f"{name}.{key}", value[key])
        return
    if isinstance(value, list):
        # Twice through millions of texts rather than all of their bytes at once.
        size = sum(8 + len(str(item).encode()) for item in value)
        state.update(f"{name}:{size}:".encode())
        for start in range(0, len(value), BLOCK_TEXTS):
            parts = [str(item).encode() for item in value[start : start + BLOCK_TEXTS]]
            state.update(b"".join(len(part).to_bytes(8) + part for part in parts))
        return
    content = value.tobytes() if isinstance(value, np.ndarray) else str(value).encode()
    state.update(f"{name}:{len(content)}:".encode())
    state.update(content)
