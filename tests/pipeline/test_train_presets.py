"""`train --preset`: what it sets, what wins over it, and what of it has no place here."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaclip.cli import main
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.training.presets import apply_preset
from deltaclip.tests.pipeline.conftest import read_csv, read_json

TABLE = {
    "quick": {"epochs": 10, "batch_size": 64, "lr": 1e-3},
    "small": {"scale": "0.1", "epochs": 30, "batch_size": 16},
    "balanced": {"scale": "0.2", "epochs": 20, "batch_size": 32},
}
CACHE = Path("c.h5")


def applied(num_rows=500, **settings):
    return apply_preset(TrainConfig(cache=CACHE, **settings), num_rows=num_rows)


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_sets_what_the_table_says_and_nothing_else(name):
    config, about = applied(preset=name)
    assert config == TrainConfig(cache=CACHE, preset=name, **TABLE[name])
    assert about.applied == TABLE[name]
    assert about.given == ()
    assert about.reason == ""
    assert config.lr == 1e-3  # a preset's other rates are those of a backbone that trains


def test_without_a_preset_nothing_changes():
    config = TrainConfig(cache=CACHE, epochs=3)
    assert apply_preset(config, num_rows=10) == (config, None)


def test_what_is_given_wins_also_where_it_is_the_default():
    config, about = applied(preset="small", epochs=20, scale="0.2")
    assert (config.epochs, config.scale, config.batch_size) == (20, "0.2", 16)
    assert about.given == ("scale", "epochs")
    assert about.applied == {"batch_size": 16}
    assert applied(preset="small", scale="0")[0].scales.of("quality") == 0
    everything, about = applied(**(TABLE["small"] | {"preset": "small", "epochs": 1}))
    assert everything.epochs == 1
    assert "nothing left to set; given and kept: --scale" in about.lines()[0]


@pytest.mark.parametrize("given", [{"scale": "consistency=0.3"}, {"residual_scale_c": 0.3}])
def test_a_scale_of_one_target_leaves_the_others_to_the_preset(given):
    config, about = applied(preset="small", **given)
    assert [config.scales.of(name) for name in ("quality", "consistency", "colour")] == [0.1, 0.3, 0.1]
    assert "scale" in about.applied
    assert "scale" not in about.given


@pytest.mark.parametrize(
    ("num_rows", "name", "reason"),
    [
        (999, "small", "999 training rows, under 1,000"),
        (1000, "balanced", "1,000 training rows, between 1,000 and 3,000, where scales of 0.1 cost consistency"),
        (3000, "balanced", "3,000 training rows, between 1,000 and 3,000, where scales of 0.1 cost consistency"),
        (3001, "balanced", "3,001 training rows, over 3,000"),
    ],
)
def test_auto_picks_by_rows_and_says_why(num_rows, name, reason):
    config, about = applied(num_rows, preset="auto")
    assert (about.name, about.reason) == (name, reason)
    assert config.preset == "auto"
    assert config.batch_size == TABLE[name]["batch_size"]
    assert about.lines()[0].startswith(f"preset        {name} (auto: {reason}): --scale ")


def test_scales_are_nothing_to_direct_heads():
    config, about = applied(preset="small", residual_learning=False)
    assert config.scale == TrainConfig(cache=CACHE).scale
    assert about.lines() == [
        "preset        small (for under 1,000 rows): --epochs 30, --batch-size 16",
        "              not used here: scales: direct heads have none; freezing 83% of CLIP, learning rate 1e-05: "
        "the backbone is frozen, and heads learn at 0.001",
    ]


def test_a_preset_trains_as_its_settings_do(train_demo, tmp_path, capsys):
    """The same from Python and from the command line; the run says what was in force and why."""
    run = train_demo(preset="auto", epochs=2)
    err = capsys.readouterr().err
    lines = [
        "preset        small (auto: 168 training rows, under 1,000): --scale 0.1, --batch-size 16; "
        "given and kept: --epochs",
        "              not used here: freezing 83% of CLIP, learning rate 1e-05: the backbone is frozen, "
        "and heads learn at 0.001",
        "epochs        2, batch 16, seed 42",
    ]
    assert set(lines) <= set(err.splitlines())
    config = read_json(run.run / "config.json")
    assert config["preset"]["name"] == "small"
    assert config["preset"]["reason"] == "168 training rows, under 1,000"
    assert config["preset"]["given"] == ["epochs"]
    assert {name: config["settings"][name] for name in TABLE["small"]} == TABLE["small"] | {"epochs": 2}
    assert config["settings"]["preset"] == "auto"
    cache, out = config["cache"]["path"], tmp_path / "typed"
    with pytest.raises(SystemExit) as ended:
        main(["train", cache, "--preset", "small", "--epochs", "2", "--base", "calibrated", "--out", str(out)])
    assert ended.value.code == 0
    plain = train_demo(scale="0.1", batch_size=16, epochs=2)
    same = [path / "predictions.csv" for path in (run.run, out, plain.run)]
    assert len({path.read_bytes() for path in same}) == 1
    assert read_json(plain.run / "config.json")["preset"] is None


def test_repeats_of_a_preset_share_its_settings(train_demo):
    run = train_demo(preset="quick", epochs=1, repeats=2)
    assert len(read_csv(run.run / "history.csv")) == 1
    assert read_json(run.run / "config.json")["preset"]["applied"] == {"batch_size": 64, "lr": 1e-3}
