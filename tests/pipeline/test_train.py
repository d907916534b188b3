"""Training as a user sees it: what a run directory holds, what its numbers rest on, and what each setting does."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import random
import re

import numpy as np
import pytest
from scipy import stats

from deltaclip.base.errors import UserError
from deltaclip.base.options import settings_to_json
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.tests.pipeline.conftest import EPOCHS, numbers, read_csv, read_json, same_weights, weights_of

LABELS = ("quality", "consistency")
SIDES = ("train", "val", "test")
CHECKPOINT = "residual_frozen_best.safetensors"
FIGURES = {"srocc", "krocc", "plcc", "plcc_mapped", "rmse", "main", "n", "note"}


def embeddings(cache):
    with FeatureStore.open(cache) as store:
        rows = store.rows()
        v = store.embeddings("images").astype(np.float64)[rows.image]
        t = store.embeddings("texts").astype(np.float64)[rows.prompt]
    return v, t


# What a run directory holds


def test_run_directory_holds_exactly_what_is_promised(demo_run):
    names = {path.name for path in demo_run.iterdir()}
    tables = {"config.json", "history.csv", "metrics.json", "predictions.csv"}
    assert names == tables | {"rows.safetensors", "trust.safetensors", CHECKPOINT}


def test_config_says_how_to_repeat_the_run(demo_run, demo_cache):
    config = read_json(demo_run / "config.json")
    settings = TrainConfig(cache=demo_cache, out=demo_run, epochs=EPOCHS, base="calibrated")
    assert config["settings"] == settings_to_json(settings)
    assert set(config["settings"]) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert config["settings"]["seed"] == 42
    assert config["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"python", "deltaclip", "numpy", "scipy", "h5py", "open_clip_torch"} <= set(config["versions"])
    assert config["git"] is None or re.fullmatch("[0-9a-f]{40}", config["git"]["commit"])
    with FeatureStore.open(demo_cache) as store:
        assert config["cache"]["plan"] == store.header["plan"]
        assert config["request"] == store.header["request"]
        assert config["backbone"] == store.facts
    assert config["cache"]["path"] == str(demo_cache)
    assert config["labels"] == list(LABELS)
    assert config["scales"] == pytest.approx({"quality": 0.2, "consistency": 0.2})
    assert config["targets"] == [{"name": "quality", "sees": "image"}, {"name": "consistency", "sees": "pair"}]
    assert any("clamp(sigmoid(w . v + b0) + 0.2 tanh(MLP(v)), 0, 1)" in line for line in config["description"])
    assert any("image tower: all frozen; text tower: all frozen" in line for line in config["description"])


def test_calibration_is_a_least_squares_line_through_training_rows(demo_run, demo_cache):
    calibration = read_json(demo_run / "config.json")["calibration"]
    rows = read_csv(demo_run / "predictions.csv")
    train = np.array([row["split"] == "train" for row in rows])
    v, t = embeddings(demo_cache)
    x, y = ((v * t).sum(axis=1) + 1) / 2, numbers(rows, "consistency_label")
    slope, offset = np.polyfit(x[train], y[train], 1)
    # Labels are stored with six digits in the table, and a narrow x multiplies what is lost.
    found = calibration["consistency"]
    assert found["slope"] == pytest.approx(slope, rel=1e-4)
    assert found["offset"] - found["level"] == pytest.approx(offset, rel=1e-4)
    said = np.clip(found["slope"] * x[train] + found["offset"], 0, 1)
    assert said.mean() == pytest.approx(y[train].mean(), abs=1e-5)
    assert calibration["quality"]["num_rows"] == found["num_rows"] == train.sum()


def test_metrics_have_the_shape_of_the_specification(demo_run):
    metrics = read_json(demo_run / "metrics.json")
    sides = ["test", "val", "train"]
    assert list(metrics) == ["split", *sides, "floors", "per_source", "intervals", "unlike", "diagnostics", "verdict"]
    split = metrics["split"]
    assert split["kind"] == "grouped"
    assert split["leaks_groups"] is False
    assert split["seeds"] == [42]
    assert sum(split["rows"].values()) == 240
    for side in SIDES:
        assert set(metrics[side]) == set(LABELS)
        for figures in metrics[side].values():
            assert set(figures) == FIGURES | ({"srocc_ci"} if side == "test" else set())
    for label in LABELS:
        low, high = metrics["test"][label]["srocc_ci"]
        assert low < metrics["test"][label]["srocc"] < high
        for floor in ("no_image", "cosine"):
            assert metrics["floors"][floor][label]["n"] == split["rows"]["test"]
        assert len(metrics["per_source"][label]) == 6
    assert {entry["name"] for entry in metrics["diagnostics"]} == {
        f"{label}.{name}"
        for label in LABELS
        for name in ("outcome", "saturated_share", "small_share", "base_srocc", "final_srocc", "train_val_gap")
    }


def test_history_has_a_row_per_epoch_and_the_best_one_was_kept(demo_run):
    history = read_csv(demo_run / "history.csv")
    assert [int(row["epoch"]) for row in history] == list(range(1, EPOCHS + 1))
    assert {f"val_{label}_{figure}" for label in LABELS for figure in ("srocc", "plcc")} <= set(history[0])
    best = read_json(demo_run / "config.json")["best_epoch"]
    mains = []
    for label in LABELS:
        rank, linear = (numbers(history, f"val_{label}_{figure}") for figure in ("srocc", "plcc"))
        # Epoch 0, the calibrated base, is no row of the history: it is kept where no epoch beats it.
        assert best[label] in (0, 1 + (rank + linear).argmax())
        mains.append(rank[best[label] - 1] if best[label] else None)
    # The weights in the checkpoint are those of that epoch: they reproduce its validation figures.
    metrics = read_json(demo_run / "metrics.json")
    for label, rank in zip(LABELS, mains, strict=True):
        if rank is not None:
            assert metrics["val"][label]["srocc"] == pytest.approx(rank, abs=1e-6)


def test_metrics_can_be_recomputed_from_the_predictions(demo_run):
    rows = read_csv(demo_run / "predictions.csv")
    metrics = read_json(demo_run / "metrics.json")
    for side in SIDES:
        chosen = [row for row in rows if row["split"] == side]
        assert len(chosen) == metrics["split"]["rows"][side]
        for label in LABELS:
            truth, predicted = numbers(chosen, f"{label}_label"), numbers(chosen, label)
            # Six digits are stored, which may tie neighbours: each pair is worth at most 6 / N^2.
            ties = len(chosen) - len(np.unique(predicted))
            rank = pytest.approx(stats.spearmanr(predicted, truth)[0], abs=1e-5 + 6 * ties / len(chosen) ** 2)
            assert metrics[side][label]["srocc"] == rank
            assert metrics[side][label]["plcc"] == pytest.approx(stats.pearsonr(predicted, truth)[0], abs=1e-5)
            assert metrics[side][label]["krocc"] == pytest.approx(stats.kendalltau(predicted, truth)[0], abs=1e-3)
    test = [row for row in rows if row["split"] == "test"]
    assert [row["image"] for row in test], "no test rows"


def test_cosine_floor_is_the_correlation_of_raw_cosines(demo_run, demo_cache):
    rows = read_csv(demo_run / "predictions.csv")
    test = np.array([row["split"] == "test" for row in rows])
    v, t = embeddings(demo_cache)
    for label in LABELS:
        expected = stats.spearmanr((v * t).sum(axis=1)[test], numbers(rows, f"{label}_label")[test])[0]
        found = read_json(demo_run / "metrics.json")["floors"]["cosine"][label]["srocc"]
        assert found == pytest.approx(expected, abs=1e-4)  # float32 cosines may swap neighbours


def test_predictions_keep_rows_labels_and_bounds(demo_run, demo_rows):
    rows = read_csv(demo_run / "predictions.csv")
    assert [row["image"] for row in rows] == [row["image"] for row in demo_rows]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in demo_rows]
    assert [row["source"] for row in rows] == [row["source"] for row in demo_rows]
    for label in LABELS:
        assert numbers(rows, f"{label}_label") == pytest.approx(numbers(demo_rows, label), abs=1e-6)
        score, base, delta = (numbers(rows, name) for name in (label, f"{label}_base", f"{label}_delta"))
        rounding = 1.5e-6  # three numbers of six digits
        assert np.abs(score - base).max() <= 0.2 + rounding
        assert np.abs(delta).max() <= 0.2 + rounding
        assert np.abs(delta).max() > 0
        assert score == pytest.approx(np.clip(base + delta, 0, 1), abs=rounding)
        assert [row[label[0]] for row in rows] == [row[label] for row in rows]  # under the name of the formulas too


def test_sides_are_disjoint_by_prompt(demo_run):
    prompts = {side: set() for side in SIDES}
    for row in read_csv(demo_run / "predictions.csv"):
        prompts[row["split"]].add(row["prompt"])
    assert all(prompts.values())
    assert not prompts["train"] & prompts["val"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["val"] & prompts["test"]


# What the numbers rest on


def test_the_same_seed_gives_the_same_run_and_another_seed_another(train_demo, demo_run):
    again, other = train_demo(), train_demo(seed=1)
    assert same_weights(weights_of(demo_run), weights_of(again.run))
    assert read_json(demo_run / "metrics.json") == read_json(again.run / "metrics.json") == again.metrics
    assert (demo_run / "predictions.csv").read_bytes() == (again.run / "predictions.csv").read_bytes()
    assert not same_weights(weights_of(demo_run), weights_of(other.run))
    split = {row["image"]: row["split"] for row in read_csv(other.run / "predictions.csv")}
    assert any(split[row["image"]] != row["split"] for row in read_csv(demo_run / "predictions.csv"))


def test_training_never_looks_at_test_labels(train_demo, demo_run, relabelled):
    side = {row["image"]: row["split"] for row in read_csv(demo_run / "predictions.csv")}

    def change(which):
        def flip(rows):
            for row in rows:
                if side[row["image"]] == which:
                    row["quality"], row["consistency"] = (f"{1 - float(row[label]):.4f}" for label in LABELS)

        return flip

    run = train_demo(cache=relabelled(change("test")))
    assert same_weights(weights_of(demo_run), weights_of(run.run))
    before, after = (read_csv(path / "history.csv") for path in (demo_run, run.run))
    assert [row | {"seconds": ""} for row in before] == [row | {"seconds": ""} for row in after]
    assert run.metrics["test"]["quality"]["srocc"] == pytest.approx(
        -read_json(demo_run / "metrics.json")["test"]["quality"]["srocc"], abs=1e-9
    )
    # The same change on the training side does reach the weights, so the comparison above can fail.
    assert not same_weights(weights_of(demo_run), weights_of(train_demo(cache=relabelled(change("train"))).run))


MODES = {
    "residual": {"scale": "0.5"},
    "direct": {"residual_learning": False},
    "two branches": {"residual_learning": False, "two_branch": True},
    "refinement": {"residual_learning": False, "refinement": True, "epochs": 12},
}


@pytest.mark.parametrize(
    "mode", ["residual", *(pytest.param(mode, marks=pytest.mark.slow) for mode in list(MODES)[1:])]
)
def test_shuffled_labels_teach_nothing(mode, train_demo, relabelled):
    """Labels dealt at random over all rows: whatever SROCC remains on the test rows would come from a leak.

    The heads are given every means to learn by heart, so that a leak would show: they do so on the training rows.
    """
    boldly = {"lr": 5e-3, "epochs": 40, "dropout": 0, **MODES[mode]}
    found, learned = [], []
    for seed, loss in enumerate(("mse", "mse", "rank", "rank")):

        def shuffle(rows, seed=seed):
            labels = [(row["quality"], row["consistency"]) for row in rows]
            random.Random(seed).shuffle(labels)
            for row, (quality, consistency) in zip(rows, labels, strict=True):
                row["quality"], row["consistency"] = quality, consistency

        # Without validation the last epoch is kept, which has learned the most.
        run = train_demo(cache=relabelled(shuffle), fractions="0.6,0,0.4", seed=seed, loss=loss, **boldly)
        assert not run.metrics["split"]["leaks_groups"]
        num_rows = run.metrics["split"]["rows"]["test"]
        found += [run.metrics["test"][label]["srocc"] for label in LABELS]
        learned.append(run.metrics["train"]["consistency"]["srocc"])  # quality of direct heads is linear, and cannot
    # Whatever was learned, the test labels are a random order of what is left: SROCC has the mean 0 and, exactly, the
    # standard deviation 1 / sqrt(n - 1). 4 of them for each figure, and for the mean of 4 runs (the two labels are
    # dealt together, so they count once): one of the 36 figures of all modes is beyond by chance once in 400 changes.
    assert abs(np.mean(found)) < 4 / np.sqrt(4 * (num_rows - 1))
    assert np.abs(found).max() < 4 / np.sqrt(num_rows - 1)
    assert np.mean(learned) > 0.5, "nothing was learned by heart, so that a leak would not show"


# Labels that are missing


@pytest.mark.parametrize(("kept", "dropped"), [LABELS, LABELS[::-1]])
def test_one_label_is_enough(train_demo, relabelled, capsys, *, kept, dropped):
    def drop(rows):
        for row in rows:
            row[dropped] = ""

    run = train_demo(cache=relabelled(drop))
    warning = f"warning: the cache has no {dropped} labels: that head is not trained and has no scores\n"
    assert warning in capsys.readouterr().err
    for side in SIDES:
        assert list(run.metrics[side]) == [kept]
    assert read_json(run.run / "config.json")["labels"] == [kept]
    rows = read_csv(run.run / "predictions.csv")
    assert np.isnan(numbers(rows, dropped)).all()
    assert np.isnan(numbers(rows, dropped[0])).all()
    assert np.isfinite(numbers(rows, kept)).all()
    # The last layer of a correction starts at zero and gets no gradient without labels.
    last = "fusion.out.weight" if dropped == "consistency" else "mlp.out.weight"
    assert not weights_of(run.run)[f"{dropped}_head.{last}"].any()


@pytest.mark.parametrize(("kept", "dropped"), [LABELS, LABELS[::-1]])
def test_a_target_without_a_column_has_no_head(train_demo, relabelled, capsys, *, kept, dropped):
    def drop(rows):
        for row in rows:
            del row[dropped]

    cache = relabelled(drop)
    run = train_demo(cache=cache)
    assert "warning: " not in capsys.readouterr().err
    for side in SIDES:
        assert list(run.metrics[side]) == [kept]
    assert [target["name"] for target in read_json(run.run / "config.json")["targets"]] == [kept]
    assert {name.partition(".")[0] for name in weights_of(run.run)} == {f"{kept}_head"}
    columns = {name.partition("_")[0] for name in read_csv(run.run / "predictions.csv")[0]}
    assert not columns & {dropped, dropped[0]}
    # A number for it is not an error, as a preset or a script may give both, and is said.
    train_demo(cache=cache, scale=f"{dropped}=0.1", epochs=1)
    line = f"warning: the cache has no target {dropped}: what is given for it is not used\n"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["mse", "rank"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kept", "dropped"), [LABELS, LABELS[::-1]])
def test_one_label_trains_in_every_mode(train_demo, relabelled, *, mode, loss, kept, dropped):
    def drop(rows):
        for row in rows:
            row[dropped] = ""

    run = train_demo(cache=relabelled(drop), loss=loss, **MODES[mode] | {"epochs": 1})
    assert list(run.metrics["test"]) == [kept]
    assert run.metrics["test"][kept]["srocc"] is not None
    assert np.isnan(numbers(read_csv(run.run / "predictions.csv"), dropped)).all()


def test_no_labels_is_an_error_before_anything_is_written(train_demo, relabelled, tmp_path):
    def drop(rows):
        for row in rows:
            del row["quality"], row["consistency"]

    cache = relabelled(drop)
    with pytest.raises(UserError) as error:
        train_demo(cache=cache)
    remedy = "give the manifest a quality or consistency column and extract again"
    assert str(error.value) == f"{cache}: has no labels; {remedy}"
    assert not list(tmp_path.glob("run*"))


def test_missing_labels_are_masked_not_dropped(train_demo, relabelled, demo_run):
    def blank(rows):
        for number, row in enumerate(rows):
            row["quality" if number % 2 else "consistency"] = ""

    run = train_demo(cache=relabelled(blank))
    rows = read_csv(run.run / "predictions.csv")
    assert len(rows) == 240
    assert [row["split"] for row in rows] == [row["split"] for row in read_csv(demo_run / "predictions.csv")]
    for label, parity in zip(LABELS, (0, 1), strict=True):
        assert np.isfinite(numbers(rows, label)).all()
        has_label = np.isfinite(numbers(rows, f"{label}_label"))
        assert np.flatnonzero(has_label).tolist() == list(range(parity, 240, 2))
        for side in SIDES:
            expected = sum(row["split"] == side and row[f"{label}_label"] != "" for row in rows)
            assert run.metrics[side][label]["n"] == expected > 0
    config = read_json(run.run / "config.json")
    train = [row for row in rows if row["split"] == "train"]
    for label in LABELS:
        assert config["calibration"][label]["num_rows"] == sum(row[f"{label}_label"] != "" for row in train)
