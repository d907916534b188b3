"""Data without prompts, in whole or in part: every stage works, and what sees a prompt is left out and said."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import EvaluateConfig, PredictConfig, TrainConfig
from deltaclip.pipeline.train import train

ROWS = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory, demo_folder, tiny_backbone):
    """Extract tables of the demo's images: without prompts, and with a prompt in every second row."""
    folder = tmp_path_factory.mktemp("quality")
    images = sorted((demo_folder / "images").iterdir())[:ROWS]
    for name in ("none", "half"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "mos", *(["prompt", "consistency"] if name == "half" else [])])
            for i, image in enumerate(images):
                prompt = [f"thing {i}" if i % 2 else "", i % 4] if name == "half" else []
                writer.writerow([image.name, i % 5, *prompt])
        config = ExtractConfig(
            data=str(folder / f"{name}.csv"),
            image_root=demo_folder / "images",
            backbone=tiny_backbone,
            label_range=["quality=0,4", "consistency=0,3"],
            out=folder / f"{name}.h5",
            views="center",
        )
        assert extract(config).usable_rows == ROWS
    return folder


@pytest.fixture(scope="module")
def run(made):
    """Train on the data without prompts."""
    return train(TrainConfig(cache=made / "none.h5", epochs=1, out=made / "run")).run


def test_a_cache_without_prompts_has_no_texts(made):
    with FeatureStore.open(made / "none.h5") as store:
        rows = store.rows()
        assert (len(store.texts()), set(rows.prompt.tolist()), set(rows.text["prompt"])) == (0, {-1}, {""})
        assert len(set(rows.text["group"])) == ROWS  # each image is its own
        assert all(group.startswith("image ") for group in rows.text["group"])


def test_rows_without_a_prompt_lose_what_sees_one(made):
    with FeatureStore.open(made / "half.h5") as store:
        rows = store.rows()
        blind = rows.prompt < 0
        assert (int(blind.sum()), len(store.texts())) == (ROWS // 2, ROWS // 2)
        assert np.isnan(rows.numbers["consistency"][blind]).all()
        assert np.isfinite(rows.numbers["consistency"][~blind]).all()
        assert np.isfinite(rows.numbers["quality"]).all()


def test_a_run_says_what_it_needs(run):
    folder = open_run(run)
    assert (folder.labels, folder.needs_prompts) == (("quality",), False)
    assert set(folder.metrics["test"]) == {"quality"}
    assert folder.metrics["floors"]["cosine"] == {}
    assert not folder.metrics["split"]["leaks_groups"]


@pytest.mark.parametrize("base", ["identity", "calibrated", "kernel", "auto"])
def test_every_base_trains(made, tmp_path, base):
    view = {"view": "center"} if base == "kernel" else {}
    for name, labels in (("none", ("quality",)), ("half", ("quality", "consistency"))):
        result = train(TrainConfig(cache=made / f"{name}.h5", epochs=1, base=base, out=tmp_path / name, **view))
        assert open_run(result.run).labels == labels
        with (result.run / "predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert all(row["quality"] for row in rows)
        if "consistency" in labels:
            assert [bool(row["consistency"]) for row in rows] == [bool(row["prompt"]) for row in rows]
        else:  # no column of theirs, no target
            assert not {"consistency", "c"} & rows[0].keys()


def test_direct_heads_train(made, tmp_path):
    config = TrainConfig(
        cache=made / "none.h5", epochs=1, residual_learning=False, two_branch=True, refinement=True, out=tmp_path / "r"
    )
    assert open_run(train(config).run).labels == ("quality",)


def test_evaluate_without_prompts(made, run):
    found = evaluate(EvaluateConfig(run=run)).metrics
    assert found["test"]["quality"] == open_run(run).metrics["test"]["quality"]
    other = evaluate(EvaluateConfig(run=run, cache=made / "half.h5")).metrics["split"]
    assert other["rows"]["test"] > 0


def test_predict_without_prompts(made, run, demo_folder, tmp_path):
    image = sorted((demo_folder / "images").iterdir())[0]
    alone = predict(PredictConfig(run=run, target=str(image)))
    assert np.isfinite(alone.columns["quality"]).all()
    assert alone.summary().splitlines()[0].split() == ["image", "quality"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / image.name).write_bytes(image.read_bytes())
    folder = predict(PredictConfig(run=run, target=str(tmp_path / "a")))
    table = predict(PredictConfig(run=run, target=str(made / "none.csv"), image_root=demo_folder / "images"))
    for found in (folder, table):
        np.testing.assert_allclose(found.columns["quality"][0], alone.columns["quality"][0], atol=1e-6)
        assert not {"consistency", "c"} & found.columns.keys()


def test_a_run_of_both_scores_what_it_can(made, demo_folder, tmp_path):
    both = train(TrainConfig(cache=made / "half.h5", epochs=1, out=tmp_path / "both")).run
    half = predict(PredictConfig(run=both, target=str(made / "half.csv"), image_root=demo_folder / "images"))
    assert np.isfinite(half.columns["quality"]).all()
    assert np.isfinite(half.columns["consistency"]).tolist() == [bool(prompt) for prompt in half.columns["prompt"]]
    assert "20 rows have no prompt: of use for scores of the image alone" in half.note
    with pytest.raises(UserError) as caught:
        predict(PredictConfig(run=both, target=str(made / "none.csv"), image_root=demo_folder / "images"))
    assert str(caught.value) == (
        f"{made}/none.csv: has no prompts to be scored against; add a column prompt, or train a run on quality alone"
    )
