"""The values of a sweep as they are written: lists and ranges of settings of `train`.

Knows how values are written. Must not know how they are combined or drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaclip.base.errors import UserError
from deltaclip.base.settings import field_types, option_name
from deltaclip.pipeline.settings.training import TrainConfig

SWEPT = (
    "residual_scale_q",
    "residual_scale_c",
    "lr",
    "weight_decay",
    "w_q",
    "w_c",
    "dropout",
    "loss",
    "base_init",
    "seed",
)
LOGARITHMIC = ("lr", "weight_decay")
_NOWHERE = Path("cache.h5")  # settings are checked without it


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, to be drawn from."""

    low: float
    high: float
    logarithmic: bool


def swept_values(name: str, text: str) -> list[Any] | Range:
    """Return the values that a text names, without double ones, or the range.

    Raises:
        UserError: no number, out of the range of the setting, or not a choice; ends of a range that do not rise.
    """
    place, kind = option_name(name), field_types(TrainConfig)[name]
    low, dots, high = text.partition("..")
    if dots and kind is float:
        ends = [_number(part, kind, place) for part in (low, high)]
        if not ends[0] < ends[1] or (name in LOGARITHMIC and ends[0] <= 0):
            remedy = "give LO..HI with LO below HI" + (" and above 0" if name in LOGARITHMIC else "")
            raise UserError(f"{text!r} is no range", place=place, remedy=remedy)
        for end in ends:
            TrainConfig(cache=_NOWHERE, **{name: end})  # refuses what is out of range
        return Range(ends[0], ends[1], name in LOGARITHMIC)
    words = [word.strip() for word in text.split(",")]
    values = list(dict.fromkeys(_number(word, kind, place) if kind in (float, int) else word for word in words))
    for value in values:
        given: dict[str, Any] = {name: value}
        TrainConfig(cache=_NOWHERE, **given)  # refuses what is out of range or no choice
    return values


def _number(word: str, kind: type, place: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        remedy = "give values such as 1,2,3" if kind is int else "give values such as 0.1,0.2"
        what = "whole number" if kind is int else "number"
        raise UserError(f"{word!r} is no {what}", place=place, remedy=remedy) from None
