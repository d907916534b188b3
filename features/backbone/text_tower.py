"""The text tower of a backbone, run no further than the last token that its output depends on.

In a tower whose attention is causal nothing behind the token that is pooled changes the result, so the padding of a
short prompt need not be computed: exact, and most of the work of prompts of 10 tokens at 77 places. Towers that look at
padding, pool elsewhere or append a token of their own run whole. Knows open_clip's towers. Must not know tokenizers or
caches.

Shapes: B texts, L tokens, D width.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from deltaclip.features.backbone.load import Backbone


class TextTower:
    """Calls `encode_text` of a model on tokens that are cut behind the last one in use, where that is exact."""

    def __init__(self, backbone: Backbone) -> None:
        self._model: Any = backbone.encoder
        self._device = backbone.device
        self._owner: Any = getattr(self._model, "text", self._model)
        self._pool = getattr(self._owner, "text_pool_type", getattr(self._owner, "pool_type", None))
        self.can_cut = self._pool in {"argmax", "eos"} and _is_causal(self._owner)
        self._of_length: dict[int, Any] = {}

    def lengths(self, tokens_BL: torch.Tensor) -> NDArray[np.int64]:
        """Return how many tokens of each text the tower must see, (B,) int64: all where it cannot be cut."""
        if not self.can_cut:
            return np.full(len(tokens_BL), tokens_BL.shape[1], dtype=np.int64)
        if self._pool == "argmax":
            return np.asarray(tokens_BL.argmax(dim=1)) + 1
        eos: Any = getattr(self._owner, "text_eos_id", getattr(self._owner, "eos_id", None))
        return np.asarray(tokens_BL.eq(eos).int().argmax(dim=1)) + 1

    def __call__(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Return the tower's output (B, D) for whole rows of tokens, in the model's number format."""
        length = int(self.lengths(tokens_BL).max())
        model = self._model if length == tokens_BL.shape[1] else self._cut(length)
        return model.encode_text(tokens_BL[:, :length].to(self._device))  # type: ignore[no-any-return]

    def _cut(self, length: int) -> Any:
        # A model of our own that shares all weights but two: the real one stays whole, for other threads too.
        if length not in self._of_length:
            import torch

            owner, model = self._owner, self._model
            shared = {id(part): part for part in (*model.parameters(), *model.buffers(), model.visual)}
            places = owner.positional_embedding
            shared[id(places)] = torch.nn.Parameter(places.detach()[:length], requires_grad=places.requires_grad)
            shared[id(owner.attn_mask)] = owner.attn_mask[:length, :length]
            self._of_length[length] = copy.deepcopy(model, shared)
        return self._of_length[length]


def _is_causal(owner: Any) -> bool:
    import torch

    mask = getattr(owner, "attn_mask", None)
    if getattr(owner, "cls_emb", None) is not None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return False
    expected = torch.full_like(mask, float("-inf")).triu(1)
    return torch.equal(mask, expected) and owner.positional_embedding.shape[0] == mask.shape[0]
