"""Predictions of test rows that no heads made: floors and baselines, one label at a time.

Knows which features of a cache a baseline gets, and which rows it fits and chooses on: never the test rows. Must not
know run directories or what the predictions are compared with. Spec sections 5 and 8.

Shapes: N rows, F features, M test rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.model.baselines import fit_ridge_regression, fit_svr
from deltaclip.pipeline.model.scores import cosine
from deltaclip.pipeline.run.learning import validation
from deltaclip.pipeline.run.predictions import SCORE_BATCH
from deltaclip.pipeline.scoring.floors import no_image_floor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.model.baselines import Baseline
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.scoring.splits import Split

    FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Predictions (M,) of the test rows, NaN where there are none, and what was chosen without them."""

    score_M: NDArray[np.floating]
    about: dict[str, Any] = field(default_factory=dict)


def predict_no_image(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict from source and prompt alone: the floor of `train`'s table."""
    sources = rows.rows.text["source"]
    floor = no_image_floor(
        rows.label(label),
        groups=rows.rows.text["group"],
        train=split.train,
        test=split.test,
        sources=sources if any(sources) else None,
    )
    return Predicted(score_M=floor.predicted)


def predict_cosine(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with the cosine of image and prompt, without training."""
    return Predicted(score_M=rows.cosine()[split.test])


def predict_ridge(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with ridge regression, its strength chosen among the training rows."""
    train_NF = features(rows, split.train, label)
    groups_N = rows.rows.text["group"][split.train].astype(str)
    return _predicted(fit_ridge_regression(train_NF, rows.label(label)[split.train], groups_N), rows, split, label)


def predict_svr(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with a support vector machine, chosen on the validation rows by what chooses a head's epoch."""

    def judge(predicted: FloatArray, truth: FloatArray) -> float:
        score = validation({label: predicted}, {label: truth}).scores[label]
        return float(np.nan_to_num(score))  # constant predictions have no correlation

    train_NF, val_NF = (features(rows, side, label) for side in (split.train, split.val))
    truth = rows.label(label)
    machine = fit_svr(train_NF, truth[split.train], validation=(val_NF, truth[split.val]), judge=judge)
    return _predicted(machine, rows, split, label)


def features(rows: CacheRows, chosen: NDArray[np.int64], label: str) -> FloatArray:
    """Return what the head of a label sees, (N, F) float64: v for quality, [v, t, s] for consistency."""
    parts = []
    for batch in rows.batches(chosen, batch_size=1).in_order(SCORE_BATCH):
        v_BD, t_BD = batch.v_BD.cpu().double().numpy(), batch.t_BD.cpu().double().numpy()
        s_B = cosine(batch.v_BD, batch.t_BD).cpu().double().numpy()
        parts.append(v_BD if label == "quality" else np.concatenate([v_BD, t_BD, s_B[:, None]], axis=1))
    return np.concatenate(parts)


def _predicted(baseline: Baseline, rows: CacheRows, split: Split, label: str) -> Predicted:
    labelled = int((~np.isnan(rows.label(label)[split.train])).sum())
    about = {**baseline.chosen, "rows": baseline.num_rows, "of_rows": labelled}
    return Predicted(score_M=baseline.predict(features(rows, split.test, label)), about=about)
