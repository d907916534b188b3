"""What a training is about to do; what looks unwise.

What a training is about to do, in words: settings, freeze strategy, formulas; and what looks unwise.

Printed before training and stored in the run.

What a fine-tuning is about to do, in words: rates, freeze strategy of both towers; and what looks unwise.

Knows the settings of `finetune` and towers. The lines that every training has stand in `describe`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.options import option_name
from deltaclip.base.vocabulary import LABELS
from deltaclip.features.backbone.towers import count_parameters
from deltaclip.pipeline.model.heads import BOUND, HEADS, LAYERS, WIDTH
from deltaclip.pipeline.model.losses import BATCH_LOSSES, DEFAULT_STD, WEIGHT_FLOOR
from deltaclip.pipeline.rows.task import labels_with_std, num_explained
from deltaclip.pipeline.runs.measure import present_labels, rankable_labels, trained_labels
from deltaclip.pipeline.training.train_towers import heads_config

if TYPE_CHECKING:
    from deltaclip.features.backbone.precision import Choice
    from deltaclip.features.backbone.towers import CutTower
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.rows.task import LossWeights
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import FinetuneConfig, TrainConfig
    from deltaclip.pipeline.training.processes import Processes


# ---- What a training is about to do, in words: settings, freeze strategy, formulas; and what looks unwise


LR_RANGE = (1e-3, 5e-3)
_BASES = {
    "calibrated": "calibrated on the training rows",
    "identity": "identity",
    "kernel": "kernel ridge on training and validation rows: f_q on {view}, f_c on {view}, prompt and f_q",
}
LARGE_SCALE = 0.5  # beyond, the correction is no longer small


class ModeWords(NamedTuple):
    """What of a description differs between modes: the learning rates, and lines on what is frozen."""

    rates: str
    freezing: list[str]


def describe(config: TrainConfig, rows: CacheRows, weights: LossWeights, *, mode: ModeWords | None = None) -> list[str]:
    """Return the configuration of a training, one line a topic.

    Args:
        config: settings of the stage.
        rows: the cache.
        weights: loss weights that are in force.
        mode: of a training that is not of heads alone.
    """
    frozen = ["freezing      image tower: all frozen; text tower: all frozen (cached embeddings)"]
    mode = mode or ModeWords(f"{config.lr:g}", frozen)
    clip = f"gradients clipped to {config.max_grad_norm:g}" if config.max_grad_norm else "gradients not clipped"
    data = "" if config.split_seed == config.seed else f", data seed {config.split_seed}"
    stop = f", stops after {config.patience} epochs without gain" if config.patience else ""
    return [
        f"data          {rows.dataset['name']}: {len(rows.rows):,} rows",
        f"embeddings    {rows.facts['backbone']}, {rows.facts['precision']}, D = {rows.dim}",
        f"epochs        {config.epochs}, batch {config.batch_size}, seed {config.seed}{data}{stop}",
        *_about_repeats(config),
        f"learning rate {mode.rates}, {config.warmup_ratio:.0%} warm-up, then {config.schedule}",
        f"optimiser     AdamW, weight decay {config.weight_decay:g}, {clip}, dropout {config.dropout:g}",
        f"loss          {weights.q:g} {config.loss}(q) + {weights.c:g} {config.loss}(c)"
        + (f" + {weights.exp:g} mse(explanation)" if weights.exp else "; no explanations"),
        *_about_rationale(config, rows, weights),
        *_about_stds(config, rows),
        *mode.freezing,
        *_formulas(config),
    ]


def _about_repeats(config: TrainConfig) -> list[str]:
    if config.repeats == 1:
        return []
    last = config.split_seed + config.repeats - 1
    seeds = f"split seeds {config.split_seed} to {last}, initial weights of their own"
    return [f"repeats       {config.repeats}: {seeds}; the run keeps the heads of the first"]


def _about_rationale(config: TrainConfig, rows: CacheRows, weights: LossWeights) -> list[str]:
    if not weights.exp:
        return []
    shared = "Fusion" if config.residual_learning else "MLP"
    found = f"{num_explained(rows):,} of {len(rows.rows):,} rows have one"
    return [f"explanations  {found}; predicted by a Linear on the first layer of {shared}([v, t, s])"]


def _about_stds(config: TrainConfig, rows: CacheRows) -> list[str]:
    known = labels_with_std(rows)
    lines = []
    if config.loss == "fidelity":
        used = f"of the cache for {' and '.join(known)}, {DEFAULT_STD:g} elsewhere" if known else f"{DEFAULT_STD:g}"
        lines.append(f"label SDs     {used}")
    if config.std_weighting and known:
        lines.append(f"row weights   1 / (label SD^2 + {WEIGHT_FLOOR:g}), mean 1, for {' and '.join(known)}")
    return lines


def _formulas(config: TrainConfig) -> list[str]:
    if not config.residual_learning:
        return _direct_formulas(config)
    scale = {"fixed": "", "learned": " (start; learned)", "curriculum": " (end; ramped up)"}[config.scale_mode]
    scale_q, scale_c = f"{config.residual_scale_q:g}{scale}", f"{config.residual_scale_c:g}{scale}"
    kernel = config.base_init == "kernel"
    base_q, term_c = ("clamp(f_q(x), 0, 1)", " + f_c(x, t, f_q)") if kernel else ("sigmoid(w . v + b0)", "")
    base_c = f"clamp(a (s + 1)/2 + b{term_c}, 0, 1)"
    return [
        f"quality       q = clamp({base_q} + {scale_q} tanh(MLP(v)), 0, 1)",
        f"consistency   c = clamp({base_c} + {scale_c} tanh(Fusion([v, t, s])), 0, 1), s = v . t",
        f"bases         {_BASES[config.base_init].format(view=config.view)}",
    ]


def _direct_formulas(config: TrainConfig) -> list[str]:
    c = "sigmoid(MLP([v, t, s]))"
    lines = [
        "quality       q = sigmoid(Linear(v))",
        f"consistency   c = {f'({c} + sigmoid(k s + m)) / 2' if config.two_branch else c}, s = v . t",
    ]
    if config.two_branch:
        lines.append("cosine branch k, m start calibrated on the training rows")
    if config.refinement:
        shape = f"{LAYERS} layers, {HEADS} heads, width {WIDTH}"
        lines.append(f"refinement    clamp(c + {BOUND:g} tanh(Transformer(v, t, c)), 0, 1), {shape}")
    return lines


def warnings_of(config: TrainConfig, rows: CacheRows, split: Split) -> list[str]:
    """Return one line for each setting that is unwise, or that changes nothing here."""
    rates = rate_warnings("--lr", config.lr, LR_RANGE)
    found = [*config.frozen_words(), *rates, *settings_warnings(config, rows, split)]
    return [f"warning: {line}" for line in found]


def rate_warnings(option: str, rate: float, sane: tuple[float, float]) -> list[str]:
    """Return a line where a learning rate is out of its range."""
    if sane[0] <= rate <= sane[1]:
        return []
    return [f"{option} {rate:g} is outside {sane[0]:g} to {sane[1]:g}, the sane range of this mode"]


def settings_warnings(config: TrainConfig, rows: CacheRows, split: Split) -> list[str]:
    """Return what `warnings_of` says of all but learning rates, in any mode."""
    found = []
    for head in ("q", "c"):
        scale = getattr(config, f"residual_scale_{head}")
        if config.residual_learning and scale > LARGE_SCALE:
            found.append(f"--residual-scale-{head} {scale:g} is above {LARGE_SCALE}: the correction is no longer small")
    if not config.residual_learning:
        found += [
            f"{option_name(name)} is not used: direct heads have neither base nor scale"
            for name in ("residual_scale_q", "residual_scale_c", "scale_mode", "base_init")
            if getattr(config, name) != getattr(type(config), name)
        ]
    if config.view != type(config).view and (config.base_init != "kernel" or not config.residual_learning):
        found.append(f"--view {config.view} is not used: it belongs to --base-init kernel")
    if config.residual_learning:
        found += [
            f"{option_name(name)} is not used: it belongs to direct heads (--no-residual-learning)"
            for name in ("two_branch", "refinement")
            if getattr(config, name)
        ]
    found += _about_loss(config, rows)
    found += _about_explanations(config, rows)
    found += _about_split(config, rows, split)
    missing = [label for label in LABELS if label not in present_labels(rows)]
    found += [f"the cache has no {label} labels: that head is not trained and has no scores" for label in missing]
    learned = trained_labels(rows, split.train, (config.w_q, config.w_c))
    idle = [label for label in LABELS if label not in (*missing, *learned)]
    found += [f"no training row weighs for {label}: that head is not trained and has no scores" for label in idle]
    return found


def _about_loss(config: TrainConfig, rows: CacheRows) -> list[str]:
    found = []
    lacking = " and ".join(label for label in present_labels(rows) if label not in labels_with_std(rows))
    if lacking and config.loss == "fidelity":
        found.append(f"the cache has no label SDs for {lacking}: --loss fidelity takes {DEFAULT_STD:g} there")
    if lacking and config.std_weighting:
        found.append(f"--std-weighting is not used for {lacking}: the cache has no label SDs there")
    if config.batch_size == 1 and config.loss in BATCH_LOSSES:
        found.append(f"--batch-size 1 leaves --loss {config.loss} nothing to compare: the heads do not learn")
    return found


def _about_explanations(config: TrainConfig, rows: CacheRows) -> list[str]:
    if not config.use_explanations:
        changed = config.w_exp != type(config).w_exp
        return [f"--w-exp {config.w_exp:g} is not used: give --use-explanations"] if changed else []
    if not num_explained(rows):
        return ["--use-explanations is not used: no row of the cache has an explanation"]
    return [] if config.w_exp else ["--use-explanations is not used: --w-exp is 0"]


def _about_split(config: TrainConfig, rows: CacheRows, split: Split) -> list[str]:
    found = []
    if not rankable_labels(rows, split.val):
        found.append("too few validation rows to rank: the last epoch is kept")
        if config.patience:
            found.append(f"--patience {config.patience} is not used: it needs validation rows")
    if config.split == "column" and config.repeats > 1:
        found.append("--split column gives every repeat the same test rows: the SD is that of the initial weights")
    if not split.test.size:
        found.append("no test rows: nothing is held back to judge this run by")
    if config.split == "column" and not split.note and config.fractions != type(config).fractions:
        found.append(f"--fractions {config.fractions} is not used: the column gives all three sides")
    return found


# ---- What a fine-tuning is about to do, in words: rates, freeze strategy of both towers; and what looks unwise


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
