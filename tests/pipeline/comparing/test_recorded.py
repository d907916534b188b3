"""Rows of several runs as pairs: by image and prompt, doubles by place; by content where the runs know it."""

from __future__ import annotations

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.comparing.run_differences import (
    check_labels,
    common_test_rows,
    of_equal_names,
    read_tables,
    seen_in_training,
    trained_on_test_of_others,
)
from deltaclip.pipeline.rows.cached_rows import RowKeys, text_keys, write_keys
from deltaclip.tests.pipeline.conftest import write_csv

ROWS = [
    # image, prompt, split, label of quality, its score
    ("a.png", "x", "train", "0.1", "0.5"),
    ("b.png", "x", "test", "0.2", "0.6"),
    ("b.png", "x", "test", "0.3", "0.7"),
    ("c.png", "y", "test", "0.4", "0.8"),
    ("d.png", "z", "val", "", "0.9"),
]


def table(folder, name, rows):
    names = ("image", "prompt", "split", "quality_label", "quality")
    more = {"consistency_label": "", "consistency": ""}
    full = [dict(zip(names, row, strict=True)) | {"group": row[1]} | more for row in rows]
    write_csv(folder / name, full)
    return folder / name


def read(*paths):
    return read_tables(paths)[0]


def test_rows_are_paired_in_whatever_order_they_stand(tmp_path):
    first = table(tmp_path, "a.csv", ROWS)
    second = table(tmp_path, "b.csv", [ROWS[3], ("e.png", "y", "test", "0.5", "0.1"), ROWS[1], ROWS[0], ROWS[2]])
    first, second = read(first, second)
    rows = common_test_rows([first, second])
    assert rows[0].tolist() == [1, 2, 3]
    assert rows[1].tolist() == [2, 4, 0]
    assert first.scores["quality"][rows[0]].tolist() == second.scores["quality"][rows[1]].tolist()
    check_labels([first, second], rows, "quality")
    check_labels([first, second], rows, "consistency")  # missing in both
    assert common_test_rows(read(first.path, second.path, table(tmp_path, "c.csv", ROWS[:2])))[2].tolist() == [1]


def keyed(folder, name, rows, images):
    path = table(folder / name, "predictions.csv", rows)
    keys = RowKeys(
        image_N=np.array(images, dtype=np.uint64),
        text_N=text_keys([row[1] for row in rows]),
        tokens_N=np.zeros(len(rows), dtype=np.uint64),
    )
    write_keys(path.parent / "rows.safetensors", keys)
    return path


def test_rows_are_paired_by_content_whatever_files_are_called(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    first = keyed(tmp_path, "a", ROWS, [1, 2, 2, 3, 4])
    renamed = [("z.png", *ROWS[3][1:]), ("y.png", *ROWS[1][1:])]
    second = keyed(tmp_path, "b", renamed, [3, 2])
    tables, by_content = read_tables([first, second])
    assert by_content
    assert [rows.tolist() for rows in common_test_rows(tables)] == [[1, 3], [1, 0]]
    others = read(first, keyed(tmp_path, "c", ROWS, [11, 12, 12, 13, 14]))
    assert common_test_rows(others)[0].size == 0
    assert of_equal_names(others) == 3
    (tmp_path / "c" / "rows.safetensors").unlink()  # one run of before: names are all that both have
    tables, by_content = read_tables([first, tmp_path / "c" / "predictions.csv"])
    assert not by_content
    assert common_test_rows(tables)[1].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("label", "shown"), [("0.35", "0.35"), ("", "nan")])
def test_other_labels_are_refused_by_row(tmp_path, label, shown):
    first = table(tmp_path, "a.csv", ROWS)
    second = table(tmp_path, "b.csv", [*ROWS[:2], ("b.png", "x", "test", label, "0.7"), *ROWS[3:]])
    first, second = read(first, second)
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
    first, second = read(first, second)
    assert trained_on_test_of_others([first, second]) == [1, 1]
    rows = common_test_rows([first, second])
    assert [seen_in_training(first, rows[0]), seen_in_training(second, rows[1])] == [2, 0]
    (one_prompt,) = read(table(tmp_path, "c.csv", [("a.png", "x", "train", "", ""), ("b.png", "x", "test", "", "")]))
    assert seen_in_training(one_prompt, common_test_rows([one_prompt])[0]) == 0


def test_damaged_tables_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        read(table(tmp_path, "a.csv", [("a.png", "x", "test", "good", "0.5")]))
    words = "column quality_label: could not convert string to float: 'good'"
    assert str(error.value) == f"{tmp_path / 'a.csv'}: {words}; train again"
    (tmp_path / "b.csv").write_text("image,prompt,quality_label\na,b,0.5\n")
    with pytest.raises(UserError, match="has no column 'group'; train again"):
        read(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("image,prompt\na,b\n")
    with pytest.raises(UserError) as error:
        read(tmp_path / "c.csv")
    assert str(error.value) == f"{tmp_path / 'c.csv'}: has no column of labels, such as 'quality_label'; train again"
