"""The sides of a run's rows: as asked, as recorded, and refused where the shares do not fit."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.data.prompts import prompt_group
from deltaclip.features.store.texts import TextColumn, Texts
from deltaclip.pipeline.rows.cached_rows import load_rows, write_keys
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.run_split import split_of_run
from deltaclip.tests.pipeline.conftest import read_csv, write_csv


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


def with_prompts(rows, prompts):
    """Return the rows with other prompts, each text once, and no tokens."""
    names = sorted(set(prompts))
    codes = np.array([names.index(prompt) for prompt in prompts])
    column = TextColumn(codes, Texts.of(names))
    changed = replace(rows.rows, prompt=codes, text=rows.rows.text | {"prompt": column})
    return replace(rows, rows=changed, tokens_T=np.zeros(len(names), dtype=np.uint64))


def with_other_images(rows, places):
    """Return the rows with other content under the names of some."""
    keys = rows.image_key_I.copy()
    keys[rows.rows.image[places]] += np.uint64(1)
    return replace(rows, image_key_I=keys)


def test_new_rows_of_the_own_cache_are_test(demo_run, rows):
    run = open_run(demo_run)
    before = split_of_run(run, rows)
    found = split_of_run(run, with_other_images(rows, np.arange(230, 240)))
    assert found.train.tolist() == before.train[before.train < 230].tolist()
    assert set(range(230, 240)) <= set(found.test)
    assert found.note.startswith("10 rows are new since the training and count as test; ")
    assert "test rows have a prompt that the run trained on" in found.note


def test_other_names_of_files_and_groups_change_nothing(demo_run, rows):
    run = open_run(demo_run)
    before = split_of_run(run, rows)
    order = np.random.default_rng(0).permutation(240)
    text = {name: column[order] for name, column in rows.rows.text.items()}
    moved = with_text(rows, image=rows.rows.image[order], **text)
    moved = replace(moved, rows=replace(moved.rows, prompt=rows.rows.prompt[order]))
    found = split_of_run(run, with_text(moved, file=[f"x{i}.png" for i in range(240)], group=["g"] * 240))
    for side in ("train", "val", "test"):
        assert sorted(order[getattr(found, side)]) == getattr(before, side).tolist()
    assert not found.leaks_groups


def test_of_a_pair_on_two_sides_the_one_that_was_learned_from_counts(demo_run, rows, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    keys = rows.keys
    twice = replace(keys, **{name: np.tile(getattr(keys, name)[:120], 2) for name in ("image_N", "text_N", "tokens_N")})
    write_keys(run / "rows.safetensors", twice)
    recorded = read_csv(run / "predictions.csv")
    write_csv(
        run / "predictions.csv", [row | {"split": "test" if i < 120 else "train"} for i, row in enumerate(recorded)]
    )
    assert split_of_run(open_run(run), rows).train.tolist() == list(range(120))


def of_before(demo_run, tmp_path, *, plan=None):
    """Return a run as earlier releases wrote it, of this cache or of another."""
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    (run / "rows.safetensors").unlink()
    config = json.loads((run / "config.json").read_text())
    config["cache"]["plan"] = plan or config["cache"]["plan"]
    (run / "config.json").write_text(json.dumps(config))
    return open_run(run)


def test_a_run_of_before_knows_its_own_cache_by_its_fingerprint(demo_run, rows, tmp_path):
    run = of_before(demo_run, tmp_path)
    found = split_of_run(run, with_text(rows, file=[f"x{i}.png" for i in range(240)]))
    assert found.test.tolist() == split_of_run(open_run(demo_run), rows).test.tolist()
    assert found.note == ""


def test_a_run_of_before_knows_other_caches_by_names_and_says_so(demo_run, rows, tmp_path):
    run = of_before(demo_run, tmp_path, plan="another")
    sentence = "images are compared by name: the content of their files is not known of both sides"
    files = [*rows.rows.text["file"][:230], *(f"new-{i}.png" for i in range(10))]
    found = split_of_run(run, with_text(rows, file=files))
    assert set(range(230, 240)) <= set(found.test)
    assert found.note.startswith("10 rows are new since the training and count as test; ")
    assert found.note.endswith(sentence)


def test_rows_that_were_taken_out_of_the_table_leave_it_to_names(demo_run, rows, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    write_csv(run / "predictions.csv", read_csv(run / "predictions.csv")[:-1])
    assert "images are compared by name" in split_of_run(open_run(run), rows).note


def test_keys_that_are_damaged_are_named(demo_run, rows, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    (run / "rows.safetensors").write_bytes(b"\0nothing")
    with pytest.raises(UserError, match=r"rows\.safetensors: cannot be read \(.*\); train again$"):
        split_of_run(open_run(run), rows)


SPELLINGS = ["a cat", "A  cat.", "\u201ca cat\u201d", "a&amp;#32;cat"]


@pytest.mark.parametrize("stored", ["now", "before"])
def test_spellings_of_a_prompt_stay_on_one_side(rows, stored):
    prompts = [f"{SPELLINGS[i % 3]} {i // 4}." if i % 2 else f"{SPELLINGS[i % 3]} {i // 4}" for i in range(240)]
    groups = [prompt_group(p) if stored == "now" else " ".join(p.split()).casefold() for p in prompts]
    spelled = with_text(with_prompts(rows, prompts), group=groups)
    split = split_cache(spelled, "grouped", fractions="0.6,0.2,0.2", seed=0)
    sides = {}
    for side in ("train", "val", "test"):
        for row in getattr(split, side):
            sides.setdefault(prompt_group(prompts[row]), set()).add(side)
    assert all(len(found) == 1 for found in sides.values())
    assert not split.leaks_groups


def test_prompts_of_the_same_tokens_stay_on_one_side(rows):
    prompts = [f"prompt {i}" for i in range(240)]
    told = with_text(with_prompts(rows, prompts), group=prompts)
    names = told.rows.text["prompt"].names
    tokens = np.array([int(names[k].split()[1]) // 4 + 1 for k in range(240)], dtype=np.uint64)
    told = replace(told, tokens_T=tokens)
    split = split_cache(told, "grouped", fractions="0.6,0.2,0.2", seed=0)
    side = np.zeros(240, dtype=int)
    side[split.val], side[split.test] = 1, 2
    assert (side.reshape(60, 4) == side[::4, None]).all()
    assert not split.leaks_groups
    # Groups that somebody gave stay as they are, and the leak is said.
    given = with_text(told, group=[f"g{i}" for i in range(240)])
    split = split_cache(given, "grouped", fractions="0.6,0.2,0.2", seed=0)
    assert split.leaks_groups
    assert split.note.endswith("test rows have a prompt of another side")


def with_vectors(rows, change):
    vectors = rows.v_ID.float().clone()
    change(vectors)
    return replace(rows, v_ID=vectors)


def copy_some(vectors, *, count):
    vectors[240 - count :] = vectors[:count] + 1e-4


def test_near_copies_stay_on_one_side_and_are_said(rows):
    copied = with_vectors(rows, lambda vectors: copy_some(vectors, count=8))
    split = split_cache(copied, "grouped", fractions="0.6,0.2,0.2", seed=0)
    side = np.zeros(240, dtype=int)
    side[split.val], side[split.test] = 1, 2
    assert (side[:8] == side[232:]).all()
    assert not split.leaks_groups
    files = rows.rows.text["file"]
    assert split.note == f"8 pairs of images are near copies (for example {files[0]} and {files[232]})"


def test_near_copies_on_two_sides_are_a_leak(rows):
    copied = with_vectors(rows, lambda vectors: copy_some(vectors, count=8))
    marks = np.where(np.arange(240) < 120, "train", "test")
    marked = with_text(with_prompts(copied, ["same"] * 240), split=marks)
    split = split_cache(marked, "column", fractions="1,0,0", seed=0)
    assert split.leaks_groups
    assert split.note.startswith("8 test rows have a near copy of an image of another side; 8 pairs of images are near")


def test_a_backbone_that_sees_copies_everywhere_joins_nothing(rows):
    copied = with_vectors(rows, lambda vectors: copy_some(vectors, count=100))
    split = split_cache(copied, "grouped", fractions="0.6,0.2,0.2", seed=0)
    assert split.test.tolist() == split_cache(rows, "grouped", fractions="0.6,0.2,0.2", seed=0).test.tolist()
    assert "test rows have a near copy of an image of another side" in split.note
