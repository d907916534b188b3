"""Scores and labels to `metrics.json`: sides of the split, floors, per source, diagnostics, verdicts; repeats as one.

Must not know heads or files.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from deltaclip.pipeline.rows.pair_rows import count_across, pairs_of
from deltaclip.pipeline.rows.row_floor import floor_of
from deltaclip.pipeline.rows.split_rows import row_groups
from deltaclip.pipeline.rows.task import present_labels
from deltaclip.pipeline.runs.trust import COVERAGE
from deltaclip.pipeline.scoring.agreement import agreement, agreement_by, json_number, srocc
from deltaclip.pipeline.scoring.diagnostics import diagnose_residual
from deltaclip.pipeline.scoring.floors import cosine_floor
from deltaclip.pipeline.scoring.intervals import srocc_interval
from deltaclip.pipeline.scoring.ordering import ordering
from deltaclip.pipeline.scoring.splits import repeat_seeds
from deltaclip.pipeline.scoring.verdict import margin, mean_margin
from deltaclip.pipeline.settings import LearningSettings
from deltaclip.pipeline.words.result_words import with_sentence

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


def measure(
    rows: CacheRows,
    scores: Scores,
    split: Split,
    *,
    labels: list[str],
    scales: Mapping[str, float],
    lacks_views: Sequence[str] = (),
    coverage: float = COVERAGE,
) -> dict[str, Any]:
    """Compute everything that stands in `metrics.json`; of a side of over JUDGED_ROWS rows from that many of them.

    Args:
        rows: N rows with labels.
        scores: N scores.
        split: sides of the N rows; train may be empty (a foreign cache), and there is then no no-image floor.
        labels: those whose head was trained; the scores of another head mean nothing.
        scales: of residual heads by target, none of direct ones.
        lacks_views: views that the training would have seen, had the cache them.
        coverage: that the intervals of the scores were asked for.
    """
    trained, labels = labels, [label for label in labels if label in present_labels(rows)]
    group_N = row_groups(rows)
    judged = _judged(split)
    metrics: dict[str, Any] = {"split": judged.to_json() | {"rows": split.to_json()["rows"]}}
    for side in ("test", "val", "train"):
        chosen = getattr(judged, side)
        metrics[side] = {
            label: _side(rows, scores, label, chosen, group_N=group_N if side == "test" else None) for label in labels
        }
    metrics["floors"] = {"no_image": {}, "cosine": {}}
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
        for entry in _diagnose(rows, scores, judged, label=label, scale=scale)
    ]
    if rows.pairs is not None:
        metrics["pairs"] = _pairs(rows, scores, split, trained, group_N=group_N)
    metrics["verdict"] = {}
    cosine_M = _cosine(rows, judged.test)
    for label in labels:
        others_M = _floors(rows, replace(judged, train=split.train), label, metrics["floors"], cosine_M=cosine_M)
        found = _margins(rows, scores, judged.test, label, others_M=others_M, group_N=group_N)
        state = next((one["state"] for one in metrics["diagnostics"] if one["name"] == f"{label}.outcome"), "")
        found |= {"state": state, "lacks_views": list(lacks_views)}
        metrics["verdict"][label] = with_sentence(found, label, metrics["split"])
    return metrics


def _pairs(
    rows: CacheRows, scores: Scores, split: Split, trained: Sequence[str], *, group_N: KeyArray
) -> dict[str, Any]:
    """Return by side and target how many pairs are ordered as people did, beside the cosine; `across` counts the rest.

    Pairs of images on two sides are left out. What is said of training pairs is not out of fold.
    """
    found: dict[str, Any] = {"across": count_across(rows, split)}
    for side in ("test", "val", "train"):
        found[side] = {}
        for target in (one.name for one in rows.targets if one.name in trained):
            pairs = pairs_of(rows, target).among(getattr(split, side))
            if not len(pairs):
                continue
            x_N, groups_P = scores.of(target), group_N[pairs.a_P]
            figures = ordering(x_N[pairs.a_P] - x_N[pairs.b_P], pairs.preferred_P, groups=groups_P).to_json()
            if (
                side == "test"
                and rows.has_text
                and (rows.rows.prompt[np.concatenate([pairs.a_P, pairs.b_P])] >= 0).all()
            ):
                cosine_P = rows.cosine(pairs.a_P) - rows.cosine(pairs.b_P)
                figures["cosine"] = ordering(cosine_P, pairs.preferred_P, groups=groups_P).to_json()
            found[side][target] = figures
    return found


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


def _cosine(rows: CacheRows, test: NDArray[np.int64]) -> NDArray[np.floating]:
    """Return the cosine of image and prompt of the test rows, (M,), NaN without a prompt."""
    has_prompt_M = (rows.rows.prompt[test] >= 0) & rows.has_text
    cosine_M = np.full(test.size, np.nan)
    cosine_M[has_prompt_M] = rows.cosine(test[has_prompt_M])
    return cosine_M


def _floors(
    rows: CacheRows,
    split: Split,
    label: str,
    floors: dict[str, dict[str, Any]],
    *,
    cosine_M: NDArray[np.floating],
) -> dict[str, NDArray[np.floating]]:
    """Add the figures of the floors that a target has, and return their predictions of the test rows, (M,) each."""
    truth: NDArray[np.floating] = rows.label(label)
    others_M: dict[str, NDArray[np.floating]] = {}
    if split.train.size:
        floor = floor_of(rows, label, train=split.train, test=split.test)
        floors["no_image"][label] = floor.to_json()
        others_M["no_image"] = floor.predicted
    if (has_prompt_M := np.isfinite(cosine_M)).any():
        floors["cosine"][label] = cosine_floor(cosine_M[has_prompt_M], truth[split.test[has_prompt_M]]).to_json()
        others_M["cosine"] = cosine_M
    return others_M


def _margins(
    rows: CacheRows,
    scores: Scores,
    test: NDArray[np.int64],
    label: str,
    *,
    others_M: dict[str, NDArray[np.floating]],
    group_N: KeyArray,
) -> dict[str, Any]:
    """Return how far a head is ahead of the no-image floor, else of chance; one that sees pairs of the cosine too."""
    predicted, truth, groups = scores.of(label)[test], rows.label(label)[test], group_N[test]
    floor = others_M.get("no_image")
    # A floor without sources and words says one number of all rows: it ranks as chance does.
    ranks = floor is not None and np.isfinite(srocc(floor, truth))
    found = margin(predicted, floor if ranks else None, truth, groups=groups).to_json()
    sees = next(target.sees for target in rows.targets if target.name == label)
    cosine = others_M.get("cosine") if sees == "pair" else None
    beside = None if cosine is None else margin(predicted, cosine, truth, groups=groups).to_json()
    return found | {"over": "no_image" if ranks else "chance", "has_floor": floor is not None, "cosine": beside}


def _per_source(rows: CacheRows, scores: Scores, label: str, chosen: NDArray[np.int64]) -> dict[str, Any]:
    sources = rows.rows.text["source"]
    code_M = sources.codes[chosen]
    if not (code_M >= 0).any():
        return {}
    found = agreement_by(scores.of(label)[chosen], rows.label(label)[chosen], groups_N=code_M)
    names = dict(zip(found, sources.names.take(np.array(list(found), dtype=np.int64)), strict=True))
    return {str(names[code]): figures.to_json() for code, figures in found.items()}


def _diagnose(rows: CacheRows, scores: Scores, split: Split, *, label: str, scale: float) -> list[dict[str, Any]]:
    (predicted, base, delta), truth = scores.targets[label], rows.label(label)
    train_srocc, train_base_srocc = (srocc(of[split.train], truth[split.train]) for of in (predicted, base))
    found = diagnose_residual(
        base[split.val],
        delta[split.val],
        label_N=truth[split.val],
        scale=scale,
        head=label,
        train_srocc=train_srocc,
        train_base_srocc=train_base_srocc,
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
    it belongs to; a state stands where more than half of the repeats have it.
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
        if name not in ("split", "diagnostics", "verdict")
    }
    diagnostics = _diagnostics([found["diagnostics"] for found in metrics])
    combined = {"split": split, **figures, "diagnostics": diagnostics}
    if "verdict" in metrics[0]:
        combined["verdict"] = {label: _verdict_of_all(metrics, label, split) for label in metrics[0]["verdict"]}
    return combined


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
    seeds_of: dict[str, list[str]] = {}
    for seed, words in zip(seeds, found, strict=True):
        seeds_of.setdefault(words, []).append(str(seed))
    return "; ".join(
        f"seed{'s' if len(of) > 1 else ''} {', '.join(of)}: {words}" for words, of in seeds_of.items() if words
    )


def _diagnostics(found: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(entry["name"] for entries in found for entry in entries)
    by_name = [{entry["name"]: entry for entry in entries} for entries in found]
    merged = []
    for name in names:
        entries = [entries.get(name, {"value": None, "state": ""}) for entries in by_name]
        state = _most([entry["state"] for entry in entries])
        merged.append({"name": name, "value": spread([entry["value"] for entry in entries]), "state": state})
    return merged


def _most(states: Sequence[str]) -> str:
    """Return the state of more than half of the repeats, else that they are mixed."""
    state, count = Counter(states).most_common(1)[0]
    return state if 2 * count > len(states) else "mixed"


def _verdict_of_all(metrics: Sequence[dict[str, Any]], label: str, split: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict of repeats on one target: mean differences with the interval over splits.

    A repeat that has not the target, or another floor than most (a source that says nothing there), is left out.
    """
    with_label = [one for one in metrics if label in one["verdict"]]
    over = Counter(one["verdict"][label]["over"] for one in with_label).most_common(1)[0][0]
    used = [one for one in with_label if one["verdict"][label]["over"] == over]
    found = [one["verdict"][label] for one in used]
    sizes = [(one["test"][label]["n"], one["train"].get(label, {"n": 0})["n"]) for one in used]
    cosines = [one["cosine"] for one in found]
    merged = found[0] | mean_margin(found, sizes).to_json() | {"repeats": len(used)}
    merged["cosine"] = mean_margin(cosines, sizes).to_json() if any(cosines) else None
    merged["state"] = _most([one["state"] for one in found])
    return with_sentence(merged, label, split)
