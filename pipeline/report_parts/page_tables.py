"""The tables of a report, cell by cell. Knows the shape of `metrics.json` and of comparisons; no markup."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltaclip.pipeline.report_parts.charts import number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


HEADINGS = {
    "srocc": "SROCC",
    "krocc": "KROCC",
    "plcc": "PLCC",
    "plcc_mapped": "PLCC mapped",
    "rmse": "RMSE",
    "main": "main",
}
FLOORS = {"no_image": "no-image floor", "cosine": "zero-shot cosine"}
SIDES = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: its words, what it is sorted by, and further words below.

    A cell may name its row, and that row may belong below the one before.
    """

    words: str
    key: float | str | None = None
    below: str = ""
    names_row: bool = False
    is_below: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; `is_sortable` gives its headings buttons."""

    caption: str
    headings: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    is_sortable: bool = False


def figure_cell(value: Any, *, decimals: int = 3, below: str = "") -> Cell:
    """Return a figure, or mean ± SD of one over repeats."""
    if not isinstance(value, dict):
        return Cell(words=number(value, decimals), key=value, below=below)
    sd = f" ± {number(value['sd'], decimals)}" if value["sd"] is not None else ""
    return Cell(words=number(value["mean"], decimals) + sd, key=value["mean"], below=below)


def mean_of(value: Any) -> float | None:
    """Return a figure, of repeats their mean."""
    found: float | None = value["mean"] if isinstance(value, dict) else value
    return found


def interval_words(bounds: Sequence[Any] | None) -> str:
    """Return `lo to hi`, nothing where there is no interval; of repeats the SD says more than a mean of intervals."""
    if not bounds or any(not isinstance(bound, int | float) for bound in bounds):
        return ""
    return f"{number(bounds[0])} to {number(bounds[1])}"


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Return the figures of the test rows, each label's heads beside its floors."""
    rows = []
    for label, figures in metrics["test"].items():
        rows.append(_figures(f"{label}: trained heads", figures))
        rows += [
            _figures(words, metrics["floors"][floor][label], is_below=True)
            for floor, words in FLOORS.items()
            if label in metrics["floors"][floor]
        ]
    return Table(caption="Test rows", headings=("", *HEADINGS.values(), "rows"), rows=rows)


def _figures(name: str, figures: Mapping[str, Any], *, is_below: bool = False) -> list[Cell]:
    below = {"srocc": interval_words(figures.get("srocc_ci"))}
    cells = [figure_cell(figures[key], below=below.get(key, "")) for key in HEADINGS]
    return [
        Cell(words=name, names_row=True, is_below=is_below),
        *cells,
        Cell(words=number(mean_of(figures["n"]), 0)),
    ]


def sides_table(metrics: Mapping[str, Any]) -> Table:
    """Return SROCC and PLCC of every side of the split."""
    rows = []
    for side, words in SIDES.items():
        count = number(mean_of(metrics["split"]["rows"][side]), 0)
        cells = [
            figure_cell(metrics[side].get(label, {}).get(key)) for label in metrics["test"] for key in ("srocc", "plcc")
        ]
        rows.append([Cell(words=words, names_row=True), Cell(words=count), *cells])
    headings = [f"{label} {key}" for label in metrics["test"] for key in ("SROCC", "PLCC")]
    return Table(caption="Sides of the split", headings=("side", "rows", *headings), rows=rows)


def bases_table(calibration: Mapping[str, Any] | None) -> Table | None:
    """Return how every candidate for the bases did on left-out rows, and its share; None where none was chosen."""
    rows = []
    for label, choice in ((calibration or {}).get("choice") or {}).items():
        if choice is None:
            continue
        sign = -1 if choice["by"] == "rmse" else 1
        order = sorted(choice["left_out"].items(), key=lambda one: -sign * (one[1][choice["by"]] or 0.0))
        for place, (name, figures) in enumerate(order):
            mixed = name == "mixture" and len(choice["shares"]) > 1
            share = 1.0 if mixed else choice["shares"].get(name, 0.0)
            rows.append(
                [
                    Cell(words=f"{label}: {name}" if place == 0 else name, names_row=True, is_below=place > 0),
                    figure_cell(figures["srocc"]),
                    figure_cell(figures["rmse"]),
                    Cell(words=number(share, 2) if share and not mixed else "all" if mixed else "", key=share),
                ]
            )
    if not rows:
        return None
    caption = "Bases: closed forms on left-out training and validation rows, best first; the test rows had no say"
    return Table(caption=caption, headings=("", "SROCC", "RMSE", "share"), rows=rows)


def trust_table(metrics: Mapping[str, Any]) -> Table | None:
    """Return how many test labels lie in their intervals, overall and by source; None of a run without any."""
    found = {
        label: each for label, each in metrics.get("intervals", {}).items() if mean_of(each["coverage"]) is not None
    }
    if not found:
        return None
    sources = sorted({source for each in found.values() for source in each["per_source"]})
    shares = [figure_cell(cell) for each in found.values() for cell in (each["coverage"], each["width"])]
    rows = [[Cell(words="all test rows", names_row=True), *shares]]
    for source in sources:
        cells = [(figure_cell(each["per_source"].get(source)), Cell(words="")) for each in found.values()]
        rows.append([Cell(words=source or "(no source)", names_row=True), *(one for pair in cells for one in pair)])
    asked = mean_of(next(iter(found.values()))["asked"])
    share = mean_of(metrics.get("unlike", {}).get("test"))
    unlike = "" if share is None else f"; {100 * share:.1f} % of the test rows are unlike the training, 1 % is usual"
    headings = [f"{label} {word}" for label in found for word in ("coverage", "mean width")]
    return Table(
        caption=f"Intervals, asked to hold {asked:g} of the labels{unlike}", headings=("", *headings), rows=rows
    )


def pairs_table(metrics: Mapping[str, Any]) -> Table | None:
    """Return the share of pairs ordered as people did, by target and side; None of a run without pairs."""
    found = metrics.get("pairs", {})
    names = list(dict.fromkeys(name for side in ("test", "val", "train") for name in found.get(side, {})))
    if not names:
        return None
    rows = []
    for name in names:
        test = found["test"].get(name, {})
        cells = [figure_cell(found[side].get(name, {}).get("share")) for side in ("test", "val", "train")]
        cosine = figure_cell(test.get("cosine", {}).get("share"))
        count = mean_of(test.get("n")) or 0
        interval = Cell(words=interval_words(test.get("share_ci")))
        named = Cell(words=name, names_row=True)
        rows.append([named, Cell(words=number(count, 0), key=count), cells[0], interval, cosine, *cells[1:]])
    headings = ("", "test pairs", "test", "95 %", "cosine", "validation", "training")
    return Table(caption="Share of pairs ordered as people did; chance is .5", headings=headings, rows=rows)


def source_table(metrics: Mapping[str, Any]) -> Table | None:
    """Return the figures of each source's test rows, None where the data names no sources."""
    per_source = metrics["per_source"]
    sources = sorted({source for found in per_source.values() for source in found})
    if not sources:
        return None
    shown = ("srocc", "plcc", "rmse")
    rows = []
    for source in sources:
        found = [figures.get(source, {}) for figures in per_source.values()]
        count = max(mean_of(figures.get("n")) or 0 for figures in found)
        cells = [figure_cell(figures.get(key)) for figures in found for key in shown]
        name = Cell(words=source or "(no source)", key=source, names_row=True)
        rows.append([name, Cell(words=number(count, 0), key=count), *cells])
    headings = [f"{label} {HEADINGS[key]}" for label in per_source for key in shown]
    return Table(caption="Test rows by source", headings=("source", "rows", *headings), rows=rows, is_sortable=True)


def runs_table(names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> Table:
    """Return the test figures that each run recorded, side by side."""
    labels = list(dict.fromkeys(label for one in metrics for label in one["test"]))
    rows = []
    for name, one in zip(names, metrics, strict=True):
        cells = [
            Cell(words=name, key=name, names_row=True),
            Cell(words=number(mean_of(one["split"]["rows"]["test"]), 0)),
        ]
        for label in labels:
            figures = one["test"].get(label, {})
            cells.append(figure_cell(figures.get("srocc"), below=interval_words(figures.get("srocc_ci"))))
            cells.append(figure_cell(figures.get("plcc")))
            floors = [figure_cell(one["floors"][floor].get(label, {}).get("srocc")) for floor in FLOORS]
            cells.append(Cell(words=floors[0].words, key=floors[0].key, below=floors[1].words))
        rows.append([*cells, Cell(words="LEAKS" if one["split"]["leaks_groups"] else "no leak")])
    columns = [f"{label} {words}" for label in labels for words in ("SROCC", "PLCC", "SROCC of floors")]
    headings = ("run", "test rows", *columns, "split")
    return Table(caption="Each run on its own test rows", headings=headings, rows=rows, is_sortable=True)


def comparison_tables(comparison: Mapping[str, Any], names: Sequence[str]) -> list[Table]:
    """Return for each label the runs on the rows that are test in all of them, with differences from the first."""
    tables = []
    for label, entries in comparison["labels"].items():
        rows = []
        for name, entry in zip(names, entries, strict=True):
            found = entry["difference"] or {}
            value = found.get("difference", found.get("mean"))
            bounds = (found.get("lo"), found.get("hi"))
            shown = ("+" if value is not None and value > 0 else "") + number(value)
            rows.append(
                [
                    Cell(words=name, key=name, names_row=True),
                    figure_cell(entry["srocc"], below=interval_words(entry.get("srocc_ci"))),
                    figure_cell(entry["plcc"]),
                    Cell(words=shown if found else "(first run)", key=value, below=interval_words(bounds)),
                    figure_cell(found.get("p_value")),
                ]
            )
        headings = ("run", "SROCC", "PLCC", "difference of SROCC", "p")
        tables.append(Table(caption=label.capitalize(), headings=headings, rows=rows, is_sortable=True))
    return tables


def repeats_table(metrics: Mapping[str, Any]) -> Table | None:
    """Return SROCC and PLCC of every repeat, None for a single training."""
    seeds = metrics["split"]["seeds"]
    if len(seeds) == 1:
        return None
    labels = list(metrics["test"])
    columns = [metrics["test"][label][key] for label in labels for key in ("srocc", "plcc")]
    rows = [
        [
            Cell(words=f"split seed {seed}", key=seed, names_row=True),
            *(figure_cell(column["values"][place]) for column in columns),
        ]
        for place, seed in enumerate(seeds)
    ]
    rows.append([Cell(words="mean ± SD", names_row=True), *(figure_cell(column) for column in columns)])
    headings = [f"{label} {key}" for label in labels for key in ("SROCC", "PLCC")]
    return Table(caption="Test rows of every repeat", headings=("repeat", *headings), rows=rows)
