"""Scores and labels to the metrics of a run: every side of the split, floors, per source, diagnostics.

Knows the shape of `metrics.json`. Must not know caches, heads or files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.base.targets import LABELS
from deltaclip.pipeline.run.keys import row_keys
from deltaclip.pipeline.scoring.bootstrap import srocc_interval
from deltaclip.pipeline.scoring.diagnostics import Trained, diagnose_residual
from deltaclip.pipeline.scoring.floors import cosine_floor, no_image_floor
from deltaclip.pipeline.scoring.metrics import MIN_ROWS, agreement, agreement_by, json_number, srocc

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.run.predictions import Scores
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.scoring.groups import KeyArray
    from deltaclip.pipeline.scoring.splits import Split


# A correlation of a million rows is known to 0.001; the logistic and the ranks of more would take gigabytes.
JUDGED_ROWS = 1_000_000


class Training(NamedTuple):
    """Of which labels the last epoch was kept, and whether towers were trained too."""

    last_is_best: frozenset[str]
    tuned: bool = False


def present_labels(rows: CacheRows) -> list[str]:
    """Return the labels that at least one row has."""
    return [label for label in LABELS if not np.isnan(rows.label(label)).all()]


def trained_labels(rows: CacheRows, train: NDArray[np.int64], weights: tuple[float, float]) -> list[str]:
    """Return the labels that a head can learn from: their loss weighs, and some training row has them."""
    return [
        label
        for label, weight in zip(LABELS, weights, strict=True)
        if weight > 0 and not np.isnan(rows.label(label)[train]).all()
    ]


def rankable_labels(rows: CacheRows, chosen: NDArray[np.int64]) -> list[str]:
    """Return the labels for which a correlation exists among the chosen rows: three of them, and two values."""
    found = {label: rows.label(label)[chosen] for label in LABELS}
    known = {label: truth[~np.isnan(truth)] for label, truth in found.items()}
    return [label for label, truth in known.items() if truth.size >= MIN_ROWS and truth.min() < truth.max()]


def measure(
    rows: CacheRows,
    scores: Scores,
    split: Split,
    *,
    labels: list[str],
    scales: tuple[float | None, float | None],
    training: Training | None = None,
) -> dict[str, Any]:
    """Compute everything that stands in `metrics.json`; of a side of over JUDGED_ROWS rows from that many of them.

    Args:
        rows: N rows with labels.
        scores: N scores.
        split: sides of the N rows; train may be empty (a foreign cache), and there is then no no-image floor.
        labels: those whose head was trained; the scores of another head mean nothing.
        scales: quality and consistency scale of residual heads, None for direct ones.
        training: what advice may be given on.
    """
    labels = [label for label in labels if label in present_labels(rows)]
    group_N = row_keys(rows.rows.text["group"])
    judged = _judged(split)
    metrics: dict[str, Any] = {"split": judged.to_json() | {"rows": split.to_json()["rows"]}}
    for side in ("test", "val", "train"):
        chosen = getattr(judged, side)
        metrics[side] = {
            label: _side(rows, scores, label, chosen, group_N=group_N if side == "test" else None) for label in labels
        }
    metrics["floors"] = _floors(rows, replace(judged, train=split.train), labels, group_N)
    metrics["per_source"] = {label: _per_source(rows, scores, label, judged.test) for label in labels}
    metrics["diagnostics"] = [
        entry
        for label, scale in zip(LABELS, scales, strict=True)
        if label in labels and scale is not None and split.val.size
        for entry in _diagnose(
            rows, scores, judged, label=label, scale=scale, training=training or Training(frozenset())
        )
    ]
    return metrics


def _judged(split: Split) -> Split:
    """Return a split whose sides are drawn at random where they are larger than JUDGED_ROWS, and that says so."""
    drawn: dict[str, Any] = {}
    notes = [split.note] if split.note else []
    for side in ("test", "val", "train"):
        rows = getattr(split, side)
        if len(rows) > JUDGED_ROWS:
            drawn[side] = np.sort(np.random.default_rng(0).choice(rows, JUDGED_ROWS, replace=False))
            note = f"figures of {side} are of {JUDGED_ROWS:,} rows drawn from {len(rows):,}"
            notes += [note] if note not in split.note else []  # a recorded split says so already
    return replace(split, note="; ".join(notes), **drawn)


def _side(
    rows: CacheRows, scores: Scores, label: str, chosen: NDArray[np.int64], *, group_N: KeyArray | None
) -> dict[str, Any]:
    predicted, truth = scores.of(label)[chosen], rows.label(label)[chosen]
    figures: dict[str, Any] = agreement(predicted, truth).to_json()
    if group_N is not None:
        # Groups are resampled, not rows: images of one prompt are not independent.
        bounds = srocc_interval(predicted, truth, seed=0, groups=group_N[chosen])
        figures["srocc_ci"] = [json_number(bound) for bound in bounds]
    return figures


def _floors(rows: CacheRows, split: Split, labels: list[str], group_N: KeyArray) -> dict[str, Any]:
    sources = rows.rows.text["source"]
    known = sources.codes if sources.some() else None
    prompted = split.test[rows.rows.prompt[split.test] >= 0]
    cosine_M = rows.cosine(prompted)
    floors: dict[str, Any] = {"no_image": {}, "cosine": {}}
    for label in labels:
        truth = rows.label(label)
        if split.train.size:
            floor = no_image_floor(truth, groups=group_N, train=split.train, test=split.test, sources=known)
            floors["no_image"][label] = floor.agreement.to_json()
        if prompted.size:
            floors["cosine"][label] = cosine_floor(cosine_M, truth[prompted]).to_json()
    return floors


def _per_source(rows: CacheRows, scores: Scores, label: str, chosen: NDArray[np.int64]) -> dict[str, Any]:
    sources = rows.rows.text["source"]
    code_M = sources.codes[chosen]
    if not (code_M >= 0).any():
        return {}
    found = agreement_by(scores.of(label)[chosen], rows.label(label)[chosen], groups_N=code_M)
    names = dict(zip(found, sources.names.take(np.array(list(found), dtype=np.int64)), strict=True))
    return {str(names[code]): figures.to_json() for code, figures in found.items()}


def _diagnose(
    rows: CacheRows, scores: Scores, split: Split, *, label: str, scale: float, training: Training
) -> list[dict[str, Any]]:
    base, delta = (scores.q_base, scores.q_delta) if label == "quality" else (scores.c_base, scores.c_delta)
    truth = rows.label(label)
    train_srocc, train_base = (srocc(of[split.train], truth[split.train]) for of in (scores.of(label), base))
    found = diagnose_residual(
        base[split.val],
        delta[split.val],
        label_N=truth[split.val],
        scale=scale,
        head="quality" if label == "quality" else "consistency",
        trained=Trained(
            train_srocc=train_srocc,
            train_base_srocc=train_base,
            last_is_best=label in training.last_is_best,
            tuned=training.tuned,
        ),
    )
    return [entry.to_json() for entry in found]
