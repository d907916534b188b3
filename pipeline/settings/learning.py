"""Settings that every training of heads has, with the backbone frozen or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from deltaclip.base.errors import UserError
from deltaclip.base.settings import check_settings, setting

BaseInit = Literal["calibrated", "identity", "kernel"]
MAX_SEED = 2**32 - 1  # what every generator takes: torch has 64 bits, scikit-learn 32


def check_fractions(text: str) -> tuple[float, float, float]:
    """Return the shares of train, validation and test that `0.7,0.1,0.2` names; they sum to 1, that of train is not 0.

    Raises:
        UserError: no numbers, or such that do not fit.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        remedy = "give train,val,test such as 0.7,0.1,0.2"
        raise UserError(f"{text!r} are no numbers", place="--fractions", remedy=remedy) from None
    fits = len(shares) == 3 and all(0 <= share <= 1 for share in shares)  # NaN does not
    if not fits or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
        shown = ",".join(f"{share:g}" for share in shares)
        raise UserError(
            f"fractions {shown} do not fit",
            place="--fractions",
            remedy="give train,val,test that sum to 1, train above 0, for example 0.7,0.1,0.2",
        )
    return shares[0], shares[1], shares[2]


@dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """What `train` and `finetune` have in common: the heads, what they learn from, and for how long."""

    cache: Path = setting(help="Feature cache made by `deltaclip extract`.", argument=True, names="cache")
    out: Path | None = setting(
        None, help="Run directory to make; default runs/CACHE_MODE, numbered if taken.", names="new"
    )
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
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")

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
        check_fractions(self.fractions)


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
