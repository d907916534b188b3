"""Unit outlines of the things a scene can hold; knows geometry only."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

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
