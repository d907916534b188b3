"""Validation scores of a sweep as a table and as heat maps, numbers and text. Knows rows of plain values alone."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

SHOWN_SETTINGS = 10
SHOWN_MAPS = 3
MAX_CELLS = 12  # along one side, in the terminal; the file has all


def heatmaps(table: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return one map per pair of listed names: the mean validation score over all else that varied.

    Each is `{"x", "y", "x_values", "y_values", "val_score"}`, rows of `val_score` along y; None where no setting is.
    Pairs come with the one first whose cells differ most: it says most.
    """
    values = {name: {row[name] for row in table} for name in names if name != "seed"}
    # Draws from ranges meet in no cell twice: a map of them would be empty but for one setting a row.
    pairs = [(x, y) for x, y in itertools.combinations(values, 2) if len(values[x]) * len(values[y]) <= 4 * len(table)]
    maps = [_heatmap(table, x, y) for x, y in pairs]
    return sorted(maps, key=lambda one: -_range(one))


def _heatmap(table: Sequence[dict[str, Any]], x: str, y: str) -> dict[str, Any]:
    cells = defaultdict(list)
    for row in table:
        cells[row[x], row[y]].append(row["val_score"])
    x_values, y_values = (sorted({row[name] for row in table}) for name in (x, y))
    scores = [[float(np.mean(cells[a, b])) if cells[a, b] else None for a in x_values] for b in y_values]
    return {"x": x, "y": y, "x_values": x_values, "y_values": y_values, "val_score": scores}


def _range(one: dict[str, Any]) -> float:
    known = [score for line in one["val_score"] for score in line if score is not None]
    return float(max(known) - min(known))


def table_lines(table: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Return the best settings as aligned text."""
    columns = [*names, *(name for name in table[0] if name.startswith("val_"))]
    if table[0]["num_seeds"] == 1:
        columns.remove("val_score_mean")
    shown = [[_word(row[name]) for name in columns] for row in table[:SHOWN_SETTINGS]]
    widths = [max(map(len, column)) for column in zip(columns, *shown, strict=True)]
    words = [columns, *shown]
    lines = ["  ".join(f"{word:>{width}}" for word, width in zip(line, widths, strict=True)) for line in words]
    more = len(table) - len(shown)
    return [*lines, *([f"... and {more:,} more in sweep.csv"] if more else [])]


def heatmap_lines(maps: Sequence[dict[str, Any]]) -> list[str]:
    """Return the maps that say most as text, those that fit a terminal."""
    lines = []
    fitting = [one for one in maps if max(len(one["x_values"]), len(one["y_values"])) <= MAX_CELLS]
    for one in fitting[:SHOWN_MAPS]:
        x_words, y_words = ([_word(value) for value in one[f"{axis}_values"]] for axis in "xy")
        side, width = max(map(len, [*y_words, one["y"]])), max(map(len, [*x_words, "0.000"]))
        lines += ["", f"validation score, {one['y']} down, {one['x']} across"]
        lines.append(f"{'':{side}}  " + "  ".join(f"{word:>{width}}" for word in x_words))
        for word, scores in zip(y_words, one["val_score"], strict=True):
            cells = ["-" if score is None else f"{score:.3f}" for score in scores]
            lines.append(f"{word:>{side}}  " + "  ".join(f"{cell:>{width}}" for cell in cells))
    return lines


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
