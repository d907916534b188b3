"""Kernel bases from the cache to a prediction: what they are fitted to, and that nothing else changes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from deltaclip.base.errors import UserError
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.ablate import ablate
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.model.kernel import Part, fit_member
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import AblateConfig, EvaluateConfig, PredictConfig, SweepConfig
from deltaclip.pipeline.sweep import sweep
from deltaclip.tests.pipeline.conftest import EPOCHS, numbers, read_csv, read_json, write_csv

LABELS = ("quality", "consistency")


@pytest.fixture(scope="module")
def stages_cache(tmp_path_factory, *, demo_folder, demo_cache, demo_rows, tiny_backbone):
    """The demo cache with the view `stages`."""
    folder = tmp_path_factory.mktemp("stages")
    cache = folder / "stages.h5"
    write_csv(folder / "demo.csv", demo_rows)
    shutil.copyfile(demo_cache, cache)
    config = ExtractConfig(
        data=str(folder / "demo.csv"), out=cache, backbone=tiny_backbone, image_root=demo_folder, views="stages"
    )
    assert extract(config).views["stages"] == len({row["image"] for row in demo_rows})
    return cache


@pytest.fixture
def with_rows(tmp_path, *, stages_cache, demo_rows, demo_folder, tiny_backbone):
    """Make a cache of changed rows of the demo's manifest; no vector is computed again."""

    def make(change):
        number = len(list(tmp_path.glob("changed*.csv")))
        manifest, cache = tmp_path / f"changed{number}.csv", tmp_path / f"changed{number}.h5"
        write_csv(manifest, [change(dict(row), place) for place, row in enumerate(demo_rows)])
        shutil.copyfile(stages_cache, cache)
        config = ExtractConfig(
            data=str(manifest), out=cache, backbone=tiny_backbone, image_root=demo_folder, views="center"
        )
        assert extract(config).new_images == 0
        return cache

    return make


@pytest.fixture
def train_kernel(train_demo, stages_cache):
    def run(**settings):
        return train_demo(**{"cache": stages_cache, "base": "kernel", "epochs": EPOCHS, **settings})

    return run


def test_the_bases_are_the_kernels(train_kernel, stages_cache):
    run = train_kernel(residual_scale_q=0.0, residual_scale_c=0.0, lr=1e-9)
    rows = load_rows(stages_cache, "cpu", views=["stages"])
    split = split_cache(rows, "grouped", fractions="0.7,0.1,0.2", seed=42)
    fitted = np.concatenate([split.train, split.val])
    target = torch.full((len(rows.rows),), torch.nan)
    target[fitted] = torch.from_numpy(rows.label("quality")[fitted])
    groups = rows.rows.text["group"][:].astype(str)
    parts = [Part(rows.inputs()["stages"], 1.0)]
    found = fit_member("kernel", parts, target, groups, seed=42)
    said, fit = found.say(parts), found.fit
    table = read_csv(run.run / "predictions.csv")
    # Left-out scores are moved by one constant, to the mean of the training labels.
    assert np.ptp((numbers(table, "quality") - said.numpy())[fitted]) < 1e-4
    for label in LABELS:
        known = split.train[~np.isnan(rows.label(label)[split.train])]
        mean = rows.label(label)[known].astype(np.float64).mean()
        assert numbers(table, f"{label}_base")[known].mean() == pytest.approx(mean, abs=1e-5)
    assert numbers(table, "quality_base") == pytest.approx(numbers(table, "quality"), abs=1e-6)
    assert read_json(run.run / "config.json")["calibration"]["members"]["quality"] == [pytest.approx(fit.to_json())]
    assert any(
        "f is kernel ridge on training and validation rows: on stages;" in line
        for line in read_json(run.run / "config.json")["description"]
    )


def test_corrections_stay_within_their_scales(train_kernel):
    table = read_csv(train_kernel(residual_scale_q=0.1, residual_scale_c=0.3, lr=5e-3).run / "predictions.csv")
    for label, scale in (("quality", 0.1), ("consistency", 0.3)):
        moved = np.abs(numbers(table, label) - numbers(table, f"{label}_base"))
        assert moved.max() <= scale + 1e-5


def test_test_rows_score_alike_from_cache_from_disk_and_by_evaluate(train_kernel, demo_folder, tmp_path):
    run = train_kernel()
    assert evaluate(EvaluateConfig(run=run.run)).metrics["test"] == read_json(run.run / "metrics.json")["test"]
    table = [row for row in read_csv(run.run / "predictions.csv") if row["split"] == "test"][:12]
    write_csv(tmp_path / "some.csv", [{"image": row["image"], "prompt": row["prompt"]} for row in table])
    predict(
        PredictConfig(run=run.run, target=str(tmp_path / "some.csv"), image_root=demo_folder, out=tmp_path / "o.csv")
    )
    found = read_csv(tmp_path / "o.csv")
    for label in LABELS:
        # Another batch size: bf16 sums differ in their last bit, as in test_predict.
        assert numbers(found, label) == pytest.approx(numbers(table, label), abs=5e-3)


def test_test_labels_do_not_matter(train_kernel, with_rows):
    run = train_kernel()
    side = {row["image"]: row["split"] for row in read_csv(run.run / "predictions.csv")}
    cache = with_rows(lambda row, _: row | ({"quality": "0.5"} if side[row["image"]] == "test" else {}))
    other = train_kernel(cache=cache)
    first, second = (open_run(one.run).heads.state_dict() for one in (run, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_sweep_over_bases_gives_what_train_gives(train_kernel, stages_cache, tmp_path):
    swept = sweep(
        SweepConfig(
            cache=stages_cache,
            out=tmp_path / "sweep",
            base="calibrated,kernel,identity",
            residual_scale_q="0.1,0.3",
            epochs=EPOCHS,
            precision="fp32",
        )
    )
    assert len(swept.table) == 6
    for row in swept.table:
        alone = train_kernel(base=row["base"], residual_scale_q=row["scale_quality"])
        mains = [alone.metrics["val"][label]["main"] for label in LABELS]
        assert [row[f"val_{label}"] for label in LABELS] == pytest.approx(mains, abs=1e-3)
    assert evaluate(EvaluateConfig(run=swept.run)).metrics["test"] == read_json(swept.run / "metrics.json")["test"]


@pytest.mark.slow
def test_ablate_compares_kernels_where_the_cache_has_the_view(train_kernel, stages_cache, demo_cache, tmp_path):
    with_view = ablate(AblateConfig(cache=stages_cache, out=tmp_path / "a", repeats=1, epochs=EPOCHS))
    assert {"ridge-view", "kernel", "kernel-only"} <= set(with_view.compared)
    alone = train_kernel()
    for label in LABELS:
        found = with_view.compared["kernel"][label]["test"]["srocc"]["values"][0]
        assert found == pytest.approx(alone.metrics["test"][label]["srocc"], abs=1e-3)
    without = ablate(AblateConfig(cache=demo_cache, out=tmp_path / "b", repeats=1, epochs=1))
    assert not {"ridge-view", "kernel", "kernel-only"} & set(without.compared)
    with pytest.raises(UserError) as error:
        ablate(AblateConfig(cache=demo_cache, out=tmp_path / "c", against="kernel"))
    assert str(error.value) == (
        "--against: 'kernel' needs the view 'stages', which the cache does not have; "
        "give --views stages to `deltaclip extract`"
    )


@pytest.mark.slow
def test_shuffled_labels_teach_a_kernel_nothing(train_kernel, with_rows, demo_rows):
    found = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(demo_rows))

        def other(row, place, order=order):
            return row | {label: demo_rows[order[place]][label] for label in LABELS}

        test = train_kernel(cache=with_rows(other)).metrics["test"]
        found += [test[label]["srocc"] for label in LABELS]
    # The SD of SROCC without any relation is 1 / sqrt(n - 1), n = 48.
    assert np.abs(found).max() < 4 / np.sqrt(47)
    assert abs(np.mean(found)) < 4 / np.sqrt(47 * len(found))


@pytest.mark.parametrize("label", LABELS)
def test_one_label_is_enough(train_kernel, with_rows, label):
    run = train_kernel(cache=with_rows(lambda row, _: row | {LABELS[1 - LABELS.index(label)]: ""}))
    assert set(run.metrics["test"]) == {label}
    assert evaluate(EvaluateConfig(run=run.run)).metrics["test"] == read_json(run.run / "metrics.json")["test"]


def test_what_is_refused_and_what_is_said(train_demo, train_kernel, demo_cache, capsys):
    with pytest.raises(UserError) as error:
        train_demo(base="kernel")
    assert str(error.value) == (
        f"{demo_cache}: has no view stages for 240 images; give --views stages to `deltaclip extract`"
    )
    with pytest.raises(UserError, match=r"has no view 'stagesx'; did you mean 'stages'\?"):
        train_kernel(view="stagesx")
    train_demo(view="tiles", epochs=1)
    assert "warning: --view tiles is not used: it belongs to --base kernel\n" in capsys.readouterr().err


def test_evaluate_leaves_out_the_rows_that_the_kernel_was_fitted_to(train_kernel):
    found = evaluate(EvaluateConfig(run=train_kernel().run)).metrics
    assert (found["train"], found["val"], found["diagnostics"]) == ({}, {}, [])
    assert "train and validation rows are left out" in found["split"]["note"]
    assert found["floors"]["no_image"]["quality"]["srocc"] is not None


@pytest.mark.slow
def test_a_label_of_weight_0_shapes_no_other_kernel(train_kernel, with_rows, demo_rows):
    order = np.random.default_rng(0).permutation(len(demo_rows))
    shuffled = with_rows(lambda row, place: row | {"quality": demo_rows[order[place]]["quality"]})
    runs = [train_kernel(w_q=0.0), train_kernel(w_q=0.0, cache=shuffled)]
    first, second = (numbers(read_csv(run.run / "predictions.csv"), "consistency") for run in runs)
    assert np.array_equal(first, second)


def test_a_label_of_one_group_is_as_if_missing(train_kernel, with_rows, demo_rows):
    prompt = demo_rows[0]["prompt"]
    run = train_kernel(
        cache=with_rows(lambda row, _: row | ({} if row["prompt"] == prompt else {"quality": ""})), seed=1
    )
    assert run.metrics["test"]["consistency"]["srocc"] is not None
