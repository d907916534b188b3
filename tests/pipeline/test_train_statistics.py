"""A base made of the view `statistics`: it ranks what embeddings cannot, and a run of it scores files as its cache."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from deltaclip.features.data.images import open_image
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.settings.training import TrainConfig
from deltaclip.pipeline.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_folder, tiny_backbone):
    folder = tmp_path_factory.mktemp("statistics")
    config = ExtractConfig(
        data=str(demo_folder / "demo.csv"), out=folder / "c.h5", backbone=tiny_backbone, views="statistics"
    )
    cache = extract(config).cache
    return train(TrainConfig(cache=cache, out=folder / "run", base="kernel", view="statistics", epochs=3))


@pytest.mark.slow
def test_quality_of_the_demo_is_ranked(trained):
    # .86 is reached with 1,200 pictures; these are 240, of which 48 are for testing.
    assert trained.metrics["test"]["quality"]["srocc"] > 0.55


def test_files_score_as_their_cache(trained, demo_folder):
    with (trained.run / "predictions.csv").open(newline="") as file:
        # Of rows that were fitted, a run tells what it says without them.
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"][:24]
    scorer = Scorer.load(trained.run)
    prompts = [row["prompt"] for row in rows]
    files = [demo_folder / row["image"] for row in rows]
    for pictures in (files, [open_image(file.read_bytes()) for file in files]):
        found = scorer.score(pictures, prompts)
        # bf16 towers sum otherwise in another batch; statistics have equal bits
        np.testing.assert_allclose(found.q, [float(row["q"]) for row in rows], atol=5e-3)
