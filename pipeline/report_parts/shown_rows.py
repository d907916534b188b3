"""The rows that a report shows one by one, with their pictures: highest, lowest, unlike, worst and best.

Which rows these are, and what stands beside a picture. Knows rows and image files. Must not know runs or the page.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.features.data.addresses import address
from deltaclip.features.data.images import thumbnail
from deltaclip.features.data.paths import GONE, explained
from deltaclip.features.data.sources import OUTSIDE, UnreadableImage, read_image_bytes
from deltaclip.pipeline.report_parts import panels
from deltaclip.pipeline.report_parts.charts import number as shown_number
from deltaclip.pipeline.report_parts.panels import TEXT
from deltaclip.pipeline.rows.cached_rows import image_key
from deltaclip.pipeline.runs.trust import flagged_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from deltaclip.pipeline.report_parts.panels import Rows


# A picture can be enlarged to its LARGE side; of very many each is SMALL, so that a page stays one that can be mailed.
LARGE, SMALL, MAX_LARGE = 448, 224, 200
WORKERS = 4
RENAMED = "another picture has that name now"
NO_ROOT = "the cache has no record of where its images lie"
REASONS = 3  # why pictures are missing, that are named
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


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A row in a strip of pictures: `at` is its number in the data of the section, `figures` its scores in words."""

    at: int
    picture: Picture
    image: str
    prompt: str
    source: str
    flag: str
    figures: list[str]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Pictures side by side, with what they have in common."""

    heading: str
    shots: list[Shot]
    words: str = ""


SHOTS = 6  # of a strip: one line of a desk's screen


def strip_rows(rows: Rows, labels: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows that a report opens on, by the heading of their strip: a target's highest and lowest, the unlike.

    Ties go by row. A row stands once at most for a target: of fewer than twice as many, half are highest. Those that
    are unlike the training are every n-th of them, so that they are not of one source alone.
    """
    found = {}
    for label in labels:
        score = rows.numbers[label]
        order = [int(row) for row in np.argsort(-score, kind="stable") if np.isfinite(score[row])]
        count = min(SHOTS, (len(order) + 1) // 2)
        found[f"Highest {label}"], found[f"Lowest {label}"] = order[:count], order[count:][::-1][:count]
    flagged = [row for row, flag in enumerate(rows.flags) if flag]
    found["Unlike the training"] = flagged[:: -(-len(flagged) // SHOTS)] if flagged else []
    return {heading: chosen for heading, chosen in found.items() if chosen}


def make_shot(rows: Rows, row: int, at: int, *, picture: Picture, labels: Sequence[str]) -> Shot:
    """Return a row as a strip shows it: its score of each of the `labels`, human ones beside."""
    figures = []
    for label in labels:
        human, name = rows.numbers[f"{label}_label"][row], f"{label} " if len(labels) > 1 else ""
        beside = f", human {shown_number(float(human))}" if math.isfinite(human) else ""
        figures.append(f"{name}{shown_number(float(rows.numbers[label][row]))}{beside}")
    return Shot(
        at=at,
        picture=picture,
        image=rows.text["image"][row],
        prompt=rows.text["prompt"][row][:SHOWN_CHARACTERS],
        source=rows.text["source"][row],
        flag=rows.flags[row] if rows.flags else "",
        figures=figures,
    )


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


def pictures(
    images: Sequence[str], root: Path | None, *, allow_outside: bool, keys: Sequence[int] | None = None
) -> list[Picture]:
    """Return the thumbnail of each image.

    Args:
        images: names as the manifest had them.
        root: folder that they are relative to; None where nothing recorded it.
        allow_outside: permit names that lead out of it.
        keys: of the content that was scored (`RowKeys`): a file that holds another is not that picture.
    """
    if root is None:
        return [Picture(reason=NO_ROOT)] * len(images)
    bound, side = None if allow_outside else root, LARGE if len(images) <= MAX_LARGE else SMALL

    def one(image: str, key: int | None) -> Picture:
        try:
            content = read_image_bytes(address(root, image), bound)
            if key is not None and key != image_key(hashlib.sha256(content).digest()):
                return Picture(reason=RENAMED)
            small = thumbnail(content, side)
        except UnreadableImage as error:
            return Picture(reason=explained(str(error), image, root))
        return Picture(address="data:image/webp;base64," + base64.b64encode(small).decode("ascii"))

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(one, images, [None] * len(images) if keys is None else keys))


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


def missing_words(found: Sequence[Picture], image_root: Path | None) -> str:
    """Say how many pictures are missing, why, the most frequent reasons first, and what to do; nothing without any."""
    counts = Counter(_plain_reason(picture.reason) for picture in found if not picture.address)
    if not counts:
        return ""
    first = {_plain_reason(picture.reason): picture.reason for picture in reversed(found)}
    said = [f"{count} {first[reason]}" for reason, count in counts.most_common(REASONS)]
    if more := sum(count for _, count in counts.most_common()[REASONS:]):
        said.append(f"{more} for other reasons")
    where = f" under {image_root}" if image_root else ""
    words = [f"{counts.total()} of {len(found)} pictures could not be shown{where} ({'; '.join(said)})."]
    if OUTSIDE in counts:
        words.append("Give --allow-outside to show pictures from elsewhere.")
    if {GONE, NO_ROOT, RENAMED} & counts.keys():
        words.append("Give --image-root with the folder of the images.")
    return " ".join(words)


def _plain_reason(reason: str) -> str:
    """Return a reason without what it says of one file alone."""
    return reason.partition(":")[0].partition(" (")[0]


# ---- Everything of many rows: the pictures that a report opens on, means per source, and the table of all


MAX_ROWS = 20_000  # in the tables of a page, all its runs together: some 5 MB
ROW_CHARACTERS = 300  # of a prompt in the table, where no picture stands beside it


class Column(NamedTuple):
    """A column of the table of rows: its heading, and which value of a row it is, `target` where it is of one."""

    heading: str
    value: str
    target: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The table of rows, which the script of the page fills: `count` of `total` are in it, `words` say which.

    `what` they are called.
    """

    count: int
    total: int
    what: str
    words: str
    columns: list[Column]
    sources: list[str]
    has_flags: bool


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a page shows of its rows.

    `at` gives the number of a row in `data`, which is what the script needs, and `pictures` those rows that have one.
    """

    number: int
    labels: list[str]
    rows: Rows
    at: dict[int, int]
    pictures: dict[int, Picture]
    strips: list[Strip]
    means: list[panels.Panel]
    unlike_words: str
    listing: Listing
    data: dict[str, Any]


def show_rows(  # noqa: PLR0913 - what there is to choose, each by its name
    rows: Rows,
    labels: list[str],
    *,
    number: int,
    most: int,
    what: str,
    pictures_of: Callable[[list[int]], list[Picture]],
    first: Sequence[int] = (),
    drawn: Sequence[int] = (),
) -> Shown:
    """Gather what a page shows of rows.

    Args:
        rows: N rows.
        labels: targets that are scored.
        number: of the section on the page.
        most: rows of the table; beyond, those that are shown elsewhere, and others drawn at random.
        what: the rows are called.
        pictures_of: makes the pictures of some rows.
        first: further rows that have their picture on the page.
        drawn: further rows that the page knows.
    """
    strips = strip_rows(rows, labels)
    pictured = list(dict.fromkeys([*first, *(row for chosen in strips.values() for row in chosen)]))
    known = {*pictured, *drawn}
    others = [row for row in range(len(rows)) if row not in known]
    known |= {others[place] for place in sample(len(others), max(0, most - len(known)))}
    at = {row: place for place, row in enumerate(sorted(known))}
    found = dict(zip(pictured, pictures_of(pictured), strict=True))

    def shots(heading: str, chosen: Sequence[int]) -> list[Shot]:
        own = [label for label in labels if heading.endswith(f" {label}")] or labels
        return [make_shot(rows, row, at[row], picture=found[row], labels=own) for row in chosen]

    return Shown(
        number=number,
        labels=labels,
        rows=rows,
        at=at,
        pictures=found,
        strips=[Strip(heading=heading, shots=shots(heading, chosen)) for heading, chosen in strips.items()],
        means=panels.source_means(rows, labels),
        unlike_words=flagged_words(rows.flags, len(rows), what) if rows.flags else "",
        listing=_listing(rows, labels, at, what),
        data={
            "labels": labels,
            "fields": [*TEXT, *rows.numbers, *(["flag"] if rows.flags else [])],
            "rows": [_row(rows, row, KEPT_CHARACTERS if row in found else ROW_CHARACTERS) for row in at],
        },
    )


def sample(count: int, most: int) -> list[int]:
    """Return all of `count` rows, or `most` of them drawn without replacement, always the same ones, in order."""
    if count <= most:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, size=most, replace=False).tolist())


def _row(rows: Rows, row: int, characters: int) -> list[str | float | None]:
    words = [rows.text[name][row] for name in TEXT]
    values = [float(column[row]) for column in rows.numbers.values()]
    return [
        *(word if len(word) <= characters else f"{word[: characters - 1]}\N{HORIZONTAL ELLIPSIS}" for word in words),
        *(round(value, 5) if math.isfinite(value) else None for value in values),
        *([rows.flags[row]] if rows.flags else []),
    ]


def _listing(rows: Rows, labels: Sequence[str], at: Mapping[int, int], what: str) -> Listing:
    sources = sorted({rows.text["source"][row] for row in at} - {""})
    columns = [Column("image", "image"), Column("prompt", "prompt")]
    columns += [Column("source", "source")] if sources else []
    for label in labels:
        columns.append(Column(label, "predicted", label))
        if np.isfinite(rows.numbers[f"{label}_label"]).any():
            columns += [Column(f"human {label}", "human", label), Column(f"error of {label}", "over", label)]
    has_flags = any(rows.flags)
    columns += [Column("flag", "flag")] if has_flags else []
    words = f"All {len(rows):,} {what}."
    if len(at) < len(rows):
        words = f"{len(at):,} of {len(rows):,} {what}: those with pictures above, the others drawn at random."
    return Listing(
        count=len(at), total=len(rows), what=what, words=words, columns=columns, sources=sources, has_flags=has_flags
    )
