"""Settings of `sweep`: lists and ranges of settings of `train`, as they are written.

Knows how values are written. Must not know how they are combined or drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from deltaclip.base.errors import UserError
from deltaclip.base.options import check_settings, field_types, option_name, setting
from deltaclip.pipeline.settings.learning import (
    MAX_SEED,
    Base,
    Loss,
    ScaleMode,
    Schedule,
    SplitKind,
    Tracked,
    check_fractions,
    words_by_target,
)
from deltaclip.pipeline.settings.training import FrozenClip, TrainConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Tracked, FrozenClip):
    """Settings of `sweep`: residual heads on cached embeddings, many settings of `train` at once.

    The first are lists; what `train` has beside these has its meaning of there.
    """

    cache: Path = setting(help="Feature cache made by `deltaclip extract`.", argument=True, names="cache")
    out: Path | None = setting(
        None, help="Run directory of the winner; default runs/CACHE_sweep, numbered if taken.", names="new"
    )
    scale: str = setting(
        "0.2",
        help="Values, comma-separated, of all targets or by name: 0.1,0.2 or quality=0.05,0.1,consistency=0.2; with "
        "--samples also LO..HI.",
    )
    residual_scale_q: str | None = setting(None, help="Values, as --scale quality=.")
    residual_scale_c: str | None = setting(None, help="Values, as --scale consistency=.")
    lr: str = setting("1e-3", help="Values; LO..HI is drawn on a logarithmic scale.")
    weight_decay: str = setting("1e-4", help="Values; LO..HI is drawn on a logarithmic scale.")
    weight: str = setting("0.5", help="Values of the weights of the losses, as those of --scale.")
    w_q: str | None = setting(None, help="Values, as --weight quality=.")
    w_c: str | None = setting(None, help="Values, as --weight consistency=.")
    dropout: str = setting("0.1", help="Values.")
    loss: str = setting("mse", help=f"Names: {', '.join(get_args(Loss))}.")
    base: str = setting("auto", help=f"Names: {', '.join(get_args(Base))}.", spelling="--base-init")
    beside: list[Path] | None = setting(None, help="As in `train`.", argument=True, names="cache")
    view: str = setting("stages", help="As in `train`.")
    seed: str = setting("42", help="Seeds of initial weights and dropout; settings rank by their mean over seeds.")
    samples: int = setting(0, help="Train this many settings, drawn from the grid or the ranges; 0: the grid.", ge=0)
    scale_mode: ScaleMode = setting("fixed", help="As in `train`.")
    std_weighting: bool = setting(False, help="As in `train`.")
    epochs: int = setting(20, help="Passes over the training rows.", ge=1)
    batch_size: int = setting(64, help="Rows per step.", ge=1)
    schedule: Schedule = setting("cosine", help="Learning rate after the warm-up.")
    warmup_ratio: float = setting(0.05, help="Share of the steps in which the learning rate rises.", ge=0, le=1)
    max_grad_norm: float = setting(1.0, help="Gradients of a head are clipped to this norm; 0 never clips.", ge=0)
    patience: int = setting(0, help="Stop a head after this many epochs without a better score; 0 never.", ge=0)
    split: SplitKind = setting("grouped", help="As in `train`; one split for all.")
    fractions: str = setting("0.7,0.1,0.2", help="Shares of train, validation, test.")
    data_seed: int = setting(42, help="Seed of the split, of the order of rows and of --samples.", ge=0, le=MAX_SEED)
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", help="Number format of the large products; auto takes bf16 where the processor has units for it."
    )
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")

    def __post_init__(self) -> None:
        check_settings(self)
        check_fractions(self.fractions)
        self.check_frozen()
        _check_size(sweep_axes(self), self.samples)


# Settings with lists of values: one axis each, or one for every target that is named.
PLAIN = ("lr", "weight_decay", "dropout", "loss", "base", "seed")
BY_TARGET = {
    "scale": {"quality": "residual_scale_q", "consistency": "residual_scale_c"},
    "weight": {"quality": "w_q", "consistency": "w_c"},
}
LOGARITHMIC = ("lr", "weight_decay")
# More would fill the table with noise before it fills the machine: 10,000 draws of one winner are chance.
MAX_SETTINGS = 10_000
_NOWHERE = Path("cache.h5")  # settings are checked without it


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, to be drawn from; `place` is the option that gave them."""

    low: float
    high: float
    logarithmic: bool
    place: str


def swept_values(name: str, text: str) -> list[Any] | Range:
    """Return the values that the text of an option names, without double ones, or the range.

    Raises:
        UserError: no number, out of the range of the setting, or not a choice; ends of a range that do not rise.
    """
    place, kind = option_name(name), field_types(TrainConfig)[name] if name in PLAIN else float
    low, dots, high = text.partition("..")
    if dots and kind is float:
        ends = [_number(part, kind, place) for part in (low, high)]
        if not ends[0] < ends[1] or (name in LOGARITHMIC and ends[0] <= 0):
            remedy = "give LO..HI with LO below HI" + (" and above 0" if name in LOGARITHMIC else "")
            raise UserError(f"{text!r} is no range", place=place, remedy=remedy)
        for end in ends:
            _check_one(name, end)
        return Range(ends[0], ends[1], name in LOGARITHMIC, place)
    words = [word.strip() for word in text.split(",")]
    values = list(dict.fromkeys(_number(word, kind, place) if kind in (float, int) else word for word in words))
    for value in values:
        _check_one(name, value)
    return values


def _check_one(name: str, value: Any) -> None:
    """Refuse what is out of the range of a setting of `train`, or no choice."""
    given: dict[str, Any] = {name: repr(value) if name in BY_TARGET else value}
    TrainConfig(cache=_NOWHERE, **given)


def sweep_axes(config: SweepConfig) -> dict[str, list[Any] | Range]:
    """Return the values of every axis, by name: `lr`, `scale` of all targets, `scale_quality` of one.

    Raises:
        UserError: see `swept_values`; or a target that is given twice.
    """
    axes = {}
    for name, of_one in BY_TARGET.items():
        lists = {target: (name, ",".join(words)) for target, words in words_by_target(getattr(config, name)).items()}
        for target, option in of_one.items():
            if (given := getattr(config, option)) is not None:
                if target in lists:
                    remedy = f"give one of {option_name(name)} and {option_name(option)}"
                    raise UserError(f"{target} is given twice", place=option_name(option), remedy=remedy)
                lists[target] = (option, given)
        for target, (option, words) in lists.items():
            axis = f"{name}_{target}" if target else name
            if axis in PLAIN:
                remedy = "sweep that of all targets, or give the target another name"
                raise UserError(f"{axis} is a setting of its own", place=option_name(option), remedy=remedy)
            axes[axis] = swept_values(option, words)
    return axes | {name: swept_values(name, getattr(config, name)) for name in PLAIN}


def _check_size(axes: dict[str, list[Any] | Range], samples: int) -> None:
    """Refuse a sweep without end, and one of more settings than are worth it."""
    if samples > MAX_SETTINGS:
        raise UserError(f"{samples:,} settings", place="--samples", remedy=f"give at most {MAX_SETTINGS:,}")
    ranges = [axis for axis in axes.values() if isinstance(axis, Range)]
    if ranges and not samples:
        raise UserError("a range has no grid", place=ranges[0].place, remedy="give --samples, or values")
    count = 1 if samples else math.prod(len(axis) for axis in axes.values() if isinstance(axis, list))
    if count > MAX_SETTINGS:
        remedy = f"give fewer values, or --samples of at most {MAX_SETTINGS:,}"
        raise UserError(f"the grid has {count:,} settings", place="sweep", remedy=remedy)


def _number(word: str, kind: type, place: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        remedy = "give values such as 1,2,3" if kind is int else "give values such as 0.1,0.2"
        what = "whole number" if kind is int else "number"
        raise UserError(f"{word!r} is no {what}", place=place, remedy=remedy) from None
