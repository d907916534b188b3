"""Runs beside each other: which rows are compared, what is said of a difference, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from deltaclip.base.errors import UserError
from deltaclip.pipeline.compare import compare
from deltaclip.pipeline.rows.cached_rows import read_keys, write_keys
from deltaclip.pipeline.runs.run_split import with_near_trained
from deltaclip.pipeline.scoring.intervals import paired_difference
from deltaclip.pipeline.settings import CompareConfig
from deltaclip.pipeline.train import train
from deltaclip.tests.pipeline.conftest import EPOCHS, TrainConfig, calibrated, numbers, read_csv, written_again

LABELS = ("quality", "consistency")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_cache):
    """Train once per setting and keep the run for all tests of this module."""
    folder, runs = tmp_path_factory.mktemp("compared"), {}

    def run(**settings):
        key = json.dumps(settings, default=str)
        if key not in runs:
            out = folder / f"run{len(runs)}"
            runs[key] = train(
                TrainConfig(**{"cache": demo_cache, "out": out, "epochs": EPOCHS, **calibrated(settings)})
            ).run
        return runs[key]

    return run


def compared(*runs, **settings):
    return compare(CompareConfig(runs=list(runs), **settings))


def test_two_runs_on_one_split_are_compared_by_bootstrap_over_groups(demo_run, trained):
    direct = trained(residual_learning=False)
    found = compared(demo_run, direct).to_json()
    assert found["runs"] == [str(demo_run), str(direct)]
    assert (found["seeds"], found["over"], found["rows"], found["warnings"]) == ([42], "rows", [48], [])
    tables = [
        [row for row in read_csv(run / "predictions.csv") if row["split"] == "test"] for run in (demo_run, direct)
    ]
    for label in LABELS:
        first, second = found["labels"][label]
        a, b = (numbers(table, label) for table in tables)
        truth = numbers(tables[0], f"{label}_label")
        assert first["srocc"] == pytest.approx(stats.spearmanr(a, truth)[0])
        assert second["plcc"] == pytest.approx(stats.pearsonr(b, truth)[0])
        assert first["difference"] is None
        groups = [row["group"] for row in tables[0]]
        expected = paired_difference(b, a, truth, groups=groups, seed=0).to_json()
        assert second["difference"] == pytest.approx(expected)
        assert second["difference"]["difference"] == pytest.approx(second["srocc"] - first["srocc"])
        assert second["srocc_ci"][0] < second["srocc"] < second["srocc_ci"][1]


def test_a_run_does_not_differ_from_itself(demo_run, tmp_path):
    shutil.copytree(demo_run, tmp_path / "copy")
    _, second = compared(demo_run, tmp_path / "copy").to_json()["labels"]["quality"]
    assert second["difference"] == {"difference": 0, "lo": 0, "hi": 0, "p_value": 1}


@pytest.mark.slow
def test_repeats_are_paired_by_seed_and_judged_over_splits(demo_cache, trained):
    runs = trained(repeats=3), trained(repeats=4, seed=43, residual_scale_c=0.4)
    found = compared(*runs).to_json()
    assert (found["seeds"], found["over"], found["rows"]) == ([43, 44], "splits", [48, 48])
    for label in LABELS:
        expected = []
        for names in (("predictions_43.csv", "predictions.csv"), ("predictions_44.csv", "predictions_44.csv")):
            tables = [
                [row for row in read_csv(run / name) if row["split"] == "test"]
                for run, name in zip(runs, names, strict=True)
            ]
            a, b = (stats.spearmanr(numbers(rows, label), numbers(rows, f"{label}_label"))[0] for rows in tables)
            expected.append(b - a)
        difference = found["labels"][label][1]["difference"]
        assert difference["values"] == pytest.approx(expected)
        assert difference["mean"] == pytest.approx(np.mean(expected))
        # 48 of 240 rows are compared, 168 trained; t of one degree of freedom, as `ablate` has it.
        half = stats.t.ppf(0.975, 1) * np.std(expected, ddof=1) * np.sqrt(1 / 2 + 48 / 168)
        assert difference["hi"] - difference["mean"] == pytest.approx(half)
    lines = compared(*runs).summary().splitlines()
    assert lines[0] == (
        "48 rows that are test in all runs; differences from the first run: SROCC, mean over splits (seeds 43, 44), "
        "t-interval over splits, widened because they share training rows"
    )
    assert " ± " in lines[3]


def test_one_seed_in_common_is_a_comparison_over_rows(demo_run, trained):
    found = compared(trained(repeats=3), demo_run).to_json()
    assert (found["seeds"], found["over"]) == ([42], "rows")
    assert found["labels"]["quality"][1]["difference"]["difference"] == 0


@pytest.mark.slow
def test_repeats_on_one_split_are_judged_over_weights(trained, relabelled):
    def mark(rows):
        for number, row in enumerate(rows):
            row["split"] = ("train", "val", "test")[number // 6 % 3]

    cache = relabelled(mark)
    # Without a calibrated base, which may be the best epoch of every seed and is the same in all.
    settings = {"cache": cache, "split": "column", "repeats": 2, "residual_learning": False}
    runs = [trained(**settings, epochs=epochs) for epochs in (1, 2)]
    found = compared(*runs).to_json()
    assert found["over"] == "weights"
    difference = found["labels"]["consistency"][1]["difference"]
    assert difference["p_value"] == pytest.approx(stats.ttest_1samp(difference["values"], 0).pvalue)
    assert "over initial weights (seeds 42, 43) on one split" in compared(*runs).summary()


def test_other_splits_leave_the_rows_that_are_test_in_all_and_say_so(demo_run, trained):
    other = trained(seed=7, split="random")
    result = compared(demo_run, other)
    sides = [{row["image"]: row["split"] for row in read_csv(run / "predictions.csv")} for run in (demo_run, other)]
    common = [name for name in sides[0] if sides[0][name] == sides[1][name] == "test"]
    num_trained = sum(side == "test" != sides[1][name] for name, side in sides[0].items())
    assert result.to_json()["rows"] == [len(common)]
    assert result.to_json()["seeds"] == []
    lines = result.summary().splitlines()
    assert "warning: the runs have no split seed in common: the first training of each is compared" in lines
    words = "rows that are test in another run: only rows that are test in all are compared"
    assert f"warning: {other} trained on {num_trained} {words}" in lines
    assert any(line.startswith(f"warning: {other} has seen the prompt or the image of ") for line in lines)
    assert not any(line.startswith(f"warning: {demo_run} has seen") for line in lines)


def test_out_and_summary(demo_run, trained, tmp_path):
    out = tmp_path / "new" / "comparison.json"
    result = compared(demo_run, trained(residual_learning=False), trained(loss="rank"), out=out)
    assert json.loads(out.read_text()) == result.to_json()
    lines = result.summary().splitlines()
    assert lines[0].endswith("differences from the first run: SROCC, paired bootstrap over prompts")
    assert len(lines) == 2 + 2 * 4
    difference = result.to_json()["labels"]["quality"][1]["difference"]
    assert f"{difference['difference']:+.3f}" in lines[4]
    assert f"{difference['lo']:.3f} to {difference['hi']:.3f}" in lines[4]
    assert lines[4].endswith(f"{difference['p_value']:.3f}")


def test_a_label_that_is_not_in_all_is_left_out_and_said(demo_run, trained, relabelled):
    def drop(kept):
        def change(rows):
            for row in rows:
                row["quality" if kept == "consistency" else "consistency"] = ""

        return change

    one = trained(cache=relabelled(drop("quality")))
    result = compared(demo_run, one)
    assert list(result.to_json()["labels"]) == ["quality"]
    assert f"warning: {one} was not trained on consistency, which is not compared" in result.summary()
    with pytest.raises(UserError) as error:
        compared(one, trained(cache=relabelled(drop("consistency"))))
    assert str(error.value) == "RUNS: no label was trained in all runs; give runs that share one"
    assert compared(one, one).to_json()["warnings"] == []  # a label that no run knows is nothing to miss


def test_a_label_that_one_repeat_could_not_learn_is_left_out_and_said(demo_cache, trained, relabelled):
    """Too few labels for every split: the rows of one prompt, which trains in one repeat and is test in the other."""
    run = trained(repeats=3)
    first, second = (read_csv(run / name) for name in ("predictions.csv", "predictions_43.csv"))
    held = {row["prompt"] for row in second if row["split"] == "test"}
    held -= {row["prompt"] for row in first if row["split"] != "train"}

    def keep_one(rows):
        prompt = next(row["prompt"] for row in rows if row["prompt"] in held)
        for row in rows:
            row["consistency"] = row["consistency"] if row["prompt"] == prompt else ""

    run = trained(cache=relabelled(keep_one), repeats=2, epochs=1)
    result = compared(run, run)
    assert list(result.to_json()["labels"]) == ["quality"]
    assert f"warning: {run} was not trained on consistency, which is not compared" in result.summary()


def with_keys(run, out, change):
    """Return a copy of a run whose record of what its rows show was changed."""
    shutil.copytree(run, out)
    keys = read_keys(out / "rows.safetensors", num_rows=240)
    (out / "rows.safetensors").unlink()
    if changed := change(keys):
        write_keys(out / "rows.safetensors", changed)
    return out


def test_rows_that_have_nothing_in_common_are_refused(demo_run, tmp_path):
    other = with_keys(demo_run, tmp_path / "o", lambda keys: replace(keys, image_N=keys.image_N + np.uint64(1)))
    with pytest.raises(UserError) as error:
        compared(demo_run, other)
    assert str(error.value) == (
        f"{demo_run / 'predictions.csv'}: has no test row that is test in {other / 'predictions.csv'} too: 48 have an "
        "image of the same name, but of another content or prompt; "
        "train on the same data with the same --seed, --split and --fractions"
    )


def test_files_of_other_names_are_paired_by_their_content(demo_run, trained, relabelled):
    other = trained(cache=relabelled(lambda rows: [row | {"image": "./" + row["image"]} for row in rows]))
    found = compared(demo_run, other).to_json()
    assert found["rows"] == [48]
    assert found["warnings"] == []


@pytest.mark.slow
def test_a_run_that_learned_from_near_copies_of_compared_images_is_named(tmp_path, few_folder, few_cache):
    settings = {"epochs": 1, "base": "calibrated"}
    first = train(TrainConfig(cache=few_cache, out=tmp_path / "first", **settings)).run
    sides = {row["image"]: row["split"] for row in read_csv(first / "predictions.csv")}
    cache = written_again(tmp_path, few_folder, sides=sides)
    both = train(TrainConfig(cache=cache, out=tmp_path / "both", split="column", **settings)).run
    found = compared(first, both)
    said = [line for line in found.comparison["warnings"] if "near cop" in line]
    num_rows = list(sides.values()).count("test")
    assert said == [f"{both} has seen a near copy of the image of {num_rows} compared rows in training: it flatters"]
    cache.unlink()
    assert f"whether {both} has seen near copies of compared images is not known" in compared(first, both).summary()


def test_which_images_have_a_near_copy_that_was_learned_from():
    images, learned = (np.array(keys, dtype=np.uint64) for keys in ([1, 2, 3, 4, 5], [5, 6, 7]))
    pairs = np.array([[1, 6], [7, 2], [3, 4], [5, 6]], dtype=np.uint64)  # 5 was learned from itself
    assert with_near_trained(images, learned, pairs).tolist() == [True, True, False, False, False]
    assert not with_near_trained(images, learned, pairs[:0]).any()


def test_runs_of_before_are_paired_by_name_and_say_so(demo_run, tmp_path):
    old = with_keys(demo_run, tmp_path / "old", lambda _: None)
    assert compared(demo_run, old).to_json()["warnings"] == []  # of one state of one data set, by its fingerprint
    config = json.loads((old / "config.json").read_text())
    config["cache"]["plan"] = "another"
    (old / "config.json").write_text(json.dumps(config))
    found = compared(demo_run, old).to_json()
    assert found["rows"] == [48]
    assert found["warnings"] == ["rows are paired by name: not all runs recorded the content of their images"]


def test_other_labels_are_refused(demo_run, trained, relabelled):
    def move(rows):
        for row in rows:
            row["quality"] = f"{float(row['quality']) / 2:.4f}"

    with pytest.raises(UserError, match="48 of 48 rows have another quality than in"):
        compared(demo_run, trained(cache=relabelled(move), epochs=1))


def test_a_finished_run_is_not_written_to(demo_run, trained):
    before = (demo_run / "metrics.json").read_bytes()
    with pytest.raises(UserError) as error:
        compared(trained(loss="rank"), demo_run, out=demo_run / "metrics.json")
    remedy = "give a file outside: a finished run stays as it is"
    assert str(error.value) == f"{demo_run / 'metrics.json'}: lies in the run; {remedy}"
    assert (demo_run / "metrics.json").read_bytes() == before
