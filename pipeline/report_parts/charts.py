"""The plots of a report as SVG: epochs, predicted against human, corrections, heat map, figures with intervals.

Knows values and the frame of a plot. Must not know run directories or the page around. Every mark
carries what it shows: `data-tip` in words, or `data-row`, the number of a row whose data the page has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.report_parts.scales import domain, number, tick_words
from deltaclip.pipeline.report_parts.svg import DIGIT, WIDTH, axes, label_beside, line, picture, plot, tag, text, x_axis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup
    from numpy.typing import NDArray

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
