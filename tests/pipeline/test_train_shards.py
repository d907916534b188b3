"""Training on shards is training on the whole: same rows, same order, same run."""

from __future__ import annotations

import numpy as np
import pytest

from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.settings import EvaluateConfig, TrainConfig
from deltaclip.pipeline.train import train


@pytest.fixture(scope="module")
def caches(tmp_path_factory, demo_folder, tiny_backbone):
    """Cache the demo set whole and in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    whole, parts = folder / "whole" / "c.h5", folder / "parts" / "c.h5"
    values = {"data": str(demo_folder / "demo.csv"), "backbone": tiny_backbone, "precision": "fp32", "views": "center"}
    for out, shard in ((whole, None), (parts, "1/2"), (parts, "2/2")):
        extract(ExtractConfig(**values, out=out, shard=shard))
    return whole, parts


@pytest.mark.slow
def test_a_run_on_shards_is_that_on_the_whole(caches, tmp_path):
    runs = [train(TrainConfig(cache=cache, epochs=2, out=tmp_path / cache.parent.name)) for cache in caches]
    columns = [
        np.loadtxt(tmp_path / cache.parent.name / "predictions.csv", delimiter=",", skiprows=1, usecols=0, dtype=str)
        for cache in caches
    ]
    assert columns[0].tolist() == columns[1].tolist()
    metrics = [run.to_json()["test"] for run in runs]
    for label in ("quality", "consistency"):
        # Vectors agree within rounding, since their batches were cut elsewhere; two epochs enlarge that a little.
        assert metrics[1][label]["srocc"] == pytest.approx(metrics[0][label]["srocc"], abs=2e-3)
    again = evaluate(EvaluateConfig(run=tmp_path / "parts"))
    assert again.metrics["test"]["quality"]["srocc"] == pytest.approx(metrics[1]["quality"]["srocc"], abs=1e-9)
