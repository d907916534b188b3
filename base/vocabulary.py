"""LABELS, SIDES and their spellings: the ONE place (6 definitions today).

The three sides of a split, and how people spell them in a column.

The targets: which labels there are, and what each of them sees of a row.

Knows names alone. Must not know tables, caches or heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable


# ---- The three sides of a split, and how people spell them in a column


SIDES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def side_of(value: str) -> str | None:
    """Return train, val or test for a spelling in any case, or None."""
    name = value.strip().lower()
    return next((side for side, spellings in SIDES.items() if name in spellings), None)


# ---- The targets: which labels there are, and what each of them sees of a row


Sees = Literal["image", "pair"]  # the image alone, or image and prompt

SEES: dict[str, Sees] = {"quality": "image", "consistency": "pair"}
LABELS = tuple(SEES)


def need_prompts(labels: Iterable[str]) -> bool:
    """Tell whether any of these labels sees the prompt: rows without one then say nothing of it."""
    return any(SEES[label] == "pair" for label in labels)
