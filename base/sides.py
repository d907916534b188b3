"""The three sides of a split, and how people spell them in a column."""

from __future__ import annotations

SIDES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def side_of(value: str) -> str | None:
    """Return train, val or test for a spelling in any case, or None."""
    name = value.strip().lower()
    return next((side for side, spellings in SIDES.items() if name in spellings), None)
