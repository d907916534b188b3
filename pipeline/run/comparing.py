"""Figures of several runs on the same rows, and how far their differences can be trusted.

Knows recorded rows and the judges of differences. Must not know run directories or what is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.targets import LABELS
from deltaclip.pipeline.run.recorded import (
    check_labels,
    common_test_rows,
    of_equal_names,
    read_tables,
    seen_in_training,
    trained_on_test_of_others,
)
from deltaclip.pipeline.run.repeats import spread
from deltaclip.pipeline.scoring.bootstrap import paired_difference, srocc_interval
from deltaclip.pipeline.scoring.metrics import agreement, json_number
from deltaclip.pipeline.scoring.paired_t import difference_over_splits, mean_difference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Round:
    """One training of each of R runs, on the N rows that are test in all: their groups (N,) and labels (N,).

    `row_N` (N,) are their places in the table of the first run; `by_content` tells whether rows are known by what they
    show and ask for, or by names, where a run recorded no more.
    `scores` has (N,) by label for each run; a label that a run was not trained on stands in its `missing`, and in no
    run's scores. `trained` counts a run's training rows that are test in another run, `seen` the N rows whose prompt or
    image it knows from training, `num_trained` by label the training rows of the first run.
    """

    row_N: NDArray[np.int64]
    group_N: NDArray[np.str_]
    labels: dict[str, NDArray[np.float64]]
    scores: list[dict[str, NDArray[np.float64]]]
    missing: list[list[str]]
    trained: list[int]
    seen: list[int]
    num_trained: dict[str, int]
    by_content: bool


def read_round(paths: Sequence[Path]) -> Round:
    """Read one table of each run and pair their rows; only what is compared stays in memory.

    Raises:
        UserError: a table cannot be read, no row is test in all, or labels differ.
    """
    tables, by_content = read_tables(paths)
    rows = common_test_rows(tables)
    if not rows[0].size:
        named = of_equal_names(tables)
        other = f": {named:,} have an image of the same name, but of another content or prompt" if named else ""
        raise UserError(
            f"has no test row that is test in {', '.join(str(path) for path in paths[1:])} too{other}",
            place=paths[0],
            remedy="train on the same data with the same --seed, --split and --fractions",
        )
    missing = [[label for label in LABELS if np.isnan(table.scores[label]).all()] for table in tables]
    shared = [label for label in LABELS if not any(label in lacking for lacking in missing)]
    for label in shared:
        check_labels(tables, rows, label)
    first = tables[0]
    return Round(
        row_N=rows[0],
        group_N=first.group_N[rows[0]],
        labels={label: first.labels[label][rows[0]] for label in shared},
        scores=[
            {label: table.scores[label][chosen] for label in shared} for table, chosen in zip(tables, rows, strict=True)
        ],
        missing=missing,
        trained=trained_on_test_of_others(tables),
        seen=[seen_in_training(table, chosen) for table, chosen in zip(tables, rows, strict=True)],
        num_trained={label: int((~np.isnan(first.labels[label][first.is_train_N])).sum()) for label in shared},
        by_content=by_content,
    )


def source_of_spread(rounds: Sequence[Round]) -> str:
    """Return what differences vary over: 'rows' of one split, 'splits', or 'weights' on one split."""
    if len(rounds) == 1:
        return "rows"
    tests = [set(one.row_N.tolist()) for one in rounds]
    return "weights" if all(test == tests[0] for test in tests) else "splits"


def compare_label(
    rounds: Sequence[Round], label: str, *, advance: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Return the figures of every run, in order, each but the first with its difference from the first.

    One round: SROCC with its interval, and the paired bootstrap, both over groups. Several: each figure over rounds,
    and the t-interval of the mean difference. `advance` is called after each run.
    """
    compared: list[dict[str, Any]] = []
    numbers = range(len(rounds[0].scores))
    found = [[agreement(one.scores[number][label], one.labels[label]) for one in rounds] for number in numbers]
    for number in numbers:
        figures = {name: [getattr(one, name) for one in found[number]] for name in ("srocc", "plcc")}
        entry: dict[str, Any]
        if len(rounds) == 1:
            entry = {name: json_number(values[0]) for name, values in figures.items()}
            entry |= _over_rows(rounds[0], number, label)
        else:
            entry = {name: spread([json_number(value) for value in values]) for name, values in figures.items()}
            differences = [a.srocc - b.srocc for a, b in zip(found[number], found[0], strict=True)]
            entry["difference"] = _over_rounds(rounds, differences, label) if number else None
        compared.append(entry)
        advance()
    return compared


def _over_rows(one: Round, number: int, label: str) -> dict[str, Any]:
    scores, labels, groups = one.scores[number][label], one.labels[label], one.group_N
    interval = srocc_interval(scores, labels, seed=0, groups=groups)
    difference = None
    if number:
        difference = paired_difference(scores, one.scores[0][label], labels, seed=0, groups=groups).to_json()
    return {"srocc_ci": [json_number(bound) for bound in interval], "difference": difference}


def _over_rounds(rounds: Sequence[Round], differences: Sequence[float], label: str) -> dict[str, Any]:
    if source_of_spread(rounds) == "splits":
        judged = difference_over_splits(
            differences,
            num_test_K=[int((~np.isnan(one.labels[label])).sum()) for one in rounds],
            num_train_K=[one.num_trained[label] for one in rounds],
        )
    else:  # initial weights on one split do not make each other's training
        judged = mean_difference(differences)
    return judged.to_json() | {"values": [json_number(value) for value in differences]}
