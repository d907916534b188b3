"""Prompts to text embeddings, each run to its last token in use, with a count of those that were cut.

Knows a loaded backbone and its tokenizer. Must not know files or caches.

Shapes: B texts, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.features.backbone.encode_images import Embeddings, require_usable, to_unit_length
from deltaclip.features.backbone.text_tower import TextTower

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from deltaclip.features.backbone.load import Backbone

TEXT_BATCH = 256
# Texts are sorted by length within windows of this many: batches then lie close together in a cache, whatever its size.
WINDOW = 16 * TEXT_BATCH


@dataclass(frozen=True)
class TextBatch:
    """Embeddings of the texts at `entries`, which rise; `truncated_B` says which were cut at the context length.

    `tokens_B`, uint64 above 0, are equal for texts that are one to the tower, as it is given the same tokens.
    """

    entries: NDArray[np.int64]
    found: Embeddings
    truncated_B: NDArray[np.bool_]
    tokens_B: NDArray[np.uint64]


def text_batches(
    backbone: Backbone, texts: Sequence[str], entries: Sequence[int] | NDArray[np.int64]
) -> Iterator[TextBatch]:
    """Encode `texts[entry]` for every one of the rising `entries`, texts of about one length at a time.

    Batches are cut by entry and length, so that a run which resumes after any of them computes the same ones again.

    Raises:
        UserError: an embedding is not finite or has no length.
    """
    tower = TextTower(backbone)
    for _, window in itertools.groupby(entries, key=lambda entry: int(entry) // WINDOW):
        of_window = np.fromiter(window, dtype=np.int64)
        tokens_BL, truncated_B = _tokenise(backbone, [texts[entry] for entry in of_window])
        order = np.argsort(tower.lengths(tokens_BL), kind="stable")
        for start in range(0, len(order), TEXT_BATCH):
            places = np.sort(order[start : start + TEXT_BATCH])
            found = _encode(backbone, tower, tokens_BL[places])
            yield TextBatch(of_window[places], found, truncated_B[places], _token_keys(tokens_BL[places]))


def encode_texts(backbone: Backbone, texts: list[str]) -> Embeddings:
    """Encode texts in one batch; longer ones are cut at the context length, as open_clip does.

    Args:
        backbone: a loaded model.
        texts: B texts.

    Returns:
        unit_BD float32 (B, D), L2 norm 1; norm_B float32 (B,).

    Raises:
        UserError: an embedding is not finite or has no length.
    """
    return _encode(backbone, TextTower(backbone), _tokenise(backbone, texts)[0])


def _encode(backbone: Backbone, tower: TextTower, tokens_BL: torch.Tensor) -> Embeddings:
    import torch

    with torch.inference_mode():
        return require_usable(to_unit_length(tower(tokens_BL)), backbone)


def _token_keys(tokens_BL: torch.Tensor) -> NDArray[np.uint64]:
    """Return 64 bits of the tokens of each text, (B,) uint64; 0 is left to texts whose tokens nobody knows."""
    rows = np.ascontiguousarray(tokens_BL.cpu().numpy().astype("<i4"))
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.maximum(np.frombuffer(digests, dtype="<u8").astype(np.uint64), 1)


def _tokenise(backbone: Backbone, texts: list[str]) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Return the tokens (B, L) that the tower is given, and which texts lose some, (B,) bool.

    open_clip cuts them without a word. A text is cut exactly if one more place changes the tokens before
    it or is itself filled.
    """
    length = backbone.context_length
    longer_BL = backbone.tokenizer(texts, context_length=length + 1)
    padding = backbone.tokenizer(["a"], context_length=length + 1)[0, -1]
    tokens_BL, cut_B = longer_BL[:, :length].clone(), np.zeros(len(texts), dtype=bool)
    # Tokenising costs as much as a tenth of the encoding: a second time only for those that reach the last place.
    full = (longer_BL[:, -2:] != padding).any(dim=1).nonzero()[:, 0].tolist()
    if full:
        short_BL = backbone.tokenizer([texts[place] for place in full], context_length=length)
        same = (longer_BL[full, :length] == short_BL).all(dim=1)
        cut_B[full] = np.asarray(~(same & (longer_BL[full, -1] == padding)))
        tokens_BL[full] = short_BL
    return tokens_BL, cut_B
