"""Training on pairs that people chose between: alone, beside ratings, drawn by lot; with what is said of it."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.compare import compare
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.report import report
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.settings import CompareConfig, EvaluateConfig, ReportConfig, SweepConfig, TrainConfig
from deltaclip.pipeline.sweep import sweep
from deltaclip.pipeline.train import train

VIEWS = "center,statistics"


def pairs_of(demo_folder, *, lots=False, across=False):
    """Return pairs of pictures within prompts, the better one preferred, close ones tied; or preferences by lot."""
    with (demo_folder / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    random, found = np.random.default_rng(2), []
    for _, of_prompt in itertools.groupby(rows, key=lambda row: row["prompt"]):
        for a, b in itertools.combinations(of_prompt, 2):
            difference = float(a["quality"]) - float(b["quality"])
            said = "tie" if abs(difference) < 0.05 else "a" if difference > 0 else "b"
            found.append([a["image"], b["image"], a["prompt"], random.choice(["a", "b"]) if lots else said])
    if across:
        found += [[rows[at]["image"], rows[(at + 67) % len(rows)]["image"], "", "a"] for at in range(0, len(rows), 2)]
    return found


def write_pairs(path, pairs):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_a", "image_b", "prompt", "preferred"])
        writer.writerows(pairs)
    return str(path)


def cache_of(demo_folder, out, backbone, *, pairs, ratings=False):
    table = write_pairs(out.with_suffix(".csv"), pairs)
    values = {"data": table, "image_root": demo_folder}
    if ratings:
        values = {"data": str(demo_folder / "demo.csv"), "pairs": table}
    return extract(ExtractConfig(**values, pairs_target="quality", out=out, backbone=backbone, views=VIEWS)).cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory, demo_folder, tiny_backbone):
    """Return caches of pairs alone, of pairs drawn by lot, and of pairs beside ratings."""
    folder, pairs = tmp_path_factory.mktemp("caches"), pairs_of(demo_folder)
    return {
        "alone": cache_of(demo_folder, folder / "alone.h5", tiny_backbone, pairs=pairs),
        "lots": cache_of(demo_folder, folder / "lots.h5", tiny_backbone, pairs=pairs_of(demo_folder, lots=True)),
        "both": cache_of(demo_folder, folder / "both.h5", tiny_backbone, pairs=pairs, ratings=True),
    }


@pytest.fixture(scope="module")
def runs(caches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: train(TrainConfig(cache=cache, out=folder / name, epochs=3, fractions="0.6,0.15,0.25"))
        for name, cache in caches.items()
    }


@pytest.mark.slow
def test_pairs_alone_order_prompts_that_were_left_out(runs):
    found = runs["alone"].metrics["pairs"]["test"]["quality"]
    assert found["share"] > 0.6 < found["share_ci"][1]
    assert found["share_ci"][0] > 0.5
    assert found["cosine"]["n"] == found["n"]
    assert (runs["alone"].metrics["test"], runs["alone"].metrics["pairs"]["across"]) == ({}, 0)
    calibration = json.loads((runs["alone"].run / "config.json").read_text())["calibration"]
    assert calibration["pairs"]["quality"]["ratings"] == 0


@pytest.mark.slow
def test_scores_of_pairs_alone_have_the_unit_that_is_said(runs):
    with (runs["alone"].run / "predictions.csv").open(newline="") as file:
        q = np.array([float(row["q"]) for row in csv.DictReader(file)])
    assert 0.4 < q.mean() < 0.6
    assert 0.05 < q.std() < 0.3
    assert "pairs ordered rightly, 95 % interval over prompts" in runs["alone"].summary()
    assert "best epoch quality" in runs["alone"].summary()


@pytest.mark.slow
def test_preferences_drawn_by_lot_teach_nothing(runs):
    lo, hi = runs["lots"].metrics["pairs"]["test"]["quality"]["share_ci"]
    assert lo - 0.02 < 0.5 < hi + 0.02


@pytest.mark.slow
def test_pairs_beside_ratings(runs):
    """Both kinds of figures are there; the scores keep the unit of the ratings."""
    metrics = runs["both"].metrics
    assert metrics["pairs"]["test"]["quality"]["share"] > 0.6
    assert metrics["test"]["quality"]["srocc"] > 0.4
    assert metrics["verdict"]["quality"]["sentence"]


@pytest.mark.slow
def test_runs_of_pairs_are_evaluated_compared_and_shown(runs, caches, tmp_path):
    found = evaluate(EvaluateConfig(run=runs["alone"].run, out=tmp_path / "e.json"))
    assert found.metrics["pairs"]["test"] == runs["alone"].metrics["pairs"]["test"]
    other = evaluate(EvaluateConfig(run=runs["both"].run, cache=caches["alone"]))
    assert other.metrics["pairs"]["test"]["quality"]["n"] > 0
    pages = report(ReportConfig(runs=[runs["alone"].run, runs["both"].run], out=tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text()
    assert "Share of pairs ordered as people did" in text
    assert pages
    with pytest.raises(UserError):  # one line: nothing that both were rated on
        compare(CompareConfig(runs=[runs["alone"].run, runs["both"].run]))


@pytest.mark.slow
def test_other_commands_say_that_pairs_are_for_train(caches, tmp_path):
    with pytest.raises(UserError) as error:
        sweep(SweepConfig(cache=caches["alone"], out=tmp_path / "s"))
    assert str(error.value) == f"{caches['alone']}: has no labels; learn from its pairs by `deltaclip train`"


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"base": "calibrated", "epochs": 12},
        {"base": "identity", "epochs": 12},
        {"residual_learning": False, "epochs": 60},
    ],
)
def test_heads_learn_from_pairs_without_a_fitted_base(values, caches, tmp_path):
    found = train(TrainConfig(cache=caches["alone"], out=tmp_path / "r", **values))
    # A sigmoid of v alone learns slowest.
    assert found.metrics["pairs"]["train"]["quality"]["share"] > (0.6 if "base" in values else 0.55)
    again = train(TrainConfig(cache=caches["alone"], out=tmp_path / "s", **values))
    assert (found.run / "predictions.csv").read_bytes() == (again.run / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_groups_keep_pairs_together_where_they_can(tmp_path, demo_folder, tiny_backbone):
    """A few pairs across prompts join these; very many would join all, and are left out and counted instead."""
    few = pairs_of(demo_folder)
    few += [[few[0][0], few[40][1], "", "a"]]
    many = pairs_of(demo_folder, across=True)
    for name, pairs in (("few", few), ("many", many)):
        cache = cache_of(demo_folder, tmp_path / f"{name}.h5", tiny_backbone, pairs=pairs)
        rows = load_rows(cache, "cpu")
        split = split_cache(rows, "grouped", fractions="0.7,0.1,0.2", seed=42)
        side = np.zeros(len(rows.rows), dtype=int)
        side[split.val], side[split.test] = 1, 2
        across = int((side[rows.pairs.a_P] != side[rows.pairs.b_P]).sum())
        assert (across > 0) == (name == "many")
