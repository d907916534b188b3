"""STAGE train: heads on cached embeddings, the backbone frozen. Spec sections 2, 3, 5 and 8.

Split, calibrate on the training rows, fit, choose the epoch on validation, look at the test rows once, write the run.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.device import choose_device
from deltaclip.base.progress import Progress
from deltaclip.base.settings import settings_to_json
from deltaclip.pipeline.model.calibrate import calibrate, calibrate_branch
from deltaclip.pipeline.model.direct import DirectHeads
from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.spec import HeadSpec, build_heads
from deltaclip.pipeline.run.describe import describe, warnings_of
from deltaclip.pipeline.run.folder import RunContents, free_run_path, surroundings, write_run
from deltaclip.pipeline.run.measure import measure, rankable_labels, trained_labels
from deltaclip.pipeline.run.predictions import Scores, blank_untrained, score
from deltaclip.pipeline.run.rows import LABELS, CacheRows, load_rows
from deltaclip.pipeline.run.sides import split_cache
from deltaclip.pipeline.run.tables import metrics_table
from deltaclip.pipeline.run.targets import loss_weights, training_columns
from deltaclip.pipeline.scoring.metrics import pearson, srocc
from deltaclip.pipeline.training.fit import EpochRow, FitPlan, FitResult, Validation, fit, seeded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from deltaclip.pipeline.run.targets import LossWeights
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import TrainConfig

SCORE_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    run: Path
    metrics: dict[str, Any]
    best_epoch: int
    scales: tuple[float | None, float | None]
    fit_seconds: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the metrics in the shape of `metrics.json`, with the run and its times."""
        about = {
            "run": str(self.run),
            "best_epoch": self.best_epoch,
            "scales": {"quality": self.scales[0], "consistency": self.scales[1]},
            "fit_seconds": self.fit_seconds,
            "seconds": self.seconds,
        }
        return {**self.metrics, **about}

    def summary(self) -> str:
        """Return the metrics table and where the run lies."""
        q, c = self.scales
        scales = f", scales q {q:.3f} c {c:.3f}" if q is not None and c is not None else ""
        times = f"fit {self.fit_seconds:.1f} s, all {self.seconds:.1f} s"
        where = f"run: {self.run} (best epoch {self.best_epoch}{scales}, {times})"
        return f"{metrics_table(self.metrics)}\n\n{where}"


def train(config: TrainConfig) -> TrainResult:
    """Train heads on a cache and write a run directory.

    Raises:
        UserError: no labels, a split that is not possible, a cache that cannot be read, a diverging loss.
    """
    started = time.monotonic()
    mode = "residual_frozen" if config.residual_learning else "direct_frozen"
    run_name = f"{config.cache.stem}_{mode}"
    free_run_path(config.out, run_name)  # refused now if taken, not after the training
    rows = load_rows(config.cache, choose_device(config.device))
    weights = loss_weights(config, rows)
    split = split_cache(rows, config.split, fractions=config.fractions, seed=config.seed)
    for line in (*warnings_of(config, rows, split), *describe(config, rows, weights)):
        print(line, file=sys.stderr)  # noqa: T201 - before the progress bar, and not on stdout
    spec, heads, calibration, fitted = _fit(config, rows, split, weights)
    scores = score(heads, rows.batches(None, batch_size=1).in_order(SCORE_BATCH))
    scales = heads.scales() if isinstance(heads, ResidualHeads) else (None, None)
    labels = trained_labels(rows, split.train, weights[:2])
    metrics = measure(rows, scores, split, labels=labels, scales=scales)
    contents = RunContents(
        mode=mode,
        heads=heads,
        spec=spec,
        config={
            "stage": "train",
            "mode": mode,
            "settings": settings_to_json(config),
            "description": describe(config, rows, weights),
            "cache": {"path": str(config.cache.resolve()), **rows.header, "dataset": rows.dataset},
            "labels": labels,
            "request": rows.header["request"],
            "backbone": rows.facts,
            "calibration": calibration,
            "scales": scales,
            "best_epoch": fitted.best_epoch,
            **surroundings(),
        },
        history=_history(fitted.history),
        metrics=metrics,
        predictions=_predictions(rows, blank_untrained(scores, labels), split),
    )
    return TrainResult(
        run=write_run(config.out, run_name, contents),
        metrics=metrics,
        best_epoch=fitted.best_epoch,
        scales=scales,
        fit_seconds=round(sum(row.seconds for row in fitted.history), 3),
        seconds=round(time.monotonic() - started, 3),
    )


def _fit(
    config: TrainConfig, rows: CacheRows, split: Split, weights: LossWeights
) -> tuple[HeadSpec, nn.Module, dict[str, Any] | None, FitResult]:
    spec = _spec(config, rows, weights)
    plan = FitPlan(
        epochs=config.epochs,
        lr=config.lr,
        weight_decay=config.weight_decay,
        warmup_ratio=config.warmup_ratio,
        schedule=config.schedule,
        max_grad_norm=config.max_grad_norm,
        patience=config.patience,
    )
    device = rows.v_ID.device
    ranked = set(rankable_labels(rows, split.val)) & set(trained_labels(rows, split.train, weights[:2]))
    columns = training_columns(config, rows, split.train)
    batches = rows.batches(
        split.train, batch_size=config.batch_size, seed=config.seed, columns=columns, explanations=spec.rationale
    )
    with seeded(config.seed, device), Progress(config.epochs, "training", unit="epochs") as progress:
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
            plan=plan,
            validate=_validator(heads, rows, split.val, sorted(ranked)) if ranked else None,
            on_epoch=lambda row: progress.advance(note=_epoch_note(row)),
        )
    return spec, heads, calibration, fitted


def _spec(config: TrainConfig, rows: CacheRows, weights: LossWeights) -> HeadSpec:
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
    """Return a hook that scores the validation rows; the epoch is chosen by the mean of `main` over the labels."""
    batches = rows.batches(val, batch_size=1)
    labels = {label: rows.label(label)[val] for label in ranked}

    def validate() -> Validation:
        scores = score(heads, batches.in_order(SCORE_BATCH))
        mains, figures = [], {}
        for label, truth in labels.items():
            predicted = scores.of(label)
            known = ~np.isnan(truth)
            rank, linear = srocc(predicted[known], truth[known]), pearson(predicted[known], truth[known])
            figures[f"val_{label}_srocc"], figures[f"val_{label}_plcc"] = rank, linear
            mains.append((rank + linear) / 2)
        # Constant scores have no correlation; they rank as 0, so that every epoch is judged on the same labels.
        return Validation(float(np.mean(np.nan_to_num(mains))), figures)

    return validate


def _epoch_note(row: EpochRow) -> str:
    names = {"val_quality_srocc": "q", "val_consistency_srocc": "c"}
    shown = [f"{letter} {row.figures[name]:.3f}" for name, letter in names.items() if name in row.figures]
    return f"loss {row.train_loss:.4f}, SROCC {' '.join(shown)}" if shown else f"loss {row.train_loss:.4f}"


def _history(history: tuple[EpochRow, ...]) -> dict[str, Any]:
    """Return the columns of `history.csv`, one row per epoch."""
    columns = {
        name: np.array(
            [np.nan if getattr(row, name) is None else getattr(row, name) for row in history],
            dtype=np.float64,
        )
        for name in ("train_loss", "val_score", "lr", "scale_q", "scale_c", "seconds")
    }
    figures = {name: np.array([row.figures[name] for row in history]) for name in history[0].figures}
    return {"epoch": [row.epoch for row in history], **columns, **figures}


def _predictions(rows: CacheRows, scores: Scores, split: Split) -> dict[str, Any]:
    """Return the columns of `predictions.csv`, every usable row of the cache."""
    side = np.empty(len(rows.rows), dtype=object)
    for name in ("train", "val", "test"):
        side[getattr(split, name)] = name
    text = rows.rows.text
    about = {
        "image": text["file"],
        "prompt": text["prompt"],
        "group": text["group"],
        "source": text["source"],
        "split": side,
    }
    return {**about, **{label: rows.label(label) for label in LABELS}, **scores.columns()}
