"""Run directories: whole or not at all, numbered, and refused by name where something is missing or damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltaclip.base.errors import UserError
from deltaclip.pipeline.report_parts.panels import read_history
from deltaclip.pipeline.rows.cached_rows import read_keys
from deltaclip.pipeline.runs import folder as folder_module
from deltaclip.pipeline.runs.folder import free_run_path, open_run, surroundings
from deltaclip.pipeline.runs.prediction_table import read_predictions, recorded_targets

CHECKPOINT = "residual_frozen_best.safetensors"


@pytest.fixture
def copied_run(demo_run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(demo_run, path)
    return path


def refused(path):
    with pytest.raises(UserError) as error:
        open_run(path)
    return str(error.value)


def test_open_run_returns_what_was_written(demo_run):
    run = open_run(demo_run)
    assert run.path == demo_run
    assert not run.heads.training
    assert run.config["stage"] == "train"
    assert run.config["mode"] == "residual_frozen"
    assert set(run.metrics["test"]) == {"quality", "consistency"}


def test_a_run_is_public_as_its_folder(demo_run):
    """Safetensors writes private files; a run should have the rights that a plain open() gives."""
    rights = {path.stat().st_mode & 0o777 for path in demo_run.iterdir()}
    assert len(rights) == 1
    assert rights.pop() & 0o600 == 0o600


def test_no_such_run(tmp_path):
    assert refused(tmp_path / "x") == f"{tmp_path / 'x'}: no such run directory; make one with `deltaclip train`"


def test_a_folder_that_is_no_run(tmp_path):
    remedy = "give a directory made by `deltaclip train`"
    assert refused(tmp_path) == f"{tmp_path}: holds 0 checkpoints, not one; {remedy}"


def test_two_checkpoints(copied_run):
    shutil.copyfile(copied_run / CHECKPOINT, copied_run / "other_best.safetensors")
    remedy = "give a directory made by `deltaclip train`"
    assert refused(copied_run) == f"{copied_run}: holds 2 checkpoints, not one; {remedy}"


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_missing_file_is_named(copied_run, name):
    (copied_run / name).unlink()
    place = copied_run / name
    reason = f"[Errno 2] No such file or directory: {str(place)!r}"
    assert refused(copied_run) == f"{place}: cannot be read ({reason}); train again"


@pytest.mark.parametrize(
    ("text", "words"),
    [("[]", "holds no object of JSON"), ("5", "holds no object of JSON"), ("{}", "lacks 'labels'")],
)
def test_json_of_another_shape_is_named(copied_run, text, words):
    place = copied_run / "config.json"
    place.write_text(text)
    assert refused(copied_run) == f"{place}: {words}; train again"


def test_a_run_without_what_its_training_recorded_is_named(copied_run):
    place = copied_run / "config.json"
    recorded = json.loads(place.read_text())
    del recorded["cache"]
    place.write_text(json.dumps(recorded))
    assert refused(copied_run) == f"{place}: lacks 'cache'; train again"


def test_weights_that_are_not_finite_are_named(copied_run):
    place = copied_run / CHECKPOINT
    with safe_open(place, framework="pt") as file:
        header = file.metadata()
    weights = load_file(place)
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    save_file(weights | {name: weights[name] * torch.nan}, place, metadata=header)
    assert refused(copied_run) == f"{place}: holds weights that are not finite ({name}); train again"


def test_broken_json_is_named(copied_run):
    (copied_run / "config.json").write_text('{"a": 1')
    place = copied_run / "config.json"
    reason = "Expecting ',' delimiter: line 1 column 8 (char 7)"
    assert refused(copied_run) == f"{place}: cannot be read ({reason}); train again"


# What people have in place of a file, and the words for it.
IN_PLACE = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "is a Git LFS pointer, not the file itself",
    b"<!DOCTYPE html><html><title>Sign in</title></html>": "is a page of HTML",
    b"": "is empty",
    b"Entry not found": "is text",
}


def read_all(run):
    """Open every file of a run as stages do."""
    open_run(run)
    read_keys(run / "rows.safetensors", num_rows=1)
    read_history(run / "history.csv")
    read_predictions(run / "predictions.csv", ["image"])
    recorded_targets(run / "predictions.csv")


@pytest.mark.parametrize("content", IN_PLACE)
def test_what_lies_in_place_of_any_file_of_a_run_is_said(copied_run, content):
    read_all(copied_run)
    for path in sorted(path for path in copied_run.iterdir() if path.is_file()):
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_all(copied_run)
        if not (IN_PLACE[content] == "is text" and path.suffix in {".csv", ".json"}):
            assert str(caught.value).startswith(f"{path}: {IN_PLACE[content]}, no ")
        path.write_bytes(whole)


def test_a_truncated_checkpoint_is_named(copied_run):
    place = copied_run / CHECKPOINT
    place.write_bytes(place.read_bytes()[:-100])
    line = refused(copied_run)
    assert line.startswith(f"{place}: is no checkpoint of deltaclip heads (")
    assert line.endswith("); train again")
    assert "\n" not in line


def test_numbers_of_default_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_run_path(None, "x") == Path("runs/x")
    Path("runs/x").mkdir(parents=True)
    assert free_run_path(None, "x") == Path("runs/x-2")
    Path("runs/x-2").mkdir()
    assert free_run_path(None, "x") == Path("runs/x-3")
    assert free_run_path(tmp_path / "given", "x") == tmp_path / "given"


def test_an_error_while_writing_leaves_nothing(demo_run, tmp_path, monkeypatch, train_demo):
    written = folder_module.write_table

    def fail(path, columns):
        written(path, columns)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folder_module, "write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        train_demo(epochs=1)
    assert list(tmp_path.iterdir()) == []


def git(*arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_git_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert surroundings()["git"] is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "x")
    assert surroundings()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert surroundings()["git"]["dirty"] is True
