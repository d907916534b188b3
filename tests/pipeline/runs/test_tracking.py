"""What trackers are given, read back with their own clients, without any network."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.runs import tracking
from deltaclip.pipeline.runs.tracking import TOOLS, final_figures, track_run
from deltaclip.pipeline.settings import FinetuneConfig, SweepConfig, TrainConfig
from deltaclip.pipeline.train import train
from deltaclip.tests.pipeline.conftest import numbers, read_csv, read_json

MLFLOW = """
import json, mlflow
(run,) = mlflow.search_runs(experiment_names=["deltaclip"], output_format="list")
curve = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss/train")
print(json.dumps([run.data.params, run.data.metrics, [[one.step, one.value] for one in curve], run.info.run_name]))
"""


def test_figures_have_names_and_floors(demo_run):
    metrics = read_json(demo_run / "metrics.json")
    found = final_figures(metrics)
    assert found["test/quality/srocc"] == metrics["test"]["quality"]["srocc"]
    assert found["floors/no_image/quality/srocc"] == metrics["floors"]["no_image"]["quality"]["srocc"]
    assert found["test/quality/srocc_ci/low"] == metrics["test"]["quality"]["srocc_ci"][0]
    assert found["verdict/quality/lo"] == metrics["verdict"]["quality"]["lo"]
    assert not [name for name in found if "per_source" in name]
    repeats = {"test": {"quality": {"srocc": {"mean": 0.5, "sd": 0.1, "values": [0.4, 0.6]}, "n": 3, "note": "x"}}}
    wanted = {"test/quality/srocc": 0.5, "test/quality/srocc/sd": 0.1, "test/quality/n": 3.0}
    assert final_figures(repeats) == wanted


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("config", [TrainConfig, SweepConfig, FinetuneConfig], ids=lambda one: one.__name__)
def test_without_the_extra_one_line_says_so(tool, config, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        config(cache=tmp_path / "c.h5", track=tool).check_more()
    line = f"--track: needs {tool}, which is not installed; install it with: pip install 'deltaclip[{tool}]'"
    assert str(caught.value) == line


def test_a_tracker_that_refuses_leaves_the_run(demo_run, monkeypatch):
    def refuse(*_):
        raise OSError("no room\nfor more")

    monkeypatch.setitem(tracking.TOOLS, "mlflow", (refuse, lambda: (OSError,)))
    with pytest.raises(UserError) as caught:
        track_run("mlflow", demo_run)
    assert str(caught.value).startswith(f"{demo_run}: mlflow did not take it (no room")
    assert "\n" not in str(caught.value)


def tracked(tool, cache, folder, *more, **variables):
    """Train and track in a process that has no network and no home, and return what it says."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"the extra {tool} is not installed")
    command = [sys.executable, "-m", "deltaclip", *more, str(cache), "--epochs", "3", "--out", "run", "--track", tool]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "WANDB"))}
    environment |= {"HOME": str(folder), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr, environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_has_the_curves_the_figures_and_the_settings(demo_cache, tmp_path):
    said, environment = tracked("mlflow", demo_cache, tmp_path, "train", "--base", "calibrated")
    assert "tracked: MLflow run " in said
    command = [sys.executable, "-c", MLFLOW]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    parameters, metrics, curve, name = json.loads(done.stdout.splitlines()[-1])
    assert (parameters["epochs"], parameters["base"], parameters["backbone/backbone"]) == ("3", "calibrated", "tiny")
    figures = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["test/quality/srocc"] == pytest.approx(figures["test"]["quality"]["srocc"])
    assert "floors/no_image/consistency/srocc" in metrics
    loss = numbers(read_csv(tmp_path / "run" / "history.csv"), "train_loss").tolist()
    assert curve == [[epoch, pytest.approx(value)] for epoch, value in enumerate(loss, start=1)]
    assert name == "run"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights_and_biases_works_offline(demo_cache, tmp_path):
    said, _ = tracked("wandb", demo_cache, tmp_path, "sweep", "--scale", "0.1,0.2")
    assert "tracked: Weights & Biases, offline: " in said
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for word in (b"loss/train", b"floors/no_image/quality/srocc", b"test/consistency/srocc", b"scale/quality"):
        assert word in content, word
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_nothing_is_tracked_unasked(demo_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "TOOLS", {})
    config = TrainConfig(cache=demo_cache, out=tmp_path / "run", epochs=1, base="identity")
    assert train(config).run == tmp_path / "run"
