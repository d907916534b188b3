"""The plots of a page with their headings and a sentence each, and the rows of a run that they show.

Knows the table of predictions, of one side, columns as arrays. Must not know the page around.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import refuse_other
from deltaclip.pipeline.report_parts import charts, page_tables
from deltaclip.pipeline.report_parts.charts import number
from deltaclip.pipeline.runs.prediction_table import CSV_FIELD_BYTES, recorded_targets, today_names
from deltaclip.pipeline.scoring.prompt_means import Mean, ranked_means, unit_means

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from markupsafe import Markup
    from numpy.typing import NDArray

    from deltaclip.pipeline.runs.folder import RunFolder


# ---- The plots of a page with their headings and a sentence each, from what runs recorded


LOSS, FLOOR = 2, 7  # numbers of colours
OF_TARGETS = (0, 1, 3, 4, 5, 6)  # numbers of colours, in the order of the targets of a run
RUNS = 7  # colours that runs may have
MAX_MAPS = 6


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A plot with its heading, and a sentence of what to see or to know."""

    heading: str
    plot: Markup
    words: str = ""


def colours(labels: Iterable[str]) -> dict[str, int]:
    """Return the number of the colour of each target."""
    return {label: OF_TARGETS[place % len(OF_TARGETS)] for place, label in enumerate(labels)}


def figure_panel(metrics: dict[str, Any]) -> Panel:
    """Return the SROCC of the test rows beside its floors."""
    figures, colour = [], colours(metrics["test"])
    for label, found in metrics["test"].items():
        figures.append(_figure(f"{label}: heads", colour[label], found))
        for floor, words in page_tables.FLOORS.items():
            if label in metrics["floors"][floor]:
                figures.append(_figure(words, FLOOR, metrics["floors"][floor][label]))
    repeats = len(metrics["split"]["seeds"])
    words = (
        f"Whiskers are one SD over {repeats} repeats, small dots the repeats."
        if repeats > 1
        else "Whiskers are the 95 % interval of a bootstrap over prompts."
    )
    return Panel(
        heading="SROCC beside floors", plot=charts.figure_plot(figures, x_label="SROCC, test rows"), words=words
    )


def _figure(name: str, colour: int, found: dict[str, Any]) -> charts.Figure:
    value = found["srocc"]
    if not isinstance(value, dict):
        return charts.Figure(name=name, colour=colour, value=value, interval=tuple(found.get("srocc_ci", (None, None))))
    mean, sd = value["mean"], value["sd"]
    interval = (None, None) if sd is None or mean is None else (mean - sd, mean + sd)
    return charts.Figure(name=name, colour=colour, value=mean, interval=interval, values=tuple(value["values"]))


def figures_of_runs(names: Sequence[str], metrics: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return for each label the SROCC of every run, one below the other."""
    found = []
    for label in dict.fromkeys(label for one in metrics for label in one["test"]):
        figures = [
            _figure(name, place % RUNS, one["test"][label])
            for place, (name, one) in enumerate(zip(names, metrics, strict=True))
            if label in one["test"]
        ]
        found.append(
            Panel(heading=label.capitalize(), plot=charts.figure_plot(figures, x_label=f"SROCC of {label}, test rows"))
        )
    return found


def epoch_panels(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Panel]:
    """Return validation SROCC and training loss by epoch: lines are labels of one run, or the runs."""
    histories = [read_history(run.path / "history.csv") for run in runs]
    labels = list(dict.fromkeys(label for run in runs for label in run.metrics["test"]))
    colour = colours(labels)

    def lines(column: str, label: str | None = None) -> list[charts.Series]:
        return [
            charts.Series(
                name=label if label and len(runs) == 1 else name,
                colour=colour[label] if label and len(runs) == 1 else (place % RUNS if len(runs) > 1 else LOSS),
                epochs=history["epoch"],
                values=history[column],
                kept=run.config["best_epoch"].get(label) if label else None,
            )
            for place, (run, name, history) in enumerate(zip(runs, names, histories, strict=True))
            if column in history
        ]

    def panel(heading: str, series: list[charts.Series], y_label: str) -> list[Panel]:
        return [Panel(heading=heading, plot=charts.epoch_plot(series, y_label=y_label))] if series else []

    if len(runs) == 1:
        series = [one for label in labels for one in lines(f"val_{label}_srocc", label)]
        found = panel("Validation SROCC", series, "validation SROCC")
    else:
        found = [
            one
            for label in labels
            for one in panel(f"Validation SROCC of {label}", lines(f"val_{label}_srocc", label), "validation SROCC")
        ]
    return [*found, *panel("Training loss", lines("train_loss"), "training loss")]


RESAMPLES = 1_000
MAX_SOURCES = 24  # in a plot of means: as many lines as one sees at a glance


def source_means(rows: Rows, labels: Sequence[str]) -> list[Panel]:
    """Return for each target the mean score of every source, highest first, beside that of people where they rated.

    Means are over groups, such as prompts, each of which counts once; intervals are of a bootstrap over these.
    """
    names = Counter(name for name in rows.text["source"] if name)
    if not names:
        return []
    units = {name: place for place, name in enumerate(dict.fromkeys(rows.groups))}
    # A row without a group is one of its own.
    unit_N = np.array([units[name] if name else len(units) + row for row, name in enumerate(rows.groups)])
    source_N, colour = np.array(rows.text["source"], dtype=object), colours(labels)
    left_out = f" {MAX_SOURCES} of {len(names):,} sources, those with most rows." if len(names) > MAX_SOURCES else ""
    found = []
    for label in labels:
        score_N, human_N = rows.numbers[label], rows.numbers[f"{label}_label"]
        means = [
            (name, _means([score_N, human_N], source_N == name, unit_N)) for name, _ in names.most_common(MAX_SOURCES)
        ]
        known = sorted((one for one in means if np.isfinite(one[1][0].value)), key=lambda one: -one[1][0].value)
        figures = []
        for name, (score, human) in known:
            for words, number_of, mean in ((name, colour[label], score), ("human", FLOOR, human)):
                if np.isfinite(mean.value):
                    ends = (mean.lo, mean.hi) if np.isfinite(mean.lo) else (None, None)
                    figures.append(charts.Figure(name=words, colour=number_of, value=mean.value, interval=ends))
        who = "Coloured by the run, grey by people. " if np.isfinite(human_N).any() else ""
        words = f"{who}Whiskers are 95 % intervals of a bootstrap over prompts.{left_out}"
        plot = charts.figure_plot(figures, x_label=f"mean {label}")
        found += [Panel(heading=f"Mean {label} by source", plot=plot, words=words)] if figures else []
    return found


def _means(values: Sequence[NDArray[np.float64]], of_source_N: NDArray[Any], unit_N: NDArray[Any]) -> list[Mean]:
    """Return the mean of each column over the units of a source, each unit once."""
    unit_M = np.unique(unit_N[of_source_N], return_inverse=True)[1]
    found = []
    for value_N in values:
        mean_U = unit_means(value_N[of_source_N], unit_M, int(unit_M.max()) + 1)
        known_U = mean_U[np.isfinite(mean_U)]
        none = Mean(value=math.nan, lo=math.nan, hi=math.nan, p_value=math.nan, units=0)
        found.append(ranked_means(known_U[:, None], resamples=RESAMPLES)[0][0] if known_U.size else none)
    return found


def scatter_panels(rows: Rows, points: Sequence[int], at: dict[int, int], labels: Sequence[str]) -> list[Panel]:
    """Return predicted against human scores of some rows.

    Args:
        rows: N rows.
        points: those to show.
        at: the number of each in the data of the page.
        labels: those that were trained.
    """
    chosen = np.asarray(points, dtype=np.int64)
    numbers, colour = [at[row] for row in points], colours(labels)
    words = f"{len(points):,} of {len(rows):,} rows, drawn at random." if len(points) < len(rows) else ""
    return [
        Panel(
            heading=label.capitalize(),
            plot=charts.scatter_plot(
                rows.numbers[label][chosen],
                rows.numbers[f"{label}_label"][chosen],
                numbers,
                label=label,
                colour=colour[label],
            ),
            words=words,
        )
        for label in labels
    ]


def delta_panels(rows: Rows, run: RunFolder, labels: Sequence[str]) -> list[Panel]:
    """Return the corrections of the test rows against their scales; none for heads without a base."""
    found, scales, colour = [], run.config["scales"], colours(labels)
    shares = {entry["name"]: page_tables.mean_of(entry["value"]) for entry in run.metrics["diagnostics"]}
    for label in labels:
        delta: NDArray[np.float64] = rows.numbers[f"{label}_delta"]
        if not np.isfinite(delta).any():
            continue
        words = "" if delta.any() else "Every correction is zero: the base alone was best on validation rows. "
        saturated, small = (shares.get(f"{label}.{name}_share") for name in ("saturated", "small"))
        if saturated is not None and small is not None:
            words += f"Validation rows: {saturated:.0%} beyond 90 % of the scale (shaded), {small:.0%} under a quarter."
        plot = charts.delta_plot(delta, scales.get(label), label=label, colour=colour[label])
        found.append(Panel(heading=label.capitalize(), plot=plot, words=words))
    return found


def map_panels(config: dict[str, Any]) -> list[Panel]:
    """Return the heat maps of a sweep, those first that say most; none of another run."""
    maps = config.get("sweep", {}).get("heatmaps", [])[:MAX_MAPS]
    return [
        Panel(heading=f"{one['y']} by {one['x']}", plot=charts.heat_map(one), words=_range_words(one)) for one in maps
    ]


def _range_words(one: dict[str, Any]) -> str:
    known = [score for scores in one["val_score"] for score in scores if score is not None]
    if not known:
        return ""
    return f"From {number(min(known))} (palest) to {number(max(known))} (strongest); means over all else that varied."


# ---- Rows of a run as a report shows them: those of one side, columns as arrays


TEXT = ("image", "prompt", "source")
PARTS = ("{}_label", "{}", "{}_base", "{}_delta")  # columns of a target


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N rows: `text` columns (N) str and `numbers` columns (N,) float64, NaN where a cell is empty.

    `flags` (N) say what of a row is unlike the training; none of a run of an earlier release. `groups` (N) are what is
    drawn as a whole, '' of a row that stands alone, and `places` (N) the rows' numbers in their table.
    """

    text: dict[str, list[str]]
    numbers: dict[str, NDArray[np.float64]]
    flags: list[str]
    groups: list[str]
    places: list[int]

    def __len__(self) -> int:
        return len(self.text["image"])

    def error(self, label: str) -> NDArray[np.float64]:
        """Return predicted minus human score of a target, (N,), NaN where either is missing."""
        return self.numbers[label] - self.numbers[f"{label}_label"]


def read_rows(path: Path, *, split: str) -> Rows:
    """Read the rows of one side; the others do not stay in memory.

    Raises:
        UserError: the table cannot be read or lacks a column.
    """
    csv.field_size_limit(CSV_FIELD_BYTES)
    columns = [part.format(target) for target in recorded_targets(path) for part in PARTS]
    text: dict[str, list[str]] = {name: [] for name in TEXT}
    numbers: dict[str, list[float]] = {name: [] for name in columns}
    flags, groups, places = list[str](), list[str](), list[int]()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            table.fieldnames = today_names(list(table.fieldnames or ()))
            for name in ("split", *TEXT, *columns):
                if name not in table.fieldnames:
                    raise UserError(f"has no column {name!r}", place=path, remedy="train again")
            for place, row in enumerate(table):
                if row["split"] == split:
                    places.append(place)
                    groups.append(row.get("group") or row["prompt"])
                    for name in TEXT:
                        text[name].append(row[name])
                    for name in columns:
                        numbers[name].append(float(row[name] or "nan"))
                    flags += [row["flag"]] if "flag" in row else []
    except (OSError, csv.Error, ValueError, TypeError) as error:  # TypeError: a row that ends early
        raise UserError(f"cannot be read ({error})", place=path, remedy="train again") from error
    arrays = {name: np.array(values) for name, values in numbers.items()}
    return Rows(text=text, numbers=arrays, flags=flags, groups=groups, places=places)


def read_history(path: Path) -> dict[str, NDArray[np.float64]]:
    """Read the table of epochs, every column (E,) float64, NaN where a cell is empty.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), list(reader.fieldnames or [])
        if "epoch" not in names:
            refuse_other(path, {"text"}, what="table of epochs")
            raise ValueError("it has no column epoch")
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (OSError, csv.Error, ValueError, TypeError) as error:
        raise UserError(f"cannot be read ({error})", place=path, remedy="train again") from error
