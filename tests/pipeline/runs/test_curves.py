"""Event files are read back with TensorBoard's own reader: every epoch, every curve, where they are said to lie."""

from __future__ import annotations

import importlib.util
import math

import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.loop.epochs import EpochRow
from deltaclip.pipeline.runs.curves import EpochLog, live_events
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def row(epoch, **changed):
    values = {
        "epoch": epoch,
        "train_loss": 0.5 / epoch,
        "val_score": 0.25,
        "lr": 0.001,
        "scales": {"quality": 0.2},
    }
    figures = {"val_quality_srocc": math.nan, "val_consistency_srocc": 0.5}
    return EpochRow(**values | {"seconds": 1.0, "figures": figures} | changed)


def test_every_epoch_is_there_at_once(tmp_path):
    with EpochLog(tmp_path) as log:
        log(row(1))
        assert curves(tmp_path)["loss/train"] == [(1, 0.5)]  # while the training goes on
        log(row(2, val_score=math.nan))
    found = curves(tmp_path)
    assert found["loss/train"] == [(1, 0.5), (2, 0.25)]
    assert found["validation/main"] == [(1, 0.25)]
    assert found["validation/val_consistency_srocc"] == [(1, 0.5), (2, 0.5)]
    assert found["scale/quality"] == [(1, pytest.approx(0.2)), (2, pytest.approx(0.2))]
    assert found.keys().isdisjoint({"scale/consistency", "validation/val_quality_srocc"})


def test_live_events_lie_beside_the_run_and_go(tmp_path):
    with live_events(tmp_path / "runs" / "a") as folder:
        assert folder.parent == tmp_path / "runs"
        assert folder.name.startswith("a.")
        assert folder.name.endswith(".tensorboard")
    with pytest.raises(KeyboardInterrupt), live_events(tmp_path / "runs" / "a"):
        raise KeyboardInterrupt
    assert list((tmp_path / "runs").iterdir()) == []


def test_train_writes_what_its_history_says(demo_cache, tmp_path):
    done = train(TrainConfig(cache=demo_cache, out=tmp_path / "run", epochs=3, tensorboard=True))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    lines = (done.run / "history.csv").read_text().splitlines()
    history = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    found = curves(done.run / "tensorboard")
    for column, curve in (("train_loss", "loss/train"), ("val_score", "validation/main"), ("lr", "learning rate")):
        expected = [
            (int(row["epoch"]), pytest.approx(float(row[column]), rel=2e-6)) for row in history
        ]  # the table has 6 digits
        assert found[curve] == expected, curve
    assert len(history) == 3


def test_repeats_have_a_folder_each(demo_cache, tmp_path):
    done = train(TrainConfig(cache=demo_cache, out=tmp_path / "run", epochs=1, repeats=2, tensorboard=True))
    folders = sorted((done.run / "tensorboard").iterdir())
    assert [path.name for path in folders] == ["seed-42", "seed-43"]
    assert all(len(curves(path)["loss/train"]) == 1 for path in folders)


def test_without_the_option_there_are_no_events(demo_cache, tmp_path):
    done = train(TrainConfig(cache=demo_cache, out=tmp_path / "run", epochs=1))
    assert not (done.run / "tensorboard").exists()


def test_without_the_library_nothing_starts(demo_cache, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    with pytest.raises(UserError) as caught:
        train(TrainConfig(cache=demo_cache, out=tmp_path / "run", tensorboard=True))
    remedy = "install it with: pip install 'deltaclip[tensorboard]'"
    assert str(caught.value) == f"--tensorboard: needs tensorboard, which is not installed; {remedy}"
    assert list(tmp_path.iterdir()) == []
