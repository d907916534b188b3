"""Predictions of several variants on several splits to one table: figures, and differences to one of the variants.

Knows the shape of `ablate.json` (docs/ablate.md). Must not know how a variant was trained, or files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.rows.task import rankable_labels
from deltaclip.pipeline.runs.measure import spread
from deltaclip.pipeline.scoring.agreement import agreement, json_number, srocc
from deltaclip.pipeline.scoring.intervals import difference_over_splits, paired_difference
from deltaclip.pipeline.words.result_words import COLUMNS, KIND_WORDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deltaclip.pipeline.comparing.variants import Predicted
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.rows.task import Task
    from deltaclip.pipeline.scoring.intervals import MeanDifference, PairedDifference
    from deltaclip.pipeline.scoring.splits import Split


# What both the interval and the p-value of a difference come from.
BOOTSTRAP = "paired bootstrap of whole prompts on the test rows of the first split"
CORRECTED = "corrected resampled t over the splits, which share rows (Nadeau and Bengio 2003)"
# Of ablate.csv: figures, each as its mean and its SD.
CSV_FIGURES = ("srocc", "plcc", "main", "rmse")
CSV_PARTS = (("", "mean"), ("_sd", "sd"))


def comparable_labels(tasks: Sequence[Task[Any]]) -> list[str]:
    """Return the targets with three different rows or more on each side of every split, so that they can be ranked."""
    found = [
        set(task.trained).intersection(
            *(rankable_labels(task.rows, getattr(task.split, side)) for side in ("train", "val", "test"))
        )
        for task in tasks
    ]
    return [target.name for target in tasks[0].rows.targets if all(target.name in each for each in found)]


def interval_kind(splits: Sequence[Split]) -> str:
    """Return what differences are judged by: splits, or rows where there is one split or the sides are given."""
    return BOOTSTRAP if len(splits) == 1 or splits[0].kind == "column" else CORRECTED


def compare_variants(
    rows: CacheRows,
    splits: Sequence[Split],
    predicted: Sequence[Mapping[str, Mapping[str, Predicted]]],
    *,
    against: str,
) -> dict[str, dict[str, Any]]:
    """Return of each variant and label the figures over repeats and the difference in SROCC to `against`.

    Args:
        rows: the cache.
        splits: one per repeat.
        predicted: of each repeat the predictions of its test rows, by variant and label.
        against: the variant that differences are taken against; its own is None.
    """
    return {
        name: {
            label: {
                "test": _figures(rows, splits, [each[name][label] for each in predicted], label),
                "difference": None
                if name == against
                else _difference(
                    rows, splits, [(each[name][label], each[against][label]) for each in predicted], label
                ),
                "about": [each[name][label].about for each in predicted],
            }
            for label in predicted[0][name]
        }
        for name in predicted[0]
    }


def _figures(
    rows: CacheRows, splits: Sequence[Split], predicted: Sequence[Predicted], label: str
) -> dict[str, dict[str, Any]]:
    found = [
        agreement(each.score_M, rows.label(label)[split.test]) for each, split in zip(predicted, splits, strict=True)
    ]
    return {name: spread([json_number(getattr(one, name)) for one in found]) for name in COLUMNS}


def _difference(
    rows: CacheRows, splits: Sequence[Split], pairs: Sequence[tuple[Predicted, Predicted]], label: str
) -> dict[str, Any]:
    truth = rows.label(label)
    values = [
        srocc(ours.score_M, truth[split.test]) - srocc(other.score_M, truth[split.test])
        for (ours, other), split in zip(pairs, splits, strict=True)
    ]
    lo, hi, p_value = _judged(rows, splits, pairs, label, values=values)
    return {
        **spread([json_number(value) for value in values]),
        "ci": [json_number(lo), json_number(hi)],
        "p_value": json_number(p_value),
    }


def _judged(
    rows: CacheRows,
    splits: Sequence[Split],
    pairs: Sequence[tuple[Predicted, Predicted]],
    label: str,
    *,
    values: Sequence[float],
) -> tuple[float, float, float]:
    """Return the 95 % interval and the p-value of the mean difference, both of `interval_kind`."""
    truth = rows.label(label)
    found: PairedDifference | MeanDifference
    if interval_kind(splits) == BOOTSTRAP:
        test, (ours, other) = splits[0].test, pairs[0]
        groups = rows.rows.text["group"][test]
        found = paired_difference(ours.score_M, other.score_M, truth[test], groups=groups, seed=0)
    else:
        num_test, num_train = (
            [int((~np.isnan(truth[getattr(split, side)])).sum()) for split in splits] for side in ("test", "train")
        )
        found = difference_over_splits(values, num_test_K=num_test, num_train_K=num_train)
    return found.lo, found.hi, found.p_value


def csv_columns(compared: Mapping[str, Mapping[str, Any]], words: Mapping[str, str]) -> dict[str, Any]:
    """Return the columns of `ablate.csv`, a row per variant and label; a figure that does not exist is NaN."""
    nothing: dict[str, Any] = {"mean": None, "ci": (None, None), "p_value": None}
    names, figures = [], []
    for name, found in compared.items():
        for label, one in found.items():
            difference = one["difference"] or nothing
            row = {f"{figure}{end}": one["test"][figure][part] for figure in CSV_FIGURES for end, part in CSV_PARTS}
            row |= {"difference": difference["mean"], "difference_lo": difference["ci"][0]}
            row |= {"difference_hi": difference["ci"][1], "p_value": difference["p_value"]}
            names.append({"variant": name, "what": words[name], "label": label})
            figures.append(row)
    columns: dict[str, Any] = {column: [row[column] for row in names] for column in names[0]}
    return columns | {column: np.array([row[column] for row in figures], np.float64) for column in figures[0]}


def comparison_lines(
    split: Mapping[str, Any],
    compared: Mapping[str, Mapping[str, Any]],
    words: Mapping[str, str],
    *,
    against: str,
    interval: str,
) -> list[str]:
    """Return a table per label for a person, and what its columns are.

    Args:
        split: of all repeats, as in `metrics.json`.
        compared: what `compare_variants` returns.
        words: of each variant what it is.
        against: the variant that differences are taken against.
        interval: what it comes from, and p with it.
    """
    seeds = split["seeds"]
    train, val, test = (_mean(split["rows"][side]) for side in ("train", "val", "test"))
    leak = "; LEAKS: some prompts are on two sides, so these figures flatter" if split["leaks_groups"] else ""
    counts = f"{test:,.0f} test rows ({train:,.0f} train, {val:,.0f} validation)"
    lines = [f"split: {KIND_WORDS[split['kind']]}, {counts}, {_seed_words(seeds)}{leak}"]
    if split.get("note"):
        lines.append(f"       {split['note']}")
    names = max(map(len, compared)) + 2
    wide = max(map(len, words.values())) + 2
    for label in next(iter(compared.values())):
        heading = f"{'test SROCC':>13}{f'- {against}':>{max(12, len(against) + 4)}}{'95 %':>20}{'p':>8}"
        lines += ["", f"{label:{names + wide}}{heading}"]
        for name, found in compared.items():
            figure = found[label]["test"]["srocc"]
            shown = f"{_number(figure['mean'])}" + (f" ± {figure['sd']:.3f}" if figure["sd"] is not None else "")
            end = _difference_words(found[label]["difference"], width=max(12, len(against) + 4))
            lines.append(f"{name:{names}}{words[name]:{wide}}{shown:>13}{end}".rstrip())
    lines += ["", f"95 % and p: {interval}", "            two-sided, one comparison at a time"]
    return lines


def subset_notes(compared: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each variant that was fitted on a part of the training rows."""
    found = []
    for name, labels in compared.items():
        for label, one in labels.items():
            parts = [about for about in one["about"] if about.get("rows", 0) < about.get("of_rows", 0)]
            if parts:
                rows, of = parts[0]["rows"], parts[0]["of_rows"]
                found.append(f"note: {name} ({label}) was fitted on {rows:,} of {of:,} training rows, drawn at random")
    return found


def _difference_words(difference: Mapping[str, Any] | None, *, width: int) -> str:
    if difference is None:
        return ""
    mean, (lo, hi), p = difference["mean"], difference["ci"], difference["p_value"]
    bounds = "-" if lo is None or hi is None else f"{lo:+.3f} to {hi:+.3f}"
    return f"{'-' if mean is None else f'{mean:+.3f}':>{width}}{bounds:>20}{_number(p):>8}"


def _seed_words(seeds: Sequence[int]) -> str:
    return f"seeds {seeds[0]} to {seeds[-1]}, mean ± SD" if len(seeds) > 1 else f"seed {seeds[0]}"


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, dict) else value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
