"""The sides of a run's rows: as it trained with them, or all test where it did not. Spec section 5."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.manifest import prompt_group
from deltaclip.pipeline.scoring.splits import Split, split_rows

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.pipeline.run.folder import RunFolder
    from deltaclip.pipeline.run.rows import CacheRows


def split_cache(rows: CacheRows, kind: str, *, fractions: str, seed: int) -> Split:
    """Split the rows of a cache.

    Args:
        rows: the cache.
        kind: grouped, random or column.
        fractions: `train,val,test` as text.
        seed: of the split.

    Raises:
        UserError: the fractions are no numbers, or the split is not possible.
    """
    try:
        shares = tuple(float(part) for part in fractions.split(","))
    except ValueError:
        remedy = "give train,val,test such as 0.7,0.1,0.2"
        raise UserError(f"{fractions!r} are no numbers", place="--fractions", remedy=remedy) from None
    text = rows.rows.text
    column = text["split"] if kind == "column" and any(text["split"]) else None
    return split_rows(kind, groups=text["group"].astype(str), seed=seed, fractions=shares, column=column)


def split_of_run(run: RunFolder, rows: CacheRows) -> Split:
    """Return the sides that a run trained with if this is its cache, else all rows as test.

    In another cache, rows of a prompt that the run has trained on count as a leak and are said so. Prompts are
    compared, not groups: a group may be a number that means something else in another data set.
    """
    recorded = _read_predictions(run.path / "predictions.csv")
    if rows.header["plan"] == run.config["cache"]["plan"]:
        # As recorded, not dealt again: another release may deal otherwise.
        side = np.array([row["split"] for row in recorded])
        about = run.metrics["split"]
        return Split(
            kind=about["kind"],
            train=np.flatnonzero(side == "train"),
            val=np.flatnonzero(side == "val"),
            test=np.flatnonzero(side == "test"),
            leaks_groups=about["leaks_groups"],
            seeds=tuple(about["seeds"]),
            note=about["note"],
        )
    trained = {prompt_group(row["prompt"]) for row in recorded if row["split"] != "test"}
    seen = np.array([prompt_group(prompt) in trained for prompt in rows.rows.text["prompt"]])
    none = np.empty(0, dtype=np.int64)
    return Split(
        kind="all",
        train=none,
        val=none,
        test=np.arange(len(seen), dtype=np.int64),
        leaks_groups=bool(seen.any()),
        seeds=(),
        note=f"{int(seen.sum()):,} rows have a prompt that the run trained on" if seen.any() else "",
    )


def _read_predictions(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", place=path, remedy="train again") from error
