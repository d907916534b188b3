"""Figures of several runs on the rows that are test in all, and how far their differences can be trusted.

Rows are the same where image and prompt are, by content, and by name where a run says no more. Knows the tables of
predictions and the judges of differences. Must not know caches, heads or what is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.pipeline.rows.cached_rows import FILE, Codes, common_codes, keys_of_names, read_keys
from deltaclip.pipeline.runs.measure import spread
from deltaclip.pipeline.runs.prediction_table import read_predictions, recorded_targets
from deltaclip.pipeline.scoring.agreement import agreement, json_number
from deltaclip.pipeline.scoring.intervals import Trial, judged_difference, srocc_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.pipeline.scoring.groups import KeyArray
    from deltaclip.pipeline.scoring.intervals import Over


# ---- Figures of several runs on the same rows, and how far their differences can be trusted


@dataclass(frozen=True, kw_only=True)
class Round:
    """One training of each of R runs, on the N rows that are test in all: their groups (N,) and labels (N,).

    `row_N` (N,) are their places in the table of the first run; `by_content` tells whether rows are known by what they
    show and ask for, or by names, where a run recorded no more.
    `scores` has (N,) by label for each run; a label that a run was not trained on stands in its `missing`, and in no
    run's scores. `trained` counts a run's training rows that are test in another run, `seen` the N rows whose prompt or
    image it knows from training, `num_trained` by label the training rows of the first run. `image_N` are keys of the
    images' content, `learned` those that each run learned from; neither where rows are known by names.
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
    image_N: KeyArray
    learned: list[KeyArray]


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
    every = list(dict.fromkeys(label for table in tables for label in table.scores))
    nothing = np.full(1, np.nan)
    missing = [[label for label in every if np.isnan(table.scores.get(label, nothing)).all()] for table in tables]
    shared = [label for label in every if not any(label in lacking for lacking in missing)]
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
        image_N=first.image_N[rows[0]],
        learned=[table.image_N[~table.is_test_N] for table in tables],
    )


def source_of_spread(rounds: Sequence[Round]) -> Over:
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
    over = source_of_spread(rounds)
    compared: list[dict[str, Any]] = []
    for number in range(len(rounds[0].scores)):
        found = [agreement(one.scores[number][label], one.labels[label]) for one in rounds]
        figures = {name: [json_number(getattr(one, name)) for one in found] for name in ("srocc", "plcc")}
        entry: dict[str, Any]
        if over == "rows":
            (one,) = rounds
            interval = srocc_interval(one.scores[number][label], one.labels[label], seed=0, groups=one.group_N)
            entry = {name: values[0] for name, values in figures.items()}
            entry["srocc_ci"] = [json_number(bound) for bound in interval]
        else:
            entry = {name: spread(values) for name, values in figures.items()}
        compared.append({**entry, "difference": _difference(rounds, number, label, over=over) if number else None})
        advance()
    return compared


def _difference(rounds: Sequence[Round], number: int, label: str, *, over: Over) -> dict[str, Any]:
    trials = [
        Trial(one.scores[number][label], one.scores[0][label], one.labels[label], one.group_N, one.num_trained[label])
        for one in rounds
    ]
    values, judged = judged_difference(trials, over=over)
    return judged.to_json() | ({} if over == "rows" else {"values": [json_number(value) for value in values]})


# ---- What runs recorded of their rows, read again and paired: the rows that are test in every run


COLUMNS = ("image", "prompt", "group", "split")
# Tables have six digits.
LABEL_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """N rows of one training.

    `codes` mean the same in tables that were read together, and `image_N` are the keys of images behind them; so does
    `id_N` (N,) int64, of the pair of image and prompt and of how often it came before, which is unique in a table.
    Labels and scores are (N,) float64 by label, NaN where there is none.
    """

    path: Path
    images: list[str]
    codes: Codes
    image_N: KeyArray
    id_N: NDArray[np.int64]
    group_N: NDArray[np.str_]
    is_test_N: NDArray[np.bool_]
    is_train_N: NDArray[np.bool_]
    labels: dict[str, NDArray[np.float64]]
    scores: dict[str, NDArray[np.float64]]


def read_tables(paths: Sequence[Path]) -> tuple[list[Recorded], bool]:
    """Read tables of predictions; tell too whether all their rows are known by content.

    Raises:
        UserError: no such table, or it lacks a column.
    """
    columns = [_read_columns(path) for path in paths]
    named = [keys_of_names(found["image"], found["prompt"]) for found in columns]
    stored = [read_keys(path.parent / FILE, num_rows=len(keys)) for path, keys in zip(paths, named, strict=True)]
    known = [keys for keys in stored if keys is not None]
    by_content = len(known) == len(paths) and len({keys.known_by for keys in known}) == 1
    keys = known if by_content else named
    read = zip(paths, columns, common_codes(keys), keys, strict=True)
    return [_recorded(path, found, codes, own.image_N) for path, found, codes, own in read], by_content


def _read_columns(path: Path) -> dict[str, list[str]]:
    targets = recorded_targets(path)
    names = (*COLUMNS, *targets, *(f"{target}_label" for target in targets))
    rows = read_predictions(path, names)
    return {name: [row[name] for row in rows] for name in names}


def _recorded(path: Path, columns: dict[str, list[str]], codes: Codes, image_N: KeyArray) -> Recorded:
    def numbers(name: str) -> NDArray[np.float64]:
        try:
            return np.array([float(cell or "nan") for cell in columns[name]], dtype=np.float64)
        except ValueError as error:
            raise UserError(f"column {name}: {error}", place=path, remedy="train again") from error

    targets = [name.removesuffix("_label") for name in columns if name.endswith("_label")]
    return Recorded(
        path=path,
        images=columns["image"],
        codes=codes,
        image_N=image_N,
        id_N=_numbered(codes.pair),
        group_N=np.array(columns["group"], dtype=str),
        is_test_N=np.array([side == "test" for side in columns["split"]], dtype=bool),
        is_train_N=np.array([side == "train" for side in columns["split"]], dtype=bool),
        labels={target: numbers(f"{target}_label") for target in targets},
        scores={target: numbers(target) for target in targets},
    )


def _numbered(pair_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return an id (N,) of each row: its pair in the upper half, how often that came before in the lower one."""
    order = np.argsort(pair_N, kind="stable")
    place_N = np.empty(len(pair_N), dtype=np.int64)
    place_N[order] = np.arange(len(pair_N)) - np.searchsorted(pair_N[order], pair_N[order])
    return (pair_N << 32) | place_N


def common_test_rows(tables: Sequence[Recorded]) -> list[NDArray[np.int64]]:
    """Return, for each table, where the rows lie that are test in all of them; the same order in each."""
    tests = [table.id_N[table.is_test_N] for table in tables]
    shared = tests[0][np.all([np.isin(tests[0], test) for test in tests], axis=0)]
    found = []
    for table in tables:
        order = np.argsort(table.id_N)
        found.append(order[np.searchsorted(table.id_N, shared, sorter=order)] if len(shared) else order[:0])
    return found


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
            image = table.images[chosen[at]]
            raise UserError(
                f"{int(differs.sum()):,} of {differs.size:,} rows have another {label} than in {first.path}: "
                f"that of {image} is {found[at]:g} here, {truth[at]:g} there",
                place=table.path,
                remedy="compare runs on the same labels",
            )


def trained_on_test_of_others(tables: Sequence[Recorded]) -> list[int]:
    """Return, for each table, how many of its rows that are not test are test in another one."""
    tests = [table.id_N[table.is_test_N] for table in tables]
    found = []
    for number, table in enumerate(tables):
        others = [test for place, test in enumerate(tests) if place != number]
        found.append(int(np.isin(table.id_N[~table.is_test_N], np.concatenate([tests[0][:0], *others])).sum()))
    return found


def seen_in_training(table: Recorded, rows: NDArray[np.int64]) -> int:
    """Return how many of some rows have a prompt or an image that is on another side than test in this table.

    One prompt for all rows is quality-only data: it tells nothing, so it counts as not seen.
    """
    image_N, prompt_N, trained = table.codes.image, table.codes.prompt, ~table.is_test_N
    seen = np.isin(image_N[rows], image_N[trained])
    if (prompt_N != prompt_N[:1]).any():
        seen |= np.isin(prompt_N[rows], prompt_N[trained])
    return int(seen.sum())


def of_equal_names(tables: Sequence[Recorded]) -> int:
    """Return how many test rows of the first table have an image of a name that a test row has in every other one."""
    names = [{table.images[row] for row in np.flatnonzero(table.is_test_N)} for table in tables]
    shared = set.intersection(*names)
    return sum(tables[0].images[row] in shared for row in np.flatnonzero(tables[0].is_test_N))
