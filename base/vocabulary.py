"""The words that all of the tool shares: what people rate, and the sides of a split, with their spellings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from deltaclip.base.errors import UserError, did_you_mean

Sees = Literal["image", "pair"]

# A name becomes a column of tables, a part of option values and of the names of weights.
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_ENDINGS = ("_std", "_base", "_delta", "_label", "_low", "_high")
# Columns that tables of predictions, manifests, caches and exports have beside those of targets.
_TAKEN = (
    *("image", "prompt", "group", "source", "split", "explanation", "side", "error", "key", "rater", "flag"),
    *("file", "position", "image_path", "caption", "q", "c"),
)


@dataclass(frozen=True)
class Target:
    """Something that people rate and a head predicts.

    Args:
        name: of its columns, such as `quality`; lower-case letters, digits and underscores.
        sees: `image`, the image embedding v alone; `pair`, v, the prompt embedding t and their cosine s.
    """

    name: str
    sees: Sees = "image"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.endswith(_ENDINGS):
            endings = f"{', '.join(_ENDINGS[:-1])} or {_ENDINGS[-1]}"
            remedy = f"use lower-case letters, digits and _, a letter first, no ending {endings}"
            raise UserError(f"{self.name!r} is no name for a target", remedy=remedy)
        if self.name in _TAKEN:
            raise UserError(f"{self.name!r} is the name of another column", remedy="give the target another name")
        if self.sees not in get_args(Sees):
            raise UserError(f"{self.sees!r} is not what a target sees", remedy=did_you_mean(self.sees, get_args(Sees)))

    @property
    def std(self) -> str:
        """Name of the column with the SD of its ratings."""
        return f"{self.name}_std"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"name": self.name, "sees": self.sees}


QUALITY = Target("quality", "image")
CONSISTENCY = Target("consistency", "pair")
AUTHENTICITY = Target("authenticity", "image")

# Which image of a prompt people like better, for whatever reason: what pairs of images speak for. No table has ratings
# of it unless a user names a column.
PREFERENCE = Target("preference", "pair")

# Known by name wherever a table has their column, in the order of tables and reports.
KNOWN_TARGETS = (QUALITY, CONSISTENCY, AUTHENTICITY)


def known_target(name: str) -> Target | None:
    """Return the built-in target of a name, None where there is none."""
    return next((target for target in (*KNOWN_TARGETS, PREFERENCE) if target.name == name), None)


SIDES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def side_of(value: str) -> str | None:
    """Return train, val or test for a spelling in any case, or None."""
    name = value.strip().lower()
    return next((side for side, spellings in SIDES.items() if name in spellings), None)
