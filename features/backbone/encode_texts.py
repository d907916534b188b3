"""Prompts to text embeddings, with a count of those that were cut. Spec sections 2 and 6.

Knows a loaded backbone and its tokenizer. Must not know files or caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltaclip.features.backbone.encode_images import Embeddings, require_usable, to_unit_length

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.features.backbone.load import Backbone


def encode_texts(backbone: Backbone, texts: list[str]) -> Embeddings:
    """Encode texts; longer ones are cut at the context length, as open_clip does.

    Args:
        backbone: a loaded model.
        texts: B texts.

    Returns:
        unit_BD float32 (B, D), L2 norm 1; norm_B float32 (B,).

    Raises:
        UserError: an embedding is not finite or has no length.
    """
    import torch

    tokens_BL = backbone.tokenizer(texts, context_length=backbone.context_length)
    with torch.inference_mode():
        found = to_unit_length(backbone.model.encode_text(tokens_BL.to(backbone.device)))  # type: ignore[operator]
    return require_usable(found, backbone)


def find_truncated(backbone: Backbone, texts: list[str]) -> NDArray[np.bool_]:
    """Tell which texts lose tokens at the context length; open_clip cuts them without a word (PEERS trap 5).

    A text is cut exactly if one more place changes the tokens before it or is itself filled.

    Returns:
        (B,) bool.
    """
    length = backbone.context_length
    short_BL = backbone.tokenizer(texts, context_length=length)
    longer_BL = backbone.tokenizer(texts, context_length=length + 1)
    padding = longer_BL[:, -1] == backbone.tokenizer(["a"], context_length=length + 1)[0, -1]
    same = (longer_BL[:, :length] == short_BL).all(dim=1)
    return np.asarray(~(same & padding))
