"""A run as one module from tensors to named scores, which is what an exported file holds.

Knows heads and a backbone's two towers. Must not know files or ONNX.

Shapes: N rows, D width, F width of a view, L tokens, H and W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.model.scores import Batch, HeadScores, run_heads

if TYPE_CHECKING:
    from collections.abc import Collection


class HeadGraph(nn.Module):
    """v, t (N, D) of unit length, and x (N, F) of the view of a kernel base, to `outputs`, each (N,).

    Where no label sees the prompt, t is left out.
    """

    def __init__(self, heads: nn.Module, labels: Collection[str]) -> None:
        super().__init__()
        self.heads = heads.eval()
        self.outputs = _outputs(heads, labels)

    def forward(self, v: Tensor, t: Tensor | None = None, x: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the scores and their parts in the order of `outputs`."""
        terms = {}
        t = torch.zeros_like(v) if t is None else t
        if isinstance(self.heads, ResidualHeads) and x is not None:
            terms = self.heads.kernel_terms(x, t)
        unlabelled = torch.full((v.shape[0],), torch.nan)
        columns = _columns(run_heads(self.heads, Batch(v, t, unlabelled, unlabelled, **terms)))
        return tuple(columns[name] for name in self.outputs)


class ScorerGraph(nn.Module):
    """Preprocessed pixels (N, 3, H, W) and tokens (N, L) to the outputs of the heads; without tokens as `HeadGraph`."""

    def __init__(self, model: nn.Module, heads: HeadGraph) -> None:
        super().__init__()
        self.model, self.heads = model.eval(), heads
        self.outputs = heads.outputs

    def forward(self, pixels: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the scores and their parts in the order of `outputs`."""
        encode: Any = self.model
        v = nn.functional.normalize(encode.encode_image(pixels), dim=-1)
        t = None if tokens is None else nn.functional.normalize(encode.encode_text(tokens), dim=-1)
        scores: tuple[Tensor, ...] = self.heads(v, t)
        return scores


def _outputs(heads: nn.Module, labels: Collection[str]) -> tuple[str, ...]:
    """Return the names of what these heads say of the labels that they learned."""
    found = []
    for label, letter in (("quality", "q"), ("consistency", "c")):
        has_parts = isinstance(heads, ResidualHeads) or (
            letter == "c" and getattr(heads, "refinement", None) is not None
        )
        if label in labels:
            found += [letter, *([f"{letter}_base", f"{letter}_delta"] if has_parts else [])]
    return tuple(found)


def _columns(found: HeadScores) -> dict[str, Tensor]:
    columns = {"q": found.q, "c": found.c}
    for letter, base, delta, scale in (
        ("q", found.q_base_N, found.dq_N, found.scale_q),
        ("c", found.c_base_N, found.dc_N, found.scale_c),
    ):
        if base is not None and delta is not None and scale is not None:
            columns |= {f"{letter}_base": base, f"{letter}_delta": scale * delta}
    return columns
