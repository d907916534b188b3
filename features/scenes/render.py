"""The demo set: drawn pictures and a CSV, the same bytes from the same seed; knows no CLIP and no manifest.

Six pretended generators (`source`) have habits: how many mistakes they make, how much they damage, and how.
The habits overlap, so that the source tells something about a label, as with real generators, but not all.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_folder
from deltaclip.features.scenes.captions import Caption, write_caption
from deltaclip.features.scenes.damage import DAMAGES, Damage, damage_image, damage_words, quality_label
from deltaclip.features.scenes.draw import Scene, draw_scene, random_scene
from deltaclip.features.scenes.mismatch import Mismatch, join_clauses, mismatch, other_scene

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.random import Generator
    from PIL.Image import Image

COLUMNS: tuple[str, ...] = ("image", "prompt", "quality", "consistency", "explanation", "source")
CSV_NAME = "demo.csv"
# First number of every seed of the demo set; the backbone is trained on other streams, never on this one.
DEMO_STREAM = 1_000_000
MIN_SIZE = 32
# zlib level 1: three times as fast as level 6 and 10 % larger, for files that are drawn again at will.
PNG_LEVEL = 1
MOST_MISTAKES = 4


@dataclass(frozen=True, kw_only=True)
class Source:
    """Habits of one pretended generator.

    `mistakes`: chances of 0 to 4 mistakes, sum 1; half of those with 4 show a whole other scene instead.
    `strength`: the two parameters of the Beta distribution of a damage's strength.
    `kinds`: the damages it tends to, drawn three times as often as the others.
    """

    name: str
    mistakes: tuple[float, float, float, float, float]
    strength: tuple[float, float]
    kinds: tuple[str, ...]


SOURCES: tuple[Source, ...] = (
    Source(name="aurora", mistakes=(0.55, 0.23, 0.12, 0.06, 0.04), strength=(0.8, 3.0), kinds=("jpeg",)),
    Source(
        name="mist",
        mistakes=(0.36, 0.24, 0.18, 0.12, 0.10),
        strength=(2.6, 1.3),
        kinds=("blur", "low_resolution"),
    ),
    Source(name="mirage", mistakes=(0.10, 0.20, 0.22, 0.20, 0.28), strength=(0.8, 2.6), kinds=("colours",)),
    Source(name="grain", mistakes=(0.28, 0.24, 0.20, 0.14, 0.14), strength=(2.2, 1.4), kinds=("noise", "jpeg")),
    Source(name="draft", mistakes=(0.14, 0.20, 0.22, 0.20, 0.24), strength=(2.2, 1.4), kinds=("warp", "colours")),
    Source(name="basic", mistakes=(0.30, 0.24, 0.20, 0.14, 0.12), strength=(1.0, 1.4), kinds=()),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture of the set before it is drawn: what it shows, its damages, what was asked for, by whom."""

    shown: Mismatch
    damages: tuple[Damage, ...]
    caption: Caption
    source: str
    seed: int

    @property
    def explanation(self) -> str:
        """What is wrong in one sentence, mistakes first; empty if nothing is."""
        return join_clauses([*(m.words for m in self.shown.mistakes), *damage_words(self.damages)])


def _damages(source: Source, rng: Generator) -> tuple[Damage, ...]:
    """Draw up to three damages, none for one picture in eight; the second and third are weaker."""
    if rng.random() < 0.125:
        return ()
    chances = np.array([3.0 if kind in source.kinds else 1.0 for kind in DAMAGES])
    count = 1 + int(rng.random() < 0.55) + int(rng.random() < 0.25)
    kinds = rng.choice(len(DAMAGES), size=count, replace=False, p=chances / chances.sum())
    strengths = rng.beta(*source.strength, size=count) * np.array([1.0, 0.9, 0.8])[:count]
    return tuple(Damage(kind=DAMAGES[k], strength=round(float(s), 3)) for k, s in zip(kinds, strengths, strict=True))


def _shown(scene: Scene, caption: Caption, source: Source, rng: Generator) -> Mismatch:
    num_mistakes = int(rng.choice(MOST_MISTAKES + 1, p=source.mistakes))
    seed = int(rng.integers(2**31))
    if num_mistakes == MOST_MISTAKES and rng.random() < 0.5:
        return other_scene(scene, seed)
    return mismatch(scene, caption, num_mistakes, seed)


def _prompts(seed: int, num_prompts: int) -> list[tuple[Scene, Caption]]:
    """Return scenes with prompts that all differ."""
    found: dict[str, tuple[Scene, Caption]] = {}
    index = 0
    while len(found) < num_prompts:
        scene = random_scene([DEMO_STREAM, seed, index, 1])
        caption = write_caption(scene, [DEMO_STREAM, seed, index, 2])
        found.setdefault(caption.text, (scene, caption))
        index += 1
    return list(found.values())


def plan_demo(seed: int, num_prompts: int, images_per_prompt: int) -> list[Row]:
    """Return the rows of the demo set, the pictures of a prompt after each other, nothing drawn yet."""
    rows = []
    for index, (scene, caption) in enumerate(_prompts(seed, num_prompts)):
        rng = np.random.default_rng([DEMO_STREAM, seed, index, 3])
        order: list[int] = []
        while len(order) < images_per_prompt:
            order += rng.permutation(len(SOURCES)).tolist()
        for number in order[:images_per_prompt]:
            source = SOURCES[number]
            shown = _shown(scene, caption, source, rng)
            damages, row_seed = _damages(source, rng), int(rng.integers(2**31))
            rows.append(Row(shown=shown, damages=damages, caption=caption, source=source.name, seed=row_seed))
    return rows


def draw_row(row: Row, size: int) -> Image:
    """Return the damaged RGB picture of a row, `size` x `size` pixels.

    Every picture has a layout of its own: two generators never place things alike.
    """
    image = draw_scene(replace(row.shown.scene, layout=row.seed), size)
    return damage_image(image, row.damages, row.seed)


def _check(num_prompts: int, images_per_prompt: int, size: int) -> None:
    for name, value, least in (
        ("num_prompts", num_prompts, 1),
        ("images_per_prompt", images_per_prompt, 1),
        ("size", size, MIN_SIZE),
    ):
        if value < least:
            raise UserError(f"{name} is {value}", place="demo", remedy=f"give at least {least}")


def render_demo(
    folder: Path,
    *,
    seed: int = 0,
    num_prompts: int = 200,
    images_per_prompt: int = 6,
    size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw the demo set into `folder`, whole or not at all, and return the path of its CSV.

    Args:
        folder: the folder to make; it must not exist yet.
        seed: the same seed gives the same bytes (with the same Pillow and numpy).
        num_prompts: different prompts; each is a group of its own.
        images_per_prompt: pictures per prompt, from different sources as far as they go (there are six).
        size: side of the pictures in pixels, at least 32.
        progress: called with (pictures done, pictures in all) after each picture.

    Returns:
        `folder/demo.csv` with the columns image (relative to the folder), prompt, quality and consistency in
        [0, 1], explanation ("" if nothing is wrong), source.

    Raises:
        UserError: `folder` exists, or a number is too small.
    """
    _check(num_prompts, images_per_prompt, size)
    rows = plan_demo(seed, num_prompts, images_per_prompt)
    with whole_folder(folder) as growing:
        temporary = growing.work
        (temporary / "images").mkdir()
        cells = []
        for number, row in enumerate(rows):
            name = f"images/{number // images_per_prompt:04d}_{number % images_per_prompt}.png"
            draw_row(row, size).save(temporary / name, compress_level=PNG_LEVEL)
            quality, consistency = quality_label(row.damages), row.shown.consistency
            cells.append((name, row.caption.text, f"{quality:.4f}", f"{consistency:.4f}", row.explanation, row.source))
            if progress is not None:
                progress(number + 1, len(rows))
        with (temporary / CSV_NAME).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(cells)
    return growing.path / CSV_NAME
