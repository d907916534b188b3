"""The page of a table of scores that `predict` wrote: pictures, means of sources, flags, all rows; nothing of labels.

Apart from the page of runs, which knows run directories. Knows that table, and the rows of a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.table import read_table
from deltaclip.pipeline.report_parts.page import render
from deltaclip.pipeline.report_parts.panels import PARTS, TEXT, Rows
from deltaclip.pipeline.report_parts.shown_rows import MAX_ROWS, Shown, missing_words, pictures, show_rows

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.data.table import Table

# Of the scores without a run those that people ask for first; a strip for each of a dozen would say less.
ZERO_SHOT = ("cosine", "antonym_quality")


@dataclass(frozen=True, kw_only=True)
class ScoresPage:
    """A page, what it shows, and what is to be said of its pictures."""

    html: str
    shown: Shown
    missing_words: str


def scores_page(path: Path, *, image_root: Path | None, allow_outside: bool, footer: str) -> ScoresPage:
    """Return the page of a table of scores.

    Args:
        path: CSV, JSON Lines or Parquet, as `predict` writes it.
        image_root: folder of the images; None takes that of the table.
        allow_outside: permit image names that lead out of it.
        footer: last line.

    Raises:
        UserError: cannot be read, is not such a table, or has no score.
    """
    rows, unscored = _read_scores(path)
    root = image_root or path.resolve().parent
    shown = show_rows(
        rows,
        list(dict.fromkeys(name.removesuffix("_label") for name in rows.numbers if name.endswith("_label"))),
        number=0,
        most=MAX_ROWS,
        what="pairs" if any(rows.text["prompt"]) else "images",
        pictures_of=lambda chosen: pictures(
            [rows.text["image"][row] for row in chosen], root, allow_outside=allow_outside
        ),
    )
    missing = missing_words(list(shown.pictures.values()), root)
    html = render(
        path.name,
        [],
        scores=shown,
        warnings=[words for words in (missing, unscored) if words],
        subtitle=f"{len(rows):,} {shown.listing.what} with scores; nothing here says how right these are",
        footer=footer,
    )
    return ScoresPage(html=html, shown=shown, missing_words=missing)


def _read_scores(path: Path) -> tuple[Rows, str]:
    """Return the rows that have a score, and how many have none."""
    table = read_table(path)
    targets = [name.removesuffix("_base") for name in table.columns if name.endswith("_base")]
    targets = [target for target in targets if target in table.columns] or [
        name for name in ZERO_SHOT if name in table.columns
    ]
    if not targets or "image" not in table.columns:
        remedy = "give a run, or what `deltaclip predict RUN DATA --out FILE` wrote"
        raise UserError("is no table of scores", place=path, remedy=remedy)
    blank = [""] * len(table.lines)
    numbers = {name: _numbers(table, name) for target in targets for name in _parts(table, target)}
    keep_N: NDArray[np.bool_] = np.logical_or.reduce([np.isfinite(numbers[target]) for target in targets], axis=0)
    if not keep_N.any():
        raise UserError("has no score in any row", place=path, remedy="its column error says why")
    text = {
        name: [cell for cell, keep in zip(table.columns.get(name, blank), keep_N, strict=True) if keep] for name in TEXT
    }
    # In the order of the parts of a run's rows, where people's scores come first.
    ordered = {
        name: numbers[name][keep_N] if name in numbers else np.full(int(keep_N.sum()), math.nan)
        for target in targets
        for name in (part.format(target) for part in PARTS)
    }
    flags = [cell for cell, keep in zip(table.columns.get("flag", blank), keep_N, strict=True) if keep]
    rows = Rows(
        text=text,
        numbers=ordered,
        flags=flags if "flag" in table.columns else [],
        groups=text["prompt"],
        places=np.flatnonzero(keep_N).tolist(),
    )
    left = int((~keep_N).sum())
    return (
        rows,
        f"{left:,} of {len(keep_N):,} rows have no score and are not here; column error says why." if left else "",
    )


def _parts(table: Table, target: str) -> list[str]:
    """Return the columns of a target that a table has, of score, base and correction."""
    return [name for part in PARTS[1:] if (name := part.format(target)) in table.columns]


def _numbers(table: Table, name: str) -> NDArray[np.float64]:
    values = np.full(len(table.lines), math.nan)
    for row, cell in enumerate(table.columns[name]):
        try:
            values[row] = float(cell or "nan")
        except ValueError:
            raise UserError(f"{cell!r} is no number", place=table.place(row, name), remedy="predict again") from None
    return values
