"""The sides of a run's rows: as asked, as recorded, and refused where the shares do not fit."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.store.texts import TextColumn
from deltaclip.pipeline.run.folder import open_run
from deltaclip.pipeline.run.rows import load_rows
from deltaclip.pipeline.run.sides import split_cache, split_of_run
from deltaclip.tests.pipeline.conftest import read_csv


@pytest.fixture(scope="module")
def rows(demo_cache):
    return load_rows(demo_cache, "cpu")


@pytest.mark.parametrize("kind", ["grouped", "random"])
def test_shares_are_met(rows, kind):
    split = split_cache(rows, kind, fractions="0.5,0.25,0.25", seed=0)
    assert [side.size for side in (split.train, split.val, split.test)] == [120, 60, 60]
    assert split.leaks_groups is (kind == "random")


@pytest.mark.parametrize(
    ("fractions", "line"),
    [
        ("a,b,c", "--fractions: 'a,b,c' are no numbers; give train,val,test such as 0.7,0.1,0.2"),
        ("", "--fractions: '' are no numbers; give train,val,test such as 0.7,0.1,0.2"),
        *(
            (given, f"--fractions: fractions {shown} do not fit; give train,val,test that sum to 1, train above 0, "
             "for example 0.7,0.1,0.2")
            for given, shown in (
                ("0.5,0.5", "0.5,0.5"),
                ("0.7,0.1,0.3", "0.7,0.1,0.3"),
                ("0,0.5,0.5", "0,0.5,0.5"),
                ("1.2,-0.1,-0.1", "1.2,-0.1,-0.1"),
                ("nan,0.5,0.5", "nan,0.5,0.5"),
            )
        ),
    ],
)  # fmt: skip
def test_shares_that_do_not_fit(rows, fractions, line):
    with pytest.raises(UserError) as error:
        split_cache(rows, "grouped", fractions=fractions, seed=0)
    assert str(error.value) == line


def test_a_cache_without_marks_cannot_be_split_by_column(rows):
    with pytest.raises(UserError) as error:
        split_cache(rows, "column", fractions="0.7,0.1,0.2", seed=0)
    remedy = "add one to the manifest and extract again, or give --split grouped"
    assert str(error.value) == f"{rows.path}: has no split column; {remedy}"


def test_recorded_sides_are_used_not_dealt_again(demo_run, rows, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    recorded = read_csv(run / "predictions.csv")
    sides = np.random.default_rng(0).choice(["train", "val", "test"], size=len(recorded))
    with (run / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, recorded[0])
        writer.writeheader()
        writer.writerows(row | {"split": side} for row, side in zip(recorded, sides, strict=True))
    split = split_of_run(open_run(run), rows)
    for side in ("train", "val", "test"):
        assert getattr(split, side).tolist() == np.flatnonzero(sides == side).tolist()


def test_a_run_without_predictions_is_refused(demo_run, rows, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    (run / "predictions.csv").unlink()
    with pytest.raises(UserError) as error:
        split_of_run(open_run(run), rows)
    place = run / "predictions.csv"
    assert str(error.value) == f"{place}: cannot be read (No such file or directory); train again"


def with_text(rows, *, image=None, **text):
    changed = replace(rows.rows, text=rows.rows.text | {k: TextColumn.of(v) for k, v in text.items()})
    return replace(rows, rows=changed if image is None else replace(changed, image=np.asarray(image)))


def test_groups_with_an_image_in_common_stay_together(rows):
    # Image i stands in row i and in row i + 120, which has another prompt.
    shared = with_text(rows, image=np.arange(240) % 120)
    split = split_cache(shared, "grouped", fractions="0.6,0.2,0.2", seed=1)
    side = np.zeros(240, dtype=int)
    side[split.val], side[split.test] = 1, 2
    assert (side[:120] == side[120:]).all()
    assert len(set(side)) == 3
    assert not split.leaks_groups
    order = np.random.default_rng(0).permutation(240)
    moved = with_text(shared, image=shared.rows.image[order], **{k: v[order] for k, v in shared.rows.text.items()})
    moved = replace(moved, rows=replace(moved.rows, prompt=rows.rows.prompt[order]))
    again = split_cache(moved, "grouped", fractions="0.6,0.2,0.2", seed=1)
    assert set(order[again.test]) == set(split.test)


def test_groups_finer_than_prompts_leak_and_say_so(rows):
    fine = with_text(rows, group=[f"g{i}" for i in range(240)])
    split = split_cache(fine, "grouped", fractions="0.6,0.2,0.2", seed=0)
    assert split.leaks_groups
    assert split.note.endswith("test rows have a prompt of another side")


def test_an_image_on_two_sides_of_a_column_is_a_leak(rows):
    marks = np.where(np.arange(240) < 120, "train", "test")
    twice = with_text(rows, image=np.arange(240) % 120, split=marks, prompt=["same"] * 240)
    twice = replace(twice, rows=replace(twice.rows, prompt=np.zeros(240, dtype=np.int64)))
    split = split_cache(twice, "column", fractions="1,0,0", seed=0)
    assert split.leaks_groups
    assert split.note == "120 test rows have an image of another side"


def test_new_rows_of_the_own_cache_are_test(demo_run, rows):
    run = open_run(demo_run)
    before = split_of_run(run, rows)
    files = [*rows.rows.text["file"][:230], *(f"new-{i}.png" for i in range(10))]
    found = split_of_run(run, with_text(rows, file=files))
    kept = before.train[before.train < 230]
    assert (found.train == kept).all()
    assert set(range(230, 240)) <= set(found.test)
    assert found.note.startswith("10 rows are new since the training and count as test")
