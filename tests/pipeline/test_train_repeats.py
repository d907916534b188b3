"""`train --repeats`: each repeat is a training of its own, and every figure is a mean with its SD and values."""

from __future__ import annotations

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.settings import MAX_SEED, EvaluateConfig
from deltaclip.pipeline.train import train
from deltaclip.pipeline.training import train_heads as learning
from deltaclip.tests.pipeline.conftest import EPOCHS, TrainConfig, read_csv, read_json, same_weights, weights_of

SEEDS = [42, 43, 44]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory, demo_cache):
    out = tmp_path_factory.mktemp("repeated") / "run"
    return train(TrainConfig(cache=demo_cache, out=out, epochs=EPOCHS, repeats=3, base="calibrated"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, demo_cache, demo_run):
    """Run directories of the same seeds, each trained alone."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {
        seed: train(
            TrainConfig(cache=demo_cache, out=folder / str(seed), epochs=EPOCHS, seed=seed, base="calibrated")
        ).run
        for seed in SEEDS[1:]
    }
    return {42: demo_run, **runs}


def figures(repeated, single, path=()):
    """Yield every leaf of the combined metrics with the leaves of the same place in each single one."""
    if isinstance(repeated, dict) and set(repeated) == {"mean", "sd", "values"}:
        yield path, repeated, single
    elif isinstance(repeated, dict):
        for name, value in repeated.items():
            yield from figures(value, [one[name] for one in single], (*path, name))
    elif isinstance(repeated, list):
        for place, value in enumerate(repeated):
            yield from figures(value, [one[place] for one in single], (*path, place))
    else:
        assert not isinstance(repeated, float), f"{path} is a plain figure"


def test_every_figure_is_that_of_the_seeds_trained_alone(repeated, alone):
    single = [read_json(run / "metrics.json") for run in alone.values()]
    combined = {name: value for name, value in repeated.metrics.items() if name not in ("split", "verdict")}
    found = list(figures(combined, single))
    assert len(found) > 100
    for path, figure, values in found:
        assert figure["values"] == values, path
        if None in values:  # the prompt explains nothing in some split: its k is infinite
            assert path[-1] == "shrinkage", path
            continue
        assert figure["mean"] == pytest.approx(np.mean(values)), path
        assert figure["sd"] == pytest.approx(np.std(values, ddof=1)), path
    assert repeated.metrics["split"]["seeds"] == SEEDS
    assert repeated.metrics["split"]["rows"]["test"]["values"] == [one["split"]["rows"]["test"] for one in single]
    assert list(repeated.metrics) == list(single[0])


def test_the_run_keeps_the_first_repeat_and_the_predictions_of_all(repeated, alone, demo_run):
    names = {path.name for path in repeated.run.iterdir()}
    assert names - {path.name for path in demo_run.iterdir()} == {"predictions_43.csv", "predictions_44.csv"}
    assert same_weights(weights_of(repeated.run), weights_of(demo_run))
    for seed, run in alone.items():
        name = "predictions.csv" if seed == 42 else f"predictions_{seed}.csv"
        assert (repeated.run / name).read_bytes() == (run / "predictions.csv").read_bytes()
    before, after = (read_csv(path / "history.csv") for path in (demo_run, repeated.run))
    assert [row | {"seconds": ""} for row in before] == [row | {"seconds": ""} for row in after]
    config = read_json(repeated.run / "config.json")
    assert config["kept"] == "heads, history.csv and predictions.csv are those of the first repeat, split seed 42"
    assert [one["split"]["seeds"] for one in config["repeats"]] == [[42], [43], [44]]
    best = [read_json(run / "config.json")["best_epoch"] for run in alone.values()]
    assert [one["best_epoch"] for one in config["repeats"]] == best
    assert read_json(repeated.run / "metrics.json") == repeated.metrics
    assert "kept" not in read_json(demo_run / "config.json")


def test_the_table_shows_mean_and_sd_also_of_the_floors(repeated):
    lines = repeated.summary().splitlines()
    assert "mean ± SD of 3 repeats, split seeds 42 to 44" in lines
    for name, figure in (
        ("trained heads", repeated.metrics["test"]["quality"]["srocc"]),
        ("floor: no image", repeated.metrics["floors"]["no_image"]["quality"]["srocc"]),
    ):
        (line, *_) = [line for line in lines if name in line]
        assert f"{figure['mean']:.3f} ± {figure['sd']:.3f}" in line
    (where,) = [line for line in lines if line.startswith("run: ")]
    assert "keeps the first of 3 repeats, split seed 42: best epoch" in where
    verdict = repeated.metrics["verdict"]
    assert lines[lines.index("verdict: difference of SROCC on test rows, 95 % interval") - 1] == ""
    assert f"quality      {verdict['quality']['sentence']}" in lines[lines.index(where) :]
    assert "over 3 splits" in verdict["quality"]["sentence"]
    assert not any("SROCC 95 %" in line for line in lines)


def test_evaluate_scores_the_first_repeat(repeated, demo_run):
    found = evaluate(EvaluateConfig(run=repeated.run))
    assert found.metrics == read_json(demo_run / "metrics.json")
    assert "the heads of the first of 3 repeats, split seed 42\n" in found.summary()
    assert "repeats" not in evaluate(EvaluateConfig(run=demo_run)).summary()


def test_a_data_seed_counts_up_beside_the_seed(train_demo, demo_run, capsys):
    run = train_demo(repeats=2, seed=1, data_seed=42, epochs=1)
    assert run.metrics["split"]["seeds"] == [42, 43]
    line = "repeats       2: split seeds 42 to 43, initial weights of their own; the run keeps the heads of the first"
    assert line in capsys.readouterr().err.splitlines()
    sides = [[row["split"] for row in read_csv(path / "predictions.csv")] for path in (run.run, demo_run)]
    assert sides[0] == sides[1]
    second = train_demo(seed=2, data_seed=43, epochs=1)
    assert (run.run / "predictions_43.csv").read_bytes() == (second.run / "predictions.csv").read_bytes()


def test_the_bar_says_which_repeat(train_demo, monkeypatch):
    bars = []

    class Bar(learning.Progress):
        def __init__(self, total, what, *, unit):
            bars.append(what)
            super().__init__(total, what, unit=unit)

    monkeypatch.setattr(learning, "Progress", Bar)
    train_demo(repeats=2, epochs=1)
    train_demo(epochs=1)
    assert bars == ["training 1 of 2", "training 2 of 2", "training"]


def test_repeats_of_a_given_split_differ_in_their_weights_alone(train_demo, relabelled, capsys):
    def mark(rows):
        for number, row in enumerate(rows):
            row["split"] = ("train", "val", "test")[number // 6 % 3]

    run = train_demo(cache=relabelled(mark), split="column", repeats=2, epochs=1, residual_learning=False)
    words = "--split column gives every repeat the same test rows: the SD is that of the initial weights"
    assert capsys.readouterr().err.count(f"warning: {words}\n") == 1
    first, second = (read_csv(run.run / name) for name in ("predictions.csv", "predictions_43.csv"))
    assert [row["split"] for row in first] == [row["split"] for row in second]
    assert [row["q"] for row in first] != [row["q"] for row in second]


def test_the_last_seed_has_the_same_bound(train_demo, tmp_path):
    with pytest.raises(UserError) as error:
        train_demo(seed=MAX_SEED, repeats=2)
    assert str(error.value) == f"--seed: {MAX_SEED + 1} is out of range; give a value at most {MAX_SEED}"
    assert not list(tmp_path.iterdir())
