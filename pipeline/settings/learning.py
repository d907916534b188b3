"""Settings that every training of heads has, with the backbone frozen or not, and numbers by target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from deltaclip.base.errors import UserError, require_extra
from deltaclip.base.options import LARGEST_NUMBER, check_settings, option_name, setting

# The names that options take; what they mean is said where each is read.
Base = Literal["auto", "calibrated", "identity", "kernel"]
Loss = Literal["mse", "huber", "plcc", "rank", "fidelity"]
Schedule = Literal["cosine", "linear", "constant"]
ScaleMode = Literal["fixed", "learned", "curriculum"]
SplitKind = Literal["grouped", "random", "column"]
Preset = Literal["quick", "small", "balanced", "auto"]
MAX_REPEATS = 1000  # more tell nothing more of a mean
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


@dataclass(frozen=True)
class ByTarget:
    """A number for every target: `named` for those that were named, `default` for the others."""

    default: float
    named: dict[str, float]

    def of(self, target: str) -> float:
        """Return the number of a target."""
        return self.named.get(target, self.default)


def words_by_target(text: str) -> dict[str, list[str]]:
    """Return the words of `0.2,quality=0.1,0.3` by target: {"": ["0.2"], "quality": ["0.1", "0.3"]}; "" is all."""
    found, name = dict[str, list[str]](), ""
    for word in text.split(","):
        before, sign, after = word.strip().rpartition("=")
        name = before.strip() if sign else name
        found.setdefault(name, []).append(after.strip())
    return found


def by_target(
    option: str, text: str, of_one: Mapping[str, float | None], *, default: float, le: float = LARGEST_NUMBER
) -> ByTarget:
    """Return the numbers of `0.2,quality=0.1`, with those of options for one target.

    Raises:
        UserError: no number, one out of range, or two of one target.
    """
    place, example = option_name(option), f"give {default:g}, or quality={default:g}"
    numbers = dict[str, float]()
    for name, words in words_by_target(text).items():
        if len(words) > 1:
            raise UserError(f"{len(words)} values for {name or 'all targets'}", place=place, remedy=example)
        try:
            numbers[name] = float(words[0])
        except ValueError:
            raise UserError(f"{words[0]!r} is no number", place=place, remedy=example) from None
        if not 0 <= numbers[name] <= le:  # NaN is not
            raise UserError(f"{words[0]} is out of range", place=place, remedy=f"give a value from 0 to {le:g}")
    named = {name: value for name, value in of_one.items() if value is not None}
    if twice := sorted(named.keys() & numbers.keys()):
        raise UserError(f"{twice[0]} is given twice", place=place, remedy=f"give one of {place} and the option for it")
    everything = numbers.pop("", default)
    return ByTarget(everything, numbers | named)


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
    base: Base = setting(
        "auto",
        help="Bases: the best of several closed forms on all that the cache has, by left-out rows; linear on v and s, "
        "plain, or kernel ridge on one view (--view).",
        spelling="--base-init",
    )
    scale_mode: ScaleMode = setting(
        "fixed",
        help="Scales of the corrections: as given, learned within a bound, or ramped up over the epochs.",
    )
    scale: str = setting(
        "0.2",
        help="Largest correction, of all targets or by name: 0.1, or 0.2,quality=0.3; 0.1 for little data, 0.3 to 0.5 "
        "for much.",
    )
    residual_scale_q: float | None = setting(None, help="As --scale quality=.", ge=0, le=1)
    residual_scale_c: float | None = setting(None, help="As --scale consistency=.", ge=0, le=1)
    loss: Loss = setting("mse", help="Loss of every head; plcc, rank and fidelity compare the rows of a batch.")
    std_weighting: bool = setting(False, help="Weigh rows by how far raters agreed: 1 / (label SD^2 + 0.01), mean 1.")
    weight: str = setting(
        "0.5", help="Weight of the loss, of all targets or by name: quality=1,consistency=0.2; 0 leaves a target out."
    )
    w_q: float | None = setting(None, help="As --weight quality=.", ge=0)
    w_c: float | None = setting(None, help="As --weight consistency=.", ge=0)
    use_explanations: bool = setting(
        False, help="Also learn to predict the embedding of the explanation, where the data has one."
    )
    w_exp: float = setting(0.1, help="Weight of the explanation loss.", ge=0)
    preset: Preset | None = setting(
        None,
        help="Epochs, batch and scales for a first look, little data, much data, or by the number of training rows; "
        "an option that is given wins.",
    )
    epochs: int = setting(20, help="Passes over the training rows.", ge=1)
    batch_size: int = setting(64, help="Rows per step.", ge=1)
    lr: float = setting(1e-3, help="Peak learning rate; sane for heads: 1e-3 to 5e-3.", ge=0)
    schedule: Schedule = setting("cosine", help="Learning rate after the warm-up.")
    warmup_ratio: float = setting(0.05, help="Share of the steps in which the learning rate rises.", ge=0, le=1)
    weight_decay: float = setting(1e-4, help="AdamW weight decay; none on biases, norms and scales.", ge=0)
    max_grad_norm: float = setting(1.0, help="Gradients are clipped to this norm; 0 never clips.", ge=0)
    dropout: float = setting(0.1, help="Dropout in the heads.", ge=0, lt=1)
    patience: int = setting(
        0, help="Stop after this many epochs without a better validation score; 0 never stops early.", ge=0
    )
    split: SplitKind = setting(
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
        1,
        help="Train this often, with seeds --seed, --seed + 1, ..., and report mean and SD of every figure.",
        ge=1,
        le=MAX_REPEATS,
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

    @property
    def scales(self) -> ByTarget:
        """Scales of the corrections, with what the options for one target say."""
        of_one = {"quality": self.residual_scale_q, "consistency": self.residual_scale_c}
        return by_target("scale", self.scale, of_one, default=0.2, le=1)

    @property
    def weights(self) -> ByTarget:
        """Weights of the losses, with what the options for one target say."""
        return by_target("weight", self.weight, {"quality": self.w_q, "consistency": self.w_c}, default=0.5)

    def __post_init__(self) -> None:
        check_settings(self)
        check_fractions(self.fractions)
        for numbers in (self.scales, self.weights):  # refused when they are parsed
            assert numbers.default >= 0


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """Where a finished run is written to besides its directory."""

    track: Literal["mlflow", "wandb"] | None = setting(
        None, help="Write the finished run to MLflow or Weights & Biases too (extra of that name)."
    )

    def check_more(self) -> None:
        """Refuse to start without the library of an option."""
        if self.track:
            require_extra(self.track, self.track, place="--track")
