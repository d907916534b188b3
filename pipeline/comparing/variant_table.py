"""Predictions of several variants on several splits to one table: figures, and differences to one of the variants.

Knows the shape of `ablate.json` (docs/ablate.md). Must not know how a variant was trained, or files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.rows.split_rows import row_groups
from deltaclip.pipeline.rows.task import rankable_labels
from deltaclip.pipeline.runs.measure import spread
from deltaclip.pipeline.scoring.agreement import agreement, json_number
from deltaclip.pipeline.scoring.intervals import Trial, judged_difference
from deltaclip.pipeline.words.result_words import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deltaclip.pipeline.comparing.variants import Predicted
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.rows.task import Task
    from deltaclip.pipeline.scoring.splits import Split


# What both the interval and the p-value of a difference come from.
BOOTSTRAP = "paired bootstrap of whole prompts on the test rows"
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
    truth, groups = rows.label(label), row_groups(rows)
    trials = [
        Trial(
            ours.score_M,
            other.score_M,
            truth[split.test],
            groups[split.test],
            int((~np.isnan(truth[split.train])).sum()),
        )
        for (ours, other), split in zip(pairs, splits, strict=True)
    ]
    values, judged = judged_difference(trials, over="rows" if interval_kind(splits) == BOOTSTRAP else "splits")
    return {
        **spread([json_number(value) for value in values]),
        "ci": [json_number(judged.lo), json_number(judged.hi)],
        "p_value": json_number(judged.p_value),
    }


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
