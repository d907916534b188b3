"""The page of runs: what each recorded, its best and worst rows with pictures, in one HTML file.

Nothing is trained or scored again. Templates escape whatever comes from data, the data for the script cannot end its
element, and a content policy in the page itself forbids every request and every other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from deltaclip.features.data.ratings import agreement_words
from deltaclip.pipeline.report_parts import page_tables, panels
from deltaclip.pipeline.report_parts.charts import number
from deltaclip.pipeline.report_parts.charts import number as shown_number
from deltaclip.pipeline.report_parts.panels import read_rows
from deltaclip.pipeline.report_parts.shown_rows import (
    MAX_ROWS,
    choose,
    make_card,
    missing_words,
    pictures,
    sample,
    show_rows,
)
from deltaclip.pipeline.rows.cached_rows import FILES
from deltaclip.pipeline.runs.run_split import run_keys
from deltaclip.pipeline.words.result_words import KIND_WORDS, floor_means

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaclip.pipeline.report_parts.shown_rows import Card, Shown
    from deltaclip.pipeline.runs.folder import RunFolder


# ---- A page from its parts


PARTS = "deltaclip.pipeline.report_parts"
_CODE = re.compile(r"`([^`]+)`|(--[a-z][a-z-]*)")  # a command, or an option
# What no page may hold as it is; the replacement character shows that something was there.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(title: str, sections: Sequence[Section], *, scores: Shown | None = None, **about: Any) -> str:
    """Return the page.

    Args:
        title: name of the page.
        sections: one per run.
        scores: instead, the rows of a table of scores.
        about: further values for the template.
    """
    script, style = _part("page.js"), _part("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": number, "signed": _signed, "options": _options}
    page = environment.get_template("page.html").render(
        title=title,
        sections=sections,
        scores=scores,
        policy=policy,
        script=Markup(script),  # noqa: S704 - ours, from this package
        style=Markup(style),  # noqa: S704
        data=_for_script([scores.data] if scores else [section.shown.data for section in sections]),
        **about,
    )
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", page)


def _signed(value: float | None) -> str:
    """Return a figure as it is added to another one."""
    if value is None:
        return ""
    return f"{'-' if value < 0 else '+'} {number(abs(value))}".replace("-", "\N{MINUS SIGN}")


def _options(words: str) -> Markup:
    """Return a sentence in which commands and options are marked as code, so that none breaks at its hyphens."""
    return Markup(_CODE.sub(r"<code>\1\2</code>", str(escape(words))))  # noqa: S704 - escaped just now


def _part(name: str) -> str:
    return (files(PARTS) / name).read_text(encoding="utf-8")


def _for_script(value: Any) -> Markup:
    """Return JSON that stays inside its script element: no `<` in it can begin a tag."""
    words = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(words.replace("<", "\\u003c"))  # noqa: S704 - JSON in ASCII without `<`


# ---- What a page says of one run, from what the run recorded: nothing is trained or scored again


MAX_POINTS = 2_000  # of a scatter plot: more take seconds to draw and hide each other
SHA_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything on one run that the template shows."""

    number: int
    name: str
    run: RunFolder
    shown: Shown
    split_words: str
    headline: list[dict[str, Any]]
    metrics: page_tables.Table
    figures: panels.Panel
    sides: page_tables.Table
    bases: page_tables.Table | None
    trust: page_tables.Table | None
    pairs: page_tables.Table | None
    epochs: list[panels.Panel]
    scatter: list[panels.Panel]
    deltas: list[panels.Panel]
    maps: list[panels.Panel]
    sources: page_tables.Table | None
    repeats: page_tables.Table | None
    verdict: dict[str, dict[str, Any]]
    cards: list[Card]
    missing_words: str
    configuration: list[tuple[str, str]]
    facts: list[tuple[str, str]]

    @property
    def key(self) -> str:
        """Prefix of the anchors of this section."""
        return f"run{self.number + 1}"

    @property
    def labels(self) -> list[tuple[str, int]]:
        """Labels that were trained, with the number of their colour."""
        return list(panels.colours(self.run.metrics["test"]).items())

    @property
    def at_base(self) -> list[str]:
        """Labels of which the base alone was best."""
        return [label for label, _ in self.labels if self.run.config["best_epoch"].get(label) == 0]

    @property
    def card_sources(self) -> list[str]:
        """Sources of the rows in the gallery."""
        return sorted({card.source for card in self.cards} - {""})

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Every setting of the run."""
        return [(name, "none" if value is None else str(value)) for name, value in self.run.config["settings"].items()]

    @property
    def anchors(self) -> list[tuple[str, str]]:
        """What of this section is there, to go to."""
        there = {
            "verdict": True,
            "pictures": bool(self.shown.strips),
            "result": True,
            "epochs": True,
            "scatter": True,
            "deltas": True,
            "sweep": bool(self.maps),
            "sources": self.sources is not None,
            "gallery": bool(self.cards),
            "rows": bool(self.shown.listing.count),
            "config": True,
        }
        words = {"scatter": "predicted against human", "deltas": "corrections", "config": "configuration"}
        words |= {"gallery": "worst and best", "rows": "all rows"}
        return [(f"{self.key}-{name}", words.get(name, name).capitalize()) for name, shown in there.items() if shown]

    @property
    def leaks(self) -> bool:
        """Tell whether prompts or images are on two sides of the split."""
        return bool(self.run.metrics["split"]["leaks_groups"])

    @property
    def floor_words(self) -> str:
        """Say what the no-image floors predict from."""
        found = floor_means(self.run.metrics["floors"]["no_image"])
        return f"{found}, chosen on training rows" if found else "it knows the mean label of source and prompt"

    @property
    def choice_words(self) -> str:
        """Say by which rows epoch and setting were chosen."""
        if page_tables.mean_of(self.run.metrics["split"]["rows"]["val"]):
            return "Epoch and setting were chosen on validation rows, test rows were looked at once."
        return "Without validation rows nothing was chosen: the last epoch was kept. Test rows were looked at once."

    @property
    def first_repeat(self) -> str:
        """Say which repeat the rows and epochs are of, nothing for a single training."""
        seeds = self.run.metrics["split"]["seeds"]
        return f"of the first of {len(seeds)} repeats, split seed {seeds[0]}" if len(seeds) > 1 else ""


def make_section(  # noqa: PLR0913 - what a page needs of a run, each by its name
    run: RunFolder,
    name: str,
    *,
    number: int,
    image_root: Path | None,
    allow_outside: bool,
    count: int,
    most: int = MAX_ROWS,
    also: Sequence[int] = (),
) -> Section:
    """Gather what a page says of a run.

    Args:
        run: the run.
        name: what to call it.
        number: of the section on the page, from 0.
        image_root: where its images lie, None where unknown.
        allow_outside: permit image names that lead out of it.
        count: worst and best rows of each label in the gallery.
        most: rows in the table of all rows.
        also: places in the table of predictions of rows that the page has beside, with their pictures.
    """
    labels = list(run.metrics["test"])
    rows, keys = read_rows(run.path / "predictions.csv", split="test"), run_keys(run)
    keys = keys if keys is not None and keys.known_by == FILES else None
    kinds = choose(rows, labels, count)
    points = sample(len(rows), MAX_POINTS)
    row_of = {place: row for row, place in enumerate(rows.places)}
    shown = show_rows(
        rows,
        labels,
        number=number,
        most=most,
        what="test rows",
        pictures_of=lambda chosen: pictures(
            [rows.text["image"][row] for row in chosen],
            image_root,
            allow_outside=allow_outside,
            keys=None if keys is None else [int(keys.image_N[rows.places[row]]) for row in chosen],
        ),
        first=[*kinds, *(row_of[place] for place in also)],
        drawn=points,
    )
    cards = [
        make_card(rows, row, shown.at[row], kinds=kinds[row], picture=shown.pictures[row], labels=labels)
        for row in kinds
    ]
    return Section(
        number=number,
        name=name,
        run=run,
        shown=shown,
        split_words=_split_words(run.metrics["split"]),
        headline=[_headline(label, run) for label in labels],
        metrics=page_tables.metrics_table(run.metrics),
        figures=panels.figure_panel(run.metrics),
        sides=page_tables.sides_table(run.metrics),
        bases=page_tables.bases_table(run.config.get("calibration")),
        trust=page_tables.trust_table(run.metrics),
        pairs=page_tables.pairs_table(run.metrics),
        epochs=panels.epoch_panels([run], [name]),
        scatter=panels.scatter_panels(rows, points, shown.at, labels),
        deltas=panels.delta_panels(rows, run, labels),
        maps=panels.map_panels(run.config),
        sources=page_tables.source_table(run.metrics),
        repeats=page_tables.repeats_table(run.metrics),
        verdict=run.metrics.get("verdict", {}),
        cards=cards,
        missing_words=missing_words(list(shown.pictures.values()), image_root),
        configuration=[_topic(line) for line in run.config["description"]],
        facts=_facts(run),
    )


def _split_words(split: dict[str, Any]) -> str:
    train, val, test = (shown_number(page_tables.mean_of(split["rows"][side]), 0) for side in ("train", "val", "test"))
    seeds = split["seeds"]
    seed = f"split seed {seeds[0]}" if len(seeds) == 1 else f"split seeds {seeds[0]} to {seeds[-1]}"
    return f"{KIND_WORDS[split['kind']]}: {train} train, {val} validation and {test} test rows, {seed}"


CEILING = "ceiling by the raters' agreement"


def _headline(label: str, run: RunFolder) -> dict[str, Any]:
    """Return the first figure of a label, its floors, and what raters who agree so well allow at most."""
    metrics, agreement = run.metrics, run.config["cache"]["dataset"].get("agreement", {})
    figures = metrics["test"][label]
    floors = {
        words: page_tables.mean_of(metrics["floors"][floor].get(label, {}).get("srocc"))
        for floor, words in page_tables.FLOORS.items()
    }
    shown = page_tables.figure_cell(figures["srocc"])
    return {
        "label": label,
        "value": shown.words,
        "interval": page_tables.interval_words(figures.get("srocc_ci")),
        "floors": [
            *((words, shown_number(floor)) for words, floor in floors.items()),
            *([(CEILING, shown_number(agreement[label]["ceiling"]))] if label in agreement else []),
        ],
    }


def _topic(line: str) -> tuple[str, str]:
    """Return topic and words of a line of the description, which is aligned at a column."""
    topic, _, words = line.partition("  ")
    if not words.strip():  # the longest topic has a single space behind it
        topic, words = line[:13], line[13:]
    return topic.strip(), words.strip()


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    config = run.config
    backbone, cache = config["backbone"], config["cache"]
    agreement = cache["dataset"].get("agreement", {})
    made = " ".join(str(backbone[name]) for name in ("backbone", "pretrained") if backbone.get(name))
    facts = [
        ("backbone", f"{made}, D = {backbone['dim']}, {backbone['precision']}"),
        (
            "weights",
            f"SHA-256 {backbone['weights_sha256'][:SHA_DIGITS]}" if "weights_sha256" in backbone else "imported",
        ),
        ("preprocessing", ", ".join(f"{name} {value}" for name, value in backbone.get("preprocessing", {}).items())),
        ("label ranges", ", ".join(f"{label} {words}" for label, words in cache["dataset"]["label_ranges"].items())),
        *((f"raters of {label}", agreement_words(found)) for label, found in agreement.items()),
        ("cache", str(cache["path"])),
        ("best epoch", ", ".join(f"{label} {epoch}" for label, epoch in config["best_epoch"].items())),
        ("scales", ", ".join(f"{label} {shown_number(scale)}" for label, scale in config["scales"].items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in config["versions"].items())),
    ]
    if git := config.get("git"):
        facts.append(("commit", git["commit"][:SHA_DIGITS] + (" with changes" if git["dirty"] else "")))
    return [(name, words) for name, words in facts if words]
