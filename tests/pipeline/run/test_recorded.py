"""Rows of several runs as pairs: by image and prompt, doubles by place."""

from __future__ import annotations

import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.run.recorded import (
    check_labels,
    common_test_rows,
    read_recorded,
    seen_in_training,
    trained_on_test_of_others,
)
from deltaclip.tests.pipeline.conftest import write_csv

ROWS = [
    # image, prompt, split, quality, q
    ("a.png", "x", "train", "0.1", "0.5"),
    ("b.png", "x", "test", "0.2", "0.6"),
    ("b.png", "x", "test", "0.3", "0.7"),
    ("c.png", "y", "test", "0.4", "0.8"),
    ("d.png", "z", "val", "", "0.9"),
]


def table(folder, name, rows):
    names = ("image", "prompt", "split", "quality", "q")
    full = [dict(zip(names, row, strict=True)) | {"group": row[1], "consistency": "", "c": ""} for row in rows]
    write_csv(folder / name, full)
    return read_recorded(folder / name)


def test_rows_are_paired_in_whatever_order_they_stand(tmp_path):
    first = table(tmp_path, "a.csv", ROWS)
    second = table(tmp_path, "b.csv", [ROWS[3], ("e.png", "y", "test", "0.5", "0.1"), ROWS[1], ROWS[0], ROWS[2]])
    rows = common_test_rows([first, second])
    assert rows[0].tolist() == [1, 2, 3]
    assert rows[1].tolist() == [2, 4, 0]
    assert first.scores["quality"][rows[0]].tolist() == second.scores["quality"][rows[1]].tolist()
    check_labels([first, second], rows, "quality")
    check_labels([first, second], rows, "consistency")  # missing in both
    assert common_test_rows([first, second, table(tmp_path, "c.csv", ROWS[:2])])[2].tolist() == [1]


@pytest.mark.parametrize(("label", "shown"), [("0.35", "0.35"), ("", "nan")])
def test_other_labels_are_refused_by_row(tmp_path, label, shown):
    first = table(tmp_path, "a.csv", ROWS)
    second = table(tmp_path, "b.csv", [*ROWS[:2], ("b.png", "x", "test", label, "0.7"), *ROWS[3:]])
    with pytest.raises(UserError) as error:
        check_labels([first, second], common_test_rows([first, second]), "quality")
    assert str(error.value) == (
        f"{tmp_path / 'b.csv'}: 1 of 3 rows have another quality than in {tmp_path / 'a.csv'}: "
        f"that of b.png is {shown} here, 0.3 there; compare runs on the same labels"
    )


def test_what_a_run_has_seen(tmp_path):
    first = table(tmp_path, "a.csv", ROWS)
    swapped = [("a.png", "x", "test", "0.1", "0.5"), ("c.png", "Y ", "train", "0.4", "0.8"), *ROWS[1:3]]
    second = table(tmp_path, "b.csv", [*swapped, ("c.png", "y", "train", "0.4", "0.8")])
    assert trained_on_test_of_others([first, second]) == [1, 1]
    rows = common_test_rows([first, second])
    assert [seen_in_training(first, rows[0]), seen_in_training(second, rows[1])] == [2, 0]
    one_prompt = table(tmp_path, "c.csv", [("a.png", "x", "train", "", ""), ("b.png", "x", "test", "", "")])
    assert seen_in_training(one_prompt, common_test_rows([one_prompt])[0]) == 0


def test_damaged_tables_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        table(tmp_path, "a.csv", [("a.png", "x", "test", "good", "0.5")])
    words = "column quality: could not convert string to float: 'good'"
    assert str(error.value) == f"{tmp_path / 'a.csv'}: {words}; train again"
    (tmp_path / "b.csv").write_text("image,prompt\na,b\n")
    with pytest.raises(UserError, match="has no column 'group'; train again"):
        read_recorded(tmp_path / "b.csv")
