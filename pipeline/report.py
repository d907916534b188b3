"""STAGE report: one run, several side by side, or a table of scores, as one HTML page that needs nothing else."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import keep_result, whole_file
from deltaclip.base.places import check_file
from deltaclip.features.data.addresses import as_place
from deltaclip.pipeline.compare import compare
from deltaclip.pipeline.comparing.run_differences import read_round
from deltaclip.pipeline.report_parts import page_tables, panels
from deltaclip.pipeline.report_parts.charts import number
from deltaclip.pipeline.report_parts.page import make_section, render
from deltaclip.pipeline.report_parts.scores_page import scores_page
from deltaclip.pipeline.report_parts.shown_rows import MAX_ROWS, SHOTS, Strip, make_shot
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import RUNS, CompareConfig, newest_run
from deltaclip.pipeline.words.result_words import comparison_basis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaclip.pipeline.report_parts.shown_rows import Shown
    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.settings import ReportConfig


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """A page, and how many of the rows that it shows one by one have a picture."""

    page: Path
    runs: list[Path]
    size_bytes: int
    rows: int
    pictures: int
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return where the page is, of which runs, and how many pictures it has."""
        about = {"size_bytes": self.size_bytes, "shown_rows": self.rows, "pictures": self.pictures}
        return {"page": str(self.page), "runs": [str(run) for run in self.runs], **about}

    def summary(self) -> str:
        """Return where the page is."""
        size = f"{self.size_bytes / 1e6:.1f} MB, {self.pictures:,} of {self.rows:,} rows shown with picture"
        missing = f"\n{self.why_not}" if self.why_not else ""
        return f"report: {self.page} ({size}){missing}\nopen: {self.page.resolve().as_uri()}"


def report(config: ReportConfig) -> ReportResult:
    """Write the page of one run or several, or of a table that `predict` wrote.

    Raises:
        UserError: no such run, something in it cannot be read, or the page would replace something else.
    """
    paths = config.runs or [newest_run(RUNS)]
    if tables := [path for path in paths if path.is_file()]:
        return _scores_report(config, tables[0])
    out = _page_path(config.out, paths)
    runs = [open_run(path) for path in paths]
    for run in runs:
        run.check_has_rows()
    names = _names(paths)
    apart = _apart(runs)
    sections = [
        make_section(
            run,
            name,
            number=place,
            image_root=config.image_root or _recorded_root(run),
            allow_outside=config.allow_outside,
            count=config.gallery,
            most=MAX_ROWS // len(runs),
            also=[] if place else apart.places,
        )
        for place, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    page = render(
        names[0] if len(names) == 1 else f"{len(names)} runs side by side",
        sections,
        subtitle=_subtitle(runs),
        footer=f"Made by deltaclip {importlib.metadata.version('deltaclip')} from {', '.join(map(str, paths))}",
        beside=_beside(runs, names) | {"strips": _strips(apart, names, sections[0].shown)} if len(runs) > 1 else None,
        run_colours=[(name, place % panels.RUNS) for place, name in enumerate(names)],
        leak_words=[f"{s.name}: its figures flatter, see below." for s in sections if s.leaks],
    )
    keep_result(out, lambda path: _write(path, page))
    found = [picture for section in sections for picture in section.shown.pictures.values()]
    return ReportResult(
        page=out,
        runs=list(paths),
        size_bytes=out.stat().st_size,
        rows=len(found),
        pictures=sum(bool(picture.address) for picture in found),
        why_not="; ".join(dict.fromkeys(section.missing_words for section in sections if section.missing_words)),
    )


def _scores_report(config: ReportConfig, table: Path) -> ReportResult:
    """Write the page of a table of scores; an option that would change nothing is refused."""
    if len(config.runs or []) > 1:
        raise UserError("is a file, and a table of scores is shown alone", place=table, remedy="give it alone, or runs")
    if config.gallery != type(config).gallery:
        remedy = "leave it out: without labels no row is worst or best"
        raise UserError("would not be used", place="--gallery", remedy=remedy)
    out = config.out or table.with_suffix(".html")
    check_file(out)
    found = scores_page(
        table,
        image_root=config.image_root,
        allow_outside=config.allow_outside,
        footer=f"Made by deltaclip {importlib.metadata.version('deltaclip')} from {table}",
    )
    keep_result(out, lambda path: _write(path, found.html))
    pictures = found.shown.pictures.values()
    return ReportResult(
        page=out,
        runs=[table],
        size_bytes=out.stat().st_size,
        rows=len(pictures),
        pictures=sum(bool(picture.address) for picture in pictures),
        why_not=found.missing_words,
    )


@dataclass(frozen=True, kw_only=True)
class _Apart:
    """The rows in which runs disagree most, by target: the row's place in the first table, and each run's score."""

    rows: dict[str, list[tuple[int, list[float]]]]

    @property
    def places(self) -> list[int]:
        return list(dict.fromkeys(place for rows in self.rows.values() for place, _ in rows))


def _apart(runs: Sequence[RunFolder]) -> _Apart:
    """Find where runs disagree most; nothing for a single run, or runs without common test rows."""
    if len(runs) < 2:
        return _Apart(rows={})
    try:
        paired = read_round([run.path / "predictions.csv" for run in runs])
    except UserError:  # why is said where their differences would stand
        return _Apart(rows={})
    rows = {}
    for label in paired.labels:
        score_RN = np.stack([scores[label] for scores in paired.scores])
        spread_N = score_RN.max(axis=0) - score_RN.min(axis=0)
        order = [int(row) for row in np.argsort(-spread_N, kind="stable")[:SHOTS] if spread_N[row] > 0]
        rows[label] = [(int(paired.row_N[row]), score_RN[:, row].tolist()) for row in order]
    return _Apart(rows=rows)


def _strips(apart: _Apart, names: Sequence[str], shown: Shown) -> list[Strip]:
    """Return the pictures of those rows, as the first run has them."""
    row_of = {place: row for row, place in enumerate(shown.rows.places)}
    strips = []
    for label, rows in apart.rows.items():
        shots = []
        for place, scores in rows:
            row = row_of[place]
            shot = make_shot(shown.rows, row, shown.at[row], picture=shown.pictures[row], labels=[])
            human = shown.rows.numbers[f"{label}_label"][row]
            figures = [f"{name} {number(score)}" for name, score in zip(names, scores, strict=True)]
            shots.append(replace(shot, figures=[*figures, *([f"human {number(human)}"] if np.isfinite(human) else [])]))
        if shots:
            heading = f"Where the runs disagree most on {label}"
            strips.append(Strip(heading=heading, shots=shots, words="Rows that are test in all of them."))
    return strips


def _write(path: Path, page: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def _page_path(out: Path | None, paths: Sequence[Path]) -> Path:
    if out is None:
        return paths[0] / "report.html" if len(paths) == 1 else paths[0].resolve().parent / "report.html"
    check_file(out)
    return out


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the folder names where they tell the runs apart, else the paths as given."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _recorded_root(run: RunFolder) -> Path | None:
    root = run.config["cache"]["dataset"].get("image_root")
    return as_place(Path(root)) if root else None


def _subtitle(runs: Sequence[RunFolder]) -> str:
    data = dict.fromkeys(str(run.config["cache"]["dataset"]["name"]) for run in runs)
    backbones = dict.fromkeys(str(run.config["backbone"]["backbone"]) for run in runs)
    modes = dict.fromkeys(str(run.config["mode"]).replace("_", " ") for run in runs)
    return f"Data {', '.join(data)}; backbone {', '.join(backbones)}; heads {', '.join(modes)}"


def _beside(runs: Sequence[RunFolder], names: Sequence[str]) -> dict[str, Any]:
    """Return what several runs show together: their figures, their epochs, and how far they differ."""
    metrics = [run.metrics for run in runs]
    found: dict[str, Any] = {
        "figures": panels.figures_of_runs(names, metrics),
        "table": page_tables.runs_table(names, metrics),
        "epochs": panels.epoch_panels(runs, names),
        "comparison": [],
        "comparison_words": "",
        "warnings": [],
    }
    try:
        comparison = compare(CompareConfig(runs=[run.path for run in runs])).comparison
    except UserError as error:  # runs on other data, say: they still stand side by side
        return found | {"warnings": [f"No differences between these runs: {error}"]}
    return found | {
        "comparison": page_tables.comparison_tables(comparison, names),
        "comparison_words": comparison_basis(comparison),
        "warnings": comparison["warnings"],
    }
