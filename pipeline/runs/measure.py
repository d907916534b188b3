"""Scores and labels to `metrics.json`: every side of the split, floors, per source, diagnostics; of repeats as one.

Must not know heads or files.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from deltaclip.pipeline.rows.cached_rows import row_keys
from deltaclip.pipeline.rows.task import present_labels
from deltaclip.pipeline.runs.trust import COVERAGE
from deltaclip.pipeline.scoring.agreement import (
    agreement,
    agreement_by,
    cosine_floor,
    json_number,
    no_image_floor,
    srocc,
)
from deltaclip.pipeline.scoring.diagnostics import Trained, diagnose_residual
from deltaclip.pipeline.scoring.intervals import srocc_interval
from deltaclip.pipeline.scoring.splits import repeat_seeds
from deltaclip.pipeline.settings import LearningSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.runs.prediction_table import Scores
    from deltaclip.pipeline.scoring.groups import KeyArray
    from deltaclip.pipeline.scoring.splits import Split


# ---- Scores and labels to the metrics of a run: every side of the split, floors, per source, diagnostics


# A correlation of a million rows is known to 0.001; the logistic and the ranks of more would take gigabytes.
JUDGED_ROWS = 1_000_000


class Training(NamedTuple):
    """Of which labels the last epoch was kept, and whether towers were trained too."""

    last_is_best: frozenset[str]
    tuned: bool = False


def measure(
    rows: CacheRows,
    scores: Scores,
    split: Split,
    *,
    labels: list[str],
    scales: Mapping[str, float],
    training: Training | None = None,
    coverage: float = COVERAGE,
) -> dict[str, Any]:
    """Compute everything that stands in `metrics.json`; of a side of over JUDGED_ROWS rows from that many of them.

    Args:
        rows: N rows with labels.
        scores: N scores.
        split: sides of the N rows; train may be empty (a foreign cache), and there is then no no-image floor.
        labels: those whose head was trained; the scores of another head mean nothing.
        scales: of residual heads by target, none of direct ones.
        training: what advice may be given on.
        coverage: that the intervals of the scores were asked for.
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
    if scores.trust is not None:
        metrics["intervals"] = {
            label: _intervals(rows, scores, label, judged.test, coverage=coverage) for label in labels
        }
        unlike = scores.trust.flag_N[judged.test] >= 0
        metrics["unlike"] = {"test": float(unlike.mean()) if len(unlike) else None}
    metrics["diagnostics"] = [
        entry
        for label, scale in scales.items()
        if label in labels and split.val.size
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


def _intervals(
    rows: CacheRows, scores: Scores, label: str, chosen: NDArray[np.int64], *, coverage: float
) -> dict[str, Any]:
    """Return how many labels lie in their intervals, and how wide these are; None where there are none."""
    assert scores.trust is not None
    low_M, high_M = scores.trust.low[label][chosen], scores.trust.high[label][chosen]
    truth_M = rows.label(label)[chosen]
    known = np.flatnonzero(np.isfinite(truth_M) & np.isfinite(low_M))
    inside_K = (low_M[known] <= truth_M[known]) & (truth_M[known] <= high_M[known])
    sources = rows.rows.text["source"]
    code_K, by_source = sources.codes[chosen][known], dict[str, float]()
    if (code_K >= 0).any():
        names = sources.names.take(np.unique(code_K[code_K >= 0]))
        shares = [float(inside_K[code_K == code].mean()) for code in np.unique(code_K[code_K >= 0])]
        by_source = dict(zip(map(str, names), shares, strict=True))
    return {
        "asked": coverage,
        "coverage": float(inside_K.mean()) if len(known) else None,
        "width": float((high_M[known] - low_M[known]).mean()) if len(known) else None,
        "n": len(known),
        "per_source": by_source,
    }


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
    (predicted, base, delta), truth = scores.targets[label], rows.label(label)
    train_srocc, train_base = (srocc(of[split.train], truth[split.train]) for of in (predicted, base))
    found = diagnose_residual(
        base[split.val],
        delta[split.val],
        label_N=truth[split.val],
        scale=scale,
        head=label,
        trained=Trained(
            train_srocc=train_srocc,
            train_base_srocc=train_base,
            last_is_best=label in training.last_is_best,
            tuned=training.tuned,
        ),
    )
    return [entry.to_json() for entry in found]


# ---- Repeated trainings: the settings of each, and their metrics as one


Config = TypeVar("Config", bound=LearningSettings)


def repeat_configs(config: Config) -> list[Config]:
    """Return the settings of each repeat: both seeds count up, so that any repeat can be trained alone.

    Raises:
        UserError: the last seed is out of range.
    """
    pairs = zip(repeat_seeds(config.seed, config.repeats), repeat_seeds(config.split_seed, config.repeats), strict=True)
    return [replace(config, seed=seed, data_seed=split_seed) for seed, split_seed in pairs]


def combine(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of several repeats as one: every figure is its mean, SD and values.

    One repeat stays as it is. A figure that a repeat does not have is None among the values and left out of mean and
    SD; the SD is that of a sample (ddof 1), None for fewer than two. Words are joined, each with the split seeds that
    it belongs to; an outcome stands where more than half of the repeats have it.
    """
    if len(metrics) == 1:
        return metrics[0]
    splits = [found["split"] for found in metrics]
    seeds = [seed for split in splits for seed in split["seeds"]]
    split = {
        "kind": splits[0]["kind"],
        "leaks_groups": any(split["leaks_groups"] for split in splits),
        "seeds": seeds,
        "rows": _merged([split["rows"] for split in splits], seeds),
        "note": _words([split["note"] for split in splits], seeds),
    }
    figures = {
        name: _merged([found[name] for found in metrics], seeds)
        for name in metrics[0]
        if name not in ("split", "diagnostics")
    }
    return {"split": split, **figures, "diagnostics": _diagnostics([found["diagnostics"] for found in metrics])}


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Return mean, sample SD and values of one figure over repeats."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


def _merged(found: Sequence[Any], seeds: Sequence[int]) -> Any:
    """Merge what stands in one place in every repeat; None where a repeat lacks it (a label, a source)."""
    known = [value for value in found if value is not None]
    if known and isinstance(known[0], dict):
        names = dict.fromkeys(name for value in known for name in value)
        return {name: _merged([(value or {}).get(name) for value in found], seeds) for name in names}
    if known and isinstance(known[0], list):
        missing = [None] * len(known[0])
        return [_merged(values, seeds) for values in zip(*(value or missing for value in found), strict=True)]
    if known and isinstance(known[0], str):
        return _words([value or "" for value in found], seeds)
    return spread(found)


def _words(found: Sequence[str], seeds: Sequence[int]) -> str:
    if len(set(found)) == 1:
        return found[0]
    return "; ".join(f"seed {seed}: {words}" for seed, words in zip(seeds, found, strict=True) if words)


def _diagnostics(found: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(entry["name"] for entries in found for entry in entries)
    by_name = [{entry["name"]: entry for entry in entries} for entries in found]
    merged = []
    for name in names:
        entries = [entries.get(name, {"value": None, "advice": "", "verdict": ""}) for entries in by_name]
        verdict, words = _one_outcome(entries)
        value = spread([entry["value"] for entry in entries])
        merged.append({"name": name, "value": value, "advice": words, "verdict": verdict})
    return merged


def _one_outcome(entries: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Return the verdict and the words of more than half of the repeats, or that they differ."""
    counts = Counter(entry["verdict"] for entry in entries)
    verdict, count = counts.most_common(1)[0]
    if 2 * count <= len(entries):
        kinds = ", ".join(f"{verdict or 'none'} {count}" for verdict, count in counts.most_common())
        return "mixed", f"The repeats differ ({kinds}): nothing to advise."
    words = next(entry["advice"] for entry in entries if entry["verdict"] == verdict)
    return verdict, f"{words} ({count} of {len(entries)} repeats; the figures are those of one)" if words else ""
