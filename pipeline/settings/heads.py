"""Settings of `train`, `sweep` and `ablate`: heads on cached embeddings.

Defaults and sane ranges: spec sections 2, 3 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from deltaclip.base.settings import check_settings, setting

BaseInit = Literal["calibrated", "identity", "kernel"]
MAX_SEED = 2**32 - 1  # what every generator takes: torch has 64 bits, scikit-learn 32


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `train`: heads on cached embeddings, the backbone frozen."""

    cache: Path = setting(help="Feature cache made by `deltaclip extract`.", argument=True)
    out: Path | None = setting(None, help="Run directory to make; default runs/CACHE_MODE, numbered if taken.")
    residual_learning: bool = setting(True, help="Bounded corrections of a base, or direct heads (for ablation).")
    two_branch: bool = setting(
        False, help="Direct heads: average consistency with a sigmoid of the cosine whose two numbers are learned."
    )
    refinement: bool = setting(
        False, help="Direct heads: a small transformer over image, prompt and coarse consistency corrects the latter."
    )
    base_init: BaseInit = setting(
        "calibrated",
        help="Bases: linear and fitted in closed form, plain, or kernel ridge on a view of the cache (--view).",
    )
    view: str = setting("stages", help="View that --base-init kernel reads; give it to `extract --views`.")
    scale_mode: Literal["fixed", "learned", "curriculum"] = setting(
        "fixed",
        help="Scales of the corrections: as given, learned within a bound, or ramped up over the epochs.",
    )
    residual_scale_q: float = setting(
        0.2, help="Largest correction of quality; 0.1 for little data, 0.3 to 0.5 for much.", ge=0, le=1
    )
    residual_scale_c: float = setting(0.2, help="Largest correction of consistency.", ge=0, le=1)
    loss: Literal["mse", "huber", "plcc", "rank", "fidelity"] = setting(
        "mse", help="Loss of both heads; plcc, rank and fidelity compare the rows of a batch."
    )
    std_weighting: bool = setting(False, help="Weigh rows by how far raters agreed: 1 / (label SD^2 + 0.01), mean 1.")
    w_q: float = setting(0.5, help="Weight of the quality loss.", ge=0)
    w_c: float = setting(0.5, help="Weight of the consistency loss.", ge=0)
    use_explanations: bool = setting(
        False, help="Also learn to predict the embedding of the explanation, where the data has one."
    )
    w_exp: float = setting(0.1, help="Weight of the explanation loss.", ge=0)
    preset: Literal["quick", "small", "balanced", "auto"] | None = setting(
        None,
        help="Epochs, batch and scales for a first look, little data, much data, or by the number of training rows; "
        "an option that is given wins.",
    )
    epochs: int = setting(20, help="Passes over the training rows.", ge=1)
    batch_size: int = setting(64, help="Rows per step.", ge=1)
    lr: float = setting(1e-3, help="Peak learning rate; sane for heads: 1e-3 to 5e-3.", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", help="Learning rate after the warm-up.")
    warmup_ratio: float = setting(0.05, help="Share of the steps in which the learning rate rises.", ge=0, le=1)
    weight_decay: float = setting(1e-4, help="AdamW weight decay; none on biases, norms and scales.", ge=0)
    max_grad_norm: float = setting(1.0, help="Gradients are clipped to this norm; 0 never clips.", ge=0)
    dropout: float = setting(0.1, help="Dropout in the heads.", ge=0, lt=1)
    patience: int = setting(
        0, help="Stop after this many epochs without a better validation score; 0 never stops early.", ge=0
    )
    split: Literal["grouped", "random", "column"] = setting(
        "grouped",
        help="grouped keeps all images of a prompt on one side; random leaks prompts; column reads the cache's split.",
    )
    fractions: str = setting("0.7,0.1,0.2", help="Shares of train, validation, test.")
    seed: int = setting(
        42, help="Seed of the initial weights and of dropout; and of what --data-seed sets.", ge=0, le=MAX_SEED
    )
    data_seed: int | None = setting(
        None, help="Seed of the split and of the order of rows; default --seed.", ge=0, le=MAX_SEED
    )
    repeats: int = setting(
        1, help="Train this often, with seeds --seed, --seed + 1, ..., and report mean and SD of every figure.", ge=1
    )
    tensorboard: bool = setting(False, help="Write curves for TensorBoard, into the run at the end.")
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.")

    def __new__(cls, **given: Any) -> Self:
        """Remember which settings were given: a preset changes the others alone."""
        config = super().__new__(cls)
        object.__setattr__(config, "_given", frozenset(given))
        return config

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that were given, also those that were given their default."""
        return frozenset(self.__dict__["_given"])

    @property
    def split_seed(self) -> int:
        """Seed of the split and of the order of rows, in force."""
        return self.seed if self.data_seed is None else self.data_seed

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of `sweep`: residual heads on cached embeddings, many settings of `train` at once.

    The first ten are lists; what `train` has beside these has its meaning of there.
    """

    cache: Path = setting(help="Feature cache made by `deltaclip extract`.", argument=True)
    out: Path | None = setting(None, help="Run directory of the winner; default runs/CACHE_sweep, numbered if taken.")
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
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Settings of `ablate`: every variant of the heads, floors and baselines on the same splits.

    What `train` has beside these keeps its default, but for what a variant changes.
    """

    cache: Path = setting(help="Feature cache made by `deltaclip extract`.", argument=True)
    out: Path | None = setting(None, help="Folder to make; default runs/CACHE_ablate, numbered if taken.")
    against: str = setting("residual", help="The variant that differences are taken against.")
    view: str = setting("stages", help="View of the kernel base, compared too where the cache has it.")
    repeats: int = setting(5, help="Splits, with seeds --seed, --seed + 1, ..., the same for all variants.", ge=1)
    epochs: int = setting(20, help="Passes over the training rows.", ge=1)
    batch_size: int = setting(64, help="Rows per step.", ge=1)
    lr: float = setting(1e-3, help="Peak learning rate; sane for heads: 1e-3 to 5e-3.", ge=0)
    split: Literal["grouped", "random", "column"] = setting("grouped", help="As in `train`.")
    fractions: str = setting("0.7,0.1,0.2", help="Shares of train, validation, test.")
    seed: int = setting(42, help="Seed of the first split and of its initial weights.", ge=0, le=MAX_SEED)
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.")

    def __post_init__(self) -> None:
        check_settings(self)
