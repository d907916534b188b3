"""Presets: settings that suit an amount of data, one table for every mode, and what one sets, leaves and cannot apply.

An option that was given wins. Knows settings of `train` and `finetune`. Must not know rows or heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from deltaclip.base.options import option_name
from deltaclip.pipeline.settings import FinetuneConfig, LearningSettings, words_by_target

if TYPE_CHECKING:
    from collections.abc import Mapping


# ---- A preset applied to the settings of a training: what it sets, what was given and wins, what does not apply


SCALES = ("scale",)
FREEZING = ("freeze_layers", "partial_freeze", "freeze_clip")  # options that say how much stays frozen
Config = TypeVar("Config", bound=LearningSettings)


@dataclass(frozen=True, kw_only=True)
class AppliedPreset:
    """A preset in force: `applied` was set by it, `given` was given and won, `unused` says what has no place here."""

    name: str
    audience: str
    reason: str
    applied: dict[str, Any]
    given: tuple[str, ...]
    unused: str

    def to_json(self) -> dict[str, Any]:
        """Return what stands in config.json."""
        return {**self.__dict__, "given": list(self.given)}

    def lines(self) -> list[str]:
        """Return the preset in words, for a person."""
        why = f"auto: {self.reason}" if self.reason else f"for {self.audience}"
        settings = ", ".join(f"{option_name(name)} {_word(value)}" for name, value in self.applied.items())
        won = f"; given and kept: {', '.join(map(option_name, self.given))}" if self.given else ""
        lines = [f"preset        {self.name} ({why}): {settings or 'nothing left to set'}{won}"]
        return [*lines, f"              not used here: {self.unused}"] if self.unused else lines


def apply_preset(config: Config, *, num_rows: int) -> tuple[Config, AppliedPreset | None]:
    """Return the settings with the preset in place, and what it did; None without a preset.

    An option that was given wins, also where it was given its default.

    Args:
        config: settings as the user gave them.
        num_rows: rows to train on, by which `auto` picks.
    """
    if config.preset is None:
        return config, None
    name, reason = choose_preset(config.preset, num_rows=num_rows)
    preset = PRESETS[name]
    part = (
        _tuning_part(preset, low_rank=config.lora_rank > 0)
        if isinstance(config, FinetuneConfig)
        else _frozen_part(preset, config.lr)
    )
    without = set() if config.residual_learning else preset.heads.keys() & set(SCALES)
    fitting = {key: value for key, value in part[0].items() if key not in without}
    unused = [*(["scales: direct heads have none"] if without else []), *part[1]]
    given = {key for key in fitting if key in config.given}
    if "scale" in given and words_by_target(config.scale).keys().isdisjoint({""}):  # of some targets: not of the others
        given.remove("scale")
        fitting["scale"] = f"{fitting['scale']},{config.scale}"
    if "freeze_layers" in fitting and config.given & set(FREEZING):
        given.add("freeze_layers")
    applied = {key: value for key, value in fitting.items() if key not in given}
    about = AppliedPreset(
        name=name,
        audience=preset.audience,
        reason=reason,
        applied=applied,
        given=tuple(key for key in fitting if key in given),
        unused="; ".join(unused),
    )
    return replace(config, **applied), about


def _word(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _frozen_part(preset: Preset, lr: float) -> tuple[dict[str, Any], list[str]]:
    """Return what a preset sets of `train`, and what has no place there."""
    if preset.backbone_lr is None:
        return dict(preset.heads), []
    what = f"freezing {preset.freeze:.0%} of CLIP, learning rate {preset.backbone_lr:g}"
    return dict(preset.heads), [f"{what}: the backbone is frozen, and heads learn at {lr:g}"]


def _tuning_part(preset: Preset, *, low_rank: bool) -> tuple[dict[str, Any], list[str]]:
    """Return what a preset sets of `finetune`, and what has no place there."""
    fitting = {"head_lr" if key == "lr" else key: value for key, value in preset.heads.items()}
    if preset.backbone_lr is None:
        return fitting, ["freezing all of CLIP: that is what `train` does"]
    fitting |= {"freeze_layers": preset.freeze}
    if low_rank:
        return fitting, [f"learning rate {preset.backbone_lr:g}: that of whole weights, not of --lora-rank"]
    return fitting | {"lr": preset.backbone_lr}, []


# ---- Presets: settings that suit an amount of data, one table for every mode


FEW_ROWS, MANY_ROWS = 1_000, 3_000


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One line of the table.

    `heads` are settings by name, for heads in any mode; a trainable backbone has a learning rate of its own,
    `backbone_lr`, and trains but for its first `freeze` share of blocks.
    """

    audience: str
    heads: Mapping[str, Any] = field(default_factory=dict)
    backbone_lr: float | None = None
    freeze: float = 1.0


PRESETS = {
    # Half the steps of the standard settings: enough to see whether the data teach anything.
    "quick": Preset(audience="a first look", heads={"epochs": 10, "batch_size": 64, "lr": 1e-3}),
    # Little data: a small correction, and small batches so that the heads still take as many steps.
    "small": Preset(
        audience=f"under {FEW_ROWS:,} rows",
        heads={"scale": "0.1", "epochs": 30, "batch_size": 16},
        backbone_lr=1e-5,
        freeze=0.83,
    ),
    "balanced": Preset(
        audience=f"over {MANY_ROWS:,} rows",
        heads={"scale": "0.2", "epochs": 20, "batch_size": 32},
        backbone_lr=3e-5,
        freeze=0.75,
    ),
}


def choose_preset(name: str, *, num_rows: int) -> tuple[str, str]:
    """Return the name of a preset and the reason, which is empty but for `auto`.

    Args:
        name: of a preset, or auto.
        num_rows: rows to train on.
    """
    if name != "auto":
        return name, ""
    rows = f"{num_rows:,} training rows"
    if num_rows < FEW_ROWS:
        return "small", f"{rows}, under {FEW_ROWS:,}"
    if num_rows > MANY_ROWS:
        return "balanced", f"{rows}, over {MANY_ROWS:,}"
    # 1,722 rows of AGIQA-3K, three splits: test SROCC of consistency 0.564 balanced, 0.514 small; quality equal.
    return "balanced", f"{rows}, between {FEW_ROWS:,} and {MANY_ROWS:,}, where scales of 0.1 cost consistency"
