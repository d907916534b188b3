"""Labels in [0, 1]: the range given, the adapter's, or the one detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.data.manifest import LabelRange, parse_label_ranges, read_label, read_label_std
from deltaclip.features.data.table import Table
from deltaclip.features.data.targets import parse_targets


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
    labels, found, _ = read_label(table(*cells), "mos", "quality", None)
    assert str(found) == words
    np.testing.assert_allclose(labels, mapped, rtol=1e-12)  # one subtraction and one division in float64


def test_a_given_range_wins():
    labels, found, _ = read_label(table("0.2", "0.6"), "mos", "quality", LabelRange(-1, 1, "given"))
    assert str(found) == "-1 to 1 (given)"
    np.testing.assert_allclose(labels, [0.6, 0.8], rtol=1e-12)


@pytest.mark.parametrize(
    ("cells", "given", "line"),
    [
        (["1", "good"], None, "line 3, column mos: 'good' is no number; leave a missing label empty"),
        (["1", "1_000"], None, "line 3, column mos: '1_000' is no number; leave a missing label empty"),
        (["1", "0x10"], None, "line 3, column mos: '0x10' is no number; leave a missing label empty"),
        (
            ["1", "", "1,234"],
            None,
            "line 4, column mos: '1,234' may have a decimal comma or separated thousands: nothing says which; "
            "leave a missing label empty",
        ),
        (
            ["1,5", "1,234.5"],
            None,
            "line 2, column mos: '1,5' may have a decimal comma or separated thousands: the column writes numbers in "
            "both ways; leave a missing label empty",
        ),
        (
            ["4/5", "7/10", "3/5"],
            None,
            "line 3, column mos: '7/10' is of another scale than the rest of the column, 5; "
            "write all of them on one scale",
        ),
        (
            ["80%", "3"],
            None,
            "line 3, column mos: '3' does not say of what scale it is, as other cells of the column do; "
            "write all of them on one scale",
        ),
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
            "line 3, column mos: label 5.5 is outside 1 to 5 (given); "
            "correct the label or give --label-range quality=LO,HI",
        ),
        (
            ["0.5"],
            "1,5",
            "line 2, column mos: label 0.5 is outside 1 to 5 (given); "
            "correct the label or give --label-range quality=LO,HI",
        ),
    ],
)
def test_refusals(cells, given, line):
    with pytest.raises(UserError) as caught:
        read_label(table(*cells), "mos", "quality", parse_label_ranges(given or []).get(""))
    assert str(caught.value) == f"t.csv, {line}"


@pytest.mark.parametrize("text", ["", "5", "5,1", "1,1", "a,b", "1,5,6", "0,inf", "nan,1", ",", "quality=5", "1,5 x"])
def test_no_range(text):
    with pytest.raises(UserError) as caught:
        parse_label_ranges(text)
    remedy = "give two rising numbers such as 1,5, or quality=1,10 for one label"
    assert str(caught.value) == f"--label-range: {text!r} is no range; {remedy}"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["qualty=1,5"], "'qualty' is no label; did you mean 'quality'?"),
        (["1,5", "0,1"], "'0,1' gives all labels a second range; give one range a label"),
        (["quality=1,5", "quality=0,1"], "'quality=0,1' gives quality a second range; give one range a label"),
    ],
)
def test_ranges_that_do_not_go_together(given, line):
    with pytest.raises(UserError) as caught:
        parse_label_ranges(given)
    assert str(caught.value) == f"--label-range: {line}"


def test_ranges_of_the_command_line():
    one, ten = LabelRange(1.0, 5.0, "given"), LabelRange(1.0, 10.0, "given")
    assert parse_label_ranges([]) == {}
    assert parse_label_ranges(" 1, 5 ") == {"": one}
    assert parse_label_ranges("-1,1")[""] == LabelRange(-1.0, 1.0, "given")
    assert parse_label_ranges(["quality=1,10"]) == {"quality": ten}
    both = {"quality": ten, "consistency": one}
    for given in (["quality=1,10", "consistency=1,5"], "quality=1,10,consistency=1,5"):
        assert parse_label_ranges(given) == both
    assert parse_label_ranges(["1,5", "quality=1,10"]) == {"": one, "quality": ten}
    asked = parse_targets(["composition=comp:image"])
    assert parse_label_ranges(["composition=1,10", "authenticity=1,5"], asked) == {
        "composition": ten,
        "authenticity": one,
    }


@pytest.mark.parametrize(
    ("cells", "words", "mapped"),
    [
        (["1,5", "2,25"], "1 to 5 (detected)", [0.125, 0.3125]),
        (["1,5", "1,234"], "1 to 5 (detected)", [0.125, 0.0585]),
        (["1.234,5", "2,5"], "0 to 2000 (given)", [0.61725, 0.00125]),
        (["1,234.5", "1,000"], "0 to 2000 (given)", [0.61725, 0.5]),
        (["1e-3", "\u0663"], "0 to 5 (detected)", [0.0002, 0.6]),
        (["80%", "5 %", "N/A"], "0 to 100 (detected)", [0.8, 0.05, np.nan]),
        (["4/5", "1 / 5"], "1 to 5 (detected)", [0.75, 0]),
        (["4 out of 7", "0/7"], "0 to 7 (detected)", [4 / 7, 0]),
        (["3", "-", "<NA>", "null", "None"], "1 to 5 (detected)", [0.5, *[np.nan] * 4]),
    ],
)
def test_ways_to_write_a_number(cells, words, mapped):
    given = LabelRange(0, 2000, "given") if "given" in words else None
    labels, found, _ = read_label(table(*cells), "mos", "quality", given)
    assert str(found) == words
    np.testing.assert_allclose(labels, mapped, rtol=1e-12)


def test_what_is_said_of_a_column():
    ten = LabelRange(1, 10, "given")
    sparse = "quality lies from 1 to 5, 44% of the given range: give --label-range quality=LO,HI if it has its own"
    assert read_label(table("1", "3", "5"), "mos", "quality", ten)[2] == [sparse]
    assert read_label(table("1", "3", "5.5"), "mos", "quality", ten)[2] == []
    assert read_label(table("1", "3", "5"), "mos", "quality", LabelRange(1, 10, "adapter"))[2] == []
    empty = "column 'mos' gives no labels of quality: all of its cells are empty"
    assert read_label(table("", "nan"), "mos", "quality", None)[2] == ["1 cells of mos count as missing (nan)", empty]


def test_standard_deviations_are_scaled_and_not_shifted():
    found = read_label_std(table("0.4", "", "0"), "mos", LabelRange(1, 5, "given"))
    np.testing.assert_allclose(found, [0.1, np.nan, 0], rtol=1e-12)
    with pytest.raises(UserError) as caught:
        read_label_std(table("0.4", "-1"), "mos", LabelRange(1, 5, "given"))
    assert str(caught.value) == "t.csv, line 3, column mos: standard deviation -1 is negative; correct it"
