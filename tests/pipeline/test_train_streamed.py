"""Caches that are too large for memory: the same bases, scores and metrics, and no result from a damaged block."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.loop.batches import MemoryBatches, StreamBatches
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.settings import EvaluateConfig, TrainConfig
from deltaclip.pipeline.train import train
from deltaclip.tests.pipeline.conftest import read_csv, read_json, same_weights, weights_of
from deltaclip.tests.pipeline.test_damaged_cache import ANEW, flip


@pytest.fixture
def _streamed(monkeypatch):
    """Every cache is large now, and a window holds 24 rows of the demo set."""
    monkeypatch.setattr("deltaclip.pipeline.rows.cached_rows.MEMORY_BYTES", 0)
    monkeypatch.setattr("deltaclip.pipeline.rows.cached_rows.WINDOW_BYTES", 24 * 2 * 2 * 256)


def test_the_bound_decides(demo_cache, monkeypatch):
    rows = load_rows(demo_cache, "cpu")
    size = sum(tensor.numel() * tensor.element_size() for tensor in (rows.v_ID, rows.t_TD))
    assert isinstance(rows.batches(None, batch_size=8), MemoryBatches)
    monkeypatch.setattr("deltaclip.pipeline.rows.cached_rows.MEMORY_BYTES", size - 1)
    streamed = load_rows(demo_cache, "cpu")
    assert streamed.v_ID is streamed.t_TD is None
    assert isinstance(streamed.batches(None, batch_size=8), StreamBatches)
    np.testing.assert_array_equal(streamed.cosine(), rows.cosine())
    chosen = np.array([5, 0, 200])
    np.testing.assert_array_equal(streamed.cosine(chosen), rows.cosine()[chosen])
    found = [each.batches(None, batch_size=8, explanations=True).in_order(100) for each in (rows, streamed)]
    for one, other in zip(*found, strict=True):
        assert list(one.label_B) == list(other.label_B) == ["quality", "consistency"]
        for mine, theirs in (
            *((getattr(one, name), getattr(other, name)) for name in ("v_BD", "t_BD", "e_BD")),
            *((one.label_B[target], other.label_B[target]) for target in one.label_B),
        ):
            assert torch.equal(mine.nan_to_num(9), theirs.nan_to_num(9))


@pytest.mark.usefixtures("_streamed")
def test_a_run_is_evaluated_to_the_same_digit(demo_run):
    found = evaluate(EvaluateConfig(run=demo_run)).to_json()
    whole = read_json(demo_run / "metrics.json")
    assert {name: found[name] for name in whole} == whole


@pytest.mark.usefixtures("_streamed")
def test_training_starts_from_the_same_base_and_repeats_itself(demo_run, train_demo):
    first, again = train_demo(epochs=2), train_demo(epochs=2)
    assert same_weights(weights_of(first.run), weights_of(again.run))
    names = ("image", "prompt", "group", "source", "split", "quality_label", "consistency_label")
    for ours, theirs in zip(
        read_csv(first.run / "predictions.csv"), read_csv(demo_run / "predictions.csv"), strict=True
    ):
        assert [ours[name] for name in names] == [theirs[name] for name in names]
    assert read_json(first.run / "config.json")["calibration"] == read_json(demo_run / "config.json")["calibration"]
    # Another order of rows, the same heads: what they learn is as good.
    long = train_demo(epochs=6)
    in_memory = read_json(demo_run / "metrics.json")["test"]
    for label in ("quality", "consistency"):
        assert long.metrics["test"][label]["srocc"] == pytest.approx(in_memory[label]["srocc"], abs=0.05)


@pytest.mark.usefixtures("_streamed")
@pytest.mark.parametrize("name", ["views/center/embedding", "texts/embedding"])
def test_a_damaged_row_is_refused(demo_cache, tmp_path, name):
    path = tmp_path / "c.h5"
    shutil.copy(demo_cache, path)
    rows = flip(path, name, 7)
    with pytest.raises(UserError) as caught:
        train(TrainConfig(cache=path, out=tmp_path / "run", epochs=1))
    assert str(caught.value) == f"{path}: is damaged ({name}: 1 of {rows} rows, the first is row 7); {ANEW}"
    assert not (tmp_path / "run").exists()
