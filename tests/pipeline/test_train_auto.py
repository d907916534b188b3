"""Bases that a run chooses by itself, from the cache to a prediction: what is recorded, and every way scores alike."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from deltaclip.base.errors import UserError
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.finetune import finetune
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import EvaluateConfig, FinetuneConfig, PredictConfig, SweepConfig, TrainConfig
from deltaclip.pipeline.sweep import sweep
from deltaclip.pipeline.train import train
from deltaclip.pipeline.training.bases import fit_bases
from deltaclip.tests.pipeline.conftest import EPOCHS, numbers, read_csv, read_json, write_csv

LABELS = ("quality", "consistency")
VIEWS = ("flip", "stages")


@pytest.fixture(scope="module")
def views_cache(tmp_path_factory, demo_folder, demo_cache, tiny_backbone):
    """The demo cache with two further views."""
    cache = tmp_path_factory.mktemp("views") / "views.h5"
    shutil.copyfile(demo_cache, cache)
    views = ",".join(["center", *VIEWS])
    extract(ExtractConfig(data=str(demo_folder / "demo.csv"), out=cache, backbone=tiny_backbone, views=views))
    return cache


@pytest.fixture(scope="module")
def auto_run(tmp_path_factory, views_cache):
    return train(TrainConfig(cache=views_cache, out=tmp_path_factory.mktemp("auto") / "run", epochs=EPOCHS)).run


@pytest.fixture
def relabelled_views(tmp_path, *, views_cache, demo_folder, demo_rows, tiny_backbone):
    """Make a cache of changed rows of the demo's manifest with the same views; no vector is computed again."""

    def make(change):
        number = len(list(tmp_path.glob("changed*.csv")))
        manifest, cache = tmp_path / f"changed{number}.csv", tmp_path / f"changed{number}.h5"
        write_csv(manifest, [change(dict(row), place) for place, row in enumerate(demo_rows)])
        shutil.copyfile(views_cache, cache)
        views = ",".join(["center", *VIEWS])
        config = ExtractConfig(
            data=str(manifest), out=cache, backbone=tiny_backbone, image_root=demo_folder, views=views
        )
        assert extract(config).new_images == 0
        return cache

    return make


def test_a_run_says_what_it_chose_and_from_what(auto_run, views_cache):
    config = read_json(auto_run / "config.json")
    assert config["settings"]["base"] == "auto"
    rows = load_rows(views_cache, "cpu", views=VIEWS)
    split = split_cache(rows, "grouped", fractions="0.7,0.1,0.2", seed=42)
    found = fit_bases(rows, split, labels=LABELS, seed=42)
    assert config["calibration"]["choice"] == found.about["choice"]
    table, test = read_csv(auto_run / "predictions.csv"), split.test
    heads = open_run(auto_run).heads
    assert heads.bases == found.shape
    for name in LABELS:
        choice = config["calibration"]["choice"][name]
        assert sum(choice["shares"].values()) == pytest.approx(1)
        assert {"ridge on flip", "kernel on stages"} <= set(choice["left_out"]) or name == "consistency"
        slope, offset = found.lines.get(name, (0.0, 0.0))
        base = slope * (rows.cosine() + 1) / 2 + offset + found.columns[name].numpy()
        # The table has six digits.
        assert numbers(table, f"{name}_base") == pytest.approx(np.clip(base, 0, 1), abs=2e-6)
        own = np.abs(numbers(table, name) - numbers(table, f"{name}_base"))
        assert own.max() <= 0.2 + 2e-6
        assert not np.isnan(numbers(table, name)[test]).any()
    assert (
        any(line.startswith("base ") and "left-out" in line for line in config["description"])
        or "choice" in config["calibration"]
    )


def test_test_rows_score_alike_from_cache_from_disk_and_by_evaluate(auto_run, demo_folder, tmp_path):
    found = evaluate(EvaluateConfig(run=auto_run)).metrics
    assert found["test"] == read_json(auto_run / "metrics.json")["test"]
    assert (found["train"], found["val"]) == ({}, {})  # the bases were fitted to them
    table = [row for row in read_csv(auto_run / "predictions.csv") if row["split"] == "test"][:12]
    write_csv(tmp_path / "some.csv", [{"image": row["image"], "prompt": row["prompt"]} for row in table])
    predict(
        PredictConfig(run=auto_run, target=str(tmp_path / "some.csv"), image_root=demo_folder, out=tmp_path / "o.csv")
    )
    scored = read_csv(tmp_path / "o.csv")
    for label in LABELS:
        # Another batch size: bf16 sums differ in their last bit, as in test_predict.
        assert numbers(scored, label) == pytest.approx(numbers(table, label), abs=5e-3)


def test_test_labels_change_nothing_of_a_run(auto_run, relabelled_views, train_demo):
    side = {row["image"]: row["split"] for row in read_csv(auto_run / "predictions.csv")}

    def turned(row, _):
        return row | ({name: f"{1 - float(row[name]):.4f}" for name in LABELS} if side[row["image"]] == "test" else {})

    other = train_demo(cache=relabelled_views(turned), base="auto")
    first, second = (open_run(run).heads.state_dict() for run in (auto_run, other.run))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in LABELS:
        mine = read_json(auto_run / "metrics.json")["test"][name]["srocc"]
        assert other.metrics["test"][name]["srocc"] == pytest.approx(-mine, abs=1e-9)


@pytest.mark.slow
def test_shuffled_labels_teach_nothing(relabelled_views, train_demo, demo_rows):
    found = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(demo_rows))

        def other(row, place, order=order):
            return row | {label: demo_rows[order[place]][label] for label in LABELS}

        test = train_demo(cache=relabelled_views(other), base="auto", seed=seed).metrics["test"]
        found += [test[label]["srocc"] or 0.0 for label in LABELS]  # none: one thing is said of all rows
    # The SD of SROCC without any relation is 1 / sqrt(n - 1), n = 48; the two labels are dealt together.
    assert np.abs(found).max() < 4 / np.sqrt(47)
    assert abs(np.mean(found)) < 4 / np.sqrt(47 * 4)


def test_vectors_that_are_read_give_the_bases_of_those_in_memory(auto_run, views_cache, train_demo, monkeypatch):
    monkeypatch.setattr("deltaclip.pipeline.rows.cached_rows.MEMORY_BYTES", 0)
    rows = load_rows(views_cache, "cpu", views=VIEWS)
    assert (rows.v_ID, set(rows.views.values())) == (None, {None})
    read = train_demo(cache=views_cache, base="auto").run
    first, second = (open_run(run).heads.state_dict() for run in (auto_run, read))
    assert first.keys() == second.keys()
    for name in first:
        if ".fitted." in name:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
def test_a_sweep_over_bases_gives_what_train_gives(train_demo, views_cache, tmp_path):
    swept = sweep(
        SweepConfig(
            cache=views_cache,
            out=tmp_path / "sweep",
            base="auto,calibrated,kernel",
            residual_scale_q="0.1,0.3",
            epochs=EPOCHS,
            precision="fp32",
        )
    )
    assert len(swept.table) == 6
    for row in swept.table:
        alone = train_demo(cache=views_cache, base=row["base"], residual_scale_q=row["scale_quality"])
        mains = [alone.metrics["val"][label]["main"] for label in LABELS]
        assert [row[f"val_{label}"] for label in LABELS] == pytest.approx(mains, abs=1e-3)
    assert evaluate(EvaluateConfig(run=swept.run)).metrics["test"] == read_json(swept.run / "metrics.json")["test"]


@pytest.mark.parametrize("label", LABELS)
def test_one_label_is_enough(relabelled_views, train_demo, label):
    blank = LABELS[1 - LABELS.index(label)]
    run = train_demo(cache=relabelled_views(lambda row, _: row | {blank: ""}), base="auto", epochs=1)
    assert set(run.metrics["test"]) == {label}
    assert evaluate(EvaluateConfig(run=run.run)).metrics["test"] == read_json(run.run / "metrics.json")["test"]


@pytest.mark.parametrize(
    "held",
    [lambda number, _: number < 2, lambda _, place: place % 6 == 0, lambda number, place: number < 3 or place == 179],
    ids=["two groups", "groups of one row", "a group of one row"],
)
def test_small_data(relabelled_views, train_demo, demo_rows, held):
    """Of the first thirty prompts some rows have labels; those of the others are the test rows."""
    prompts = list(dict.fromkeys(row["prompt"] for row in demo_rows))

    def keep(row, place):
        number = prompts.index(row["prompt"])
        blank = {} if number >= 30 or held(number, place) else dict.fromkeys(LABELS, "")
        return row | blank | {"split": "test" if number >= 30 else "train"}

    run = train_demo(cache=relabelled_views(keep), base="auto", split="column", epochs=1)
    assert run.metrics["test"]["quality"]["n"] == 60
    table = read_csv(run.run / "predictions.csv")
    assert all(np.isfinite(numbers(table, label)).all() for label in LABELS)


def test_finetune_takes_no_heads_of_fitted_bases(auto_run, views_cache, tmp_path):
    with pytest.raises(UserError) as error:
        finetune(FinetuneConfig(cache=views_cache, init_heads=auto_run, out=tmp_path / "tuned", epochs=1))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{auto_run}: ")
    assert "calibrated" in str(error.value)
    assert not (tmp_path / "tuned").exists()
