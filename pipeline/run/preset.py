"""A preset applied to the settings of a training: what it sets, what was given and wins, what does not apply.

Knows settings of `train` and the table of presets. Must not know rows or heads. Spec section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaclip.base.settings import option_name
from deltaclip.pipeline.training.presets import PRESETS, choose_preset

if TYPE_CHECKING:
    from deltaclip.pipeline.settings import TrainConfig

SCALES = ("residual_scale_q", "residual_scale_c")


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
        settings = ", ".join(f"{option_name(name)} {value:g}" for name, value in self.applied.items())
        won = f"; given and kept: {', '.join(map(option_name, self.given))}" if self.given else ""
        lines = [f"preset        {self.name} ({why}): {settings or 'nothing left to set'}{won}"]
        return [*lines, f"              not used here: {self.unused}"] if self.unused else lines


def apply_preset(config: TrainConfig, *, num_rows: int) -> tuple[TrainConfig, AppliedPreset | None]:
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
    fitting = {key: value for key, value in preset.heads.items() if config.residual_learning or key not in SCALES}
    applied = {key: value for key, value in fitting.items() if key not in config.given}
    unused = []
    if len(fitting) < len(preset.heads):
        unused.append("scales: direct heads have none")
    if preset.backbone_lr is not None:
        what = f"freezing {preset.freeze:.0%} of CLIP, learning rate {preset.backbone_lr:g}"
        unused.append(f"{what}: the backbone is frozen, and heads learn at {config.lr:g}")
    about = AppliedPreset(
        name=name,
        audience=preset.audience,
        reason=reason,
        applied=applied,
        given=tuple(key for key in fitting if key in config.given),
        unused="; ".join(unused),
    )
    return replace(config, **applied), about
