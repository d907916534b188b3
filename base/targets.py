"""The targets: which labels there are, and what each of them sees of a row.

Knows names alone. Must not know tables, caches or heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Sees = Literal["image", "pair"]  # the image alone, or image and prompt

SEES: dict[str, Sees] = {"quality": "image", "consistency": "pair"}
LABELS = tuple(SEES)


def need_prompts(labels: Iterable[str]) -> bool:
    """Tell whether any of these labels sees the prompt: rows without one then say nothing of it."""
    return any(SEES[label] == "pair" for label in labels)
