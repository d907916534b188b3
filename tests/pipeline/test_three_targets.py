"""A third target that the user names, with another number of labels than the others: learned, swept, compared."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from scipy import stats

from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.ablate import ablate
from deltaclip.pipeline.compare import compare
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.settings import AblateConfig, CompareConfig, EvaluateConfig, SweepConfig
from deltaclip.pipeline.sweep import sweep
from deltaclip.tests.pipeline.conftest import EPOCHS, numbers, read_csv, read_json, weights_of, write_csv

TARGETS = ("quality", "consistency", "colour")
SCALES = {"quality": 0.1, "consistency": 0.2, "colour": 0.2}
SIDES = ("train", "val", "test")


@pytest.fixture(scope="module")
def three_cache(tmp_path_factory, *, demo_folder, demo_cache, demo_rows, tiny_backbone):
    """The demo cache with labels of colour on two thirds of the rows, and of consistency on three quarters."""
    folder = tmp_path_factory.mktemp("three")
    rows = [dict(row) for row in demo_rows]
    for place, row in enumerate(rows):
        row["tint"] = f"{1 + 4 * float(row['quality']) ** 2:.4f}" if place % 3 else ""
        row["consistency"] = row["consistency"] if place % 4 else ""
    write_csv(folder / "rated.csv", rows)
    cache = folder / "three.h5"
    shutil.copyfile(demo_cache, cache)
    found = extract(
        ExtractConfig(
            data=str(folder / "rated.csv"),
            out=cache,
            backbone=tiny_backbone,
            image_root=demo_folder,
            target=["colour=tint:image"],
            label_range=["colour=1,5"],
            views="center",
        )
    )
    assert (found.new_images, found.new_texts) == (0, 0)
    return cache


def mains(metrics):
    return [metrics["val"][target]["main"] for target in TARGETS]


def test_each_target_has_a_head_with_its_scale_and_its_rows(train_demo, three_cache, demo_rows):
    run = train_demo(cache=three_cache, scale="quality=0.1", lr=5e-3)
    assert run.scales == pytest.approx(SCALES)
    assert list(run.best_epoch) == list(TARGETS)
    config = read_json(run.run / "config.json")
    assert [(each["name"], each["sees"]) for each in config["targets"]] == [
        ("quality", "image"),
        ("consistency", "pair"),
        ("colour", "image"),
    ]
    assert "colour        clamp(sigmoid(w . v + b0) + 0.2 tanh(MLP(v)), 0, 1)" in config["description"]
    assert {name.partition(".")[0] for name in weights_of(run.run)} == {f"{target}_head" for target in TARGETS}
    table = read_csv(run.run / "predictions.csv")
    labelled = [np.isfinite(numbers(table, f"{target}_label")) for target in TARGETS]
    assert [int(each.sum()) for each in labelled] == [240, 180, 160]
    expected = [float(row["quality"]) ** 2 if place % 3 else np.nan for place, row in enumerate(demo_rows)]
    assert numbers(table, "colour_label") == pytest.approx(expected, abs=3e-5, nan_ok=True)  # four digits of 1 to 5
    assert any(run.best_epoch.values())
    for target, has_label in zip(TARGETS, labelled, strict=True):
        score, base, delta = (numbers(table, name) for name in (target, f"{target}_base", f"{target}_delta"))
        assert np.isfinite(score).all()
        assert np.abs(delta).max() <= SCALES[target] + 1.5e-6
        assert delta.any() == (run.best_epoch[target] > 0)  # epoch 0 is the base
        assert score == pytest.approx(np.clip(base + delta, 0, 1), abs=1.5e-6)
        for side in SIDES:
            chosen = has_label & np.array([row["split"] == side for row in table])
            found = run.metrics[side][target]
            assert found["n"] == chosen.sum()
            truth = numbers(table, f"{target}_label")[chosen]
            assert found["plcc"] == pytest.approx(stats.pearsonr(score[chosen], truth)[0], abs=1e-4)
    assert evaluate(EvaluateConfig(run=run.run)).metrics["test"] == run.metrics["test"]
    assert "colour" in run.summary()


def test_a_weight_of_zero_leaves_a_target_out(train_demo, three_cache, capsys):
    run = train_demo(cache=three_cache, weight="colour=0", epochs=1)
    assert list(run.metrics["test"]) == ["quality", "consistency"]
    line = "warning: no training row weighs for colour: that head is not trained and has no scores\n"
    assert line in capsys.readouterr().err
    assert np.isnan(numbers(read_csv(run.run / "predictions.csv"), "colour")).all()


@pytest.mark.slow
def test_a_sweep_gives_what_train_gives(train_demo, three_cache, tmp_path):
    common = {"cache": three_cache, "epochs": EPOCHS, "base": "calibrated"}
    settings = {"scale": "0.2,quality=0.05,0.1,colour=0.1,0.3", "precision": "fp32", "out": tmp_path / "swept"}
    swept = sweep(SweepConfig(**common, **settings))
    assert swept.varied == ["scale_quality", "scale_colour"]
    # Besides those of the grid a head of quality and one of colour with the default scale, to compare the winner with.
    assert (len(swept.table), swept.num_heads) == (4, 3 + 1 + 3)
    for row in swept.table:
        alone = train_demo(**common, scale=f"quality={row['scale_quality']},colour={row['scale_colour']}")
        assert [row[f"val_{target}"] for target in TARGETS] == pytest.approx(mains(alone.metrics), abs=1e-3)
        assert row["val_score"] == pytest.approx(np.mean([row[f"val_{target}"] for target in TARGETS]))
    assert evaluate(EvaluateConfig(run=swept.run)).metrics["test"] == swept.metrics["test"]


@pytest.mark.slow
def test_an_ablation_gives_what_train_gives(train_demo, three_cache, tmp_path):
    settings = {"cache": three_cache, "epochs": 2, "repeats": 1, "scale": "quality=0.1"}
    found = ablate(AblateConfig(**settings, out=tmp_path / "ablated"))
    for name, overrides in (("residual", {}), ("direct", {"residual_learning": False})):
        alone = train_demo(**settings | overrides)
        assert list(found.compared[name]) == list(TARGETS)
        for target in TARGETS:
            values = found.compared[name][target]["test"]["srocc"]["values"]
            assert values == pytest.approx([alone.metrics["test"][target]["srocc"]], abs=1e-3)
    sizes = [found.compared["ridge"][target]["about"][0]["of_rows"] for target in TARGETS]
    assert sizes == [alone.metrics["train"][target]["n"] for target in TARGETS]
    assert {row["label"] for row in read_csv(found.folder / "ablate.csv")} == set(TARGETS)


@pytest.mark.slow
def test_runs_are_compared_on_the_targets_of_both(train_demo, three_cache, relabelled):
    first, second = (train_demo(cache=three_cache, scale=scale, epochs=2).run for scale in ("0.2", "colour=0.4"))
    found = compare(CompareConfig(runs=[first, second])).to_json()
    assert list(found["labels"]) == list(TARGETS)
    assert found["warnings"] == []
    assert found["labels"]["colour"][1]["srocc"] == pytest.approx(
        read_json(second / "metrics.json")["test"]["colour"]["srocc"], abs=1e-4
    )

    def thinned(rows):
        for row in rows[::4]:
            row["consistency"] = ""

    two = train_demo(cache=relabelled(thinned), epochs=2).run
    for runs in ([first, two], [two, first]):
        found = compare(CompareConfig(runs=runs)).to_json()
        assert list(found["labels"]) == ["quality", "consistency"]
        assert [line for line in found["warnings"] if "colour" in line]
