"""Predictions of test rows that no heads made: floors and baselines, one label at a time.

Knows which features of a cache a baseline gets, and which rows it fits and chooses on: never the test rows. Must not
know run directories or what the predictions are compared with.

Shapes: N rows, F features, M test rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.model.baselines import fit_ridge_regression, fit_svr
from deltaclip.pipeline.model.scores import cosine
from deltaclip.pipeline.run.keys import row_keys
from deltaclip.pipeline.run.learning import validation
from deltaclip.pipeline.run.predictions import SCORE_BATCH
from deltaclip.pipeline.run.sides import joined_groups
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
        groups=row_keys(rows.rows.text["group"]),
        train=split.train,
        test=split.test,
        sources=sources.codes if sources.some() else None,
    )
    return Predicted(score_M=floor.predicted)


def predict_cosine(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with the cosine of image and prompt, without training."""
    return Predicted(score_M=rows.cosine(split.test))


def predict_ridge(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with ridge regression, its strength chosen among the training rows."""
    return _ridge(rows, split, label, of_view=False)


def predict_ridge_on_view(rows: CacheRows, split: Split, label: str) -> Predicted:
    """Predict with ridge regression on the further view of the images in place of v."""
    return _ridge(rows, split, label, of_view=True)


def _ridge(rows: CacheRows, split: Split, label: str, *, of_view: bool) -> Predicted:
    train_NF, test_MF = (features(rows, side, label, of_view=of_view) for side in (split.train, split.test))
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


def features(rows: CacheRows, chosen: NDArray[np.int64], label: str, *, of_view: bool = False) -> FloatArray:
    """Return what the head of a label sees, (N, F) float64: v for quality, [v, t, s] for consistency.

    With `of_view`, the vectors of the further view stand in place of v.
    """
    x_NF = rows.view().cpu().double().numpy()[chosen] if of_view else None
    parts = []
    for batch in rows.batches(chosen, batch_size=1).in_order(SCORE_BATCH):
        v_BD, t_BD = batch.v_BD.cpu().double().numpy(), batch.t_BD.cpu().double().numpy()
        s_B = cosine(batch.v_BD, batch.t_BD).cpu().double().numpy()
        parts.append([v_BD, t_BD, s_B[:, None]])
    v_ND, t_ND, s_N1 = (np.concatenate(column) for column in zip(*parts, strict=True))
    first = v_ND if x_NF is None else x_NF
    return first if label == "quality" else np.concatenate([first, t_ND, s_N1], axis=1)


def _predicted(baseline: Baseline, test_MF: FloatArray, split: Split, truth_N: NDArray[np.floating]) -> Predicted:
    labelled = int((~np.isnan(truth_N[split.train])).sum())
    about = {**baseline.chosen, "rows": baseline.num_rows, "of_rows": labelled}
    return Predicted(score_M=baseline.predict(test_MF), about=about)
