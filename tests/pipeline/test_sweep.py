"""Many settings at once: each as `train` gives it alone, the winner chosen on validation, wrong values refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.settings import BY_TARGET, PLAIN, EvaluateConfig, SweepConfig, TrainConfig
from deltaclip.pipeline.sweep import sweep
from deltaclip.pipeline.train import train
from deltaclip.pipeline.training.sweep_grid import axis_names, default_setting, edges, sweep_settings, varied
from deltaclip.tests.pipeline.conftest import EPOCHS, numbers, read_csv, read_json, weights_of

LABELS = ("quality", "consistency")
# What may be a list of values.
SWEPT = {*PLAIN, *BY_TARGET, *(option for options in BY_TARGET.values() for option in options.values())}
# What `sweep` has of its own, each with a test of its effect below.
OWN = {"samples", "precision", "data_seed", "out"}


@pytest.fixture
def sweep_demo(tmp_path, demo_cache):
    def run(**settings):
        out = tmp_path / f"sweep{len(list(tmp_path.glob('sweep*')))}"
        values = {"cache": demo_cache, "out": out, "epochs": EPOCHS, "precision": "fp32", "base": "calibrated"}
        return sweep(SweepConfig(**values | settings))

    return run


def as_text(settings):
    return {name: str(value) for name, value in settings.items()}


def of_train(row):
    """Return a row of the table as settings of `train`."""
    settings = {name: row[name] for name in PLAIN}
    for name in BY_TARGET:
        of_one = {axis: value for axis, value in row.items() if axis.startswith(f"{name}_") and axis not in PLAIN}
        words = [f"{axis.removeprefix(f'{name}_')}={value}" for axis, value in of_one.items()]
        settings[name] = ",".join([str(row[name]), *words])
    return settings


def figures(run):
    metrics = read_json(run / "metrics.json")
    sides = [metrics[side][label] for side in ("train", "val", "test") for label in LABELS]
    return np.array([side[name] for side in sides for name in ("srocc", "krocc", "plcc", "plcc_mapped", "rmse")])


@pytest.mark.parametrize(
    "settings",
    [
        {"residual_scale_q": 0.4, "residual_scale_c": 0.1, "lr": 5e-3, "weight_decay": 0.01},
        pytest.param({"loss": "rank", "dropout": 0.4, "seed": 7, "w_q": 0.9, "w_c": 0.2}, marks=pytest.mark.slow),
        pytest.param({"weight": "0.9,consistency=0.2", "scale": "quality=0.05"}, marks=pytest.mark.slow),
        pytest.param({"base": "identity", "dropout": 0.0, "lr": 4e-3}, marks=pytest.mark.slow),
        pytest.param({"scale_mode": "learned", "residual_scale_q": 0.3, "lr": 5e-3}, marks=pytest.mark.slow),
        pytest.param(
            {
                "scale_mode": "curriculum",
                "loss": "plcc",
                "warmup_ratio": 0.3,
                "schedule": "linear",
                "max_grad_norm": 0.05,
            },
            marks=pytest.mark.slow,
        ),
        {"batch_size": 100, "patience": 1, "fractions": "0.5,0.2,0.3", "data_seed": 3, "std_weighting": True},
    ],
)
def test_a_setting_is_as_train_gives_it_alone(sweep_demo, train_demo, settings):
    """fp32, the same seed: every metric within 1e-3."""
    listed = {name: value for name, value in settings.items() if name in SWEPT}
    common = {name: value for name, value in settings.items() if name not in SWEPT}
    alone = train_demo(**{"data_seed": 42, **settings})
    together = sweep_demo(**as_text(listed), **common)
    assert figures(together.run) == pytest.approx(figures(alone.run), abs=1e-3)
    assert read_json(together.run / "config.json")["best_epoch"] == alone.best_epoch
    ours, theirs = (read_csv(run / "history.csv") for run in (together.run, alone.run))
    for column in ("train_loss", "val_score", "lr", "scale_quality", "scale_consistency", "val_quality_srocc"):
        kept = min(len(ours), len(theirs))  # with patience each head of the stack may go on
        assert numbers(ours[:kept], column) == pytest.approx(numbers(theirs[:kept], column), abs=1e-3)
    assert set(weights_of(together.run)) == set(weights_of(alone.run))


def test_a_grid_ranks_by_validation_and_saves_the_winner(sweep_demo, train_demo, demo_cache):
    run = sweep_demo(residual_scale_q="0.05,0.4", lr="1e-3,5e-3", loss="mse,rank")
    assert len(run.table) == 8
    assert run.varied == ["scale_quality", "lr", "loss"]
    scores = [row["val_score"] for row in run.table]
    assert scores == sorted(scores, reverse=True)
    best, worst = run.table[0], run.table[-1]
    assert best["val_score"] == pytest.approx(np.mean([best[f"val_{label}"] for label in LABELS]))
    for row in (best, worst):
        alone = train_demo(**of_train(row))
        mains = [alone.metrics["val"][label]["main"] for label in LABELS]
        assert [row[f"val_{label}"] for label in LABELS] == pytest.approx(mains, abs=1e-3)
    # The winner is a run like any other; nobody else's test rows were looked at.
    assert run.metrics["val"]["quality"]["main"] == pytest.approx(best["val_quality"], abs=1e-4)
    assert evaluate(EvaluateConfig(run=run.run)).metrics["test"] == read_json(run.run / "metrics.json")["test"]
    assert not any("test" in name for name in run.table[0])
    config = read_json(run.run / "config.json")
    assert config["stage"] == "sweep"
    assert config["settings"]["lr"] == best["lr"]
    assert config["sweep"]["settings"]["lr"] == "1e-3,5e-3"
    rows = read_csv(run.run / "sweep.csv")
    assert numbers(rows, "val_score") == pytest.approx(scores, rel=1e-5)
    assert json.loads(json.dumps(run.to_json()))["sweep"]["table"] == run.table


def test_what_a_head_does_not_see_is_trained_once(sweep_demo):
    run = sweep_demo(residual_scale_q="0.1,0.2,0.3", residual_scale_c="0.1,0.2,0.3,0.4", epochs=1)
    assert (len(run.table), run.num_heads) == (12, 3 + 4)
    assert "12 settings as 7 heads" in run.summary()


def test_values_of_all_targets_and_of_one(sweep_demo):
    run = sweep_demo(scale="0.1,0.3,quality=0.05,0.2", epochs=1)
    assert run.varied == ["scale", "scale_quality"]
    assert (len(run.table), run.num_heads) == (4, 2 + 3)  # of consistency one more, with the default scale
    together = sweep_demo(scale="0.1,0.3", epochs=1)
    assert (len(together.table), together.num_heads) == (2, 3 + 3)


def test_settings_rank_by_their_mean_over_seeds(sweep_demo):
    run = sweep_demo(seed="1,2,3", residual_scale_q="0.1,0.4", base="identity", lr="5e-3")
    means = [np.mean([row["val_score"] for row in run.table if row["scale_quality"] == q]) for q in (0.1, 0.4)]
    assert run.table[0]["scale_quality"] == (0.1, 0.4)[int(np.argmax(means))]
    assert run.table[0]["val_score_mean"] == pytest.approx(max(means))
    assert run.table[0]["val_score"] == max(row["val_score"] for row in run.table[:3])
    assert {row["num_seeds"] for row in run.table} == {3}


def test_heat_maps_are_means_over_the_rest(sweep_demo):
    run = sweep_demo(residual_scale_q="0.05,0.4", residual_scale_c="0.1,0.3", lr="1e-3,5e-3")
    assert {(one["x"], one["y"]) for one in run.heatmaps} == {
        ("scale_quality", "scale_consistency"),
        ("scale_quality", "lr"),
        ("scale_consistency", "lr"),
    }
    for one in run.heatmaps:
        for y, line in zip(one["y_values"], one["val_score"], strict=True):
            for x, score in zip(one["x_values"], line, strict=True):
                cell = [row["val_score"] for row in run.table if row[one["x"]] == x and row[one["y"]] == y]
                assert score == pytest.approx(np.mean(cell))
    assert "validation score, lr down" in run.summary()


def test_a_diverged_setting_comes_last(sweep_demo):
    run = sweep_demo(lr="5e-3,1e38", max_grad_norm=0, base="identity")
    assert run.table[0]["lr"] == 5e-3
    assert np.isfinite(run.metrics["test"]["quality"]["srocc"])
    assert np.isnan(run.table[1]["val_quality"])
    assert run.table[1]["val_score"] == pytest.approx((run.table[1]["val_consistency"] - 1) / 2)


@pytest.mark.slow
def test_bf16_products_choose_alike(sweep_demo):
    settings = {"residual_scale_q": "0.05,0.4", "loss": "mse,rank", "lr": "3e-3"}
    exact, half = (sweep_demo(precision=precision, **settings) for precision in ("fp32", "bf16"))
    assert read_json(half.run / "config.json")["sweep"]["products"] == "bf16"
    for row in exact.table:
        other = next(one for one in half.table if of_train(one) == of_train(row))
        assert other["val_score"] == pytest.approx(row["val_score"], abs=0.02)


@pytest.mark.slow
def test_more_heads_than_one_stack_takes(sweep_demo, monkeypatch):
    settings = {"residual_scale_q": "0.05,0.2,0.4,0.5,0.1", "residual_scale_c": "0.1,0.3", "dropout": "0.5"}
    settings |= {"lr": "5e-3", "base": "identity"}  # no epoch is the calibrated base, which all would share
    whole = sweep_demo(**settings)
    monkeypatch.setattr("deltaclip.pipeline.training.train_stacks.MAX_HEADS", 2)
    parts = sweep_demo(**settings)
    for one, other in zip(whole.table, parts.table, strict=True):
        assert one["val_score"] == pytest.approx(other["val_score"], abs=1e-5)


def test_samples_of_a_grid_and_of_ranges(demo_cache):
    grid = {"cache": demo_cache, "lr": "1e-3,2e-3,3e-3", "loss": "mse,rank,plcc"}
    some = sweep_settings(SweepConfig(**grid, samples=5))
    assert len(set(some)) == 5
    assert set(some) <= set(sweep_settings(SweepConfig(**grid)))
    assert some == sweep_settings(SweepConfig(**grid, samples=5))
    assert some != sweep_settings(SweepConfig(**grid, samples=5, data_seed=1))
    assert len(sweep_settings(SweepConfig(**grid, samples=50))) == 9
    ranges = SweepConfig(cache=demo_cache, lr="1e-4..1e-2", dropout="0.1..0.5", scale="quality=0.1..0.3", samples=400)
    drawn = sweep_settings(ranges)
    rates = np.log10([one.lr for one in drawn])
    assert rates.min() > -4
    assert rates.max() < -2
    assert np.mean(rates) == pytest.approx(-3, abs=0.1)  # uniform in the logarithm: SD of the mean is 0.03
    assert np.mean([one.dropout for one in drawn]) == pytest.approx(0.3, abs=0.02)  # SD of the mean is 0.006
    assert np.mean([one.scales.of("quality") for one in drawn]) == pytest.approx(0.2, abs=0.01)  # SD of it is 0.003
    assert {one.scales.of("consistency") for one in drawn} == {0.2}
    assert varied(drawn, axis_names(ranges)) == ["scale_quality", "lr", "dropout"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lr": "fast"}, "--lr: 'fast' is no number; give values such as 0.1,0.2"),
        ({"seed": "1.5"}, "--seed: '1.5' is no whole number; give values such as 1,2,3"),
        ({"dropout": "0.1,1.5"}, "--dropout: 1.5 is out of range; give a value below 1"),
        ({"loss": "mse,huber,ranks"}, "--loss: 'ranks' is not a choice; did you mean 'rank'?"),
        ({"lr": "1e-4..1e-2"}, "--lr: a range has no grid; give --samples, or values"),
        ({"lr": "0..1e-2", "samples": 3}, "--lr: '0..1e-2' is no range; give LO..HI with LO below HI and above 0"),
        ({"dropout": "0.1..1.5", "samples": 3}, "--dropout: 1.5 is out of range; give a value below 1"),
        ({"samples": 20_000}, "--samples: 20,000 settings; give at most 10,000"),
        ({"samples": -1}, "--samples: -1 is out of range; give a value at least 0"),
    ],
)
def test_wrong_values(demo_cache, settings, line):
    with pytest.raises(UserError) as error:
        sweep_settings(SweepConfig(cache=demo_cache, **settings))
    assert str(error.value) == line


def test_a_grid_that_is_too_large(demo_cache):
    values = ",".join(str(k / 1000) for k in range(1, 200))
    with pytest.raises(UserError) as error:
        sweep_settings(SweepConfig(cache=demo_cache, lr=values, dropout=values))
    assert str(error.value) == (
        "sweep: the grid has 39,601 settings; give fewer values, or --samples of at most 10,000"
    )


def test_without_validation_rows_nothing_can_be_chosen(sweep_demo, demo_cache):
    with pytest.raises(UserError) as error:
        sweep_demo(fractions="0.8,0,0.2", epochs=1)
    assert str(error.value) == (
        f"{demo_cache}: too few validation rows to choose a setting by; give --fractions with more validation rows"
    )


def test_one_label_alone(sweep_demo, relabelled):
    def drop(rows):
        for row in rows:
            row["consistency"] = ""

    run = sweep_demo(cache=relabelled(drop), residual_scale_q="0.1,0.3", epochs=2)
    assert set(run.metrics["test"]) == {"quality"}
    assert "val_consistency" not in run.table[0]


def test_every_setting_of_the_sweep_is_one_of_train_or_tested_here(demo_cache):
    names = {field.name for field in dataclasses.fields(SweepConfig)}
    one = sweep_settings(SweepConfig(cache=demo_cache, epochs=3, split="random", device="cpu"))[0]
    assert (one.epochs, one.split, one.device) == (3, "random", "cpu")
    trained = {field.name for field in dataclasses.fields(one)}
    assert names - trained <= OWN


def test_what_does_not_hold_for_all_settings_is_not_warned_of(sweep_demo, capsys):
    sweep_demo(w_c="0,0.5", epochs=1)
    assert "is not trained" not in capsys.readouterr().err


def test_draws_from_ranges_have_no_heat_map(sweep_demo):
    run = sweep_demo(lr="1e-3..5e-3", dropout="0..0.3", residual_scale_q="0.1,0.2", samples=12, epochs=1)
    assert [(one["x"], one["y"]) for one in run.heatmaps] == [
        ("scale_quality", "lr"),
        ("scale_quality", "dropout"),
    ]


@pytest.mark.parametrize(
    ("swept", "value", "edge"),
    [
        ({"lr": "1e-3,3e-3,1e-2"}, {"lr": 1e-2}, {"lr": "largest"}),
        ({"lr": "1e-3,3e-3,1e-2"}, {"lr": 1e-3}, {"lr": "smallest"}),
        ({"lr": "1e-3,3e-3,1e-2"}, {"lr": 3e-3}, {}),
        ({"scale": "0,0.5,1"}, {"scale": "0.0"}, {}),  # no smaller one exists
        ({"scale": "0,0.5,1"}, {"scale": "1.0"}, {}),
        ({"scale": "quality=0.1,0.2"}, {"scale": "quality=0.2"}, {"scale_quality": "largest"}),
        ({"dropout": "0,0.1"}, {"dropout": 0.0}, {}),
        ({"loss": "huber,mse", "seed": "1,2"}, {"loss": "mse", "seed": 2}, {}),
        ({"lr": "1e-4..1e-2", "samples": 4}, {"lr": 8e-3}, {"lr": "largest"}),
        ({"lr": "1e-4..1e-2", "samples": 4}, {"lr": 1e-3}, {}),
        ({"dropout": "0.1..0.5", "samples": 4}, {"dropout": 0.13}, {"dropout": "smallest"}),
    ],
)
def test_the_edge_of_a_grid_is_found(swept, value, edge):
    config = SweepConfig(cache=Path("any.h5"), **swept)
    best = TrainConfig(cache=Path("any.h5"), **value)
    assert edges(best, config, sweep_settings(config)) == edge


def test_the_default_setting_differs_in_what_was_swept_alone():
    config = SweepConfig(cache=Path("any.h5"), lr="3e-3,1e-2", loss="huber", scale="quality=0.1,0.3", seed="7,8")
    found = default_setting(config, sweep_settings(config))
    assert (found.lr, found.loss, found.scales.of("quality"), found.seed) == (1e-3, "huber", 0.2, 7)


def test_the_winner_is_compared_with_the_default_on_test_rows(demo_cache, tmp_path):
    result = sweep(
        SweepConfig(cache=demo_cache, base="calibrated", lr="3e-3,1e-2", epochs=3, precision="fp32", out=tmp_path / "s")
    )
    assert set(result.edges) == {"lr"}
    default = train(TrainConfig(cache=demo_cache, base="calibrated", epochs=3, out=tmp_path / "d"))
    for label, found in result.over_default.items():
        expected = result.metrics["test"][label]["srocc"] - default.metrics["test"][label]["srocc"]
        # Stacked heads differ from those of `train` by rounding: two rows of 48 may change places.
        assert found["difference"] == pytest.approx(expected, abs=2e-3)
        assert found["lo"] <= found["difference"] <= found["hi"]
    words = result.summary()
    assert "the winner is at the edge of the grid: lr " in words
    assert "the winner against the default setting on test rows (quality): " in words
    assert result.to_json()["sweep"]["over_default"] == result.over_default
    same = sweep(SweepConfig(cache=demo_cache, base="calibrated", lr="1e-3", epochs=1, out=tmp_path / "one"))
    assert (same.edges, same.over_default) == ({}, {})
