"""Plots as SVG: valid markup whatever the values are, marks where they belong, nothing unescaped."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from deltaclip.pipeline.report_parts.charts import (
    WIDTH,
    Figure,
    Series,
    delta_plot,
    epoch_plot,
    figure_plot,
    heat_map,
    scatter_plot,
    tag,
)

NAN = math.nan
HOSTILE = "<script>alert(1)</script> \"quoted\" 'so' & \N{SNOWMAN}\N{GRINNING FACE} " + "x" * 500


def parsed(plot):
    """Parse a plot as strict XML and check that every number in it is one, inside the frame."""
    root = ET.fromstring(plot)  # noqa: S314 - our own output
    height = float(root.get("viewBox").split()[3])
    for element in root.iter():
        for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height", "r"):
            if (value := element.get(name)) is not None:
                assert math.isfinite(float(value))
                assert -1 <= float(value) <= max(WIDTH, height) + 1
    assert root.get("role") == "group"
    assert root.get("tabindex") == "0"
    assert root.get("aria-label")
    return root


def marks(root, kind=""):
    return [element for element in root.iter() if {"mark", *kind.split()} <= set((element.get("class") or "").split())]


def texts(root):
    return [element.text for element in root.iter("text")]


def array(*values):
    return np.array(values, dtype=np.float64)


def test_an_element_escapes_its_text_and_attributes():
    element = tag("text", "<b> & \"'", data_tip="\"><script>'", x=1.26, y=2.0, class_=None)
    assert element == ('<text data-tip="&#34;&gt;&lt;script&gt;&#39;" x="1.3" y="2">&lt;b&gt; &amp; &#34;&#39;</text>')


def test_epochs():
    series = Series(name=HOSTILE, colour=1, epochs=array(1, 2, 3), values=array(0.1, NAN, 0.3), kept=3)
    root = parsed(epoch_plot([series], y_label="validation SROCC"))
    assert [mark.get("data-tip").removeprefix(HOSTILE) for mark in marks(root)] == [
        ", epoch 1: 0.1000",
        ", epoch 3: 0.3000 (kept)",
    ]
    first, last = marks(root)
    assert float(first.get("cx")) < float(last.get("cx"))
    assert float(first.get("cy")) > float(last.get("cy"))  # upwards is more
    assert {"epoch", "validation SROCC", "1", "2", "3"} <= set(texts(root))


@pytest.mark.parametrize("values", [[], [0.5], [NAN], [0.5, 0.5, 0.5], [1e-9, 2e-9], [1e7, 2e7]])
def test_epochs_of_any_values(values):
    epochs = np.arange(1, len(values) + 1, dtype=np.float64)
    root = parsed(epoch_plot([Series(name="q", colour=0, epochs=epochs, values=array(*values))], y_label="loss"))
    assert len(marks(root)) == np.isfinite(values).sum()


def test_no_lines_are_an_empty_frame():
    assert not marks(parsed(epoch_plot([], y_label="loss")))


def test_scatter_marks_know_their_rows_and_lie_at_their_values():
    predicted, human = array(0, 1, NAN, 0.5), array(0, 1, 0.5, NAN)
    root = parsed(scatter_plot(predicted, human, [7, 8, 9, 10], label="quality", colour=0))
    first, last = marks(root)
    assert [first.get("data-row"), last.get("data-row")] == ["7", "8"]
    guide = next(element for element in root.iter("line") if element.get("class") == "guide")
    assert (first.get("cx"), first.get("cy")) == (guide.get("x1"), guide.get("y1"))
    assert (last.get("cx"), last.get("cy")) == (guide.get("x2"), guide.get("y2"))
    assert {"predicted quality", "human quality"} <= set(texts(root))


@pytest.mark.parametrize("values", [[], [0.5], [0.5] * 40, [NAN] * 3])
def test_scatter_of_any_values(values):
    root = parsed(scatter_plot(array(*values), array(*values), range(len(values)), label="quality", colour=0))
    assert len(marks(root)) == np.isfinite(values).sum()


def test_histogram_counts_every_row_between_the_bounds():
    rng = np.random.default_rng(0)
    delta = np.append(0.2 * np.tanh(rng.normal(size=500)), [0.2, -0.2, NAN])
    root = parsed(delta_plot(delta, 0.2, label="quality", colour=0))
    counts = [int(mark.get("data-tip").split(": ")[1].split()[0]) for mark in marks(root)]
    expected, _ = np.histogram(delta[:-1], bins=24, range=(-0.2, 0.2))
    assert counts == expected[expected > 0].tolist()
    assert sum(counts) == 502
    bands = [element for element in root.iter("rect") if element.get("class") == "band"]
    assert len(bands) == 2
    bar = max(marks(root), key=lambda mark: float(mark.get("height")))
    assert int(bar.get("data-tip").split(": ")[1].split()[0]) == max(counts)


@pytest.mark.parametrize(
    ("delta", "scale"), [([], 0.2), ([0.0], 0.0), ([0.0] * 9, 0.2), ([0.1], None), ([NAN], None), ([1.0, -1.0], 1.0)]
)
def test_histogram_of_any_values(delta, scale):
    root = parsed(delta_plot(array(*delta), scale, label="consistency", colour=1))
    assert len(marks(root)) == len({value for value in delta if np.isfinite(value)})


def a_map(**changes):
    found = {"x": "lr", "y": "loss", "x_values": [0.001, 0.003], "y_values": ["mse", "rank"]}
    return found | {"val_score": [[0.5, 0.6], [None, 0.7]]} | changes


def test_heat_map_has_a_cell_for_every_pair_with_its_value():
    root = parsed(heat_map(a_map()))
    assert [mark.get("data-tip") for mark in marks(root)] == [
        "lr 0.001, loss mse: 0.5000",
        "lr 0.003, loss mse: 0.6000",
        "lr 0.001, loss rank: \N{EN DASH}",
        "lr 0.003, loss rank: 0.7000",
    ]
    shades = [float(mark.get("style").removeprefix("fill-opacity:")) for mark in marks(root)]
    assert shades == pytest.approx([0.08, 0.54, 0.0, 1.0])
    assert {"0.001", "0.003", "mse", "rank", "lr", "loss", "0.500", "0.700"} <= set(texts(root))


@pytest.mark.parametrize(
    "changes",
    [
        {"val_score": [[0.5, 0.5], [0.5, 0.5]]},
        {"val_score": [[None, None], [None, None]]},
        {"x_values": [0.1], "y_values": [HOSTILE[:20]], "val_score": [[-0.2]]},
        {"x_values": list(range(40)), "y_values": [1e-5], "val_score": [[i / 40 for i in range(40)]]},
    ],
)
def test_heat_map_of_any_values(changes):
    found = a_map(**changes)
    root = parsed(heat_map(found))
    assert len(marks(root)) == len(found["x_values"]) * len(found["y_values"])


def test_figures_have_intervals_and_the_values_that_they_are_the_mean_of():
    figures = [
        Figure(name="quality: heads", colour=0, value=0.5, interval=(0.4, 0.6), values=(0.4, None, 0.6)),
        Figure(name="no-image floor", colour=7, value=None),
    ]
    root = parsed(figure_plot(figures, x_label="SROCC"))
    assert [mark.get("data-tip") for mark in marks(root)] == [
        "quality: heads: one repeat, 0.400",
        "quality: heads: one repeat, 0.600",
        "quality: heads: 0.500 (0.400 to 0.600)",
    ]
    whisker = next(element for element in root.iter("line") if element.get("class").startswith("whisker"))
    first, second, middle = (float(mark.get("cx")) for mark in marks(root))
    assert (float(whisker.get("x1")), float(whisker.get("x2"))) == (first, second)
    assert middle == pytest.approx((first + second) / 2, abs=0.11)  # places have one decimal


@pytest.mark.parametrize("value", [None, 0.0])
def test_one_figure(value):
    parsed(figure_plot([Figure(name=HOSTILE, colour=0, value=value)], x_label=HOSTILE))
    parsed(figure_plot([], x_label="SROCC"))
