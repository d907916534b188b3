"""Splits: a partition, no torn group, the shares that were asked for, whatever the order of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deltaclip.base.errors import UserError
from deltaclip.pipeline.scoring.groups import group_keys, mix
from deltaclip.pipeline.scoring.splits import FRACTIONS, repeat_seeds, split_rows
from deltaclip.tests import reference


def sides(split):
    return split.train, split.val, split.test


def side_of_group(split, groups):
    return {str(groups[row]): side for side, rows in enumerate(sides(split)) for row in rows}


def check_partition(split, num_rows):
    assert np.array_equal(np.sort(np.concatenate(sides(split))), np.arange(num_rows))
    assert all(rows.dtype == np.int64 and (np.diff(rows) > 0).all() for rows in sides(split))
    assert split.to_json()["rows"] == {
        "train": len(split.train),
        "val": len(split.val),
        "test": len(split.test),
    }


group_sizes = st.lists(st.integers(1, 40), min_size=3, max_size=60)
shares = st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


@settings(deadline=None)
@given(group_sizes, shares, st.integers(0, 2**40), st.booleans())
def test_grouped_splits_hold_their_promises(sizes, fractions, seed, as_text):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.random.default_rng(seed).permutation(groups)
    groups = np.array([f"prompt {group}" for group in groups]) if as_text else groups
    split = split_rows("grouped", groups=groups, seed=seed, fractions=fractions)
    check_partition(split, groups.size)
    assert not split.leaks_groups
    assert not reference.leaks(sides(split), groups)
    assert [len(rows) > 0 for rows in sides(split)] == [share > 0 for share in fractions]

    order = np.random.default_rng(seed + 1).permutation(groups.size)
    again = split_rows("grouped", groups=groups[order], seed=seed, fractions=fractions)
    assert side_of_group(again, groups[order]) == side_of_group(split, groups)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=60, max_size=120), st.integers(0, 2**32))
def test_shares_are_met_to_two_hundredths_or_a_group(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    split = split_rows("grouped", groups=groups, seed=seed)
    assume(max(sizes) <= 0.1 * groups.size)
    for rows, share in zip(sides(split)[1:], FRACTIONS[1:], strict=True):
        assert abs(rows.size - share * groups.size) <= max(*sizes, 0.02 * groups.size)


def test_very_uneven_groups_still_meet_the_shares():
    sizes = np.round(1000 / np.arange(1, 501)).astype(int)  # Zipf: 1000, 500, 333, ... 2
    groups = np.repeat(np.arange(500), sizes)
    seen = set()
    for seed in range(20):
        split = split_rows("grouped", groups=groups, seed=seed)
        for rows, share in zip(sides(split), FRACTIONS, strict=True):
            assert abs(rows.size / groups.size - share) <= 0.04
        seen.add(tuple(np.unique(groups[split.test])))
    assert len(seen) == 20


def test_one_giant_group_trains_and_the_rest_is_shared_out():
    groups = np.array([0] * 980 + list(range(1, 21)))
    split = split_rows("grouped", groups=groups, seed=3)
    assert split.to_json()["rows"] == {"train": 980, "val": 7, "test": 13}


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 98), (33, 33, 34), (50, 1, 1, 1)])
def test_three_groups_are_enough(sizes):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    split = split_rows("grouped", groups=groups, seed=0)
    assert all(rows.size for rows in sides(split))
    assert max(sizes) in np.bincount(groups[split.train])


def test_every_group_is_tested_in_some_repeat_and_about_as_often():
    groups = np.repeat(np.arange(50), 10)
    times = np.zeros(50)
    for seed in repeat_seeds(0, 300):
        times[np.unique(groups[split_rows("grouped", groups=groups, seed=seed).test])] += 1
    # 20 % of 300 is 60 with an SD of 7; neighbouring seeds must be independent for this.
    assert times.min() > 30
    assert times.max() < 90


def test_the_size_of_a_group_does_not_decide_its_side():
    """Filling a side up with what still fits gave groups of up to two rows to the test side with a chance of .52."""
    sizes = np.random.default_rng(0).integers(1, 40, size=40)
    groups = np.repeat(np.arange(40), sizes)
    times = np.zeros((3, 40))
    for seed in range(600):
        for side, rows in enumerate(sides(split_rows("grouped", groups=groups, seed=seed))):
            times[side, np.unique(groups[rows])] += 1
    for small, large in ((0, 6), (6, 15), (15, 25), (25, 40)):
        of_size = (sizes > small) & (sizes <= large)
        chance = times[1:, of_size].mean(axis=1) / 600
        assert chance == pytest.approx(FRACTIONS[1:], abs=0.08)  # two SDs of five groups are .03; groups are whole


def test_text_and_width_of_the_array_do_not_matter_but_the_seed_does():
    names = [f"a photo of {thing}" for thing in "abcdefghijklmnopqrstuvwxyz"] * 3
    split = split_rows("grouped", groups=names, seed=1)
    wider = split_rows("grouped", groups=np.array(names, dtype="U99"), seed=1)
    objects = split_rows("grouped", groups=np.array(names, dtype=object), seed=1)
    coded, index = np.unique(names, return_inverse=True)
    by_key = split_rows("grouped", groups=group_keys(coded)[index], seed=1)
    other = split_rows("grouped", groups=names, seed=2)
    for same in (wider, objects, by_key):
        assert np.array_equal(same.test, split.test)
    assert not np.array_equal(other.test, split.test)


def test_a_known_split_stays_what_it_is():
    """Runs are compared across versions: the deal of given values and seed must not change by accident."""
    split = split_rows("grouped", groups=[f"prompt {i}" for i in range(20)], seed=42)
    assert (split.val.tolist(), split.test.tolist()) == ([6, 19], [1, 12, 13, 15])


def test_a_new_group_moves_few_of_the_others():
    groups = np.repeat(np.arange(200), 5)
    before = side_of_group(split_rows("grouped", groups=groups, seed=1), groups)
    more = np.append(groups, [777] * 5)
    after = side_of_group(split_rows("grouped", groups=more, seed=1), more)
    assert sum(after[name] != side for name, side in before.items()) <= 4


def test_keys_tell_values_apart():
    values = [f"{i}" for i in range(20_000)] + ["ab", "ba", "a", "", "aa", "a b", "\U0001f431", "a" * 300]
    assert np.unique(group_keys(values)).size == len(values)
    numbers = np.array([-(2**63), -1, 0, 1, 2**63 - 1])
    assert np.unique(mix(group_keys(numbers), seed=5)).size == 5
    assert np.array_equal(group_keys(np.array([3], np.uint8)), group_keys(np.array([3], np.int32)))
    for wrong in ([1.5, 2.0, 3.0], [["a", "b"]]):
        with pytest.raises(ValueError, match=r"^groups must be a 1-D array of strings or integers, not "):
            group_keys(wrong)


@settings(deadline=None)
@given(st.integers(3, 200), shares, st.integers(0, 2**32))
def test_random_splits_have_exact_shares_and_say_whether_they_leak(num_rows, fractions, seed):
    groups = np.random.default_rng(seed).integers(max(1, num_rows // 2), size=num_rows)
    split = split_rows("random", groups=groups, seed=seed, fractions=fractions)
    check_partition(split, num_rows)
    assert split.leaks_groups == reference.leaks(sides(split), groups)
    for rows, share in zip(sides(split), fractions, strict=True):
        assert (rows.size > 0) == (share > 0)
        assert abs(rows.size - share * num_rows) <= 2
    again = split_rows("random", groups=groups, seed=seed, fractions=fractions)
    assert np.array_equal(again.test, split.test)


def test_a_random_split_of_single_rows_does_not_leak():
    assert not split_rows("random", groups=np.arange(100), seed=1).leaks_groups
    assert split_rows("random", groups=np.arange(100) // 10, seed=1).leaks_groups


def test_a_column_is_followed_in_every_spelling():
    column = ["train", "Training", " val", "VALID", "validation", "dev", "test", "Testing"]
    split = split_rows("column", groups=np.arange(8), column=column, seed=1)
    assert [rows.tolist() for rows in sides(split)] == [[0, 1], [2, 3, 4, 5], [6, 7]]
    assert (split.kind, split.note, split.leaks_groups) == ("column", "", False)
    torn = split_rows("column", groups=[1, 2, 3, 4, 5, 6, 7, 1], column=column, seed=1)
    assert torn.leaks_groups


def test_missing_validation_is_cut_from_train_in_whole_groups_and_said():
    groups = np.arange(200) // 5
    column = np.where(groups < 32, "train", "test")
    split = split_rows("column", groups=groups, column=column, seed=42)
    check_partition(split, 200)
    assert not split.leaks_groups
    assert np.array_equal(split.test, np.flatnonzero(column == "test"))
    assert split.val.size == 20
    assert split.note == ("no row is marked val: 20 of 160 train rows, in whole groups, became validation with seed 42")
    assert split.to_json() == {
        "kind": "column",
        "leaks_groups": False,
        "seeds": [42],
        "rows": {"train": 140, "val": 20, "test": 40},
        "note": split.note,
    }
    uncut = split_rows("column", groups=groups, column=column, seed=42, fractions=(0.8, 0.0, 0.2))
    assert (uncut.val.size, uncut.note) == (0, "")


def test_repeats_are_consecutive_and_begin_with_the_seed():
    assert repeat_seeds(42, 3) == (42, 43, 44)
    assert repeat_seeds(0, 1) == (0,)


SIX = np.arange(6)
COLUMN = np.array(["train", "train", "train", "train", "test", "test"])
FIT = "give train,val,test that sum to 1, train above 0, for example 0.7,0.1,0.2"
MORE = "use --split random, or name a column with more groups"
ERRORS = [
    ("groupd", SIX, {}, "--split: unknown split 'groupd'; did you mean 'grouped'?"),
    ("grouped", [7] * 6, {}, f"--split grouped: only one group in 6 rows, 3 are needed; {MORE}"),
    ("grouped", [7, 7, 8], {}, f"--split grouped: only 2 groups in 3 rows, 3 are needed; {MORE}"),
    ("grouped", [], {}, "--split grouped: 0 rows cannot fill 3 sides; add rows"),
    ("random", [1, 2], {}, "--split random: 2 rows cannot fill 3 sides; add rows"),
    ("random", SIX, {"fractions": (0.7, 0.2, 0.2)}, f"--fractions: fractions 0.7,0.2,0.2 do not fit; {FIT}"),
    ("grouped", SIX, {"fractions": (0.0, 0.5, 0.5)}, f"--fractions: fractions 0,0.5,0.5 do not fit; {FIT}"),
    (
        "grouped",
        SIX,
        {"fractions": (1.2, -0.4, 0.2)},
        f"--fractions: fractions 1.2,-0.4,0.2 do not fit; {FIT}",
    ),
    ("grouped", SIX, {"fractions": (0.8, 0.2)}, f"--fractions: fractions 0.8,0.2 do not fit; {FIT}"),
    (
        "grouped",
        SIX,
        {"fractions": (float("nan"), 0, 1)},
        f"--fractions: fractions nan,0,1 do not fit; {FIT}",
    ),
    ("column", SIX, {}, "--split column: the data has no split column; add one, or use --split grouped"),
    (
        "column",
        SIX,
        {"column": ["train", "trian", "zebra", "test", "test", "val"]},
        "--split column: unknown split 'trian' in row 2; did you mean 'train'?",
    ),
    (
        "column",
        SIX,
        {"column": ["train", "val", "test", "test", "", "holdout"]},
        "--split column: unknown split '' in row 5; known: train, val, test",
    ),
    (
        "column",
        SIX,
        {"column": ["test"] * 6},
        "--split column: no row is marked train; mark some, or use --split grouped",
    ),
    (
        "column",
        SIX,
        {"column": ["train"] * 6},
        "--split column: no row is marked test; mark some, or use --split grouped",
    ),
    (
        "column",
        [1, 1, 1, 1, 2, 2],
        {"column": COLUMN},
        f"--split column: only one group in 4 rows, 2 are needed; {MORE}",
    ),
]


@pytest.mark.parametrize(("kind", "groups", "options", "line"), ERRORS, ids=[error[-1] for error in ERRORS])
def test_every_mistake_is_one_line(kind, groups, options, line):
    with pytest.raises(UserError) as error:
        split_rows(kind, groups=np.asarray(groups, dtype=np.int64), seed=1, **options)
    assert str(error.value) == line


def test_no_repeats_and_a_column_of_another_length():
    with pytest.raises(UserError) as error:
        repeat_seeds(42, 0)
    assert str(error.value) == "--repeats: 0 repeats; give 1 or more"
    with pytest.raises(ValueError, match=r"^5 split values for 6 rows$"):
        split_rows("column", groups=SIX, column=COLUMN[1:], seed=1)
