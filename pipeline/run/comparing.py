"""Figures of several runs on the same rows, and how far their differences can be trusted. Spec section 5.

Knows recorded rows and the judges of differences. Must not know run directories or what is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.pipeline.run.recorded import Recorded, common_test_rows, read_recorded
from deltaclip.pipeline.run.repeats import spread
from deltaclip.pipeline.scoring.bootstrap import paired_difference, srocc_interval
from deltaclip.pipeline.scoring.metrics import agreement, json_number
from deltaclip.pipeline.scoring.paired_t import mean_difference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Round:
    """One training of each run: its table, and where in it the rows lie that are test in all."""

    tables: list[Recorded]
    rows: list[NDArray[np.int64]]

    def pair(self, number: int, label: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return scores and labels of the rows by one run."""
        table, rows = self.tables[number], self.rows[number]
        return table.scores[label][rows], table.labels[label][rows]

    @property
    def groups(self) -> NDArray[np.str_]:
        """Group of each row."""
        return self.tables[0].group_N[self.rows[0]]


def read_round(paths: Sequence[Path]) -> Round:
    """Read one table of each run and pair their rows.

    Raises:
        UserError: a table cannot be read, or no row is test in all.
    """
    tables = [read_recorded(path) for path in paths]
    rows = common_test_rows(tables)
    if not rows[0].size:
        raise UserError(
            f"has no test row that is test in {', '.join(str(path) for path in paths[1:])} too",
            place=paths[0],
            remedy="train on the same data with the same --seed, --split and --fractions",
        )
    return Round(tables=tables, rows=rows)


def source_of_spread(rounds: Sequence[Round]) -> str:
    """Return what differences vary over: 'rows' of one split, 'splits', or 'weights' on one split."""
    if len(rounds) == 1:
        return "rows"
    tests = [{one.tables[0].keys[row] for row in one.rows[0]} for one in rounds]
    return "weights" if all(test == tests[0] for test in tests) else "splits"


def compare_label(rounds: Sequence[Round], label: str) -> list[dict[str, Any]]:
    """Return the figures of every run, in order, each but the first with its difference from the first.

    One round: SROCC with its interval, and the paired bootstrap, both over groups. Several: each figure over rounds,
    and the t-interval of the mean difference.
    """
    compared: list[dict[str, Any]] = []
    numbers = range(len(rounds[0].tables))
    sroccs = [[agreement(*one.pair(number, label)).srocc for one in rounds] for number in numbers]
    for number in numbers:
        plccs = [agreement(*one.pair(number, label)).plcc for one in rounds]
        figures = {"srocc": sroccs[number], "plcc": plccs}
        entry: dict[str, Any]
        if len(rounds) == 1:
            entry = {name: json_number(values[0]) for name, values in figures.items()}
            entry |= _over_rows(rounds[0], number, label)
        else:
            entry = {name: spread([json_number(value) for value in values]) for name, values in figures.items()}
            differences = [a - b for a, b in zip(sroccs[number], sroccs[0], strict=True)]
            entry["difference"] = _over_rounds(rounds, differences) if number else None
        compared.append(entry)
    return compared


def _over_rows(one: Round, number: int, label: str) -> dict[str, Any]:
    scores, labels = one.pair(number, label)
    interval = srocc_interval(scores, labels, seed=0, groups=one.groups)
    difference = paired_difference(scores, one.pair(0, label)[0], labels, seed=0, groups=one.groups)
    return {
        "srocc_ci": [json_number(bound) for bound in interval],
        "difference": difference.to_json() if number else None,
    }


def _over_rounds(rounds: Sequence[Round], differences: Sequence[float]) -> dict[str, Any]:
    # Splits share training rows; initial weights on one split do not make each other's training.
    shares = [len(one.rows[0]) / max(1, int((~one.tables[0].is_test_N).sum())) for one in rounds]
    share = float(np.mean(shares)) if source_of_spread(rounds) == "splits" else 0.0
    judged = mean_difference(differences, test_to_train=share).to_json()
    return judged | {"values": [json_number(value) for value in differences]}
