"""Tables of scores: every format says the same, whole or not at all."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.heads import HeadSpec, TargetSpec, build_heads
from deltaclip.pipeline.model.scores import Batch
from deltaclip.pipeline.runs.prediction_table import (
    ScoreColumns,
    Scores,
    blank_untrained,
    read_blocks,
    score,
    write_table,
)

WORDS = ["plain", 'a "quoted", word', "two\nlines", "", "naïve – 图"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".CSV"])
def test_every_format_keeps_text_numbers_and_gaps(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    values = np.array([0.125, np.nan, 1e-7, 0.2, 1.0], dtype=np.float32)
    write_table(path, {"word": WORDS, "value": values, "row": [1, 2, 3, 4, 5]})
    if suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        rows = pq.read_table(path).to_pylist()
    assert [row["word"] for row in rows] == WORDS
    found = [None if row["value"] in ("", None) else float(row["value"]) for row in rows]
    assert found == [0.125, None, pytest.approx(1e-7, rel=1e-6), pytest.approx(0.2), 1.0]
    assert [int(row["row"]) for row in rows] == [1, 2, 3, 4, 5]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@settings(deadline=None, max_examples=60)
@given(value=st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_six_digits_of_every_size_are_kept(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "one.csv"
    write_table(path, {"value": np.array([value], dtype=np.float32)})
    assert float(path.read_text().splitlines()[1]) == pytest.approx(value, rel=1e-5, abs=0)


@pytest.mark.parametrize("text", ["a\rb", "\r", "a\r\nb", 'a\n"b",', " a\r"])
def test_texts_of_several_lines_come_back(tmp_path, text):
    path = tmp_path / "p.csv"
    write_table(path, {"image": np.array(["1.png", "2.png"], dtype=object), "prompt": [text, "b"], "q": [1.0, 2.0]})
    assert list(read_blocks(path, ("image", "prompt"))) == [[["1.png", "2.png"], [text, "b"]]]
    assert path.read_bytes().endswith(b"2.png,b,2.0\n")


def test_columns_of_unequal_length_write_nothing(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_table(tmp_path / "x.csv", {"a": [1, 2], "b": [1]})
    assert list(tmp_path.iterdir()) == []


def test_a_table_replaces_an_older_one(tmp_path):
    for value in (1, 2):
        write_table(tmp_path / "x.jsonl", {"a": [value]})
    assert (tmp_path / "x.jsonl").read_text() == '{"a": 2}\n'


@pytest.mark.parametrize("name", ["x.txt", "x", "csv"])
def test_an_unknown_suffix_is_refused(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(UserError) as error:
        write_table(path, {"a": [1]})
    assert str(error.value) == f"{path}: unknown suffix {path.suffix!r}; use one of .csv, .jsonl, .parquet"


def test_scores_are_clamped_and_corrections_come_with_their_scale():
    heads = build_heads(HeadSpec(dim=4).with_scales({"quality": 0.3, "consistency": 0.1}))
    with torch.no_grad():
        heads.quality_head.base.bias.fill_(9.0)  # a base of almost 1
        heads.quality_head.mlp.out.bias.fill_(9.0)  # a correction of almost 1 times the scale
        heads.consistency_head.fusion.out.bias.fill_(-9.0)
    v = torch.nn.functional.normalize(torch.ones(3, 4), dim=1)
    found = score(heads, [Batch(v, v, {})])
    quality, consistency = found.targets["quality"], found.targets["consistency"]
    assert quality.score.tolist() == [1.0] * 3
    assert quality.delta == pytest.approx(0.3, abs=1e-6)
    assert consistency.delta == pytest.approx(-0.1, abs=1e-6)
    assert consistency.base == pytest.approx(1.0, abs=1e-6)  # s = 1
    assert consistency.score == pytest.approx(0.9, abs=1e-6)
    assert found.of("quality") is quality.score
    assert found.of("consistency") is consistency.score
    assert np.isnan(found.of("authenticity")).tolist() == [True] * 3


TARGETS = (TargetSpec("quality", "image"), TargetSpec("lighting", "image"), TargetSpec("consistency", "pair"))


@pytest.mark.parametrize("kind", ["residual", "direct"])
def test_columns_are_named_by_target_and_two_have_short_names_too(kind):
    """A row without a prompt, whose t is 0, has nothing to say of targets that see one."""
    heads = build_heads(HeadSpec(dim=4, kind=kind, targets=TARGETS))
    v, t = (torch.nn.functional.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
    t[[1, 4]] = 0
    found = score(heads, [Batch(v[:2], t[:2], {}), Batch(v[2:], t[2:], {})]).columns()
    names = [name for target in TARGETS for name in (target.name, f"{target.name}_base", f"{target.name}_delta")]
    assert list(found) == [*names, "q", "c"]
    assert found["q"] is found["quality"]
    assert found["c"] is found["consistency"]
    blind = [False, True, False, False, True]
    for name, values in found.items():
        assert values.dtype == np.float32
        if kind == "direct" and name.endswith(("_base", "_delta")):
            assert np.isnan(values).all()
        else:
            assert np.isnan(values).tolist() == (blind if name.startswith("c") else [False] * 5)


def test_heads_without_labels_are_blanked():
    column = np.ones(2, dtype=np.float32)
    full = Scores({target: ScoreColumns(column, column, column) for target in ("quality", "consistency")})
    half = blank_untrained(full, ["quality"])
    blank = [name for name, values in half.columns().items() if np.isnan(values).all()]
    assert blank == ["consistency", "consistency_base", "consistency_delta", "c"]
    assert all(values is column for values in blank_untrained(full, ["quality", "consistency"]).columns().values())
