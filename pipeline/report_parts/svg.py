"""SVG in strings: elements with everything escaped, and the frame of a plot with axes that say what they show.

Knows markup and scales. Must not know what is plotted. Colours are classes of `page.css`, so that one plot serves light
and dark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from deltaclip.pipeline.report_parts.scales import Scale, tick_words, ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 400  # of a plot in its own units; the page stretches it to its column
DIGIT = 6.6  # width of a digit at the font size of page.css


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return one element; text and attributes are escaped, None leaves an attribute out.

    `class_` is `class`, `text_anchor` is `text-anchor`.
    """
    words = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _word(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, words, Markup("").join(children))


def _word(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def text(words: str, x: float, y: float, *, class_: str = "", anchor: str = "start") -> Markup:
    """Return a line of text at a place."""
    return tag("text", words, x=x, y=y, class_=class_ or None, text_anchor=anchor)


def line(start: tuple[float, float], end: tuple[float, float], *, class_: str) -> Markup:
    """Return a straight line."""
    return tag("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """The frame of a plot: where its axes run."""

    x: Scale
    y: Scale
    height: float


def plot(
    x_limits: tuple[float, float], y_limits: tuple[float, float], *, height: float, left: float | None = None
) -> Plot:
    """Lay out a plot: `x_limits` and `y_limits` are what its axes span, lo < hi; by default `left` fits its ticks."""
    if left is None:
        left = 32 + DIGIT * max([len(words) for words in tick_words(ticks(*y_limits))], default=0)
    return Plot(x=Scale(*x_limits, left, WIDTH - 10), y=Scale(*y_limits, height - 40, 10), height=height)


def axes(frame: Plot, *, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None) -> Markup:
    """Return grid, tick labels and the names of both axes.

    Args:
        frame: where they run.
        x_label: name and unit.
        y_label: the same.
        x_ticks: numbers to label instead of round ones.
    """
    x, y = frame.x, frame.y
    parts = []
    values = ticks(y.lo, y.hi)
    for value, words in zip(values, tick_words(values), strict=True):
        parts.append(line((x.start, y(value)), (x.end, y(value)), class_="grid"))
        parts.append(text(words, x.start - 6, y(value) + 4, class_="tick", anchor="end"))
    parts.append(label_beside(y_label, (y.start + y.end) / 2))
    return Markup("").join([*parts, x_axis(frame, x_label, values=x_ticks)])


def x_axis(frame: Plot, label: str, *, values: Sequence[float] | None = None, grid: bool = False) -> Markup:
    """Return the lower axis with its name: `values` labelled, or round numbers; lines upwards for a `grid`."""
    x, y = frame.x, frame.y
    shown = list(values) if values is not None else ticks(x.lo, x.hi)
    parts = []
    for value, words in zip(shown, tick_words(shown), strict=True):
        end = (x(value), y.end if grid else y.start + 4)
        parts.append(line((x(value), y.start), end, class_="grid" if grid else "axis"))
        parts.append(text(words, x(value), y.start + 16, class_="tick", anchor="middle"))
    parts.append(line((x.start, y.start), (x.end, y.start), class_="axis"))
    parts.append(text(label, (x.start + x.end) / 2, frame.height - 6, class_="label", anchor="middle"))
    return Markup("").join(parts)


def label_beside(words: str, middle: float) -> Markup:
    """Return the name of the left axis, which reads upwards."""
    turned = f"rotate(-90 12 {middle:.1f})"
    return tag("text", words, x=12, y=middle, class_="label", text_anchor="middle", transform=turned)


def picture(height: float, title: str, *parts: str) -> Markup:
    """Return a whole plot, which can be reached with the keyboard; `title` says what it shows."""
    return tag(
        "svg",
        *parts,
        class_="chart",
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        role="group",
        aria_label=f"{title}. Arrow keys go through the values.",
        tabindex="0",
    )
