"""Groups as people have them: texts, numbers, columns that lack some; missing ones are named, wherever they arrive."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deltaclip.pipeline.api.estimator import DeltaclipRegressor
from deltaclip.pipeline.scoring.agreement import agreement_by
from deltaclip.pipeline.scoring.floors import no_image_floor
from deltaclip.pipeline.scoring.groups import group_keys
from deltaclip.pipeline.scoring.intervals import srocc_interval
from deltaclip.pipeline.scoring.splits import split_rows

ROWS = 12
TEXTS = np.array([f"p{row // 3}" for row in range(ROWS)], dtype=object)
NUMBERS = np.arange(ROWS) // 3
LABELS = np.linspace(0, 1, ROWS)


class NAType:
    """What pandas calls its missing value: it equals nothing and is no truth value."""

    def __eq__(self, other: object) -> bool:
        raise TypeError

    __hash__ = None


@pytest.mark.parametrize("given", [list(TEXTS), TEXTS, TEXTS.astype(str), NUMBERS, NUMBERS.astype(float)])
def test_kinds_of_groups(given):
    keys = group_keys(given)
    assert [len(set(keys[start : start + 3])) for start in range(0, ROWS, 3)] == [1] * 4
    assert len(set(keys)) == 4


def test_whole_floats_are_the_integers():
    whole = group_keys(NUMBERS)
    for given in (NUMBERS.astype(float), NUMBERS.astype(object), NUMBERS.astype(np.uint8)):
        np.testing.assert_array_equal(group_keys(given), whole)


MISSING = [None, math.nan, np.float32("nan"), NAType()]


@pytest.mark.parametrize("nothing", MISSING)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("groups", group_keys),
        ("groups", lambda groups: split_rows("grouped", groups=groups, seed=0)),
        ("split", lambda column: split_rows("column", groups=NUMBERS, seed=0, column=column)),
        ("groups", lambda groups: agreement_by(LABELS, LABELS, groups_N=groups)),
        ("groups", lambda groups: srocc_interval(LABELS, LABELS, seed=0, groups=groups)),
        ("groups", lambda groups: no_image_floor(LABELS, groups=groups, train=[0, 1], test=[2])),
        ("sources", lambda sources: no_image_floor(LABELS, groups=NUMBERS, train=[0, 1], test=[2], sources=sources)),
        ("groups", lambda groups: DeltaclipRegressor(epochs=1).fit(np.eye(ROWS), LABELS, groups=groups)),
    ],
)
def test_missing_values_are_named(name, call, nothing):
    given = TEXTS.copy()
    given[4] = given[7] = nothing
    with pytest.raises(ValueError, match=name) as error:
        call(given)
    assert str(error.value) == (
        f"{name}: 2 of 12 rows have none, the first is row 5; give every row one, or leave these rows out"
    )


def test_missing_numbers_are_named():
    given = NUMBERS.astype(float)
    given[0] = np.nan
    with pytest.raises(ValueError, match=r"^groups: 1 of 12 rows have none, the first is row 1; "):
        group_keys(given)


@pytest.mark.parametrize("given", [[1.5, 2.0], [1, "a"], [["a"], ["b"]], [True, 1.5], [b"a", b"b"]])
def test_what_is_no_group_is_named(given):
    with pytest.raises(ValueError, match=r"^groups must be a 1-D array of strings or integers, not "):
        group_keys(np.array(given, dtype=object) if given[0] != ["a"] else given)
