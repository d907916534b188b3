"""Settings of `train` and `ablate`: heads on cached embeddings, the backbone frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaclip.base.errors import UserError, require_extra
from deltaclip.base.options import check_settings, setting
from deltaclip.pipeline.settings.learning import (
    MAX_REPEATS,
    MAX_SEED,
    LearningSettings,
    Loss,
    ScaleMode,
    Schedule,
    SplitKind,
    Tracked,
    check_fractions,
)


@dataclass(frozen=True, kw_only=True)
class FrozenClip:
    """The published spellings of what is trained, for stages that never change CLIP."""

    freeze_clip: bool | None = setting(
        None, help="Changes nothing: CLIP is always frozen here; `deltaclip finetune` trains it."
    )
    partial_freeze: bool | None = setting(None, help="Belongs to `deltaclip finetune`; refused here.")

    def check_frozen(self) -> None:
        """Refuse to train CLIP.

        Raises:
            UserError: names the command that does.
        """
        if self.freeze_clip is False:
            remedy = "use `deltaclip finetune --freeze-layers 0`"
            raise UserError("would train all of CLIP", place="--no-freeze-clip", remedy=remedy)
        if self.partial_freeze:
            remedy = "use `deltaclip finetune --freeze-layers N`"
            raise UserError("would train the later blocks of CLIP", place="--partial-freeze", remedy=remedy)

    def frozen_words(self) -> list[str]:
        """Return a line for each that is given and changes nothing."""
        given = {"--freeze-clip": self.freeze_clip, "--no-partial-freeze": self.partial_freeze is False}
        return [f"{name} changes nothing: CLIP is always frozen here" for name, is_given in given.items() if is_given]


Against = Literal[
    "no-image",
    "cosine",
    "ridge",
    "svr",
    "direct",
    "direct-two-branch",
    "residual",
    "identity-base",
    "no-correction",
    "no-dropout",
    "auto",
    "auto-only",
    "ridge-view",
    "kernel",
    "kernel-only",
    "partial-freeze",
    "full",
]
TUNED = ("partial-freeze", "full")  # of them those that train CLIP


@dataclass(frozen=True, kw_only=True)
class AblateConfig(FrozenClip):
    """Settings of `ablate`: every variant of the heads, floors and baselines on the same splits.

    What `train` has beside these keeps its default, but for what a variant changes.
    """

    cache: Path = setting(help="Feature cache made by `deltaclip extract`.", argument=True, names="cache")
    out: Path | None = setting(None, help="Folder to make; default runs/CACHE_ablate, numbered if taken.", names="new")
    against: Against = setting("residual", help="The variant that differences are taken against.")
    view: str = setting("stages", help="View of the kernel base, compared too where the cache has it.")
    finetune: bool = setting(
        False, help="Also fine-tune CLIP, with 75 % of it frozen and with none, as `finetune` does: minutes to hours."
    )
    image_root: Path | None = setting(
        None,
        help="For --finetune: folder of the images; default the one that the cache recorded.",
        names="folder",
    )
    repeats: int = setting(
        5, help="Splits, with seeds --seed, --seed + 1, ..., the same for all variants.", ge=1, le=MAX_REPEATS
    )
    epochs: int = setting(20, help="Passes over the training rows.", ge=1)
    batch_size: int = setting(64, help="Rows per step.", ge=1)
    lr: float = setting(1e-3, help="Peak learning rate; sane for heads: 1e-3 to 5e-3.", ge=0)
    scale: str = setting("0.2", help="As in `train`, but for variants with scales 0.")
    residual_scale_q: float | None = setting(None, help="As --scale quality=.", ge=0, le=1)
    residual_scale_c: float | None = setting(None, help="As --scale consistency=.", ge=0, le=1)
    scale_mode: ScaleMode = setting("fixed", help="As in `train`.")
    loss: Loss = setting("mse", help="As in `train`.")
    weight: str = setting("0.5", help="As in `train`.")
    w_q: float | None = setting(None, help="As --weight quality=.", ge=0)
    w_c: float | None = setting(None, help="As --weight consistency=.", ge=0)
    schedule: Schedule = setting("cosine", help="Learning rate after the warm-up.")
    warmup_ratio: float = setting(0.05, help="Share of the steps in which the learning rate rises.", ge=0, le=1)
    weight_decay: float = setting(1e-4, help="AdamW weight decay; none on biases, norms and scales.", ge=0)
    max_grad_norm: float = setting(1.0, help="Gradients are clipped to this norm; 0 never clips.", ge=0)
    dropout: float = setting(0.1, help="Dropout in the heads, but for the variant without.", ge=0, lt=1)
    split: SplitKind = setting("grouped", help="As in `train`.")
    fractions: str = setting("0.7,0.1,0.2", help="Shares of train, validation, test.")
    seed: int = setting(42, help="Seed of the first split and of its initial weights.", ge=0, le=MAX_SEED)
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")

    def __post_init__(self) -> None:
        check_settings(self)
        check_fractions(self.fractions)
        self.check_frozen()
        if self.against in TUNED and not self.finetune:
            raise UserError(f"{self.against!r} trains CLIP", place="--against", remedy="add --finetune")
        if self.image_root and not self.finetune:
            raise UserError("would not be used", place="--image-root", remedy="add --finetune")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Tracked, FrozenClip, LearningSettings):
    """Settings of `train`: heads on cached embeddings, the backbone frozen."""

    beside: list[Path] | None = setting(
        None,
        help="Further caches of the same images and prompts, by other backbones, whose views --base auto may take too.",
        argument=True,
        names="cache",
    )
    view: str = setting("stages", help="View that --base kernel reads, of those that `extract` has cached.")
    tensorboard: bool = setting(False, help="Write curves for TensorBoard, into the run at the end.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_frozen()

    def check_more(self) -> None:
        """Refuse to start without the library of an option."""
        super().check_more()
        if self.tensorboard:
            require_extra("tensorboard", "tensorboard", place="--tensorboard")
