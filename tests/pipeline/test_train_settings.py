"""What each setting of training does, and what is said where it does nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from deltaclip.base.options import field_types
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.settings import EvaluateConfig, TrainConfig
from deltaclip.tests.pipeline.conftest import EPOCHS, numbers, read_csv, read_json, same_weights, weights_of

LABELS = ("quality", "consistency")
SIDES = ("train", "val", "test")
IMAGE_OUT, PAIR_OUT = "mlp.out.weight", "fusion.out.weight"  # zero at the start, and without a gradient

# A new setting fails test_every_setting_has_a_test_of_its_effect until it stands in EFFECTS.


class Effect:
    """Two runs to compare: the default one and one with a changed setting."""

    def __init__(self, base, changed):
        self.base, self.changed = Path(base), Path(changed)

    def history(self, name):
        return tuple(numbers(read_csv(run / "history.csv"), name) for run in (self.base, self.changed))

    def config(self):
        return read_json(self.changed / "config.json")

    def metrics(self):
        return read_json(self.changed / "metrics.json")

    def weights_differ(self):
        return not same_weights(weights_of(self.base), weights_of(self.changed))


def direct_heads(effect):
    assert sorted(path.name for path in effect.changed.glob("*.safetensors")) == [
        "direct_frozen_best.safetensors",
        "rows.safetensors",
        "trust.safetensors",
    ]
    rows = read_csv(effect.changed / "predictions.csv")
    assert {row["quality_base"] for row in rows} == {""}
    assert np.isfinite(numbers(rows, "quality")).all()
    assert effect.metrics()["diagnostics"] == []
    return any("quality       sigmoid(Linear(v))" in line for line in effect.config()["description"])


def random_split_leaks(effect):
    prompts = {}
    for row in read_csv(effect.changed / "predictions.csv"):
        prompts.setdefault(row["prompt"], set()).add(row["split"])
    assert any(len(sides) > 1 for sides in prompts.values())
    return effect.metrics()["split"]["leaks_groups"] is True


def learned_scales_move(effect):
    base, changed = effect.history("scale_quality")
    assert np.unique(base).size == 1
    return np.unique(changed).size == EPOCHS and effect.config()["scales"]["quality"] != pytest.approx(0.2, abs=1e-7)


def scale_of_quality_alone(effect):
    return effect.history("scale_quality")[1][0] == 0.1 and effect.history("scale_consistency")[1][0] == pytest.approx(
        0.2
    )


def scale_of_consistency_alone(effect):
    return effect.history("scale_consistency")[1][0] == 0.0 and effect.history("scale_quality")[1][0] == pytest.approx(
        0.2
    )


def quality_head_alone_is_trained(effect):
    weights = weights_of(effect.changed)
    return weights[f"quality_head.{IMAGE_OUT}"].any() and not weights[f"consistency_head.{PAIR_OUT}"].any()


def consistency_head_alone_is_trained(effect):
    weights = weights_of(effect.changed)
    return weights[f"consistency_head.{PAIR_OUT}"].any() and not weights[f"quality_head.{IMAGE_OUT}"].any()


def peak_learning_rate(effect):
    base, changed = effect.history("lr")
    return changed == pytest.approx(2 * base, rel=2e-5)  # six digits are stored


def constant_after_warm_up(effect):
    return np.unique(effect.history("lr")[1]).tolist() == [0.001]


def long_warm_up(effect):
    changed = effect.history("lr")[1]
    return (np.diff(changed) > 0).all() and changed[-1] == pytest.approx(0.001)


def stopped_early(effect):
    best, length = effect.config()["best_epoch"], len(effect.history("epoch")[1])
    return length == max(best.values()) + 1 < 200


def counts_of_fractions(effect):
    return effect.metrics()["split"]["rows"] == {"train": 120, "val": 60, "test": 60}


EFFECTS = {
    "out": ({}, lambda effect: effect.config()["settings"]["out"] == str(effect.changed)),
    "residual_learning": ({"residual_learning": False}, direct_heads),
    "base": ({"base": "identity"}, lambda e: e.config()["calibration"] is None and e.weights_differ()),
    "scale_mode": ({"scale_mode": "learned"}, learned_scales_move),
    "scale": ({"scale": "0.2,quality=0.1"}, scale_of_quality_alone),
    "weight": ({"weight": "quality=0"}, consistency_head_alone_is_trained),
    "residual_scale_q": ({"residual_scale_q": 0.1}, scale_of_quality_alone),
    "residual_scale_c": ({"residual_scale_c": 0}, scale_of_consistency_alone),
    "w_q": ({"w_q": 0}, consistency_head_alone_is_trained),
    "w_c": ({"w_c": 0}, quality_head_alone_is_trained),
    "epochs": ({"epochs": 2}, lambda effect: len(effect.history("epoch")[1]) == 2),
    "batch_size": ({"batch_size": 32}, Effect.weights_differ),
    "lr": ({"lr": 2e-3}, peak_learning_rate),
    "schedule": ({"schedule": "constant"}, constant_after_warm_up),
    "warmup_ratio": ({"warmup_ratio": 1}, long_warm_up),
    "weight_decay": ({"weight_decay": 0.5}, Effect.weights_differ),
    "max_grad_norm": ({"max_grad_norm": 1e-3}, Effect.weights_differ),
    "dropout": ({"dropout": 0}, Effect.weights_differ),
    "patience": ({"patience": 1, "epochs": 200}, stopped_early),
    "split": ({"split": "random"}, random_split_leaks),
    "fractions": ({"fractions": "0.5,0.25,0.25"}, counts_of_fractions),
    "data_seed": (
        {"data_seed": 7},
        lambda effect: (
            effect.metrics()["split"]["seeds"] == [7]
            and effect.config()["settings"]["seed"] == 42
            and "seed 42, data seed 7" in " ".join(effect.config()["description"])
        ),
    ),
    "seed": ({"seed": 7}, lambda effect: effect.metrics()["split"]["seeds"] == [7] and effect.weights_differ()),
}
ELSEWHERE = {
    "cache": "test_train.py, whose runs on other caches differ",
    "loss": "test_every_loss_trains_and_repeats",
    "two_branch": "test_two_branches",
    "refinement": "test_refinement",
    "use_explanations": "test_explanations_join_the_loss",
    "w_exp": "test_explanations_join_the_loss",
    "preset": "test_train_presets.py",
    "view": "test_train_kernel.py",
    "beside": "test_beside.py",
    "repeats": "test_train_repeats.py",
    "std_weighting": "test_label_stds_are_used_and_said",
    "device": "test_device",
    "freeze_clip": "test_cli.py, what published commands say",
    "partial_freeze": "test_cli.py, what published commands say",
    "tensorboard": "runs/test_curves.py",
    "track": "runs/test_tracking.py",
}


def test_every_setting_has_a_test_of_its_effect():
    assert EFFECTS.keys() | ELSEWHERE.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    assert not EFFECTS.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("name", EFFECTS)
def test_setting_has_its_effect(name, train_demo, demo_run):
    settings, holds = EFFECTS[name]
    assert holds(Effect(demo_run, train_demo(**settings).run))


@pytest.mark.parametrize("loss", [name for name in get_args(field_types(TrainConfig)["loss"]) if name != "mse"])
def test_every_loss_trains_and_repeats(loss, train_demo, demo_run):
    run = train_demo(loss=loss)
    effect = Effect(demo_run, run.run)
    assert effect.weights_differ()
    assert any(f"0.5 {loss}(quality) + 0.5 {loss}(consistency)" in line for line in effect.config()["description"])
    losses = effect.history("train_loss")[1]
    assert min(losses[1:]) < losses[0]
    assert min(run.metrics["train"][label]["srocc"] for label in LABELS) > 0.3
    assert same_weights(weights_of(run.run), weights_of(train_demo(loss=loss).run))


def with_stds(rows):
    for number, row in enumerate(rows):
        row["quality_std"], row["consistency_std"] = f"{0.02 + 0.01 * (number % 30)}", "0.2"


@pytest.mark.slow
def test_label_stds_are_used_and_said(train_demo, relabelled):
    cache = relabelled(with_stds)
    plain = train_demo(cache=cache)
    assert not any("SD" in line for line in read_json(plain.run / "config.json")["description"])
    for settings, line in (
        ({"loss": "fidelity"}, "label SDs     of the cache for quality and consistency, 0.13 elsewhere"),
        ({"std_weighting": True}, "row weights   1 / (label SD^2 + 0.01), mean 1, for quality and consistency"),
    ):
        run = train_demo(cache=cache, **settings)
        assert line in read_json(run.run / "config.json")["description"]
        assert not same_weights(weights_of(run.run), weights_of(plain.run))
    without = train_demo(loss="fidelity")
    assert not same_weights(weights_of(without.run), weights_of(train_demo(cache=cache, loss="fidelity").run))


def test_equal_stds_weigh_nothing(train_demo, relabelled):
    def same_for_all(rows):
        for row in rows:
            row["quality_std"] = row["consistency_std"] = "0.2"

    cache = relabelled(same_for_all)
    weighted, plain = train_demo(cache=cache, std_weighting=True, epochs=1), train_demo(cache=cache, epochs=1)
    ours, theirs = weights_of(weighted.run), weights_of(plain.run)
    assert all(np.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_missing_label_stds_are_said(train_demo, relabelled, capsys):
    train_demo(loss="fidelity", std_weighting=True, epochs=1)
    err = capsys.readouterr().err
    assert "warning: the cache has no label SDs for quality and consistency: --loss fidelity takes 0.13 there\n" in err
    assert "warning: --std-weighting is not used for quality and consistency: the cache has no label SDs there\n" in err
    assert "label SDs     0.13\n" in err
    assert "row weights" not in err

    def only_quality(rows):
        for row in rows:
            row["quality_std"] = "0.1"

    train_demo(cache=relabelled(only_quality), std_weighting=True, epochs=1)
    err = capsys.readouterr().err
    assert "warning: --std-weighting is not used for consistency: the cache has no label SDs there\n" in err
    assert "row weights   1 / (label SD^2 + 0.01), mean 1, for quality\n" in err


def test_a_batch_of_one_has_nothing_to_compare(train_demo, capsys):
    train_demo(loss="rank", batch_size=1, epochs=1)
    line = "warning: --batch-size 1 leaves --loss rank nothing to compare: the heads do not learn\n"
    assert line in capsys.readouterr().err


def test_two_branches(train_demo):
    run = train_demo(residual_learning=False, two_branch=True, epochs=2)
    config, weights = read_json(run.run / "config.json"), weights_of(run.run)
    assert "consistency   (sigmoid(MLP([v, t, s])) + sigmoid(k s + m)) / 2, s = v . t" in config["description"]
    assert "cosine branch k, m start calibrated on the training rows" in config["description"]
    start = config["calibration"]["consistency"]["slope"]
    assert start > 0
    assert 0 < abs(float(weights["consistency_head.cosine_slope"]) - start) < 0.1  # trained, from there
    plain = train_demo(residual_learning=False, epochs=2)
    rows = [numbers(read_csv(path / "predictions.csv"), "consistency") for path in (run.run, plain.run)]
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


@pytest.mark.slow
def test_refinement(train_demo):
    def trained():
        return train_demo(residual_learning=False, refinement=True, epochs=2)

    run = trained()
    rows = read_csv(run.run / "predictions.csv")
    c, base, delta = (numbers(rows, name) for name in ("consistency", "consistency_base", "consistency_delta"))
    assert 0 < np.abs(c - base).max() <= 0.2 + 1e-6  # six digits are stored
    np.testing.assert_allclose(c, np.clip(base + delta, 0, 1), atol=2e-6)
    assert {row["quality_base"] for row in rows} == {""}
    line = "refinement    clamp(coarse + 0.2 tanh(Transformer(v, t, coarse)), 0, 1), 4 layers, 8 heads, width 256"
    assert line in read_json(run.run / "config.json")["description"]
    again = evaluate(EvaluateConfig(run=run.run))
    assert again.metrics["test"] == run.metrics["test"]
    assert same_weights(weights_of(run.run), weights_of(trained().run))


def test_parts_of_direct_heads_are_refused_by_residual_ones(train_demo, demo_run, capsys):
    run = train_demo(two_branch=True, refinement=True)
    err = capsys.readouterr().err
    for option in ("--two-branch", "--refinement"):
        assert f"warning: {option} is not used: it belongs to direct heads (--no-residual-learning)\n" in err
    assert "Transformer" not in err
    assert same_weights(weights_of(run.run), weights_of(demo_run))


@pytest.mark.slow
@pytest.mark.parametrize("residual", [True, False])
def test_explanations_join_the_loss(train_demo, demo_rows, residual):
    def trained(**settings):
        return train_demo(residual_learning=residual, epochs=2, lr=5e-3, **settings).run

    plain, light, heavy = trained(), trained(use_explanations=True), trained(use_explanations=True, w_exp=10)
    assert same_weights(weights_of(light), weights_of(trained(use_explanations=True)))
    assert not any("rationale" in name for name in weights_of(plain))
    explained = sum(bool(row["explanation"]) for row in demo_rows)
    for run, weight in ((light, 0.1), (heavy, 10)):
        description = read_json(run / "config.json")["description"]
        assert f"loss          0.5 mse(quality) + 0.5 mse(consistency) + {weight} mse(explanation)" in description
        shared = "Fusion" if residual else "MLP"
        line = f"{explained} of 240 rows have one; predicted by a Linear on the first layer of {shared}([v, t, s])"
        assert f"explanations  {line}" in description
        assert weights_of(run)["consistency_head.rationale.out.weight"].shape == (128, 256)
    columns = [numbers(read_csv(run / "predictions.csv"), "consistency") for run in (plain, light, heavy)]
    assert (columns[0] != columns[1]).any()
    assert (columns[1] != columns[2]).any()
    assert evaluate(EvaluateConfig(run=heavy)).metrics["test"] == read_json(heavy / "metrics.json")["test"]


@pytest.mark.slow
def test_explanations_that_cannot_be_used_are_said(train_demo, demo_run, relabelled, capsys):
    def drop(rows):
        for row in rows:
            row["explanation"] = ""

    for settings, line in (
        (
            {"cache": relabelled(drop), "use_explanations": True},
            "--use-explanations is not used: no row of the cache has an explanation",
        ),
        ({"use_explanations": True, "w_exp": 0}, "--use-explanations is not used: --w-exp is 0"),
        ({"w_exp": 0.5}, "--w-exp 0.5 is not used: give --use-explanations"),
    ):
        run = train_demo(**settings)
        err = capsys.readouterr().err
        assert f"warning: {line}\n" in err
        assert "; no explanations\n" in err
        assert same_weights(weights_of(run.run), weights_of(demo_run))


def test_explanations_need_a_target_that_sees_the_prompt(train_demo, relabelled, capsys):
    cache = relabelled(lambda rows: [{n: cell for n, cell in row.items() if n != "consistency"} for row in rows])
    run = train_demo(cache=cache, use_explanations=True, epochs=1).run
    line = "warning: --use-explanations is not used: no target of the cache sees the prompt\n"
    assert line in capsys.readouterr().err
    assert read_json(run / "config.json")["labels"] == ["quality"]


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_device(train_demo, device):
    assert read_json(train_demo(device=device, epochs=1).run / "config.json")["settings"]["device"] == device


@pytest.mark.slow
def test_the_largest_seed_trains(train_demo):
    seed = TrainConfig.__dataclass_fields__["seed"].metadata["le"]
    for settings in ({"seed": seed}, {"seed": seed, "split": "random", "loss": "rank"}):
        assert train_demo(epochs=1, **settings).metrics["split"]["seeds"] == [seed]


def test_curriculum_ramps_to_the_given_scale(train_demo):
    history = read_csv(train_demo(scale_mode="curriculum").run / "history.csv")
    scales = numbers(history, "scale_quality")
    assert scales == pytest.approx(np.linspace(0.02, 0.2, EPOCHS), abs=1e-6)


def test_split_column_is_obeyed(train_demo, relabelled, capsys):
    def mark(rows):
        for number, row in enumerate(rows):
            row["split"] = SIDES[number // 6 % 3]

    run = train_demo(cache=relabelled(mark), split="column", fractions="0.8,0.1,0.1")
    rows = read_csv(run.run / "predictions.csv")
    assert [row["split"] for row in rows] == [SIDES[number // 6 % 3] for number in range(240)]
    assert run.metrics["split"]["kind"] == "column"
    assert "warning: --fractions 0.8,0.1,0.1 is not used: the column gives all three sides\n" in capsys.readouterr().err


def test_without_validation_rows_the_last_epoch_is_kept_and_said(train_demo, capsys):
    run = train_demo(fractions="0.8,0,0.2", patience=1)
    err = capsys.readouterr().err
    assert "warning: too few validation rows to rank: the last epoch is kept\n" in err
    assert "warning: --patience 1 is not used: it needs validation rows\n" in err
    assert run.best_epoch == dict.fromkeys(LABELS, EPOCHS)
    assert run.metrics["split"]["rows"]["val"] == 0
    assert run.metrics["val"]["quality"]["srocc"] is None
    assert run.metrics["test"]["quality"]["srocc"] is not None
    assert "0 validation" in run.summary()


def test_without_test_rows_it_is_said(train_demo, capsys):
    run = train_demo(fractions="0.8,0.2,0")
    assert "warning: no test rows: nothing is held back to judge this run by\n" in capsys.readouterr().err
    assert run.metrics["test"]["quality"]["srocc"] is None
    assert run.metrics["test"]["quality"]["srocc_ci"] == [None, None]
    assert "note (quality): 0 labelled rows, 3 are needed" in run.summary()
    assert run.metrics["val"]["quality"]["srocc"] is not None


def test_constant_validation_labels_choose_nothing(train_demo, demo_run, relabelled, capsys):
    side = {row["image"]: row["split"] for row in read_csv(demo_run / "predictions.csv")}

    def flatten(rows):
        for row in rows:
            if side[row["image"]] == "val":
                row["quality"] = row["consistency"] = "0.5"

    assert train_demo(cache=relabelled(flatten)).best_epoch == dict.fromkeys(LABELS, EPOCHS)
    assert "too few validation rows to rank: the last epoch is kept" in capsys.readouterr().err


def test_unused_settings_of_direct_heads_are_said(train_demo, capsys):
    train_demo(residual_learning=False, residual_scale_q=0.1, scale_mode="learned", base="identity", epochs=1)
    err = capsys.readouterr().err
    for option in ("--residual-scale-q", "--scale-mode", "--base"):
        assert f"warning: {option} is not used: direct heads have neither base nor scale\n" in err
    assert "--residual-scale-c" not in err


def test_unwise_settings_are_said(train_demo, capsys):
    train_demo(lr=0.1, residual_scale_c=0.75, epochs=1)
    err = capsys.readouterr().err
    assert "warning: --lr 0.1 is outside 0.001 to 0.005, the sane range of this mode\n" in err
    assert "warning: --scale consistency=0.75 is above 0.5: the correction is no longer small\n" in err


def test_configuration_is_printed_before_training(train_demo, capsys):
    run = train_demo(epochs=2)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == read_json(run.run / "config.json")["description"]
