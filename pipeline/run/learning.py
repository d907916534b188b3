"""One training: heads on the training rows of a split, the epoch chosen on its validation rows.

Knows the settings of `train`, rows and heads. Must not know run directories or the test rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.progress import Progress
from deltaclip.pipeline.model.calibrate import calibrate_branch
from deltaclip.pipeline.model.direct import DirectHeads
from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.spec import HeadSpec, build_heads
from deltaclip.pipeline.run.bases import fit_kernels, start_bases
from deltaclip.pipeline.run.measure import rankable_labels, trained_labels
from deltaclip.pipeline.run.predictions import SCORE_BATCH, score
from deltaclip.pipeline.run.targets import training_columns
from deltaclip.pipeline.scoring.metrics import pearson, srocc
from deltaclip.pipeline.training.fit import EpochRow, FitPlan, FitResult, Validation, fit, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from deltaclip.pipeline.model.heads import KernelShape
    from deltaclip.pipeline.run.checkpoint import TunedBackbone
    from deltaclip.pipeline.run.rows import Batches, CacheRows
    from deltaclip.pipeline.run.targets import LossWeights
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Heads that have learned, with the weights of their best epoch; `calibration` is None for a plain start.

    `columns` are further fields of `Batch` that the heads need of the cache's rows, (N,) each. `tuned` is what training
    changed of the backbone, None where it was frozen.
    """

    spec: HeadSpec
    heads: nn.Module
    calibration: dict[str, Any] | None
    fitted: FitResult
    columns: dict[str, Tensor] = field(default_factory=dict)
    tuned: TunedBackbone | None = None

    @property
    def scales(self) -> tuple[float | None, float | None]:
        """Quality and consistency scale in force, None for direct heads."""
        return self.heads.scales() if isinstance(self.heads, ResidualHeads) else (None, None)


def learn(
    config: TrainConfig,
    rows: CacheRows,
    split: Split,
    weights: LossWeights,
    *,
    what: str = "training",
    log: Callable[[EpochRow], None] | None = None,
) -> Learned:
    """Calibrate and fit heads; the test rows are not looked at.

    Args:
        config: settings of the training.
        rows: the cache.
        split: sides of its rows.
        weights: loss weights that are in force.
        what: stands before the progress bar.
        log: is given every epoch.

    Raises:
        UserError: a training loss that is not finite.
    """
    kernels = None
    if config.residual_learning and config.base_init == "kernel":
        trained = trained_labels(rows, split.train, weights[:2])
        kernels = fit_kernels(rows, split, labels=trained, view=config.view, seed=config.split_seed)
    spec = head_spec(config, rows, weights, kernels=None if kernels is None else kernels.shape)
    fields, device = {} if kernels is None else kernels.columns, rows.device
    ranked = sorted(set(rankable_labels(rows, split.val)) & set(trained_labels(rows, split.train, weights[:2])))
    truth = {label: rows.label(label)[split.val] for label in ranked}
    batches = rows.batches(
        split.train,
        batch_size=config.batch_size,
        seed=config.split_seed,
        columns=training_columns(config, rows, split.train) | of_rows(fields, split.train),
        explanations=spec.rationale,
    )
    val = rows.batches(split.val, batch_size=1, columns=of_rows(fields, split.val)) if ranked else batches
    with seeded(config.seed, device), Progress(config.epochs, what, unit="epochs") as progress:
        heads = build_heads(spec).to(device)
        calibration = None
        if isinstance(heads, DirectHeads) and heads.two_branch:
            calibration = calibrate_branch(heads, lambda: batches.in_order(SCORE_BATCH)).to_json()
        elif isinstance(heads, ResidualHeads):
            calibration = start_bases(heads, config.base_init, batches, kernels)
        fitted = fit(
            heads,
            batches,
            objective=weighted_loss(config.loss, w_q=weights.q, w_c=weights.c, w_exp=weights.exp),
            plan=fit_plan(config),
            validate=_validator(heads, val, truth) if ranked else None,
            on_epoch=_each_epoch(progress, log),
        )
    return Learned(spec=spec, heads=heads, calibration=calibration, fitted=fitted, columns=fields)


def _each_epoch(progress: Progress, log: Callable[[EpochRow], None] | None) -> Callable[[EpochRow], None]:
    def take(row: EpochRow) -> None:
        progress.advance(note=epoch_note(row))
        if log is not None:
            log(row)

    return take


def fit_plan(config: TrainConfig) -> FitPlan:
    """Return how long and how fast to train."""
    return FitPlan(
        epochs=config.epochs,
        lr=config.lr,
        weight_decay=config.weight_decay,
        warmup_ratio=config.warmup_ratio,
        schedule=config.schedule,
        max_grad_norm=config.max_grad_norm,
        patience=config.patience,
    )


def of_rows(columns: Mapping[str, Tensor], chosen: NDArray[np.int64]) -> dict[str, Tensor]:
    """Return some rows of columns."""
    return {name: column_N[torch.from_numpy(chosen).to(column_N.device)] for name, column_N in columns.items()}


def head_spec(
    config: TrainConfig, rows: CacheRows, weights: LossWeights, *, kernels: KernelShape | None = None
) -> HeadSpec:
    """Return the heads that the settings ask for."""
    direct = not config.residual_learning
    return HeadSpec(
        dim=rows.dim,
        kind="direct" if direct else "residual",
        scale_q=config.residual_scale_q,
        scale_c=config.residual_scale_c,
        scale_mode=config.scale_mode,
        dropout=config.dropout,
        two_branch=direct and config.two_branch,
        refinement=direct and config.refinement,
        rationale=weights.exp > 0,
        kernels=kernels,
    )


def _validator(
    heads: nn.Module, batches: Batches, labels: Mapping[str, NDArray[np.floating]]
) -> Callable[[], Validation]:
    """Return a hook that scores the validation rows and judges them by the labels that can be ranked."""

    def validate() -> Validation:
        scores = score(heads, batches.in_order(SCORE_BATCH))
        return validation({label: scores.of(label) for label in labels}, labels)

    return validate


def validation(predicted: Mapping[str, NDArray[np.floating]], labels: Mapping[str, NDArray[np.floating]]) -> Validation:
    """Judge scores of the validation rows: a head's figure to choose by is the mean of SROCC and PLCC (`main`).

    NaN for constant scores and for those of heads that diverged. Labels are NaN where missing.
    """
    mains, figures = {}, {}
    for label, truth in labels.items():
        known = ~np.isnan(truth)
        x, y = predicted[label][known], truth[known]
        finite = bool(np.isfinite(x).all())
        rank, linear = (srocc(x, y), pearson(x, y)) if finite else (math.nan, math.nan)
        figures[f"val_{label}_srocc"], figures[f"val_{label}_plcc"] = rank, linear
        mains[label] = (rank + linear) / 2
    return Validation(mains, figures)


def epoch_note(row: EpochRow) -> str:
    """Return loss and validation figures of an epoch, for a progress bar."""
    names = {"val_quality_srocc": "q", "val_consistency_srocc": "c"}
    shown = [f"{letter} {row.figures[name]:.3f}" for name, letter in names.items() if name in row.figures]
    return f"loss {row.train_loss:.4f}, SROCC {' '.join(shown)}" if shown else f"loss {row.train_loss:.4f}"
