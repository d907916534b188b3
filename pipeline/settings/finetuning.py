"""Settings of `finetune`: heads and the later blocks of CLIP."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from deltaclip.base.device import PrecisionChoice
from deltaclip.base.errors import UserError
from deltaclip.base.options import setting
from deltaclip.pipeline.settings.learning import LearningSettings, Preset, Tracked
from deltaclip.pipeline.settings.training import TrainConfig

LORA_LR = 3e-4  # --lr with --lora-rank, where none is given


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Tracked, LearningSettings):
    """Settings of `finetune`: heads, and CLIP but for its first blocks."""

    base: Literal["calibrated", "identity"] = setting(
        "calibrated",
        help="Bases: fitted to the embeddings of the cache in closed form, or plain.",
        spelling="--base-init",
    )
    preset: Preset | None = setting(
        None,
        help="Freezing, learning rate, epochs, batch and scales for a first look, little data, much data, or by the "
        "number of training rows; an option that is given wins.",
    )
    batch_size: int = setting(32, help="Rows per forward and backward pass, of all processes together.", ge=1)
    lr: float = setting(
        3e-5,
        help="Peak learning rate of CLIP; sane: 3e-5 to 1e-4 with blocks frozen, 1e-5 to 5e-5 without; with "
        "--lora-rank 1e-4 to 1e-3, default 3e-4.",
        ge=0,
    )
    head_lr: float = setting(1e-3, help="Peak learning rate of the heads.", ge=0)
    layer_decay: float = setting(
        1.0, help="Factor on the learning rate from each block to the one before it; 1 is the same for all.", gt=0, le=1
    )
    freeze_layers: float = setting(
        0.75, help="First blocks of the image tower that stay frozen: a number, or a share below 1; 0 trains all.", ge=0
    )
    freeze_text_layers: float | None = setting(
        None, help="First blocks of the text tower that stay frozen; default the number of the image tower.", ge=0
    )
    partial_freeze: bool | None = setting(
        None, help="Freeze the first blocks, as --freeze-layers does; --no-partial-freeze is --freeze-layers 0."
    )
    freeze_clip: bool | None = setting(
        None, help="--no-freeze-clip is --freeze-layers 0; freezing all of CLIP is what `train` does."
    )
    lora_rank: int = setting(
        0,
        help="Train low-rank additions to the linear layers of the blocks that are not frozen, of this rank, in place "
        "of their weights; 0 trains the weights.",
        ge=0,
    )
    lora_alpha: float | None = setting(
        None, help="The additions count --lora-alpha / --lora-rank times; default --lora-rank, so once.", gt=0
    )
    lora_layers: Literal["attention", "mlp", "all"] = setting(
        "all", help="Layers with additions: those of attention, all others, or both."
    )
    precision: PrecisionChoice = setting(
        "auto", help="Number format of CLIP's activations; its weights are trained in fp32."
    )
    accumulate: int = setting(1, help="Batches whose gradients make one step.", ge=1)
    checkpointing: bool = setting(
        False, help="Keep one activation per block and compute the rest again: less memory, a third more time."
    )
    compile: bool = setting(
        False,
        help="Let torch compile the blocks that train: fewer launches a step on a GPU, a minute or more at the start.",
    )
    boundary_cache: bool = setting(
        True, help="Compute the activations behind the frozen blocks once and keep them in a file beside the cache."
    )
    augment: Literal["none", "views", "crops"] = setting(
        "none",
        help="Training images as they are, one of the fixed views center, flip and --crops a row and epoch, or random "
        "crops, which cannot be cached.",
    )
    crops: int = setting(4, help="Fixed crops among the views of --augment views.", ge=0, le=64)
    init_heads: Path | None = setting(
        None, help="Start from the heads of this run of `train`, on the same backbone.", names="run"
    )
    head_epochs: int = setting(0, help="Train the heads alone for so many epochs first, on cached embeddings.", ge=0)
    save_minutes: float = setting(
        10.0, help="Save the state for resuming so often, and at the end; 0: after each epoch.", ge=0
    )
    save_full: bool = setting(False, help="Also write the whole model, as `open_clip.create_model` loads it.")
    backbone: str | None = setting(None, help="Where the cache's backbone lies now, if it has moved.", names="backbone")
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")
    image_root: Path | None = setting(
        None, help="Folder of the images; default the one that the cache recorded.", names="folder"
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    workers: int | None = setting(
        None, help="Decoding threads; default one per processor, shared by the processes of torchrun.", ge=1
    )

    def heads(self, **changes: Any) -> TrainConfig:
        """Return what `train` would be told to train the same heads, at their own learning rate."""
        shared = {field.name: getattr(self, field.name) for field in fields(LearningSettings)}
        return TrainConfig(**{**shared, "lr": self.head_lr, **changes})

    def __post_init__(self) -> None:
        """Refuse values out of range, and options that contradict each other."""
        super().__post_init__()
        if self.lora_rank and "lr" not in self.given:
            object.__setattr__(self, "lr", LORA_LR)
        for name in ("freeze_layers", "freeze_text_layers"):
            value = getattr(self, name)
            if value is not None and value > 1 and value != int(value):
                remedy = "give a whole number of blocks, or a share below 1"
                raise UserError(f"{value} blocks cannot be frozen", place=f"--{name.replace('_', '-')}", remedy=remedy)
        if self.freeze_clip:
            remedy = "use `deltaclip train`, which trains heads with all of CLIP frozen"
            raise UserError("leaves nothing of CLIP to train", place="--freeze-clip", remedy=remedy)
        all_trains = self.partial_freeze is False or self.freeze_clip is False
        if all_trains and self.freeze_layers not in (0, type(self).freeze_layers):
            option = "--no-partial-freeze" if self.partial_freeze is False else "--no-freeze-clip"
            raise UserError(f"contradicts --freeze-layers {self.freeze_layers:g}", place=option, remedy="give one")
        if self.partial_freeze and (self.freeze_clip is False or not self.freeze_layers):
            other = "--no-freeze-clip" if self.freeze_clip is False else "--freeze-layers 0"
            raise UserError(f"contradicts {other}", place="--partial-freeze", remedy="give one")
        if self.augment == "crops" and self.boundary_cache and not self.trains_all:
            remedy = "add --no-boundary-cache, or give --augment views"
            raise UserError("crops are random in every epoch", place="--augment", remedy=remedy)

    @property
    def trains_all(self) -> bool:
        """Whether all of the image tower trains."""
        return self.partial_freeze is False or self.freeze_clip is False or self.freeze_layers == 0
