"""Where a run goes: whole or not at all, never over another one; what is printed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltaclip.base.errors import UserError
from deltaclip.tests.pipeline.conftest import read_json


def test_an_existing_out_is_refused_before_training(train_demo, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(UserError) as error:
        train_demo(out=taken)
    assert str(error.value) == f"{taken}: already exists; give another --out or remove it first"
    assert capsys.readouterr().err == ""  # not even the configuration, which comes before the first epoch
    assert list(taken.iterdir()) == []


def test_default_names_are_numbered(train_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [train_demo(out=None, epochs=1, residual_learning=residual).run for residual in (True, True, False)]
    assert found == [Path(f"runs/demo_{name}") for name in ("residual_frozen", "residual_frozen-2", "direct_frozen")]
    assert all((path / "metrics.json").is_file() for path in found)


@pytest.mark.slow
def test_a_run_killed_in_training_leaves_nothing(demo_cache, tmp_path):
    command = [sys.executable, "-m", "deltaclip", "train", str(demo_cache), "--epochs", "1000000"]
    log, folder = tmp_path / "log", tmp_path / "work"
    folder.mkdir()
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=folder, stderr=stderr, stdout=stderr)
    try:
        deadline = time.monotonic() + 120
        while "\nbases " not in log.read_text() and time.monotonic() < deadline:  # the last line before the first epoch
            time.sleep(0.05)
        time.sleep(0.3)
        assert process.poll() is None, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert list(folder.rglob("*")) == []


@pytest.mark.slow
def test_a_run_killed_while_writing_leaves_no_run(demo_cache, tmp_path, train_demo):
    program = (
        "import os, signal, sys, deltaclip.pipeline.runs.folder as folder\n"
        "written = folder.write_table\n"
        "def write_and_die(path, columns):\n"
        "    written(path, columns)\n"
        "    if path.name == 'predictions.csv': os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder.write_table = write_and_die\n"
        "from deltaclip.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", program, "train", str(demo_cache), "--epochs", "1", "--out", str(out)]
    ended = subprocess.run(command, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert train_demo(out=out, epochs=1).run == out


def test_a_diverging_run_is_one_line_and_leaves_nothing(train_demo, tmp_path):
    with pytest.raises(UserError) as error:
        train_demo(lr=1e38, max_grad_norm=0)
    assert re.fullmatch(
        r"the training loss is (nan|inf) at epoch \d+, step \d+; lower --lr, which is 1e\+38", str(error.value)
    )
    assert not list(tmp_path.glob("run*"))


def test_a_last_step_that_diverges_is_one_line_too(train_demo, tmp_path):
    """No loss comes after it that could tell."""
    with pytest.raises(UserError, match=r"^training diverged: its last step left .*; lower --lr, which is 1e\+38$"):
        train_demo(lr=1e38, base="identity", epochs=1, batch_size=1024, fractions="0.8,0,0.2")
    assert not list(tmp_path.glob("run*"))


def test_result_as_json_is_the_metrics_with_the_run(train_demo):
    run = train_demo(epochs=1)
    printed = json.loads(json.dumps(run.to_json()))
    assert {name: printed[name] for name in run.metrics} == read_json(run.run / "metrics.json")
    assert printed["run"] == str(run.run)
    assert all(epoch in (0, 1) for epoch in printed["best_epoch"].values())
    assert 0 <= printed["fit_seconds"] <= printed["seconds"]
    summary = run.summary()
    assert "split: grouped by prompt, 48 test rows (168 train, 24 validation)" in summary
    assert "floor: no image" in summary
    assert "floor: zero-shot cosine" in summary
