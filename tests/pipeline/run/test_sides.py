"""The sides of a run's rows: as asked, as recorded, and refused where the shares do not fit."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest

from deltaclip.base.errors import UserError
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
    assert str(error.value) == "--split column: the data has no split column; add one, or use --split grouped"


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
