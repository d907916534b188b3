"""The rows that a report shows one by one: the worst and the best of each label, with their pictures.

Knows rows and where images lie. Must not know pages.
"""

from __future__ import annotations

import base64
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.features.data.images import UnreadableImage, read_image_bytes
from deltaclip.features.data.thumbnails import thumbnail

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaclip.pipeline.report_parts.rows import Rows

SIDE_PIXELS = 224  # twice the size on the page, for screens with small pixels
WORKERS = 4
SHOWN_CHARACTERS = 300  # of a prompt, before what can be unfolded
KEPT_CHARACTERS = 4_000  # of a prompt, on the page
COLOURS = {"quality": 0, "consistency": 1}


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
            small = thumbnail(read_image_bytes(root / image, bound), SIDE_PIXELS)
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
    scores = []
    for label in labels:
        values = {
            "human": rows.numbers[label][row],
            "predicted": rows.numbers[label[0]][row],
            "base": rows.numbers[f"{label[0]}_base"][row],
            "delta": rows.numbers[f"{label[0]}_delta"][row],
        }
        known = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        scores.append({"label": label, "colour": COLOURS[label], "error": float(rows.error(label)[row]), **known})
    return Card(
        at=at,
        kinds=kinds,
        picture=picture,
        image=rows.text["image"][row],
        prompt=prompt[:cut],
        rest=prompt[cut:KEPT_CHARACTERS],
        source=rows.text["source"][row],
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
