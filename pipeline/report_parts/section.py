"""What a page says of one run, from what the run recorded: nothing is trained or scored again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.report_parts import gallery, panels, tables
from deltaclip.pipeline.report_parts.rows import NUMBERS, TEXT, read_rows
from deltaclip.pipeline.report_parts.scales import number as shown_number
from deltaclip.pipeline.run.tables import KIND_WORDS

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.pipeline.report_parts.rows import Rows
    from deltaclip.pipeline.run.folder import RunFolder

MAX_POINTS = 2_000  # of a scatter plot: more take seconds to draw and hide each other
SHA_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything on one run that the template shows; `data` is what the script needs."""

    number: int
    name: str
    run: RunFolder
    split_words: str
    headline: list[dict[str, Any]]
    metrics: tables.Table
    figures: panels.Panel
    sides: tables.Table
    epochs: list[panels.Panel]
    scatter: list[panels.Panel]
    deltas: list[panels.Panel]
    maps: list[panels.Panel]
    sources: tables.Table | None
    repeats: tables.Table | None
    advice: list[dict[str, Any]]
    cards: list[gallery.Card]
    gallery_words: str
    configuration: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    data: dict[str, Any]

    @property
    def key(self) -> str:
        """Prefix of the anchors of this section."""
        return f"run{self.number + 1}"

    @property
    def labels(self) -> list[tuple[str, int]]:
        """Labels that were trained, with the number of their colour."""
        return [(label, panels.COLOURS[label]) for label in self.run.metrics["test"]]

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
            "result": True,
            "advice": True,
            "epochs": True,
            "scatter": True,
            "deltas": True,
            "sweep": bool(self.maps),
            "sources": self.sources is not None,
            "gallery": bool(self.cards),
            "config": True,
        }
        words = {"scatter": "predicted against human", "deltas": "corrections", "config": "configuration"}
        return [(f"{self.key}-{name}", words.get(name, name).capitalize()) for name, shown in there.items() if shown]

    @property
    def leaks(self) -> bool:
        """Tell whether prompts or images are on two sides of the split."""
        return bool(self.run.metrics["split"]["leaks_groups"])

    @property
    def choice_words(self) -> str:
        """Say by which rows epoch and setting were chosen."""
        if tables.mean_of(self.run.metrics["split"]["rows"]["val"]):
            return "Epoch and setting were chosen on validation rows, test rows were looked at once."
        return "Without validation rows nothing was chosen: the last epoch was kept. Test rows were looked at once."

    @property
    def first_repeat(self) -> str:
        """Say which repeat the rows and epochs are of, nothing for a single training."""
        seeds = self.run.metrics["split"]["seeds"]
        return f"of the first of {len(seeds)} repeats, split seed {seeds[0]}" if len(seeds) > 1 else ""


def make_section(
    run: RunFolder, name: str, *, number: int, image_root: Path | None, allow_outside: bool, count: int
) -> Section:
    """Gather what a page says of a run.

    Args:
        run: the run.
        name: what to call it.
        number: of the section on the page, from 0.
        image_root: where its images lie, None where unknown.
        allow_outside: permit image names that lead out of it.
        count: worst and best rows of each label in the gallery.
    """
    labels = list(run.metrics["test"])
    rows = read_rows(run.path / "predictions.csv", split="test")
    kinds = gallery.choose(rows, labels, count)
    points = sample(len(rows), MAX_POINTS)
    at = {row: place for place, row in enumerate(dict.fromkeys([*kinds, *points]))}
    found = gallery.pictures([rows.text["image"][row] for row in kinds], image_root, allow_outside=allow_outside)
    cards = [
        gallery.make_card(rows, row, at[row], kinds=kinds[row], picture=picture, labels=labels)
        for row, picture in zip(kinds, found, strict=True)
    ]
    return Section(
        number=number,
        name=name,
        run=run,
        split_words=_split_words(run.metrics["split"]),
        headline=[_headline(label, run.metrics) for label in labels],
        metrics=tables.metrics_table(run.metrics),
        figures=panels.figure_panel(run.metrics),
        sides=tables.sides_table(run.metrics),
        epochs=panels.epoch_panels([run], [name]),
        scatter=panels.scatter_panels(rows, points, at, labels),
        deltas=panels.delta_panels(rows, run, labels),
        maps=panels.map_panels(run.config),
        sources=tables.source_table(run.metrics),
        repeats=tables.repeats_table(run.metrics),
        advice=[entry for entry in run.metrics["diagnostics"] if entry["advice"]],
        cards=cards,
        gallery_words=gallery.missing_words(cards, image_root),
        configuration=[_topic(line) for line in run.config["description"]],
        facts=_facts(run),
        data={"labels": labels, "rows": [_row(rows, row) for row in at]},
    )


def sample(count: int, most: int) -> list[int]:
    """Return all of `count` rows, or `most` of them drawn without replacement, always the same ones, in order."""
    if count <= most:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, size=most, replace=False).tolist())


def _row(rows: Rows, row: int) -> list[str | float | None]:
    words = [rows.text[name][row] for name in TEXT]
    values = [float(rows.numbers[name][row]) for name in NUMBERS]
    return [
        *(word[: gallery.KEPT_CHARACTERS] for word in words),
        *(round(value, 5) if math.isfinite(value) else None for value in values),
    ]


def _split_words(split: dict[str, Any]) -> str:
    train, val, test = (shown_number(tables.mean_of(split["rows"][side]), 0) for side in ("train", "val", "test"))
    seeds = split["seeds"]
    seed = f"split seed {seeds[0]}" if len(seeds) == 1 else f"split seeds {seeds[0]} to {seeds[-1]}"
    return f"{KIND_WORDS[split['kind']]}: {train} train, {val} validation and {test} test rows, {seed}"


def _headline(label: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the first figure of a label, and whether it is above both floors."""
    figures = metrics["test"][label]
    floors = {
        words: tables.mean_of(metrics["floors"][floor].get(label, {}).get("srocc"))
        for floor, words in tables.FLOORS.items()
    }
    value = tables.mean_of(figures["srocc"])
    above = [words for words, floor in floors.items() if floor is not None and value is not None and floor > value]
    shown = tables.figure_cell(figures["srocc"])
    return {
        "label": label,
        "value": shown.words,
        "interval": tables.interval_words(figures.get("srocc_ci")),
        "floors": [(words, shown_number(floor)) for words, floor in floors.items()],
        "below": above,
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
    made = " ".join(str(backbone[name]) for name in ("backbone", "pretrained") if backbone.get(name))
    facts = [
        ("backbone", f"{made}, D = {backbone['dim']}, {backbone['precision']}"),
        (
            "weights",
            f"SHA-256 {backbone['weights_sha256'][:SHA_DIGITS]}" if "weights_sha256" in backbone else "imported",
        ),
        ("preprocessing", ", ".join(f"{name} {value}" for name, value in backbone.get("preprocessing", {}).items())),
        ("label ranges", ", ".join(f"{label} {words}" for label, words in cache["dataset"]["label_ranges"].items())),
        ("cache", str(cache["path"])),
        ("best epoch", ", ".join(f"{label} {epoch}" for label, epoch in config["best_epoch"].items())),
        ("scales", ", ".join(shown_number(scale) for scale in config["scales"] if scale is not None)),
        ("versions", ", ".join(f"{name} {version}" for name, version in config["versions"].items())),
    ]
    if git := config.get("git"):
        facts.append(("commit", git["commit"][:SHA_DIGITS] + (" with changes" if git["dirty"] else "")))
    return [(name, words) for name, words in facts if words]
