"""Settings of all stages, ONE file as in features/.

Settings that every training of heads has, with the backbone frozen or not.

Settings of `sweep` and `ablate`: many heads on cached embeddings.

Settings of `finetune`: heads and the later blocks of CLIP.

Settings of the stages that read finished runs: `evaluate`, `compare`, `predict`.

Settings of the stages that show results: `report`, `demo`.

Settings of the stages that give a run to others: `export`, `serve`.

The values of a sweep as they are written: lists and ranges of settings of `train`.

Knows how values are written. Must not know how they are combined or drawn.

Settings of `train`: heads on cached embeddings, the backbone frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from deltaclip.base.device import PrecisionChoice
from deltaclip.base.errors import UserError, require_extra
from deltaclip.base.options import check_settings, field_types, option_name, setting
from deltaclip.base.places import check_suffix

# ---- Settings that every training of heads has, with the backbone frozen or not


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


# ---- Settings of `sweep` and `ablate`: many heads on cached embeddings


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


# ---- Settings of `finetune`: heads and the later blocks of CLIP


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LearningSettings):
    """Settings of `finetune`: heads, and CLIP but for its first blocks."""

    base_init: Literal["calibrated", "identity"] = setting(
        "calibrated", help="Bases: fitted to the embeddings of the cache in closed form, or plain."
    )
    preset: Literal["quick", "small", "balanced", "auto"] | None = setting(
        None,
        help="Freezing, learning rate, epochs, batch and scales for a first look, little data, much data, or by the "
        "number of training rows; an option that is given wins.",
    )
    batch_size: int = setting(32, help="Rows per forward and backward pass, of all processes together.", ge=1)
    lr: float = setting(
        3e-5,
        help="Peak learning rate of CLIP; sane: 3e-5 to 1e-4 with blocks frozen, 1e-5 to 5e-5 without.",
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
    precision: PrecisionChoice = setting(
        "auto", help="Number format of CLIP's activations; its weights are trained in fp32."
    )
    accumulate: int = setting(1, help="Batches whose gradients make one step.", ge=1)
    checkpointing: bool = setting(
        False, help="Keep one activation per block and compute the rest again: less memory, a third more time."
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
        10.0, help="Save the state for resuming after each epoch, and within it so often; 0: after epochs alone.", ge=0
    )
    save_full: bool = setting(False, help="Also write the whole model, as `open_clip.create_model` loads it.")
    backbone: str | None = setting(None, help="Where the cache's backbone lies now, if it has moved.", names="backbone")
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")
    image_root: Path | None = setting(
        None, help="Folder of the images; default the one that the cache recorded.", names="folder"
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    workers: int | None = setting(None, help="Decoding threads; default one per processor.", ge=1)

    def __post_init__(self) -> None:
        """Refuse values out of range, and options that contradict each other."""
        super().__post_init__()
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


# ---- Settings of the stages that read finished runs: `evaluate`, `compare`, `predict`


TABLES = (".csv", ".jsonl", ".parquet")  # what scores are written as


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `evaluate`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    cache: Path | None = setting(
        None,
        help="Cache to score; default the run's own, with the run's split. In another one every row is test.",
        names="cache",
    )
    image_root: Path | None = setting(
        None,
        help="For a run of `finetune`: folder of the images; default the one that the cache recorded.",
        names="folder",
    )
    backbone: str | None = setting(
        None,
        help="For a run of `finetune`: where its backbone lies now, if it has moved; checked by fingerprint.",
        names="backbone",
    )
    pretrained: str | None = setting(
        None, help="For a run of `finetune`: where its checkpoint lies now, if it has moved.", names="pretrained"
    )
    out: Path | None = setting(None, help="Also write the metrics to this JSON file.", names="file")

    def __post_init__(self) -> None:
        check_settings(self)
        _check_json(self.out)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `compare`."""

    runs: list[Path] = setting(
        help="Two or more run directories; the others are compared with the first.",
        argument=True,
        names="run",
    )
    out: Path | None = setting(None, help="Also write the comparison to this JSON file.", names="file")

    def __post_init__(self) -> None:
        check_settings(self)
        _check_json(self.out)
        if len(self.runs) < 2:
            raise UserError("one run is nothing to compare", place="RUNS", remedy="give two or more")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of `predict`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    target: str = setting(help="An image, a folder of images, a manifest, demo or ADAPTER:DIR.", argument=True)
    prompt: str | None = setting(None, help="Prompt of the image, or of every image of the folder.")
    prompts: Path | None = setting(
        None,
        help="For a folder: table with the columns image and prompt; default NAME.txt beside each image.",
        names="input",
    )
    out: Path | None = setting(None, help="Write the scores to this .csv, .jsonl or .parquet file.", names="file")
    backbone: str | None = setting(
        None, help="Where the run's backbone lies now, if it has moved; checked by fingerprint.", names="backbone"
    )
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")
    batch_size: int = setting(64, help="Images per forward pass.", ge=1)
    image_root: Path | None = setting(
        None, help="For a manifest: folder of the images; default the manifest's.", names="folder"
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    on_error: Literal["skip", "fail"] = setting("skip", help="What to do about an unreadable image.")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.out:
            check_suffix(self.out, TABLES)

    def check_more(self) -> None:
        """Refuse a target that is not there; one with a colon may be of an adapter."""
        if self.target != "demo" and ":" not in self.target and not Path(self.target).exists():
            remedy = "give an image, a folder, a manifest, demo or ADAPTER:DIR"
            raise UserError("no such file or folder", place=self.target, remedy=remedy)


def _check_json(out: Path | None) -> None:
    # So that a cache or a table given as --out by mistake is not replaced.
    if out and out.suffix.lower() != ".json":
        raise UserError(f"unknown suffix {out.suffix!r}", place="--out", remedy="give NAME.json")


# ---- Settings of the stages that show results: `report`, `demo`


RUNS = Path("runs")
PAGES = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `report`."""

    runs: list[Path] | None = setting(
        None,
        help="One run directory, or several side by side; default the newest in runs/.",
        argument=True,
        names="run",
    )
    out: Path | None = setting(
        None, help="Page to write; default RUN/report.html, of several RUN/../report.html.", names="file"
    )
    image_root: Path | None = setting(
        None,
        help="Where the images lie now; default the folder that the cache recorded.",
        names="folder",
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    gallery: int = setting(
        12, help="Worst and best rows of each label in the gallery, this many of each.", ge=0, le=500
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.out:  # so that it never replaces a file of a run
            check_suffix(self.out, PAGES)

    def check_more(self) -> None:
        """Refuse to look for the newest run where there is none."""
        if self.runs is None:
            newest_run(RUNS)


def newest_run(folder: Path) -> Path:
    """Return the run directory that was finished last.

    Raises:
        UserError: there is none.
    """
    there = folder.iterdir() if folder.is_dir() else ()
    # What a killed training left half written has a name that begins with a dot.
    found = [path for path in there if not path.name.startswith(".") and (path / "metrics.json").is_file()]
    if not found:
        raise UserError("holds no run", place=folder, remedy="give RUN, or make one with `deltaclip train`")
    return max(found, key=lambda path: (path / "metrics.json").stat().st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of `demo`."""

    out: Path = setting(Path(), help="Folder to make cache/ and runs/ in; default this one.", names="within")

    def __post_init__(self) -> None:
        check_settings(self)


# ---- Settings of the stages that give a run to others: `export`, `serve`


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `export`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    out: Path = setting(help="ONNX file to write, NAME.onnx.", names="file")
    part: Literal["heads", "scorer"] = setting(
        "scorer",
        help="scorer: pixels and tokens to scores, in fp32; heads: embeddings to scores.",
    )
    backbone: str | None = setting(
        None, help="Where the run's backbone lies now, if it has moved; checked by fingerprint.", names="backbone"
    )
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.out.suffix.lower() != ".onnx":
            raise UserError(f"unknown suffix {self.out.suffix!r}", place="--out", remedy="give NAME.onnx")

    def check_more(self) -> None:
        """Refuse to start without the extra."""
        require_extra("onnx", "onnx", "onnxscript", "onnxruntime", place="export")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `serve`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    host: str = setting("127.0.0.1", help="Address to listen on; another than this machine's own opens it to others.")
    port: int = setting(8000, help="Port to listen on; 0 takes a free one and prints it.", ge=0, le=65535)
    root: Path | None = setting(
        None, help="Folder under which requests may name images by path; none by default.", names="folder"
    )
    batch_size: int = setting(16, help="Images per forward pass; 1 scores each by itself.", ge=1)
    batch_wait_ms: float = setting(4.0, help="How long a first image waits for others, in milliseconds.", ge=0, le=1000)
    queue_size: int = setting(64, help="Images that may wait, and that one request may hold; more are refused.", ge=1)
    max_requests: int = setting(64, help="Requests answered at a time; more are refused.", ge=1)
    max_request_mb: float = setting(20.0, help="Largest request, and largest file under the root, in MB.", gt=0)
    max_megapixels: float = setting(50.0, help="Largest image, in million pixels.", gt=0, le=100)
    max_prompt_chars: int = setting(2000, help="Longest prompt, in characters.", ge=1)
    timeout_s: float = setting(30.0, help="Seconds that a request may take to arrive, and its answer to be made.", gt=0)
    backbone: str | None = setting(
        None, help="Where the run's backbone lies now, if it has moved; checked by fingerprint.", names="backbone"
    )
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")

    def __post_init__(self) -> None:
        check_settings(self)

    def check_more(self) -> None:
        """Refuse to start without the extra."""
        require_extra("serve", "fastapi", "uvicorn", "python_multipart", place="serve")


# ---- The values of a sweep as they are written: lists and ranges of settings of `train`


SWEPT = (
    "residual_scale_q",
    "residual_scale_c",
    "lr",
    "weight_decay",
    "w_q",
    "w_c",
    "dropout",
    "loss",
    "base_init",
    "seed",
)
LOGARITHMIC = ("lr", "weight_decay")
_NOWHERE = Path("cache.h5")  # settings are checked without it


@dataclass(frozen=True)
class Range:
    """Numbers between two ends, to be drawn from."""

    low: float
    high: float
    logarithmic: bool


def swept_values(name: str, text: str) -> list[Any] | Range:
    """Return the values that a text names, without double ones, or the range.

    Raises:
        UserError: no number, out of the range of the setting, or not a choice; ends of a range that do not rise.
    """
    place, kind = option_name(name), field_types(TrainConfig)[name]
    low, dots, high = text.partition("..")
    if dots and kind is float:
        ends = [_number(part, kind, place) for part in (low, high)]
        if not ends[0] < ends[1] or (name in LOGARITHMIC and ends[0] <= 0):
            remedy = "give LO..HI with LO below HI" + (" and above 0" if name in LOGARITHMIC else "")
            raise UserError(f"{text!r} is no range", place=place, remedy=remedy)
        for end in ends:
            TrainConfig(cache=_NOWHERE, **{name: end})  # refuses what is out of range
        return Range(ends[0], ends[1], name in LOGARITHMIC)
    words = [word.strip() for word in text.split(",")]
    values = list(dict.fromkeys(_number(word, kind, place) if kind in (float, int) else word for word in words))
    for value in values:
        given: dict[str, Any] = {name: value}
        TrainConfig(cache=_NOWHERE, **given)  # refuses what is out of range or no choice
    return values


def _number(word: str, kind: type, place: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        remedy = "give values such as 1,2,3" if kind is int else "give values such as 0.1,0.2"
        what = "whole number" if kind is int else "number"
        raise UserError(f"{word!r} is no {what}", place=place, remedy=remedy) from None


# ---- Settings of `train`: heads on cached embeddings, the backbone frozen


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FrozenClip, LearningSettings):
    """Settings of `train`: heads on cached embeddings, the backbone frozen."""

    view: str = setting("stages", help="View that --base-init kernel reads; give it to `extract --views`.")
    tensorboard: bool = setting(False, help="Write curves for TensorBoard, into the run at the end.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_frozen()

    def check_more(self) -> None:
        """Refuse to start without the library of an option."""
        if self.tensorboard:
            require_extra("tensorboard", "tensorboard", place="--tensorboard")
