"""What a training is about to do, in words: settings, freeze strategy, formulas; and what looks unwise.

Printed before training and stored in the run. Knows settings and towers. Must not know rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from deltaclip.base.options import option_name
from deltaclip.features.data.targets import recorded_targets
from deltaclip.pipeline.model.heads import BOUND, HEADS, LAYERS, WIDTH
from deltaclip.pipeline.model.losses import BATCH_LOSSES, DEFAULT_STD, WEIGHT_FLOOR
from deltaclip.pipeline.rows.pair_rows import count_across
from deltaclip.pipeline.rows.task import labels_with_std, num_explained, present_labels, rankable_labels
from deltaclip.pipeline.settings import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaclip.base.vocabulary import Target
    from deltaclip.features.backbone.precision import Choice
    from deltaclip.features.backbone.towers import CutTower
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.rows.task import Task
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import FinetuneConfig, LearningSettings
    from deltaclip.pipeline.training.processes import Processes


# ---- What a training is about to do, in words: settings, freeze strategy, formulas; and what looks unwise


LR_RANGE = (1e-3, 5e-3)
_BASES = {
    "calibrated": "calibrated on the training rows",
    "identity": "identity",
    "kernel": "f is kernel ridge on training and validation rows: on {view}; of pairs on it, prompt and image score",
    "auto": "f is chosen among closed forms by left-out training and validation rows, on center{views}",
}
LARGE_SCALE = 0.5  # beyond, the correction is no longer small


class ModeWords(NamedTuple):
    """What of a description differs between modes: the learning rates, and lines on what is frozen."""

    rates: str
    freezing: list[str]


def describe(task: Task[Any], *, mode: ModeWords | None = None) -> list[str]:
    """Return the configuration of a training, one line a topic; `mode` is of one that is not of heads alone."""
    config, rows = task.config, task.rows
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
        _about_weights(task),
        *_about_rationale(task),
        *_about_stds(config, rows),
        *mode.freezing,
        *_formulas(task),
    ]


def _about_weights(task: Task[Any]) -> str:
    weights = task.weights
    parts = [f"{weight:g} {task.config.loss}({target})" for target, weight in weights.targets.items()]
    if weights.explanations:
        return f"loss          {' + '.join([*parts, f'{weights.explanations:g} mse(explanation)'])}"
    return f"loss          {' + '.join(parts)}; no explanations"


def _about_repeats(config: LearningSettings) -> list[str]:
    if config.repeats == 1:
        return []
    last = config.split_seed + config.repeats - 1
    seeds = f"split seeds {config.split_seed} to {last}, initial weights of their own"
    return [f"repeats       {config.repeats}: {seeds}; the run keeps the heads of the first"]


def _about_rationale(task: Task[Any]) -> list[str]:
    if not task.weights.explanations:
        return []
    shared = "Fusion" if task.config.residual_learning else "MLP"
    found = f"{num_explained(task.rows):,} of {len(task.rows.rows):,} rows have one"
    return [f"explanations  {found}; predicted by a Linear on the first layer of {shared}([v, t, s])"]


def _about_stds(config: LearningSettings, rows: CacheRows) -> list[str]:
    known = labels_with_std(rows)
    lines = []
    if config.loss == "fidelity":
        used = f"of the cache for {' and '.join(known)}, {DEFAULT_STD:g} elsewhere" if known else f"{DEFAULT_STD:g}"
        lines.append(f"label SDs     {used}")
    if config.std_weighting and known:
        lines.append(f"row weights   1 / (label SD^2 + {WEIGHT_FLOOR:g}), mean 1, for {' and '.join(known)}")
    return lines


def _formulas(task: Task[Any]) -> list[str]:
    config, targets = task.config, task.rows.targets
    if not config.residual_learning:
        return _direct_formulas(config, targets)
    when = {"fixed": "", "learned": " (start; learned)", "curriculum": " (end; ramped up)"}[config.scale_mode]
    fitted = config.base in {"auto", "kernel"}
    bases = {
        "image": "clamp(f, 0, 1)" if fitted else "sigmoid(w . v + b0)",
        "pair": f"clamp(a (s + 1)/2 + b{' + f' if fitted else ''}, 0, 1)",
    }
    corrections = {"image": "tanh(MLP(v)), 0, 1)", "pair": "tanh(Fusion([v, t, s])), 0, 1), s = v . t"}
    lines = [
        f"{each.name:13} clamp({bases[each.sees]} + {config.scales.of(each.name):g}{when} {corrections[each.sees]}"
        for each in targets
    ]
    names = [*task.rows.views, *(["anchors"] if task.rows.anchors is not None else [])]
    names += [f"{other.rows.path.name}" for other in task.rows.others]
    views = "".join(f", {name}" for name in names)
    return [*lines, f"bases         {_BASES[config.base].format(view=getattr(config, 'view', ''), views=views)}"]


def _direct_formulas(config: LearningSettings, targets: Sequence[Target]) -> list[str]:
    mlp = "sigmoid(MLP([v, t, s]))"
    pair = f"{f'({mlp} + sigmoid(k s + m)) / 2' if config.two_branch else mlp}, s = v . t"
    lines = [f"{each.name:13} {'sigmoid(Linear(v))' if each.sees == 'image' else pair}" for each in targets]
    if config.two_branch:
        lines.append("cosine branch k, m start calibrated on the training rows")
    if config.refinement:
        shape = f"{LAYERS} layers, {HEADS} heads, width {WIDTH}"
        lines.append(f"refinement    clamp(coarse + {BOUND:g} tanh(Transformer(v, t, coarse)), 0, 1), {shape}")
    return lines


def warnings_of(task: Task[TrainConfig]) -> list[str]:
    """Return one line for each setting that is unwise, or that changes nothing here."""
    rates = rate_warnings("--lr", task.config.lr, LR_RANGE)
    found = [*task.config.frozen_words(), *rates, *settings_warnings(task)]
    return [f"warning: {line}" for line in found]


def rate_warnings(option: str, rate: float, sane: tuple[float, float]) -> list[str]:
    """Return a line where a learning rate is out of its range."""
    if sane[0] <= rate <= sane[1]:
        return []
    return [f"{option} {rate:g} is outside {sane[0]:g} to {sane[1]:g}, the sane range of this mode"]


def settings_warnings(task: Task[Any]) -> list[str]:
    """Return what `warnings_of` says of all but learning rates, in any mode."""
    config, rows, found = task.config, task.rows, list[str]()
    names = [target.name for target in rows.targets]
    large = [name for name in names if config.scales.of(name) > LARGE_SCALE]
    if config.residual_learning:
        found += [
            f"--scale {name}={config.scales.of(name):g} is above {LARGE_SCALE}: the correction is no longer small"
            for name in large
        ]
        found += [
            f"{option_name(name)} is not used: it belongs to direct heads (--no-residual-learning)"
            for name in ("two_branch", "refinement")
            if getattr(config, name)
        ]
    else:
        found += [
            f"{option_name(name)} is not used: direct heads have neither base nor scale"
            for name in ("scale", "residual_scale_q", "residual_scale_c", "scale_mode", "base")
            if getattr(config, name) != getattr(type(config), name)
        ]
    view = getattr(config, "view", TrainConfig.view)
    if view != TrainConfig.view and (config.base != "kernel" or not config.residual_learning):
        found.append(f"--view {view} is not used: it belongs to --base kernel")
    if rows.others and (config.base != "auto" or not config.residual_learning):
        found.append(f"{rows.others[0].rows.path} is not used: caches beside the first belong to --base auto")
    found += _about_unseen(rows)
    found += _about_loss(config, rows)
    found += _about_explanations(config, rows)
    found += _about_split(config, rows, task.split)
    asked = {"quality", "consistency", *names} & {*config.scales.named, *config.weights.named}
    found += [
        f"the cache has no target {name}: what is given for it is not used" for name in sorted(asked - set(names))
    ]
    found += _about_pairs(task)
    missing = [name for name in names if name not in (*present_labels(rows), *task.train_pairs)]
    found += [f"the cache has no {name} labels: that head is not trained and has no scores" for name in missing]
    idle = [name for name in names if name not in (*missing, *task.trained)]
    return found + [f"no training row weighs for {name}: that head is not trained and has no scores" for name in idle]


def _about_unseen(rows: CacheRows) -> list[str]:
    """Say what is not trained of a cache whose backbone has no text tower, and what would be needed."""
    unseen = [target.name for target in recorded_targets(rows.dataset) if target not in rows.targets]
    if not unseen:
        return []
    verb = "see" if len(unseen) > 1 else "sees"
    return [
        f"{' and '.join(unseen)} {verb} the prompt and {rows.facts['backbone']} has no text tower, so it is not "
        f"trained: extract the data with a CLIP too and give both, `deltaclip train CLIP.h5 {rows.path}`"
    ]


def _about_pairs(task: Task[Any]) -> list[str]:
    if task.rows.pairs is None:
        return []
    count = len(task.rows.pairs.a_P)
    if not task.learns_pairs:
        return [f"the cache has {count:,} pairs, which `train` learns from: here they are left out"]
    found = []
    if across := count_across(task.rows, task.split):
        found.append(f"{across:,} of {count:,} pairs have images on two sides of the split: left out")
    if task.rows.v_ID is None:
        found.append("vectors are read in blocks: bases learn from pairs, the correction from ratings alone")
    return found


def _about_loss(config: LearningSettings, rows: CacheRows) -> list[str]:
    found = []
    lacking = " and ".join(label for label in present_labels(rows) if label not in labels_with_std(rows))
    if lacking and config.loss == "fidelity":
        found.append(f"the cache has no label SDs for {lacking}: --loss fidelity takes {DEFAULT_STD:g} there")
    if lacking and config.std_weighting:
        found.append(f"--std-weighting is not used for {lacking}: the cache has no label SDs there")
    if config.batch_size == 1 and config.loss in BATCH_LOSSES:
        found.append(f"--batch-size 1 leaves --loss {config.loss} nothing to compare: the heads do not learn")
    return found


def _about_explanations(config: LearningSettings, rows: CacheRows) -> list[str]:
    if not config.use_explanations:
        changed = config.w_exp != type(config).w_exp
        return [f"--w-exp {config.w_exp:g} is not used: give --use-explanations"] if changed else []
    if all(target.sees == "image" for target in rows.targets):
        return ["--use-explanations is not used: no target of the cache sees the prompt"]
    if not num_explained(rows):
        return ["--use-explanations is not used: no row of the cache has an explanation"]
    if not any(target.sees == "pair" for target in rows.targets):
        return ["--use-explanations is not used: no target of the cache sees the prompt"]
    return [] if config.w_exp else ["--use-explanations is not used: --w-exp is 0"]


def _about_split(config: LearningSettings, rows: CacheRows, split: Split) -> list[str]:
    found = []
    if not rankable_labels(rows, split.val) and rows.pairs is None:
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


PARTIAL_RANGE, FULL_RANGE, LORA_RANGE = (3e-5, 1e-4), (1e-5, 5e-5), (1e-4, 1e-3)


def mode_words(
    config: FinetuneConfig, image: CutTower, text: CutTower, *, precision: Choice, processes: Processes
) -> ModeWords:
    """Return the lines that tell this mode from others."""
    decay = f", times {config.layer_decay:g} a block towards the input" if config.layer_decay < 1 else ""
    counts = [tower.count_parameters().words for tower in (image, text)]
    frozen_text = " (cached embeddings)" if text.all_frozen else ""
    again = ", activations computed again" if config.checkpointing else ""
    again += ", blocks compiled" if config.compile else ""
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
            *_addition_lines(image, text),
            f"frozen part   {activations}; training images: {_augment_words(config)}",
            f"precision     {precision.precision} activations ({precision.reason}), fp32 weights{again}{step}{several}",
            f"heads         {_start_words(config)}",
        ],
    )


def _addition_lines(image: CutTower, text: CutTower) -> list[str]:
    plan = image.low_rank
    if plan is None:
        return []
    count = sum(tower.count_parameters().trainable for tower in (image, text))
    size = f"{count:,} numbers, {4 * count / 1e6:.2f} MB of the checkpoint"
    first = f"additions     W + {plan.scale:g} B A, rank {plan.rank} (LoRA): {size}"
    return [first, *(f"              {words}" for tower in (image, text) if (words := tower.addition_words()))]


def _augment_words(config: FinetuneConfig) -> str:
    if config.augment == "views":
        return f"one of center, flip and {config.crops} crops a row and epoch"
    return "random crops" if config.augment == "crops" else "as they are"


def _start_words(config: FinetuneConfig) -> str:
    if config.init_heads:
        return f"those of {config.init_heads}"
    return f"trained alone for {config.head_epochs} epochs first" if config.head_epochs else "new"


def tune_warnings(task: Task[FinetuneConfig]) -> list[str]:
    """Return one line for each setting that is unwise, or that changes nothing here."""
    config = task.config
    lr_range = LORA_RANGE if config.lora_rank else FULL_RANGE if config.trains_all else PARTIAL_RANGE
    found = [
        *rate_warnings("--lr", config.lr, lr_range),
        *rate_warnings("--head-lr", config.head_lr, LR_RANGE),
        *settings_warnings(task),
    ]
    if config.crops != type(config).crops and config.augment != "views":
        found.append(f"--crops {config.crops} is not used: it belongs to --augment views")
    if not config.lora_rank:
        changed = [
            name for name in ("lora_alpha", "lora_layers") if getattr(config, name) != getattr(type(config), name)
        ]
        found += [f"{option_name(name)} is not used: give --lora-rank" for name in changed]
    if config.init_heads:
        unused = ("head_epochs", "base", "dropout")
        changed = [name for name in unused if getattr(config, name) != getattr(type(config), name)]
        found += [f"{option_name(name)} is not used: the heads are those of --init-heads" for name in changed]
    return [f"warning: {line}" for line in found]
