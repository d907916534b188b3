"""Settings of `sweep` and `ablate`: many heads on cached embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaclip.base.settings import check_settings, setting
from deltaclip.pipeline.settings.learning import MAX_SEED, FrozenClip, check_fractions
from deltaclip.pipeline.settings.swept import SWEPT, swept_values

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
    "ridge-view",
    "kernel",
    "kernel-only",
    "partial-freeze",
    "full",
]


@dataclass(frozen=True, kw_only=True)
class SweepConfig(FrozenClip):
    """Settings of `sweep`: residual heads on cached embeddings, many settings of `train` at once.

    The first ten are lists; what `train` has beside these has its meaning of there.
    """

    cache: Path = setting(help="Feature cache made by `deltaclip extract`.", argument=True, names="cache")
    out: Path | None = setting(
        None, help="Run directory of the winner; default runs/CACHE_sweep, numbered if taken.", names="new"
    )
    residual_scale_q: str = setting("0.2", help="Values, comma-separated: 0.05,0.1,0.2; with --samples also LO..HI.")
    residual_scale_c: str = setting("0.2", help="Values, as above.")
    lr: str = setting("1e-3", help="Values; LO..HI is drawn on a logarithmic scale.")
    weight_decay: str = setting("1e-4", help="Values; LO..HI is drawn on a logarithmic scale.")
    w_q: str = setting("0.5", help="Values of the weight of the quality loss.")
    w_c: str = setting("0.5", help="Values of the weight of the consistency loss.")
    dropout: str = setting("0.1", help="Values.")
    loss: str = setting("mse", help="Names: mse, huber, plcc, rank, fidelity.")
    base_init: str = setting("calibrated", help="Names: calibrated, identity, kernel.")
    view: str = setting("stages", help="As in `train`.")
    seed: str = setting("42", help="Seeds of initial weights and dropout; settings rank by their mean over seeds.")
    samples: int = setting(0, help="Train this many settings, drawn from the grid or the ranges; 0: the grid.", ge=0)
    scale_mode: Literal["fixed", "learned", "curriculum"] = setting("fixed", help="As in `train`.")
    std_weighting: bool = setting(False, help="As in `train`.")
    epochs: int = setting(20, help="Passes over the training rows.", ge=1)
    batch_size: int = setting(64, help="Rows per step.", ge=1)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", help="Learning rate after the warm-up.")
    warmup_ratio: float = setting(0.05, help="Share of the steps in which the learning rate rises.", ge=0, le=1)
    max_grad_norm: float = setting(1.0, help="Gradients of a head are clipped to this norm; 0 never clips.", ge=0)
    patience: int = setting(0, help="Stop a head after this many epochs without a better score; 0 never.", ge=0)
    split: Literal["grouped", "random", "column"] = setting("grouped", help="As in `train`; one split for all.")
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
        for name in SWEPT:
            swept_values(name, getattr(self, name))


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
    repeats: int = setting(5, help="Splits, with seeds --seed, --seed + 1, ..., the same for all variants.", ge=1)
    epochs: int = setting(20, help="Passes over the training rows.", ge=1)
    batch_size: int = setting(64, help="Rows per step.", ge=1)
    lr: float = setting(1e-3, help="Peak learning rate; sane for heads: 1e-3 to 5e-3.", ge=0)
    residual_scale_q: float = setting(0.2, help="As in `train`, but for variants with scales 0.", ge=0, le=1)
    residual_scale_c: float = setting(0.2, help="As above.", ge=0, le=1)
    scale_mode: Literal["fixed", "learned", "curriculum"] = setting("fixed", help="As in `train`.")
    loss: Literal["mse", "huber", "plcc", "rank", "fidelity"] = setting("mse", help="As in `train`.")
    w_q: float = setting(0.5, help="Weight of the quality loss.", ge=0)
    w_c: float = setting(0.5, help="Weight of the consistency loss.", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", help="Learning rate after the warm-up.")
    warmup_ratio: float = setting(0.05, help="Share of the steps in which the learning rate rises.", ge=0, le=1)
    weight_decay: float = setting(1e-4, help="AdamW weight decay; none on biases, norms and scales.", ge=0)
    max_grad_norm: float = setting(1.0, help="Gradients are clipped to this norm; 0 never clips.", ge=0)
    dropout: float = setting(0.1, help="Dropout in the heads, but for the variant without.", ge=0, lt=1)
    split: Literal["grouped", "random", "column"] = setting("grouped", help="As in `train`.")
    fractions: str = setting("0.7,0.1,0.2", help="Shares of train, validation, test.")
    seed: int = setting(42, help="Seed of the first split and of its initial weights.", ge=0, le=MAX_SEED)
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")

    def __post_init__(self) -> None:
        check_settings(self)
        check_fractions(self.fractions)
        self.check_frozen()
