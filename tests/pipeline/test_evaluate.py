"""Evaluation of a run: on its own cache, on others, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from deltaclip.base.errors import UserError
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.settings import EvaluateConfig
from deltaclip.tests.pipeline.conftest import read_csv, write_csv


@pytest.fixture(scope="module")
def foreign_cache(tmp_path_factory, demo_folder, demo_rows, other_weights):
    """Two demo rows, embedded by another backbone."""
    folder = tmp_path_factory.mktemp("foreign")
    write_csv(folder / "two.csv", demo_rows[:2])
    config = ExtractConfig(
        data=str(folder / "two.csv"),
        out=folder / "two.h5",
        backbone=other_weights,
        image_root=demo_folder,
        views="center",
    )
    return extract(config).cache


def test_own_cache_reproduces_the_metrics_of_the_run(demo_run, demo_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the run names its cache by a full path
    recorded = json.loads((demo_run / "metrics.json").read_text())
    found = evaluate(EvaluateConfig(run=demo_run))
    assert found.metrics == recorded
    assert found.cache == demo_cache
    assert evaluate(EvaluateConfig(run=demo_run, cache=demo_cache)).metrics == recorded
    assert found.to_json() == {**recorded, "run": str(demo_run), "cache": str(demo_cache)}
    assert "split: grouped by prompt, 48 test rows (168 train, 24 validation)" in found.summary()


def test_direct_heads_are_evaluated_too(train_demo):
    run = train_demo(residual_learning=False)
    assert evaluate(EvaluateConfig(run=run.run)).metrics == run.metrics


def test_out_writes_the_metrics(demo_run, tmp_path):
    out = tmp_path / "new" / "metrics.json"
    found = evaluate(EvaluateConfig(run=demo_run, out=out))
    assert json.loads(out.read_text()) == found.metrics
    assert [path.name for path in out.parent.iterdir()] == ["metrics.json"]


@pytest.fixture
def redrawn(tmp_path, demo_folder, demo_rows, tiny_backbone):
    """Make a cache of the first 24 rows whose pictures are changed, under the same names, and whose rows may be too."""

    def make(change, *, rows=demo_rows[:24]):
        folder, number = tmp_path / "redrawn", len(list(tmp_path.glob("redrawn*.h5")))
        for row in rows:
            path = folder / row["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            change(Image.open(demo_folder / row["image"]).convert("RGB")).save(path, "PNG", compress_level=9)
        write_csv(folder / "demo.csv", rows)
        config = ExtractConfig(
            data=str(folder / "demo.csv"),
            out=tmp_path / f"redrawn{number}.h5",
            backbone=tiny_backbone,
            views="center",
        )
        return extract(config).cache

    return make


@pytest.fixture(scope="module")
def trained(demo_run):
    """Tell of each of the first 24 demo rows whether the run trained on it."""
    return np.array([row["split"] != "test" for row in read_csv(demo_run / "predictions.csv")][:24])


def test_other_pictures_under_the_names_of_the_training_are_not_its_rows(demo_run, redrawn, trained):
    found = evaluate(EvaluateConfig(run=demo_run, cache=redrawn(ImageOps.flip)))
    split = found.metrics["split"]
    assert split["kind"] == "all"
    assert split["rows"] == {"train": 0, "val": 0, "test": 24}
    assert split["note"] == f"{trained.sum()} rows have a prompt that the run trained on"
    assert split["leaks_groups"] is True
    assert "LEAKS" in found.summary()
    assert found.metrics["floors"]["no_image"] == {}  # it would need training rows
    assert found.metrics["floors"]["cosine"]["quality"]["n"] == 24


def test_pictures_of_the_training_with_other_prompts_are_a_leak(demo_run, relabelled, demo_rows, trained):
    # Every row gets the prompt of the row before: one that the run knows. A last one has a new picture for nobody.
    prompts = [row["prompt"] for row in demo_rows[120:144]]
    cache = relabelled(lambda rows: [row | {"prompt": prompts[i]} for i, row in enumerate(rows[:24])])
    split = evaluate(EvaluateConfig(run=demo_run, cache=cache)).metrics["split"]
    known = {row["prompt"] for row in read_csv(demo_run / "predictions.csv") if row["split"] != "test"}
    of_prompt = np.array([prompt in known for prompt in prompts])
    assert split["kind"] == "all"
    assert split["leaks_groups"] is True
    assert split["note"] == (
        f"{trained.sum()} rows have an image that the run trained on, {of_prompt.sum()} a prompt, "
        f"{(trained & of_prompt).sum()} both"
    )


def test_pictures_of_the_training_that_were_encoded_again_are_said(demo_run, redrawn, trained, demo_rows):
    rows = [row | {"prompt": f"something else {i}"} for i, row in enumerate(demo_rows[:24])]
    split = evaluate(EvaluateConfig(run=demo_run, cache=redrawn(lambda image: image, rows=rows))).metrics["split"]
    assert split["note"] == f"{trained.sum()} rows have a near copy of an image that the run trained on"
    assert split["leaks_groups"] is True


def test_near_copies_are_not_looked_for_without_the_cache_of_the_run(demo_run, redrawn, demo_rows, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    config = json.loads((run / "config.json").read_text())
    config["cache"]["path"] = str(tmp_path / "gone.h5")
    (run / "config.json").write_text(json.dumps(config))
    rows = [row | {"prompt": f"something else {i}"} for i, row in enumerate(demo_rows[:24])]
    cache = redrawn(lambda image: image, rows=rows)
    split = evaluate(EvaluateConfig(run=run, cache=cache)).metrics["split"]
    assert split["note"] == "near copies of images that the run trained on were not looked for (no such cache)"
    assert split["leaks_groups"] is False


def test_rows_are_known_whatever_their_files_and_groups_are_called(demo_run, relabelled):
    def rename(rows):
        for row in rows:
            row["group"] = "another name of " + row["prompt"]
            row["image"] = "./" + row["image"]

    split = evaluate(EvaluateConfig(run=demo_run, cache=relabelled(rename))).metrics["split"]
    assert split == json.loads((demo_run / "metrics.json").read_text())["split"]


def test_test_prompts_alone_are_no_leak_and_score_as_in_training(demo_run, relabelled):
    recorded = read_csv(demo_run / "predictions.csv")
    side = {row["image"]: row["split"] for row in recorded}
    cache = relabelled(lambda rows: [row for row in rows if side[row["image"]] == "test"])
    found = evaluate(EvaluateConfig(run=demo_run, cache=cache))
    assert found.metrics["split"] == {
        "kind": "grouped",
        "leaks_groups": False,
        "seeds": [42],
        "rows": {"train": 0, "val": 0, "test": 48},
        "note": "",
    }
    assert "LEAKS" not in found.summary()
    in_training = json.loads((demo_run / "metrics.json").read_text())["test"]
    for label, figures in found.metrics["test"].items():
        assert figures["srocc"] == pytest.approx(in_training[label]["srocc"], abs=1e-12)


def test_a_cache_with_one_label_is_evaluated_on_that(demo_run, relabelled):
    def drop(rows):
        for row in rows:
            del row["quality"]

    assert list(evaluate(EvaluateConfig(run=demo_run, cache=relabelled(drop))).metrics["test"]) == ["consistency"]


def test_a_cache_of_another_backbone_is_refused_with_the_difference(demo_run, demo_cache, foreign_cache):
    with FeatureStore.open(demo_cache) as store, FeatureStore.open(foreign_cache) as foreign:
        here = store.header["request"]["weights_sha256"][:12]
        there = foreign.header["request"]["weights_sha256"][:12]
    assert here != there
    with pytest.raises(UserError) as error:
        evaluate(EvaluateConfig(run=demo_run, cache=foreign_cache))
    assert str(error.value) == (
        f"{foreign_cache}: was made by another backbone: weights_sha256 {there} there, {here} here; "
        "extract the data with the run's backbone, or train on this cache"
    )


def test_a_cache_without_labels_is_refused(demo_run, relabelled, tmp_path):
    def drop(rows):
        for row in rows:
            del row["quality"], row["consistency"]

    cache, out = relabelled(drop), tmp_path / "metrics.json"
    with pytest.raises(UserError) as error:
        evaluate(EvaluateConfig(run=demo_run, cache=cache, out=out))
    remedy = "use `deltaclip predict` for scores alone"
    assert str(error.value) == f"{cache}: has no quality or consistency labels to compare with; {remedy}"
    assert not out.exists()


def test_the_same_rows_in_another_order_score_the_same(demo_run, relabelled):
    """Metrics rest on rows, not on their places: the whole path from the manifest is invariant."""
    order = np.random.default_rng(0).permutation(240)
    caches = [relabelled(lambda rows: [*rows[:-1]]), relabelled(lambda rows: [rows[i] for i in order if i != 239])]
    first, second = (evaluate(EvaluateConfig(run=demo_run, cache=cache)).metrics for cache in caches)
    for label in ("quality", "consistency"):
        for figure in ("srocc", "krocc", "plcc", "rmse"):
            # Sums in another order: float32 scores differ in their last places.
            assert first["test"][label][figure] == pytest.approx(second["test"][label][figure], abs=1e-5)


def test_a_run_whose_cache_is_gone_says_so(demo_run, tmp_path):
    gone = tmp_path / "gone.h5"
    with pytest.raises(UserError, match=re.escape(f"{gone}: no such cache; make it with `deltaclip extract`")):
        evaluate(EvaluateConfig(run=demo_run, cache=gone))
