"""The page of runs: what each recorded, its best and worst rows with pictures, in one HTML file.

Nothing is trained or scored again. Templates escape whatever comes from data, the data for the script cannot end its
element, and a content policy in the page itself forbids every request and every other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from deltaclip.features.data.addresses import address
from deltaclip.features.data.images import thumbnail
from deltaclip.features.data.ratings import agreement_words
from deltaclip.features.data.sources import UnreadableImage, read_image_bytes
from deltaclip.pipeline.report_parts import page_tables, panels
from deltaclip.pipeline.report_parts.charts import number
from deltaclip.pipeline.report_parts.charts import number as shown_number
from deltaclip.pipeline.report_parts.panels import TEXT, read_rows
from deltaclip.pipeline.words.result_words import KIND_WORDS, floor_means

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaclip.pipeline.report_parts.panels import Rows
    from deltaclip.pipeline.runs.folder import RunFolder


# ---- A page from its parts


PARTS = "deltaclip.pipeline.report_parts"
_OPTION = re.compile(r"--[a-z][a-z-]*")
# What no page may hold as it is; the replacement character shows that something was there.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(title: str, sections: Sequence[Section], **about: Any) -> str:
    """Return the page.

    Args:
        title: name of the page.
        sections: one per run.
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
        policy=policy,
        script=Markup(script),  # noqa: S704 - ours, from this package
        style=Markup(style),  # noqa: S704
        data=_for_script([section.data for section in sections]),
        **about,
    )
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", page)


def _signed(value: float | None) -> str:
    """Return a figure as it is added to another one."""
    if value is None:
        return ""
    return f"{'-' if value < 0 else '+'} {number(abs(value))}".replace("-", "\N{MINUS SIGN}")


def _options(words: str) -> Markup:
    """Return a sentence in which options are marked as code, so that none breaks at its hyphens."""
    return Markup(_OPTION.sub(r"<code>\g<0></code>", str(escape(words))))  # noqa: S704 - escaped just now


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
    """Everything on one run that the template shows; `data` is what the script needs."""

    number: int
    name: str
    run: RunFolder
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
            "result": True,
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
    kinds = choose(rows, labels, count)
    points = sample(len(rows), MAX_POINTS)
    at = {row: place for place, row in enumerate(dict.fromkeys([*kinds, *points]))}
    found = pictures([rows.text["image"][row] for row in kinds], image_root, allow_outside=allow_outside)
    cards = [
        make_card(rows, row, at[row], kinds=kinds[row], picture=picture, labels=labels)
        for row, picture in zip(kinds, found, strict=True)
    ]
    return Section(
        number=number,
        name=name,
        run=run,
        split_words=_split_words(run.metrics["split"]),
        headline=[_headline(label, run) for label in labels],
        metrics=page_tables.metrics_table(run.metrics),
        figures=panels.figure_panel(run.metrics),
        sides=page_tables.sides_table(run.metrics),
        bases=page_tables.bases_table(run.config.get("calibration")),
        trust=page_tables.trust_table(run.metrics),
        pairs=page_tables.pairs_table(run.metrics),
        epochs=panels.epoch_panels([run], [name]),
        scatter=panels.scatter_panels(rows, points, at, labels),
        deltas=panels.delta_panels(rows, run, labels),
        maps=panels.map_panels(run.config),
        sources=page_tables.source_table(run.metrics),
        repeats=page_tables.repeats_table(run.metrics),
        verdict=run.metrics.get("verdict", {}),
        cards=cards,
        gallery_words=missing_words(cards, image_root),
        configuration=[_topic(line) for line in run.config["description"]],
        facts=_facts(run),
        data={"labels": labels, "fields": [*TEXT, *rows.numbers], "rows": [_row(rows, row) for row in at]},
    )


def sample(count: int, most: int) -> list[int]:
    """Return all of `count` rows, or `most` of them drawn without replacement, always the same ones, in order."""
    if count <= most:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, size=most, replace=False).tolist())


def _row(rows: Rows, row: int) -> list[str | float | None]:
    words = [rows.text[name][row] for name in TEXT]
    values = [float(column[row]) for column in rows.numbers.values()]
    return [
        *(word[:KEPT_CHARACTERS] for word in words),
        *(round(value, 5) if math.isfinite(value) else None for value in values),
    ]


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


# ---- The rows that a report shows one by one: the worst and the best of each label, with their pictures


SIDE_PIXELS = 224  # twice the size on the page, for screens with small pixels
WORKERS = 4
SHOWN_CHARACTERS = 300  # of a prompt, before what can be unfolded
KEPT_CHARACTERS = 4_000  # of a prompt, on the page


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A thumbnail as a data address, or the reason why there is none."""

    address: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A row of the gallery; `at` is its number in the data of the section."""

    at: int
    kinds: list[str]
    picture: Picture
    image: str
    prompt: str
    rest: str
    source: str
    flag: str
    scores: list[dict[str, Any]]


def choose(rows: Rows, labels: Sequence[str], count: int) -> dict[int, list[str]]:
    """Return the rows of a gallery, each with what it is: `quality-worst`, `quality-best`, ...

    Args:
        rows: N rows.
        labels: those that were trained.
        count: worst and best rows of each label, this many of each; by |predicted - human|, ties by row.
    """
    chosen: dict[int, list[str]] = {}
    for label in labels:
        error = np.abs(rows.error(label))
        order = [int(row) for row in np.argsort(-error, kind="stable") if np.isfinite(error[row])]
        for kind, found in (("worst", order[:count]), ("best", order[count:][::-1][:count])):
            for row in found:
                chosen.setdefault(row, []).append(f"{label}-{kind}")
    return chosen


def pictures(images: Sequence[str], root: Path | None, *, allow_outside: bool) -> list[Picture]:
    """Return the thumbnail of each image.

    Args:
        images: names as the manifest had them.
        root: folder that they are relative to; None where nothing recorded it.
        allow_outside: permit names that lead out of it.
    """
    if root is None:
        return [Picture(reason="the cache has no record of where its images lie")] * len(images)
    bound = None if allow_outside else root

    def one(image: str) -> Picture:
        try:
            small = thumbnail(read_image_bytes(address(root, image), bound), SIDE_PIXELS)
        except UnreadableImage as error:
            return Picture(reason=str(error))
        except ValueError:  # a name with a zero byte
            return Picture(reason="not the name of a file")
        return Picture(address="data:image/webp;base64," + base64.b64encode(small).decode("ascii"))

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(one, images))


def make_card(rows: Rows, row: int, at: int, *, kinds: list[str], picture: Picture, labels: Sequence[str]) -> Card:
    """Return a row as the gallery shows it.

    Args:
        rows: N rows.
        row: which of them.
        at: its number in the data of the page.
        kinds: what it is the worst or best of.
        picture: its thumbnail.
        labels: those that were trained.
    """
    prompt = rows.text["prompt"][row]
    cut = len(prompt) if len(prompt) <= SHOWN_CHARACTERS else SHOWN_CHARACTERS
    scores, colour = [], panels.colours(labels)
    for label in labels:
        values = {
            "human": rows.numbers[f"{label}_label"][row],
            "predicted": rows.numbers[label][row],
            "base": rows.numbers[f"{label}_base"][row],
            "delta": rows.numbers[f"{label}_delta"][row],
        }
        known = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        scores.append({"label": label, "colour": colour[label], "error": float(rows.error(label)[row]), **known})
    return Card(
        at=at,
        kinds=kinds,
        picture=picture,
        image=rows.text["image"][row],
        prompt=prompt[:cut],
        rest=prompt[cut:KEPT_CHARACTERS],
        source=rows.text["source"][row],
        flag=rows.flags[row] if rows.flags else "",
        scores=scores,
    )


def missing_words(cards: Sequence[Card], image_root: Path | None) -> str:
    """Say how many pictures are missing, why the first one, and what to do; nothing where none is."""
    missing = [card for card in cards if not card.picture.address]
    if not missing:
        return ""
    where = f" under {image_root}" if image_root else ""
    return (
        f"{len(missing)} of {len(cards)} pictures could not be shown{where} ({missing[0].picture.reason}). "
        "Give --image-root with the folder of the images."
    )
