"""Labels in [0, 1]: the range given, the adapter's, or the one detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.data.labels import LabelRange, parse_label_range, read_label, read_label_std
from deltaclip.features.data.table import Table


def table(*cells):
    return Table(Path("t.csv"), {"mos": list(cells)}, list(range(2, 2 + len(cells))), "line")


@pytest.mark.parametrize(
    ("cells", "words", "mapped"),
    [
        (["0", "1"], "0 to 1 (detected)", [0, 1]),
        (["0.2", "", "0.9"], "0 to 1 (detected)", [0.2, np.nan, 0.9]),
        (["1", "5"], "1 to 5 (detected)", [0, 1]),
        (["1.0", "1.01"], "1 to 5 (detected)", [0, 0.0025]),
        (["0.99", "5"], "0 to 5 (detected)", [0.198, 1]),
        (["0", "5.01"], "0 to 10 (detected)", [0, 0.501]),
        (["26", "72"], "0 to 100 (detected)", [0.26, 0.72]),
        (["", "nan"], "0 to 1 (detected)", [np.nan, np.nan]),
    ],
)
def test_detection(cells, words, mapped):
    labels, found = read_label(table(*cells), "mos", None)
    assert str(found) == words
    np.testing.assert_allclose(labels, mapped, rtol=1e-12)  # one subtraction and one division in float64


def test_a_given_range_wins():
    labels, found = read_label(table("0.2", "0.6"), "mos", LabelRange(-1, 1, "given"))
    assert str(found) == "-1 to 1 (given)"
    np.testing.assert_allclose(labels, [0.6, 0.8], rtol=1e-12)


@pytest.mark.parametrize(
    ("cells", "given", "line"),
    [
        (["1", "good"], None, "line 3, column mos: 'good' is no number; leave a missing label empty"),
        (["1", "", "1,5"], None, "line 4, column mos: '1,5' is no number; leave a missing label empty"),
        (["inf", "1"], None, "line 2, column mos: 'inf' is not finite; leave a missing label empty"),
        (["1", "-Infinity"], "1,5", "line 3, column mos: '-Infinity' is not finite; leave a missing label empty"),
        (["1", "1e999"], None, "line 3, column mos: '1e999' is not finite; leave a missing label empty"),
        (
            ["50", "100.1"],
            None,
            "line 3, column mos: label 100.1 fits none of the usual ranges; give --label-range LO,HI",
        ),
        (
            ["0.5", "-0.1"],
            None,
            "line 3, column mos: label -0.1 fits none of the usual ranges; give --label-range LO,HI",
        ),
        (
            ["1", "5.5", "6"],
            "1,5",
            "line 3, column mos: label 5.5 is outside 1 to 5 (given); correct the label or give --label-range LO,HI",
        ),
        (
            ["0.5"],
            "1,5",
            "line 2, column mos: label 0.5 is outside 1 to 5 (given); correct the label or give --label-range LO,HI",
        ),
    ],
)
def test_refusals(cells, given, line):
    with pytest.raises(UserError) as caught:
        read_label(table(*cells), "mos", parse_label_range(given) if given else None)
    assert str(caught.value) == f"t.csv, {line}"


@pytest.mark.parametrize("text", ["5", "5,1", "1,1", "a,b", "1,5,6", "0,inf", "nan,1", ","])
def test_no_range(text):
    with pytest.raises(UserError) as caught:
        parse_label_range(text)
    assert str(caught.value) == f"--label-range: {text!r} is no range; give two rising numbers such as 1,5"


def test_ranges_of_the_command_line():
    assert parse_label_range(" 1, 5 ") == LabelRange(1.0, 5.0, "given")
    assert parse_label_range("-1,1") == LabelRange(-1.0, 1.0, "given")


def test_standard_deviations_are_scaled_and_not_shifted():
    found = read_label_std(table("0.4", "", "0"), "mos", LabelRange(1, 5, "given"))
    np.testing.assert_allclose(found, [0.1, np.nan, 0], rtol=1e-12)
    with pytest.raises(UserError) as caught:
        read_label_std(table("0.4", "-1"), "mos", LabelRange(1, 5, "given"))
    assert str(caught.value) == "t.csv, line 3, column mos: standard deviation -1 is negative; correct it"
