"""One training: heads on the training rows of a split, the epoch chosen on its validation rows.

Bases of residual heads are there before (`bases.py`). Knows the settings of
`train`, rows and heads. Must not know run directories or the test rows.

Shapes: N rows of the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.progress import Progress
from deltaclip.pipeline.loop.batches import MemoryBatches, PairedBatches
from deltaclip.pipeline.loop.epochs import EpochRow, FitPlan, FitResult, Validation, seeded
from deltaclip.pipeline.loop.head_learner import fit
from deltaclip.pipeline.model.heads import HeadSpec, TargetSpec, build_heads
from deltaclip.pipeline.model.losses import NO_PAIRS, PairTerm, weighted_loss
from deltaclip.pipeline.model.pair_ridge import FIRST_KAPPA
from deltaclip.pipeline.model.preference import fit_scale
from deltaclip.pipeline.rows.cached_rows import views_there
from deltaclip.pipeline.rows.split_rows import joined_groups
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, score
from deltaclip.pipeline.training.bases import fit_bases, start_bases

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from deltaclip.pipeline.loop.batches import Columns, TrainBatches
    from deltaclip.pipeline.model.fitted_base import BaseShape
    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.model.losses import Objective
    from deltaclip.pipeline.rows.cached_rows import Batches
    from deltaclip.pipeline.rows.task import Task
    from deltaclip.pipeline.runs.folder import TunedBackbone
    from deltaclip.pipeline.settings import LearningSettings, TrainConfig
    from deltaclip.pipeline.training.bases import Bases


# ---- One training: heads on the training rows of a split, the epoch chosen on its validation rows


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Heads that have learned, with the weights of their best epoch; `calibration` is None for a plain start.

    `columns` are further fields of `Batch` that the heads need of the cache's rows, (N,) each. `tuned` is what training
    changed of the backbone, None where it was frozen. `left_out` is what fitted bases say of training and validation
    rows from fits without their groups, by target, (N,) float32 with NaN in other rows.
    """

    spec: HeadSpec
    heads: Heads
    calibration: dict[str, Any] | None
    fitted: FitResult
    columns: Columns = field(default_factory=dict)
    tuned: TunedBackbone | None = None
    left_out: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def learn(task: Task[TrainConfig], *, what: str = "training", log: Callable[[EpochRow], None] | None = None) -> Learned:
    """Calibrate and fit heads; the test rows are not looked at.

    Args:
        task: what to learn.
        what: stands before the progress bar.
        log: is given every epoch.

    Raises:
        UserError: a training loss that is not finite.
    """
    config, rows = task.config, task.rows
    bases = None
    if has_fitted_bases(config):
        view = config.view if config.base == "kernel" else None
        seen = np.concatenate([task.split.train, task.split.val])
        bases = fit_bases(
            rows,
            task.split,
            labels=task.trained,
            seed=config.split_seed,
            view=view,
            pairs={name: pairs for name, pairs in task.pairs_among(seen).items() if name in task.trained},
        )
    spec = head_spec(task, bases=None if bases is None else bases.shape)
    columns = {} if bases is None else {"fitted_B": bases.columns}
    batches = task.train_batches(columns=columns)
    val = task.val_batches(columns=columns) if task.judged else batches
    terms = pair_terms(task, bases)
    with seeded(config.seed, rows.device), Progress(config.epochs, what, unit="epochs") as progress:
        heads = build_heads(spec).to(rows.device)
        calibration = start_bases(heads, config.base, batches, bases)

        def validate() -> Validation:
            scores = score(heads, val.in_order(SCORE_BATCH))
            return task.judge({target: scores.of(target) for target in task.judged})

        fitted = fit(
            heads,
            paired(task, batches, terms),
            objective=objective_of(task, terms),
            plan=fit_plan(config, margin=margin_of(task)),
            validate=validate if task.judged else None,
            on_epoch=_each_epoch(progress, log),
        )
    left_out = {} if bases is None else bases.left_out
    return Learned(spec=spec, heads=heads, calibration=calibration, fitted=fitted, columns=columns, left_out=left_out)


def has_fitted_bases(config: TrainConfig) -> bool:
    """Tell whether settings ask for bases that are fitted to what the cache holds beside v and t."""
    return config.residual_learning and config.base in {"auto", "kernel"}


def views_of(*settings: TrainConfig) -> list[str]:
    """Return the views that some of the settings read for their bases, of a cache: all, or the one that is named."""
    found: list[str] = []
    for one in settings:
        if has_fitted_bases(one):
            found += views_there(one.cache) if one.base == "auto" else [one.view]
    return list(dict.fromkeys(found))


def _each_epoch(progress: Progress, log: Callable[[EpochRow], None] | None) -> Callable[[EpochRow], None]:
    def take(row: EpochRow) -> None:
        progress.advance(note=epoch_note(row))
        if log is not None:
            log(row)

    return take


def objective_of(task: Task[Any], pairs: Mapping[str, PairTerm] = NO_PAIRS) -> Objective:
    """Return the loss that the settings ask for."""
    weights = task.weights
    return weighted_loss(task.config.loss, weights=weights.targets, w_exp=weights.explanations, pairs=pairs)


def pair_terms(task: Task[Any], bases: Bases | None) -> dict[str, PairTerm]:
    """Return how pairs enter the loss of each target that training pairs speak for.

    A squared error of variance s^2 is 2 s^2 times a negative log-likelihood, and so is the loss of pairs, for as many
    as there are to a rating. Scale and variance are those of the base on left-out rows; of a base that was not fitted
    to pairs a logit is a tenth of the range.
    """
    found = {}
    for name, pairs in task.train_pairs.items():
        base = bases.pairs.get(name) if bases else None  # none where pairs did not help
        preferred_P = torch.from_numpy(pairs.preferred_P)
        scale = base.scale if base else fit_scale(torch.zeros(len(pairs)), preferred_P, kappa=FIRST_KAPPA)
        num_rated = int((~np.isnan(task.rows.label(name)[task.split.train])).sum())
        variance = base.variance if base and base.variance is not None else 1 / scale.kappa**2
        found[name] = PairTerm(scale, 2 * variance * (len(pairs) / num_rated if num_rated else 1.0))
    return found


def paired(task: Task[Any], batches: Batches, terms: Mapping[str, PairTerm]) -> TrainBatches:
    """Return the training batches with pairs in them; vectors that are read in blocks have none to offer."""
    if not terms or not isinstance(batches, MemoryBatches):
        return batches
    place_N = np.zeros(len(task.rows.rows), dtype=np.int64)
    place_N[task.split.train] = np.arange(len(task.split.train))
    pair_P3 = {
        name: torch.from_numpy(
            np.stack([place_N[pairs.a_P], place_N[pairs.b_P], pairs.preferred_P], axis=1).astype(np.float64)
        ).to(task.rows.device)
        for name, pairs in task.train_pairs.items()
    }
    return PairedBatches(rows=batches, pair_P3=pair_P3, seed=task.config.split_seed)


# Corrections of fitted bases that gained less than half of this over the square root of the validation groups lowered
# test figures as often as they raised them, on AGIQA-3K with 60 to 1,725 training rows; on the demo one that gained a
# little more lost .034 of SROCC: docs/heads.md.
MARGIN = 0.2


def margin_of(task: Task[TrainConfig]) -> float:
    """Return what a correction of a fitted base has to gain on validation rows, so that chance alone is not enough."""
    if not has_fitted_bases(task.config):
        return 0.0
    num_groups = len(np.unique(joined_groups(task.rows)[task.split.val]))
    return MARGIN / math.sqrt(max(num_groups, 1))


def fit_plan(config: LearningSettings, *, margin: float = 0.0) -> FitPlan:
    """Return how long and how fast to train: the settings of these names, and the margin."""
    found = {one.name: getattr(config, one.name) for one in fields(FitPlan) if one.name != "margin"}
    return FitPlan(**found, margin=margin)


def head_spec(task: Task[Any], *, bases: BaseShape | None = None) -> HeadSpec:
    """Return the heads that the settings ask for, one for each target of the cache."""
    config = task.config
    direct = not config.residual_learning
    return HeadSpec(
        dim=task.rows.dim,
        targets=tuple(TargetSpec(each.name, each.sees, config.scales.of(each.name)) for each in task.rows.targets),
        kind="direct" if direct else "residual",
        scale_mode=config.scale_mode,
        dropout=config.dropout,
        two_branch=direct and config.two_branch,
        refinement=direct and config.refinement,
        rationale=task.weights.explanations > 0,
        bases=bases,
    )


def epoch_note(row: EpochRow) -> str:
    """Return loss and validation figures of an epoch, for a progress bar."""
    found = {name.removeprefix("val_").removesuffix("_srocc"): f for name, f in row.figures.items() if "srocc" in name}
    shown = [f"{target} {figure:.3f}" for target, figure in found.items()]
    return f"loss {row.train_loss:.4f}, SROCC {' '.join(shown)}" if shown else f"loss {row.train_loss:.4f}"
