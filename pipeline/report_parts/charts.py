"""The plots of a report as SVG: epochs, predicted against human, corrections, heat map, figures with intervals.

Elements with everything escaped, in a frame with axes that say what they show and round numbers. Every mark carries
what it shows: `data-tip` in words, or `data-row`, the number of a row whose data the page has. Colours are classes of
`page.css`, so that one plot serves light and dark. Must not know run directories or the page around.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


# ---- The plots of a report as SVG: epochs, predicted against human, corrections, heat map, figures with intervals


BINS = 24
SATURATED = 0.9  # of the scale
MAX_CELL_WORDS = 12  # cells along one side that still have room for their value
CELL = 30.0
STRONG = 0.7  # shade of a cell from which its words are of the other colour: contrast 4.5 both ways


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a plot over epochs: (E,) values, NaN where there is none, and the epoch that was kept."""

    name: str
    colour: int
    epochs: NDArray[np.float64]
    values: NDArray[np.float64]
    kept: int | None = None


def epoch_plot(series: Sequence[Series], *, y_label: str) -> Markup:
    """Return lines over epochs; the epoch that was kept has a ring."""
    epochs = np.concatenate([one.epochs for one in series]) if series else np.zeros(0)
    lo, hi = (float(epochs.min()), float(epochs.max())) if epochs.size else (0.0, 1.0)
    frame = plot(
        (lo, hi) if hi > lo else (lo - 1, lo + 1),
        domain(value for one in series for value in one.values),
        height=260,
    )
    parts = [axes(frame, x_label="epoch", y_label=y_label, x_ticks=_whole_ticks(lo, hi))]
    for one in series:
        known = np.isfinite(one.values)
        places = [
            (frame.x(epoch), frame.y(value)) for epoch, value in zip(one.epochs[known], one.values[known], strict=True)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(tag("polyline", points=path, class_=f"line c{one.colour}"))
        for (x, y), epoch, value in zip(places, one.epochs[known], one.values[known], strict=True):
            kept = epoch == one.kept
            tip = f"{one.name}, epoch {epoch:.0f}: {number(value, 4)}{' (kept)' if kept else ''}"
            parts.append(tag("circle", cx=x, cy=y, r=2.2, class_=f"mark dot c{one.colour}", data_tip=tip))
            if kept:
                parts.append(tag("circle", cx=x, cy=y, r=6, class_=f"ring c{one.colour}"))
    return picture(frame.height, f"{y_label} by epoch", *parts)


def _whole_ticks(lo: float, hi: float) -> list[float]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**4, 10**6) if (hi - lo) / step <= 8)
    return [float(epoch) for epoch in range(int(lo), int(hi) + 1) if epoch % step == 0 or lo == hi]


def scatter_plot(
    predicted: NDArray[np.float64], human: NDArray[np.float64], rows: Sequence[int], *, label: str, colour: int
) -> Markup:
    """Return predicted against human scores, both in [0, 1], with the line where they agree.

    Args:
        predicted: (N,), NaN where there is none.
        human: (N,), the same.
        rows: numbers that the page knows these rows by, N of them.
        label: what is scored.
        colour: number of the colour.
    """
    frame = plot((-0.02, 1.02), (-0.02, 1.02), height=370)
    parts = [axes(frame, x_label=f"predicted {label}", y_label=f"human {label}")]
    parts.append(line((frame.x(0), frame.y(0)), (frame.x(1), frame.y(1)), class_="guide"))
    for x, y, row in sorted(zip(predicted, human, rows, strict=True)):  # the arrow keys go from left to right
        if np.isfinite(x) and np.isfinite(y):
            mark = f"mark point c{colour}"
            parts.append(tag("circle", cx=frame.x(x), cy=frame.y(y), r=2.8, class_=mark, data_row=row))
    return picture(frame.height, f"Predicted against human {label}", *parts)


def delta_plot(delta: NDArray[np.float64], scale: float | None, *, label: str, colour: int) -> Markup:
    """Return the histogram of corrections between the bounds -scale and scale.

    Args:
        delta: (N,) corrections, NaN where there is none.
        scale: their bound; None, or 0, takes the largest one.
        label: what is corrected.
        colour: number of the colour.
    """
    known = delta[np.isfinite(delta)]
    bound = scale or (float(np.abs(known).max()) if known.size else 0.0) or 1.0
    counts, edges = np.histogram(np.clip(known, -bound, bound), bins=BINS, range=(-bound, bound))
    frame = plot((-1.06 * bound, 1.06 * bound), (0, max(1.0, 1.08 * float(counts.max()))), height=260)
    x, y = frame.x, frame.y
    parts = [axes(frame, x_label=f"correction of {label} (predicted = base + correction)", y_label="test rows")]
    if scale:
        for side in (-1, 1):
            inner, outer = sorted((x(side * SATURATED * bound), x(side * bound)))
            parts.append(tag("rect", x=inner, y=y.end, width=outer - inner, height=y.start - y.end, class_="band"))
            parts.append(line((x(side * bound), y.start), (x(side * bound), y.end), class_="guide"))
    for count, lo, hi in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            tip = f"{number(float(lo))} to {number(float(hi))}: {count:,} rows ({count / known.size:.1%})"
            width = x(hi) - x(lo) - 1
            bar = {"x": x(lo) + 0.5, "y": y(count), "width": width, "height": y.start - y(count)}
            parts.append(tag("rect", **bar, class_=f"mark bar c{colour}", data_tip=tip))
    return picture(frame.height, f"Corrections of {label} against their scale", *parts)


def heat_map(found: dict[str, Any]) -> Markup:
    """Return a map of a sweep as `config.json` has it: `{"x", "y", "x_values", "y_values", "val_score"}`."""
    x_words, y_words = (_value_words(found[f"{axis}_values"]) for axis in "xy")
    known = [score for scores in found["val_score"] for score in scores if score is not None]
    lo, hi = (min(known), max(known)) if known else (0.0, 0.0)
    left = 32 + DIGIT * max(map(len, y_words))
    width, height = (WIDTH - left - 10) / len(x_words), CELL
    parts = []
    for row, (y_word, scores) in enumerate(zip(y_words, found["val_score"], strict=True)):
        y = 10 + row * height
        parts.append(text(y_word, left - 6, y + height / 2 + 4, class_="tick", anchor="end"))
        for column, (x_word, score) in enumerate(zip(x_words, scores, strict=True)):
            shade = 1.0 if hi <= lo or score is None else 0.08 + 0.92 * (score - lo) / (hi - lo)
            cell = {"x": left + column * width + 1, "y": y + 1, "width": width - 2, "height": height - 2}
            tip = f"{found['x']} {x_word}, {found['y']} {y_word}: {number(score, 4)}"
            style = f"fill-opacity:{shade:.3f}" if score is not None else "fill-opacity:0"
            parts.append(tag("rect", **cell, class_="mark cell", style=style, data_tip=tip))
            if len(x_words) <= MAX_CELL_WORDS:
                tone = "on-strong" if score is not None and shade > STRONG else "on-weak"
                middle = (left + (column + 0.5) * width, y + height / 2 + 4)
                parts.append(text(number(score), *middle, class_=f"cell-words {tone}", anchor="middle"))
    bottom = 10 + len(y_words) * height
    shown = range(0, len(x_words), 1 + (len(x_words) - 1) // MAX_CELL_WORDS)
    parts += [text(x_words[i], left + (i + 0.5) * width, bottom + 16, class_="tick", anchor="middle") for i in shown]
    parts.append(text(found["x"], (left + WIDTH - 10) / 2, bottom + 36, class_="label", anchor="middle"))
    parts.append(label_beside(found["y"], (10 + bottom) / 2))
    return picture(bottom + 42, f"Validation score by {found['x']} and {found['y']}", *parts)


def _value_words(values: Sequence[Any]) -> list[str]:
    if all(isinstance(value, int | float) for value in values):
        small = any(0 < abs(value) < 1e-3 for value in values)
        return [f"{value:.3g}" for value in values] if small else tick_words([float(value) for value in values])
    return [str(value) for value in values]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a plot of figures: a value, an interval around it, and the values that it is the mean of."""

    name: str
    colour: int
    value: float | None
    interval: tuple[float | None, float | None] = (None, None)
    values: tuple[float | None, ...] = ()


def figure_plot(figures: Sequence[Figure], *, x_label: str) -> Markup:
    """Return figures one below the other, each with its interval."""
    spans = [(one.value, *one.interval, *one.values) for one in figures]
    known = [value for span in spans for value in span if value is not None]
    names = [one.name if len(one.name) <= 24 else f"{one.name[:23]}\N{HORIZONTAL ELLIPSIS}" for one in figures]
    left = 20 + DIGIT * max([len(name) for name in names], default=0)
    frame = plot(domain(known), (0, max(len(figures), 1)), height=52 + 26.0 * len(figures), left=left)
    x, y = frame.x, frame.y
    parts = [x_axis(frame, x_label, grid=True)]
    for place, (one, name) in enumerate(zip(figures, names, strict=True)):
        middle = y(len(figures) - place - 0.5)
        parts.append(text(name, left - 10, middle + 4, class_="name", anchor="end"))
        lo, hi = one.interval
        if lo is not None and hi is not None:
            parts.append(line((x(lo), middle), (x(hi), middle), class_=f"whisker c{one.colour}"))
        for value in one.values:
            if value is not None:
                dot = {"cx": x(value), "cy": middle, "r": 3.0}
                tip = f"{one.name}: one repeat, {number(value)}"
                parts.append(tag("circle", **dot, class_=f"mark value c{one.colour}", data_tip=tip))
        if one.value is not None:
            words = f" ({number(lo)} to {number(hi)})" if lo is not None else ""
            dot = {"cx": x(one.value), "cy": middle, "r": 4.5}
            tip = f"{one.name}: {number(one.value)}{words}"
            parts.append(tag("circle", **dot, class_=f"mark dot c{one.colour}", data_tip=tip))
    return picture(frame.height, x_label, *parts)


# ---- SVG in strings: elements with everything escaped, and the frame of a plot with axes that say what they show


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


# ---- From values to places on a plot, and the round numbers to label them with


MAX_DECIMALS = 9
MAX_PLAIN = 1e6  # from here on, ticks are written with powers of ten


@dataclass(frozen=True)
class Scale:
    """A straight line from the domain [lo, hi], lo < hi, to places on the page."""

    lo: float
    hi: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where a value lies; values outside the domain lie outside the plot."""
        return self.start + (value - self.lo) / (self.hi - self.lo) * (self.end - self.start)


def domain(values: Iterable[float], *, pad: float = 0.05) -> tuple[float, float]:
    """Return limits around all finite values, wider by a share `pad` of their range at both ends.

    Without any it is 0 to 1; around one constant value, half of it (or 0.5) to either side, so that it has a middle.
    """
    known = [float(value) for value in values if math.isfinite(value)]
    if not known:
        return 0.0, 1.0
    lo, hi = min(known), max(known)
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):
        side = abs(lo) / 2 or 0.5
        return lo - side, hi + side
    return lo - pad * (hi - lo), hi + pad * (hi - lo)


def ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers within [lo, hi], lo < hi: multiples of 1, 2 or 5 times a power of ten."""
    rough = (hi - lo) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.75 * rough)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    decimals = min(max(0, -math.floor(math.log10(step))), 300)
    return [round(number * step, decimals) + 0.0 for number in range(first, last + 1)]  # + 0.0: no -0


def tick_words(values: list[float]) -> list[str]:
    """Return the labels of ticks, all with the decimals that they need, or digits where that would be too many."""
    if max(map(abs, values), default=0) < MAX_PLAIN:
        for places in range(MAX_DECIMALS):
            words = [number(value, places) for value in values]
            exact = all(abs(round(value, places) - value) <= 1e-9 * max(1.0, abs(value)) for value in values)
            if exact and len(set(words)) == len(values):
                return words
    for digits in range(3, 18):  # 17 tell any two numbers apart
        words = [f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}") for value in values]
        if len(set(words)) == len(values):
            break
    return words


def number(value: float | None, decimals: int = 3) -> str:
    """Return a figure for a reader: a real minus sign, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    words = f"{value:,.{decimals}f}"
    if not words.strip("-0.,"):
        words = words.lstrip("-")  # a minus before zeros says nothing
    return words.replace("-", "\N{MINUS SIGN}")
