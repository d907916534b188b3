"""The settings of a sweep: lists and ranges to settings of `train`, and what varies among them.

Knows how values are written and drawn. Must not know heads, caches or training.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.settings import field_types, option_name
from deltaclip.pipeline.settings import SweepConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

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
# More would fill the table with noise before it fills the machine: 10,000 draws of one winner are chance.
MAX_SETTINGS = 10_000
_NOWHERE = Path("cache.h5")  # settings are checked without it


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, to be drawn from."""

    low: float
    high: float
    logarithmic: bool

    def draw(self, generator: np.random.Generator) -> float:
        """Return one number, uniform in value or in logarithm."""
        if self.logarithmic:
            return float(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))
        return float(generator.uniform(self.low, self.high))


def sweep_settings(config: SweepConfig) -> list[TrainConfig]:
    """Return the settings of every training of a sweep, without double ones.

    Raises:
        UserError: a value that is no number, out of range or not a choice; a range without --samples; too many.
    """
    axes = {name: _values(name, getattr(config, name)) for name in SWEPT}
    chosen = _sampled(axes, config.samples, seed=config.data_seed) if config.samples else _grid(axes)
    common = {field.name: getattr(config, field.name) for field in fields(TrainConfig) if hasattr(config, field.name)}
    found = [TrainConfig(**{**common, **values}) for values in chosen]
    return list(dict.fromkeys(found))


def _grid(axes: dict[str, list[Any] | Range]) -> list[dict[str, Any]]:
    lists = []
    for name, axis in axes.items():
        if isinstance(axis, Range):
            raise UserError("a range has no grid", place=option_name(name), remedy="give --samples, or values")
        lists.append(axis)
    if (count := math.prod(map(len, lists))) > MAX_SETTINGS:
        remedy = f"give fewer values, or --samples of at most {MAX_SETTINGS:,}"
        raise UserError(f"the grid has {count:,} settings", place="sweep", remedy=remedy)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]


def varied(settings: Sequence[TrainConfig]) -> list[str]:
    """Return the names of the swept settings that have more than one value."""
    return [name for name in SWEPT if len({getattr(one, name) for one in settings}) > 1]


def _values(name: str, text: str) -> list[Any] | Range:
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
    return list(dict.fromkeys(_number(word, kind, place) if kind in (float, int) else word for word in words))


def _number(word: str, kind: type, place: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        remedy = "give values such as 1,2,3" if kind is int else "give values such as 0.1,0.2"
        what = "whole number" if kind is int else "number"
        raise UserError(f"{word!r} is no {what}", place=place, remedy=remedy) from None


def _sampled(axes: dict[str, list[Any] | Range], samples: int, *, seed: int) -> list[dict[str, Any]]:
    """Draw settings; from lists alone without repetition, all of them where there are no more."""
    if samples > MAX_SETTINGS:
        raise UserError(f"{samples:,} settings", place="--samples", remedy=f"give at most {MAX_SETTINGS:,}")
    generator = np.random.default_rng((seed, samples))
    lists = {name: axis for name, axis in axes.items() if isinstance(axis, list)}
    if len(lists) == len(axes):
        shape = tuple(len(axis) for axis in lists.values())
        count = math.prod(shape)
        places = generator.choice(count, size=min(samples, count), replace=False)
        indices = np.stack(np.unravel_index(np.sort(places), shape), axis=1)
        return [{name: axis[i] for (name, axis), i in zip(lists.items(), row, strict=True)} for row in indices]
    return [
        {
            name: axis.draw(generator) if isinstance(axis, Range) else axis[int(generator.integers(len(axis)))]
            for name, axis in axes.items()
        }
        for _ in range(samples)
    ]
