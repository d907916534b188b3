"""What a fine-tuning is about to do, in words: rates, freeze strategy of both towers; and what looks unwise.

Knows the settings of `finetune` and towers. The lines that every training has stand in `describe`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaclip.base.settings import option_name
from deltaclip.features.backbone.towers import count_parameters
from deltaclip.pipeline.run.describe import LR_RANGE, ModeWords, rate_warnings, settings_warnings
from deltaclip.pipeline.run.tuning import heads_config

if TYPE_CHECKING:
    from deltaclip.features.backbone.choose import Choice
    from deltaclip.features.backbone.towers import CutTower
    from deltaclip.pipeline.run.processes import Processes
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import FinetuneConfig

PARTIAL_RANGE, FULL_RANGE = (3e-5, 1e-4), (1e-5, 5e-5)


def mode_words(
    config: FinetuneConfig, image: CutTower, text: CutTower, *, precision: Choice, processes: Processes
) -> ModeWords:
    """Return the lines that tell this mode from others."""
    decay = f", times {config.layer_decay:g} a block towards the input" if config.layer_decay < 1 else ""
    counts = [count_parameters(tower).words for tower in (image, text)]
    frozen_text = " (cached embeddings)" if text.all_frozen else ""
    again = ", activations computed again" if config.checkpointing else ""
    step = f", {config.accumulate} batches a step" if config.accumulate > 1 else ""
    several = f", {processes.size} processes" if processes.size > 1 else ""
    activations = "run once, activations kept" if config.boundary_cache else "run again in every step"
    if not image.frozen_blocks:
        activations = "none of the image tower"
    return ModeWords(
        rates=f"{config.lr:g} (CLIP{decay}), {config.head_lr:g} (heads)",
        freezing=[
            f"freezing      {counts[0]}",
            f"              {counts[1]}{frozen_text}",
            f"frozen part   {activations}; training images: {_augment_words(config)}",
            f"precision     {precision.precision} activations ({precision.reason}), fp32 weights{again}{step}{several}",
            f"heads         {_start_words(config)}",
        ],
    )


def _augment_words(config: FinetuneConfig) -> str:
    if config.augment == "views":
        return f"one of center, flip and {config.crops} crops a row and epoch"
    return "random crops" if config.augment == "crops" else "as they are"


def _start_words(config: FinetuneConfig) -> str:
    if config.init_heads:
        return f"those of {config.init_heads}"
    return f"trained alone for {config.head_epochs} epochs first" if config.head_epochs else "new"


def tune_warnings(config: FinetuneConfig, rows: CacheRows, split: Split) -> list[str]:
    """Return one line for each setting that is unwise, or that changes nothing here."""
    found = [
        *rate_warnings("--lr", config.lr, FULL_RANGE if config.trains_all else PARTIAL_RANGE),
        *rate_warnings("--head-lr", config.head_lr, LR_RANGE),
        *settings_warnings(heads_config(config), rows, split),
    ]
    if config.crops != type(config).crops and config.augment != "views":
        found.append(f"--crops {config.crops} is not used: it belongs to --augment views")
    if config.init_heads:
        unused = ("head_epochs", "base_init", "dropout")
        changed = [name for name in unused if getattr(config, name) != getattr(type(config), name)]
        found += [f"{option_name(name)} is not used: the heads are those of --init-heads" for name in changed]
    return [f"warning: {line}" for line in found]
