"""One training: heads on the training rows of a split, the epoch chosen on its validation rows.

Knows the settings of `train`, rows and heads. Must not know run directories or the test rows. Spec sections 2, 3, 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.progress import Progress
from deltaclip.pipeline.model.calibrate import calibrate, calibrate_branch
from deltaclip.pipeline.model.direct import DirectHeads
from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.spec import HeadSpec, build_heads
from deltaclip.pipeline.run.measure import rankable_labels, trained_labels
from deltaclip.pipeline.run.predictions import SCORE_BATCH, score
from deltaclip.pipeline.run.targets import training_columns
from deltaclip.pipeline.scoring.metrics import pearson, srocc
from deltaclip.pipeline.training.fit import EpochRow, FitPlan, FitResult, Validation, fit, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import nn

    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.run.targets import LossWeights
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Heads that have learned, with the weights of their best epoch; `calibration` is None for a plain start."""

    spec: HeadSpec
    heads: nn.Module
    calibration: dict[str, Any] | None
    fitted: FitResult

    @property
    def scales(self) -> tuple[float | None, float | None]:
        """Quality and consistency scale in force, None for direct heads."""
        return self.heads.scales() if isinstance(self.heads, ResidualHeads) else (None, None)


def learn(
    config: TrainConfig, rows: CacheRows, split: Split, weights: LossWeights, *, what: str = "training"
) -> Learned:
    """Calibrate and fit heads; the test rows are not looked at. `what` stands before the progress bar.

    Raises:
        UserError: a training loss that is not finite.
    """
    spec = head_spec(config, rows, weights)
    device = rows.v_ID.device
    ranked = set(rankable_labels(rows, split.val)) & set(trained_labels(rows, split.train, weights[:2]))
    columns = training_columns(config, rows, split.train)
    batches = rows.batches(
        split.train, batch_size=config.batch_size, seed=config.split_seed, columns=columns, explanations=spec.rationale
    )
    with seeded(config.seed, device), Progress(config.epochs, what, unit="epochs") as progress:
        heads = build_heads(spec).to(device)
        calibration = None
        if isinstance(heads, DirectHeads) and heads.two_branch:
            calibration = calibrate_branch(heads, batches.in_order(SCORE_BATCH)).to_json()
        elif isinstance(heads, ResidualHeads) and config.base_init == "calibrated":
            calibration = calibrate(heads, batches.in_order(SCORE_BATCH)).to_json()
        fitted = fit(
            heads,
            batches,
            objective=weighted_loss(config.loss, w_q=weights.q, w_c=weights.c, w_exp=weights.exp),
            plan=fit_plan(config),
            validate=_validator(heads, rows, split.val, sorted(ranked)) if ranked else None,
            on_epoch=lambda row: progress.advance(note=_epoch_note(row)),
        )
    return Learned(spec=spec, heads=heads, calibration=calibration, fitted=fitted)


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


def head_spec(config: TrainConfig, rows: CacheRows, weights: LossWeights) -> HeadSpec:
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
    )


def _validator(
    heads: nn.Module, rows: CacheRows, val: NDArray[np.int64], ranked: list[str]
) -> Callable[[], Validation]:
    """Return a hook that scores the validation rows."""
    batches = rows.batches(val, batch_size=1)
    labels = {label: rows.label(label)[val] for label in ranked}

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


def _epoch_note(row: EpochRow) -> str:
    names = {"val_quality_srocc": "q", "val_consistency_srocc": "c"}
    shown = [f"{letter} {row.figures[name]:.3f}" for name, letter in names.items() if name in row.figures]
    return f"loss {row.train_loss:.4f}, SROCC {' '.join(shown)}" if shown else f"loss {row.train_loss:.4f}"
