"""Scales, ticks and the words of numbers, at their edges."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaclip.pipeline.report_parts.charts import Scale, domain, number, tick_words, ticks

NAN = math.nan
FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12)


def test_a_scale_maps_its_ends_and_goes_on_beyond_them():
    scale = Scale(2.0, 4.0, 100.0, 0.0)  # upwards, as on a page
    assert [scale(value) for value in (2, 3, 4, 5)] == [100, 50, 0, -50]


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([], (0, 1)),
        ([NAN, math.inf], (0, 1)),
        ([0.0], (-0.5, 0.5)),
        ([4.0, 4.0, NAN], (2, 6)),
        ([-1.0, 1.0], (-1.1, 1.1)),
    ],
)
def test_domain(values, limits):
    assert domain(values) == pytest.approx(limits)


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.02, 1.02, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.2, 0.2, [-0.2, -0.1, 0, 0.1, 0.2]),
        (0, 110, [0, 20, 40, 60, 80, 100]),
        (0.622, 0.627, [0.622, 0.623, 0.624, 0.625, 0.626, 0.627]),
    ],
)
def test_ticks(lo, hi, expected):
    assert ticks(lo, hi) == pytest.approx(expected, abs=1e-12)


@given(FINITE, st.floats(min_value=1e-6, max_value=1e12))
def test_ticks_are_few_round_and_inside(lo, width):
    hi = lo + width
    if hi <= lo + 1e-9 * abs(lo):
        return
    found = ticks(lo, hi)
    assert 1 <= len(found) <= 9
    assert found == sorted(set(found))
    assert all(lo - 1e-6 * width - 1e-9 * abs(lo) <= value <= hi + 1e-6 * width + 1e-9 * abs(hi) for value in found)
    assert len(set(tick_words(found))) == len(found)


def test_words_of_ticks_have_the_decimals_that_they_need_and_no_more():
    assert tick_words([0.0, 0.05, 0.1]) == ["0.00", "0.05", "0.10"]
    assert tick_words([-20.0, 0.0, 1000.0]) == ["\N{MINUS SIGN}20", "0", "1,000"]
    assert tick_words([996_500.0, 1_000_000.0]) == ["9.96e+05", "1e+06"]
    assert tick_words([1e-12, 2e-12]) == ["1e\N{MINUS SIGN}12", "2e\N{MINUS SIGN}12"]
    assert tick_words([]) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.12345, "0.123"),
        (-0.5, "\N{MINUS SIGN}0.500"),
        (-0.0001, "0.000"),
        (1234.5, "1,234.500"),
        (None, "\N{EN DASH}"),
        (NAN, "\N{EN DASH}"),
        (math.inf, "\N{EN DASH}"),
    ],
)
def test_number(value, words):
    assert number(value) == words
