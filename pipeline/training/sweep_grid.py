"""The settings of a sweep: lists and ranges to settings of `train`, and what varies among them.

Knows how values are written and drawn. Must not know heads, caches or training.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.settings import BY_TARGET, PLAIN, Range, SweepConfig, TrainConfig, sweep_axes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


OUTER = 0.1  # of a range, where more may lie beyond


def sweep_settings(config: SweepConfig) -> list[TrainConfig]:
    """Return the settings of every training of a sweep, without double ones.

    Raises:
        UserError: a value that is no number, out of range or not a choice.
    """
    axes = sweep_axes(config)
    chosen = _sampled(axes, config.samples, seed=config.data_seed) if config.samples else _grid(axes)
    common = _common(config)
    found = [TrainConfig(**{**common, **_setting(values)}) for values in chosen]
    return list(dict.fromkeys(found))


def default_setting(config: SweepConfig, settings: Sequence[TrainConfig]) -> TrainConfig:
    """Return the setting with the defaults of `train` in what varies among those of a sweep; the rest is theirs."""
    axes, plain = axis_names(config), TrainConfig(cache=config.cache)
    names = [name for name in varied(settings, axes) if name != "seed"]
    values = {axis: axis_value(plain if axis in names else settings[0], axis) for axis in axes}
    return TrainConfig(**{**_common(config), **_setting(values)})


def edges(best: TrainConfig, config: SweepConfig, settings: Sequence[TrainConfig]) -> dict[str, str]:
    """Return the axes of numbers on which the best setting is the smallest or the largest that was tried, and which.

    An end that is one of the setting itself (a scale or dropout of 0, a scale of 1) is none of the grid. Of a drawn
    range the outer tenth at either end counts.
    """
    axes, found = sweep_axes(config), {}
    for name in varied(settings, list(axes)):
        value, axis = axis_value(best, name), axes[name]
        if name == "seed" or isinstance(value, str):
            continue
        if isinstance(axis, Range):
            low, high = (math.log(axis.low), math.log(axis.high)) if axis.logarithmic else (axis.low, axis.high)
            share = ((math.log(value) if axis.logarithmic else value) - low) / (high - low)
            ends = {"smallest": share < OUTER, "largest": share > 1 - OUTER}
        else:
            ends = {"smallest": value == min(axis), "largest": value == max(axis)}
        top = 1.0 if name.startswith("scale") else math.inf
        if ends["smallest"] and value > 0:
            found[name] = "smallest"
        elif ends["largest"] and value < top:
            found[name] = "largest"
    return found


def _common(config: SweepConfig) -> dict[str, Any]:
    """Return what all settings of a sweep have in common."""
    own = {*PLAIN, *BY_TARGET, *(name for names in BY_TARGET.values() for name in names.values())}
    names = [field.name for field in fields(TrainConfig) if hasattr(config, field.name) and field.name not in own]
    return {name: getattr(config, name) for name in names}


def _setting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `train` for one value of every axis."""
    found = {name: value for name, value in values.items() if name in PLAIN}
    for name in BY_TARGET:
        of_targets = {axis: value for axis, value in values.items() if axis not in PLAIN}
        named = {axis.removeprefix(f"{name}_"): v for axis, v in of_targets.items() if axis.startswith(f"{name}_")}
        parts = [f"{values[name]!r}"] if name in values else []
        found[name] = ",".join([*parts, *(f"{target}={value!r}" for target, value in named.items())])
    return found


def axis_names(config: SweepConfig) -> list[str]:
    """Return the names of the axes of a sweep, in the order of its table."""
    return list(sweep_axes(config))


def axis_value(setting: TrainConfig, axis: str) -> Any:
    """Return the value that a setting has on an axis."""
    for name, numbers in (("scale", setting.scales), ("weight", setting.weights)):
        if axis == name:
            return numbers.default
        if axis.startswith(f"{name}_") and axis not in PLAIN:
            return numbers.of(axis.removeprefix(f"{name}_"))
    return getattr(setting, axis)


def _grid(axes: dict[str, list[Any] | Range]) -> list[dict[str, Any]]:
    lists = [axis for axis in axes.values() if isinstance(axis, list)]  # all: a range is refused with the settings
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*lists)]


def varied(settings: Sequence[TrainConfig], axes: Sequence[str]) -> list[str]:
    """Return the names of the axes that have more than one value."""
    return [axis for axis in axes if len({axis_value(one, axis) for one in settings}) > 1]


def _draw(axis: Range, generator: np.random.Generator) -> float:
    """Return one number of a range, uniform in value or in logarithm."""
    if axis.logarithmic:
        return float(math.exp(generator.uniform(math.log(axis.low), math.log(axis.high))))
    return float(generator.uniform(axis.low, axis.high))


def _sampled(axes: dict[str, list[Any] | Range], samples: int, *, seed: int) -> list[dict[str, Any]]:
    """Draw settings; from lists alone without repetition, all of them where there are no more."""
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
            name: _draw(axis, generator) if isinstance(axis, Range) else axis[int(generator.integers(len(axis)))]
            for name, axis in axes.items()
        }
        for _ in range(samples)
    ]
