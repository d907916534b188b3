"""One scene as data, and its picture; knows nothing of prompts, labels or files.

One scene as data, and its picture; knows nothing of prompts, labels or files.

Unit outlines of the things a scene can hold; knows geometry only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator


# ---- One scene as data, and its picture; knows nothing of prompts, labels or files


Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (216, 34, 36),
    "orange": (247, 136, 18),
    "yellow": (246, 214, 22),
    "green": (36, 150, 58),
    "blue": (34, 84, 214),
    "purple": (132, 48, 170),
    "pink": (246, 122, 178),
    "brown": (122, 76, 38),
    "black": (24, 24, 26),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (250, 250, 250),
    "grey": (176, 178, 180),
    "beige": (236, 222, 190),
    "light blue": (178, 216, 244),
    "light green": (196, 232, 190),
    "navy": (22, 30, 66),
}
# Colours that can hardly be seen on a background are never drawn there.
HIDDEN: dict[str, frozenset[str]] = {"navy": frozenset({"black", "blue", "purple", "brown"})}
STYLES: tuple[str, ...] = ("flat", "outlined", "sketch", "painted", "shaded")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
OPPOSITE: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# Radius as a share of the picture's side; `large` fits at most two to a half of the picture.
RADII: dict[str, float] = {"small": 0.072, "medium": 0.105, "large": 0.175}
MAX_COUNT = 4
MAX_LARGE = 2
MARGIN = 0.05
INK: Colour = (18, 18, 22)
SUPERSAMPLE = 2


@dataclass(frozen=True, kw_only=True)
class Group:
    """`count` equal things: `shape` of SHAPES, `colour` of COLOURS, `count` 1 to 4, `size` of RADII."""

    shape: str
    colour: str
    count: int
    size: str = "medium"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two groups on a background; `relation` places the first group relative to the second.

    It is "" for one group in the middle, and kept for one group whose counterpart is missing.
    `layout` seeds all that no prompt speaks of: exact places, tilt, wobble of the line, tint.
    """

    groups: tuple[Group, ...]
    relation: str
    background: str
    style: str
    layout: int


def visible_colours(background: str) -> list[str]:
    """Return the names of the colours that can be told from `background`."""
    return [name for name in COLOURS if name not in HIDDEN.get(background, frozenset())]


def random_scene(seed: int | Sequence[int]) -> Scene:
    """Return the scene of a seed: one group in three of ten, else two that differ in shape and colour."""
    rng = np.random.default_rng(seed)
    background = str(rng.choice(list(BACKGROUNDS)))
    num_groups = 1 if rng.random() < 0.3 else 2
    shapes = rng.choice(len(SHAPES), size=num_groups, replace=False)
    names = visible_colours(background)
    colours = rng.choice(len(names), size=num_groups, replace=False)
    groups = []
    for shape, colour in zip(shapes, colours, strict=True):
        count = int(rng.integers(1, MAX_COUNT + 1))
        size = ("small", "medium", "medium", "large")[int(rng.integers(4))]
        if size == "large" and count > MAX_LARGE:
            size = "medium"
        groups.append(Group(shape=SHAPES[shape], colour=names[colour], count=count, size=size))
    return Scene(
        groups=tuple(groups),
        relation=RELATIONS[int(rng.integers(4))] if num_groups == 2 else "",
        background=background,
        style=STYLES[int(rng.integers(len(STYLES)))],
        layout=int(rng.integers(2**31)),
    )


def with_group(scene: Scene, index: int, group: Group) -> Scene:
    """Return `scene` with its group number `index` replaced."""
    groups = list(scene.groups)
    groups[index] = group
    return replace(scene, groups=tuple(groups))


def _regions(scene: Scene) -> list[tuple[float, float, float, float]]:
    """Return one box (x0, y0, x1, y1) per group, in shares of the side.

    A lone group that has a relation keeps to its half.
    """
    low, mid, high = MARGIN, 0.5, 1 - MARGIN
    halves = {
        "left of": [(low, low, mid, high), (mid, low, high, high)],
        "right of": [(mid, low, high, high), (low, low, mid, high)],
        "above": [(low, low, high, mid), (low, mid, high, high)],
        "below": [(low, mid, high, high), (low, low, high, mid)],
    }
    return halves[scene.relation][: len(scene.groups)] if scene.relation else [(low, low, high, high)]


def _grid(count: int, *, wide: bool) -> list[tuple[float, float, float, float]]:
    """Return `count` cells (x0, y0, x1, y1) of the unit box: a row, a column or a two by two block."""
    if count < 4:
        along = [(i / count, (i + 1) / count) for i in range(count)]
        return [(a, 0.0, b, 1.0) if wide else (0.0, a, 1.0, b) for a, b in along]
    return [(x, y, x + 0.5, y + 0.5) for y in (0.0, 0.5) for x in (0.0, 0.5)]


def placements(scene: Scene) -> list[tuple[Group, float, float, float]]:
    """Return (group, x, y, radius) of every thing, in shares of the picture's side, without overlaps."""
    rng = np.random.default_rng(scene.layout)
    placed = []
    for group, (x0, y0, x1, y1) in zip(scene.groups, _regions(scene), strict=True):
        width, height = x1 - x0, y1 - y0
        wide = width > height or (width == height and rng.random() < 0.5)
        jitter = rng.uniform(-1.0, 1.0, size=(MAX_COUNT, 2))
        for (a, b, c, d), (jx, jy) in zip(_grid(group.count, wide=wide), jitter, strict=False):
            half_x, half_y = (c - a) * width / 2, (d - b) * height / 2
            radius = min(RADII[group.size], half_x * 0.97, half_y * 0.97)
            x = x0 + (a + c) / 2 * width + jx * (half_x - radius) * 0.8
            y = y0 + (b + d) / 2 * height + jy * (half_y - radius) * 0.8
            placed.append((group, x, y, radius))
    return placed


def _tint(colour: Colour, shift: float) -> Colour:
    """Return `colour` moved towards white (shift > 0) or black (shift < 0) by a share |shift|."""
    target = 255 if shift > 0 else 0
    return tuple(round(c + (target - c) * abs(shift)) for c in colour)  # type: ignore[return-value]


def _flat(points: Points) -> list[float]:
    return points.ravel().tolist()


class _Brush:
    """The canvas of one picture with the five ways to put a part on it; lengths in supersampled pixels."""

    def __init__(self, scene: Scene, side: int, rng: Generator) -> None:
        self.side = side
        self.rng = rng
        self.style = scene.style
        self.ground = BACKGROUNDS[scene.background]
        self.image = Image.new("RGB", (side, side), self.ground)
        self.pen = ImageDraw.Draw(self.image)
        self.line = max(2, round(side * 0.014))
        if self.style == "painted":
            self._strokes(np.array([side / 2, side / 2]), side * 0.5, self.ground, 26)

    def part(self, points: Points, centre: Points, radius: float, fill: Colour) -> None:
        """Draw one closed outline, float64 (K, 2), in the style of the scene."""
        getattr(self, "_" + self.style)(points, centre, radius, fill)

    def _flat(self, points: Points, _centre: Points, _radius: float, fill: Colour) -> None:
        self.pen.polygon(_flat(points), fill=fill)

    def _outlined(self, points: Points, _centre: Points, _radius: float, fill: Colour) -> None:
        # Black things get a light line, or the line could not be seen.
        ink = (235, 235, 235) if sum(fill) < 120 or sum(self.ground) < 120 else INK
        self.pen.polygon(_flat(points), fill=fill)
        self.pen.line(_flat(np.concatenate([points, points[:2]])), fill=ink, width=self.line, joint="curve")

    def _sketch(self, points: Points, centre: Points, radius: float, fill: Colour) -> None:
        for scale in (1.0, 0.96, 0.72, 0.44):
            wobble = self.rng.normal(0.0, 0.03 * radius, size=points.shape)
            loop = centre + (points - centre) * scale + wobble
            self.pen.line(_flat(np.concatenate([loop, loop[:2]])), fill=fill, width=max(2, self.line // 2))

    def _painted(self, points: Points, centre: Points, radius: float, fill: Colour) -> None:
        self.pen.polygon(_flat(points + self.rng.normal(0.0, 0.05 * radius, size=points.shape)), fill=fill)
        self._strokes(centre, 0.45 * radius, fill, 5)

    def _shaded(self, points: Points, centre: Points, radius: float, fill: Colour) -> None:
        light = centre - 0.22 * radius
        for step, shift in enumerate((-0.35, -0.18, 0.0, 0.16, 0.34)):
            scale = 1.0 - 0.19 * step
            self.pen.polygon(_flat(light + (points - light) * scale), fill=_tint(fill, shift))

    def _strokes(self, centre: Points, spread: float, colour: Colour, count: int) -> None:
        """Lay `count` short thick strokes of nearby tones around `centre`, as a brush leaves them."""
        middles = centre + self.rng.uniform(-spread, spread, size=(count, 2))
        angles = self.rng.normal(0.6, 0.35, size=count)
        tones = self.rng.uniform(-0.16, 0.16, size=count)
        arms = np.stack([np.cos(angles), np.sin(angles)], axis=1) * max(spread * 0.32, 2.0)
        width = max(2, round(spread * 0.3)) if count < 10 else max(3, round(spread * 0.09))
        for start, end, tone in zip(middles - arms, middles + arms, tones, strict=True):
            self.pen.line([*start.tolist(), *end.tolist()], fill=_tint(colour, float(tone)), width=width)


def draw_scene(scene: Scene, size: int = 128) -> Image.Image:
    """Return the RGB picture, `size` x `size` pixels, of a scene; the same scene gives the same pixels."""
    side = size * SUPERSAMPLE
    rng = np.random.default_rng([scene.layout, 1])
    brush = _Brush(scene, side, rng)
    tints = rng.uniform(-0.08, 0.08, size=len(scene.groups))
    fills = {g: _tint(COLOURS[g.colour], float(t)) for g, t in zip(scene.groups, tints, strict=True)}
    for group, x, y, radius in placements(scene):
        angle = rng.normal(0.0, 0.09)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        centre = np.array([x, y]) * side
        for role, corners in outlines()[group.shape]:
            colour = {"body": fills[group], "hole": brush.ground, "trunk": COLOURS["brown"]}[role]
            part_centre = centre + (corners.mean(axis=0) @ turn) * radius * side
            points = centre + (corners @ turn) * (radius * side)
            extent = float(np.abs(points - part_centre).max())
            brush.part(points, part_centre, extent, colour)
    return brush.image.reduce(SUPERSAMPLE)


# ---- Unit outlines of the things a scene can hold; knows geometry only


Points = NDArray[np.float64]

NOUNS: dict[str, tuple[str, str]] = {
    "circle": ("circle", "circles"),
    "square": ("square", "squares"),
    "triangle": ("triangle", "triangles"),
    "star": ("star", "stars"),
    "heart": ("heart", "hearts"),
    "diamond": ("diamond", "diamonds"),
    "cross": ("cross", "crosses"),
    "ring": ("ring", "rings"),
    "moon": ("moon", "moons"),
    "house": ("house", "houses"),
    "tree": ("tree", "trees"),
    "fish": ("fish", "fish"),
}
SHAPES: tuple[str, ...] = tuple(NOUNS)


def _circle(radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0), num_points: int = 36) -> Points:
    angle = np.linspace(0.0, 2 * np.pi, num_points, endpoint=False)
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def _corners(num_points: int, inner: float = 1.0) -> Points:
    """Return a regular polygon, or a star when every second corner is pulled in to radius `inner`."""
    angle = np.linspace(-np.pi / 2, 1.5 * np.pi, num_points, endpoint=False)
    radius = np.where(np.arange(num_points) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> Points:
    angle = np.linspace(0.0, 2 * np.pi, 36, endpoint=False)
    x = 16 * np.sin(angle) ** 3
    y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle))
    return np.stack([x / 17, y / 17], axis=1)


def _moon() -> Points:
    """Return a crescent: the left arc of a circle, closed by a flatter arc that bends the same way."""
    angle = np.linspace(0.3 * np.pi, 1.7 * np.pi, 26)
    outer = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    tip = outer[-1]
    back = np.linspace(tip[1], -tip[1], 16)[1:-1]
    inner_x = tip[0] - 0.85 * (1 - (back / tip[1]) ** 2)
    crescent: Points = np.concatenate([outer, np.stack([inner_x, back], axis=1)]) + np.array([0.15, 0.0])
    return crescent


def _fish() -> Points:
    angle = np.linspace(0.18 * np.pi, 1.82 * np.pi, 24)
    body = np.stack([-0.72 * np.cos(angle) + 0.22, 0.55 * np.sin(angle)], axis=1)
    return np.concatenate([body, [[-1.0, -0.62], [-0.8, 0.0], [-1.0, 0.62]]])


def _polygon(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=np.float64)


def _outlines() -> dict[str, list[tuple[str, Points]]]:
    arm = 0.34
    cross = [(-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)]
    cross += [(-x, -y) for x, y in cross]
    house = ((-0.78, 0.9), (-0.78, -0.1), (-1.0, -0.1), (0.0, -1.0), (1.0, -0.1), (0.78, -0.1), (0.78, 0.9))
    tree = ((0.0, -1.0), (0.6, -0.3), (0.32, -0.3), (0.85, 0.45), (-0.85, 0.45), (-0.32, -0.3), (-0.6, -0.3))
    door = ((-0.2, 0.9), (-0.2, 0.3), (0.2, 0.3), (0.2, 0.9))
    trunk = ((-0.16, 0.4), (0.16, 0.4), (0.16, 1.0), (-0.16, 1.0))
    side = 0.85
    return {
        "circle": [("body", _circle())],
        "square": [("body", _polygon((-side, -side), (side, -side), (side, side), (-side, side)))],
        "triangle": [("body", _polygon((0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)))],
        "star": [("body", _corners(10, 0.42))],
        "heart": [("body", _heart())],
        "diamond": [("body", _polygon((0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)))],
        "cross": [("body", _polygon(*cross))],
        "ring": [("body", _circle()), ("hole", _circle(0.55))],
        "moon": [("body", _moon())],
        "house": [
            ("body", _polygon(*house)),
            ("hole", _polygon(*door)),
        ],
        "tree": [
            ("trunk", _polygon(*trunk)),
            ("body", _polygon(*tree)),
        ],
        "fish": [("body", _fish()), ("hole", _circle(0.12, (0.55, -0.14), 10))],
    }


@lru_cache(maxsize=1)
def outlines() -> dict[str, list[tuple[str, Points]]]:
    """Return every shape as parts `(role, corners)` in drawing order.

    Corners are float64 (K, 2), x to the right and y downwards, inside the square [-1, 1] x [-1, 1].
    Roles: `body` takes the colour of the thing, `hole` that of the background, `trunk` is brown.
    """
    return _outlines()
