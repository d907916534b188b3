"""What runs recorded of their rows, read again and paired: the rows that are test in every run.

Knows the tables of predictions. Must not know caches, heads or metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.targets import LABELS
from deltaclip.features.data.manifest import prompt_group
from deltaclip.pipeline.run.predictions import read_predictions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

COLUMNS = ("image", "prompt", "group", "split", *LABELS, "q", "c")
# Tables have six digits.
LABEL_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """N rows of one training: `keys` are (image, prompt, how often that pair came before), unique.

    Labels and scores are (N,) float64 by label, NaN where there is none.
    """

    path: Path
    keys: list[tuple[str, str, int]]
    group_N: NDArray[np.str_]
    is_test_N: NDArray[np.bool_]
    labels: dict[str, NDArray[np.float64]]
    scores: dict[str, NDArray[np.float64]]


def read_recorded(path: Path) -> Recorded:
    """Read a table of predictions.

    Raises:
        UserError: no such table, or it lacks a column.
    """
    rows = read_predictions(path, COLUMNS)
    seen: dict[tuple[str, str], int] = {}
    keys = []
    for row in rows:
        pair = (row["image"], row["prompt"])
        seen[pair] = seen.get(pair, -1) + 1
        keys.append((*pair, seen[pair]))

    def numbers(name: str) -> NDArray[np.float64]:
        try:
            return np.array([float(row[name] or "nan") for row in rows], dtype=np.float64)
        except ValueError as error:
            raise UserError(f"column {name}: {error}", place=path, remedy="train again") from error

    return Recorded(
        path=path,
        keys=keys,
        group_N=np.array([row["group"] for row in rows], dtype=str),
        is_test_N=np.array([row["split"] == "test" for row in rows], dtype=bool),
        labels={label: numbers(label) for label in LABELS},
        scores={label: numbers(label[0]) for label in LABELS},
    )


def common_test_rows(tables: Sequence[Recorded]) -> list[NDArray[np.int64]]:
    """Return, for each table, where the rows lie that are test in all of them; the same order in each."""
    places = [{key: row for row, key in enumerate(table.keys) if table.is_test_N[row]} for table in tables]
    shared = [key for key in places[0] if all(key in found for found in places[1:])]
    return [np.array([found[key] for key in shared], dtype=np.int64) for found in places]


def check_labels(tables: Sequence[Recorded], rows: Sequence[NDArray[np.int64]], label: str) -> None:
    """Refuse tables whose labels differ in the paired rows.

    Raises:
        UserError: names the first row that differs, and how many do.
    """
    first = tables[0]
    truth = first.labels[label][rows[0]]
    for table, chosen in zip(tables[1:], rows[1:], strict=True):
        found = table.labels[label][chosen]
        differs = ~np.isclose(found, truth, rtol=0, atol=LABEL_TOLERANCE, equal_nan=True)
        if differs.any():
            at = int(np.argmax(differs))
            image = table.keys[chosen[at]][0]
            raise UserError(
                f"{int(differs.sum()):,} of {differs.size:,} rows have another {label} than in {first.path}: "
                f"that of {image} is {found[at]:g} here, {truth[at]:g} there",
                place=table.path,
                remedy="compare runs on the same labels",
            )


def trained_on_test_of_others(tables: Sequence[Recorded]) -> list[int]:
    """Return, for each table, how many of its rows that are not test are test in another one."""
    tests = [{key for row, key in enumerate(table.keys) if table.is_test_N[row]} for table in tables]
    found = []
    for number, table in enumerate(tables):
        others = set().union(*(test for place, test in enumerate(tests) if place != number))
        found.append(sum(key in others for row, key in enumerate(table.keys) if not table.is_test_N[row]))
    return found


def seen_in_training(table: Recorded, rows: NDArray[np.int64]) -> int:
    """Return how many of some rows have a prompt or an image that is on another side than test in this table.

    One prompt for all rows is quality-only data: it tells nothing, so it counts as not seen.
    """
    prompts = [prompt_group(prompt) for _, prompt, _ in table.keys]
    trained = np.flatnonzero(~table.is_test_N)
    seen_images = {table.keys[row][0] for row in trained}
    seen_prompts = {prompts[row] for row in trained} if len(set(prompts)) > 1 else set()
    return sum(prompts[row] in seen_prompts or table.keys[row][0] in seen_images for row in rows)
