"""The variants that an ablation compares, and their predictions of the test rows of one split.

Heads with parts off, floors and baselines, and trainings of CLIP too, with the defaults of `finetune`. Knows one table:
a further variant is one line of it; and which rows a baseline fits and chooses on: never the test rows. Heads share no
parameter, so a variant may turn a part of all of them off: each target's column shows its own. Must not know figures,
intervals or run directories.

Shapes: N rows, F features, M test rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.device import choose_device
from deltaclip.base.progress import say
from deltaclip.pipeline.comparing.baselines import fit_ridge_regression, fit_svr
from deltaclip.pipeline.model.scores import cosine
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.row_floor import floor_of
from deltaclip.pipeline.rows.split_rows import joined_groups
from deltaclip.pipeline.rows.task import Task, of_rows, validation
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, score
from deltaclip.pipeline.settings import BY_TARGET, PLAIN, FinetuneConfig
from deltaclip.pipeline.training.bases import candidate_scores
from deltaclip.pipeline.training.finetune_job import TuningJob
from deltaclip.pipeline.training.processes import Processes
from deltaclip.pipeline.training.train_heads import learn
from deltaclip.pipeline.training.train_stacks import Stacked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import AblateConfig, TrainConfig
    from deltaclip.pipeline.training.train_heads import Learned

# ---- Predictions of test rows that no heads made: floors and baselines, one label at a time


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.comparing.baselines import Baseline
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.scoring.splits import Split

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predictions (M,) of the test rows, NaN where there are none, and what was chosen without them."""

    score_M: NDArray[np.floating]
    about: dict[str, Any] = field(default_factory=dict)


def predict_no_image(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict from source and prompt alone: the floor of `train`'s table."""
    floor = floor_of(rows, label, train=split.train, test=split.test)
    return Predicted(score_M=floor.predicted, about={"means": floor.means})


def predict_cosine(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with the cosine of image and prompt, without training."""
    return Predicted(score_M=rows.cosine(split.test))


def predict_ridge(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with ridge regression, its strength chosen among the training rows."""
    return _ridge(rows, split, label, view=None)


def predict_ridge_on_view(rows: CacheRows, split: Split, label: str, *, view: str) -> Predicted:
    """Predict with ridge regression on a further view of the images in place of v."""
    return _ridge(rows, split, label, view=view)


def _ridge(rows: CacheRows, split: Split, label: str, *, view: str | None) -> Predicted:
    train_NF, test_MF = (features(rows, side, label, view=view) for side in (split.train, split.test))
    groups_N = joined_groups(rows)[split.train]
    truth_N = rows.label(label)
    return _predicted(fit_ridge_regression(train_NF, truth_N[split.train], groups_N), test_MF, split, truth_N)


def predict_svr(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with a support vector machine, chosen on the validation rows by what chooses a head's epoch."""

    def judge(predicted: FloatArray, truth: FloatArray) -> float:
        score = validation({label: predicted}, {label: truth}).scores[label]
        return float(np.nan_to_num(score))  # constant predictions have no correlation

    train_NF, val_NF = (features(rows, side, label) for side in (split.train, split.val))
    truth = rows.label(label)
    machine = fit_svr(train_NF, truth[split.train], validation=(val_NF, truth[split.val]), judge=judge)
    return _predicted(machine, features(rows, split.test, label), split, truth)


def features(rows: CacheRows, chosen: NDArray[np.int64], label: str, *, view: str | None = None) -> FloatArray:
    """Return what the head of a target sees, (N, F) float64: v of the image, [v, t, s] of a pair.

    With `view`, the vectors of a further view stand in place of v.
    """
    x_NF = None if view is None else rows.inputs()[view][torch.from_numpy(chosen)].cpu().double().numpy()
    parts = []
    for batch in rows.batches(chosen, batch_size=1).in_order(SCORE_BATCH):
        v_BD, t_BD = batch.v_BD.cpu().double().numpy(), batch.t_BD.cpu().double().numpy()
        s_B = cosine(batch.v_BD, batch.t_BD).cpu().double().numpy()
        parts.append([v_BD, t_BD, s_B[:, None]])
    v_ND, t_ND, s_N1 = (np.concatenate(column) for column in zip(*parts, strict=True))
    first = v_ND if x_NF is None else x_NF
    sees = {target.name: target.sees for target in rows.targets}[label]
    return first if sees == "image" else np.concatenate([first, t_ND, s_N1], axis=1)


def _predicted(baseline: Baseline, test_MF: FloatArray, split: Split, truth_N: NDArray[np.floating]) -> Predicted:
    labelled = int((~np.isnan(truth_N[split.train])).sum())
    about = {**baseline.chosen, "rows": baseline.num_rows, "of_rows": labelled}
    return Predicted(score_M=baseline.predict(test_MF), about=about)


# ---- The variants that an ablation compares, and their predictions of the test rows of one split


@dataclass(frozen=True)
class Variant:
    """One line of the table: heads that are trained with other settings, or (`predict`) something without heads.

    `overrides` are settings of `train` that differ from its defaults. `on_view` lines need a further view of the cache.
    """

    name: str
    words: str
    overrides: Mapping[str, Any] | None = None
    predict: Callable[[CacheRows, Split, str], Predicted] | None = None
    on_view: bool = False


# The older options for one target win over --scale, so that they are taken back too.
CALIBRATED: Mapping[str, Any] = {"base": "calibrated"}
NO_CORRECTION: Mapping[str, Any] = {"scale": "0", "residual_scale_q": None, "residual_scale_c": None}
VARIANTS = (
    Variant("no-image", "floor: source and prompt, no picture", predict=predict_no_image),
    Variant("cosine", "floor: zero-shot cosine", predict=predict_cosine),
    Variant("ridge", "ridge on v (pair: [v, t, s])", predict=predict_ridge),
    Variant("svr", "RBF SVR on the same", predict=predict_svr),
    Variant("direct", "direct heads", {"residual_learning": False}),
    Variant("direct-two-branch", "direct, with cosine branch", {"residual_learning": False, "two_branch": True}),
    Variant("residual", "residual heads on a calibrated base", CALIBRATED),
    Variant("identity-base", "residual, base not calibrated", {"base": "identity"}),
    Variant("no-correction", "residual, scales 0: base alone", {**CALIBRATED, **NO_CORRECTION}),
    Variant("no-dropout", "residual, dropout 0", {**CALIBRATED, "dropout": 0.0}),
    Variant("auto", "residual on a chosen base (train's default)", {}),
    Variant("auto-only", "chosen base alone: scales 0", NO_CORRECTION),
    Variant("ridge-view", "ridge on the view (pair: [view, t, s])", on_view=True),
    Variant("kernel", "residual on a kernel base", {"base": "kernel"}, on_view=True),
    Variant(
        "kernel-only",
        "kernel base alone: scales 0",
        {"base": "kernel", **NO_CORRECTION},
        on_view=True,
    ),
)


def variants_of(rows: CacheRows, view: str) -> list[Variant]:
    """Return the variants that can be compared on a cache; those on a view where it has this one."""
    of_view = functools.partial(predict_ridge_on_view, view=view)
    found = [replace(one, predict=of_view) if one.name == "ridge-view" else one for one in VARIANTS]
    return [one for one in found if view in rows.views or not one.on_view]


def predict_variants(
    config: TrainConfig,
    rows: CacheRows,
    split: Split,
    labels: Sequence[str],
    *,
    on_variant: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Predicted]]:
    """Train every variant on one split and return its predictions of the test rows, by variant and label.

    Args:
        config: settings of `train` that the variants start from.
        rows: the cache.
        split: sides of its rows.
        labels: those to predict.
        on_variant: called after each variant.

    Raises:
        UserError: a training loss that is not finite.
    """
    variants = variants_of(rows, config.view)
    tasks = {
        one.name: Task(config=replace(config, **one.overrides), rows=rows, split=split)
        for one in variants
        if one.overrides is not None
    }
    together = [tasks[one.name] for one in variants if one.overrides is not None and _stacks(one)]
    stacked = Stacked(together, half=False) if together else None
    found = {}
    for one in variants:
        if one.predict is not None:
            found[one.name] = {label: one.predict(rows, split, label) for label in labels}
        elif stacked is not None and _stacks(one):
            found[one.name] = _of_heads(stacked.learned(tasks[one.name]), rows, split, labels)
        else:
            found[one.name] = _of_heads(learn(tasks[one.name], what=one.name), rows, split, labels)
        on_variant()
    candidates = candidate_scores(rows, split, labels=labels, seed=config.split_seed)
    on_variant()
    return found | {
        name: {label: Predicted(score_M=score_M) for label, score_M in by_label.items()}
        for name, by_label in candidates.items()
    }


def _stacks(variant: Variant) -> bool:
    """Tell whether a variant differs from the others only in what heads of one stack may differ in."""
    return variant.overrides is not None and set(variant.overrides) <= {*PLAIN, *BY_TARGET}


def _of_heads(learned: Learned, rows: CacheRows, split: Split, labels: Sequence[str]) -> dict[str, Predicted]:
    columns = of_rows(learned.columns, split.test)
    scores = score(learned.heads, rows.batches(split.test, batch_size=1, columns=columns).in_order(SCORE_BATCH))
    epochs = learned.fitted.best_epoch
    return {label: Predicted(score_M=scores.of(label), about={"best_epoch": epochs[label]}) for label in labels}


# ---- The variants of an ablation that train CLIP too, and their predictions of the test rows of every split


@dataclass(frozen=True)
class TunedVariant:
    """One line of the table; `overrides` are settings of `finetune` that differ from its defaults."""

    name: str
    words: str
    overrides: Mapping[str, Any]


TUNED_VARIANTS = (
    TunedVariant("partial-freeze", "residual, 75 % of CLIP frozen", {}),
    TunedVariant("full", "residual, all of CLIP trains", {"freeze_layers": 0.0}),
)


def predict_tuned(
    config: AblateConfig, splits: Sequence[Split], labels: Sequence[str], *, on_variant: Callable[[], None]
) -> list[dict[str, dict[str, Predicted]]]:
    """Fine-tune every variant on every split and return its predictions of the test rows, by split, variant and label.

    Their state is kept until they are through, so that an interrupted ablation does not train them again.

    Raises:
        UserError: as `finetune`.
    """
    device = choose_device(config.device)
    rows = load_rows(config.cache, "cpu", in_memory=True)
    found: list[dict[str, dict[str, Predicted]]] = [{} for _ in splits]
    jobs = []
    for variant in TUNED_VARIANTS:
        tuning = _tuning_config(config, variant)
        job = TuningJob(
            tuning,
            rows,
            splits,
            device=device,
            processes=Processes(),
        )
        for done, each in zip(job.learn(), found, strict=True):
            scores, epochs = done.scores, done.learned.fitted.best_epoch
            each[variant.name] = {
                label: Predicted(score_M=scores.of(label)[done.split.test], about={"best_epoch": epochs[label]})
                for label in labels
            }
            on_variant()
        jobs.append(job)
    for job in jobs:
        job.forget()
    return found


def announce_tuned(config: AblateConfig, splits: Sequence[Split]) -> None:
    """Say what the variants that train CLIP cost, before anything is trained."""
    num_rows = splits[0].train.size
    trainings = len(TUNED_VARIANTS) * len(splits)
    passes = f"{trainings * config.epochs * num_rows:,} images forward and back"
    line = f"finetune      {trainings} trainings x {config.epochs} epochs x {num_rows:,} rows: {passes}"
    say(line)


def _tuning_config(config: AblateConfig, variant: TunedVariant) -> FinetuneConfig:
    names = ("cache", "repeats", "epochs", "split", "fractions", "seed", "device", "image_root")
    return FinetuneConfig(**{name: getattr(config, name) for name in names}, **variant.overrides)
