"""Two caches of the same rows, by two backbones, from training to a prediction."""

from __future__ import annotations

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.rows.beside import with_caches_beside
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.settings import EvaluateConfig, PredictConfig
from deltaclip.pipeline.training import bases
from deltaclip.tests.pipeline.conftest import numbers, read_csv, read_json, write_csv

LABELS = ("quality", "consistency")


def in_32_bits(folder, rows, *, image_root, **settings):
    """Return the cache of some rows of the demo by the bundled backbone in 32 bits."""
    write_csv(folder / "rows.csv", rows)
    places = {"data": str(folder / "rows.csv"), "out": folder / "rows.h5", "image_root": image_root}
    return extract(ExtractConfig(**places, precision="fp32", **settings)).cache


@pytest.fixture(scope="module")
def other_cache(tmp_path_factory, demo_folder, demo_rows, tiny_backbone):
    """The demo rows in another order, and twice those of one prompt."""
    rows, folder = [*reversed(demo_rows), *demo_rows[:6]], tmp_path_factory.mktemp("other")
    return in_32_bits(folder, rows, image_root=demo_folder, backbone=tiny_backbone, views="center,stages")


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory, demo_folder, demo_rows, tiny_backbone):
    """The first ten rows."""
    folder = tmp_path_factory.mktemp("small")
    return in_32_bits(folder, demo_rows[:10], image_root=demo_folder, backbone=tiny_backbone, views="center")


def test_rows_are_found_by_content(demo_cache, other_cache):
    rows = with_caches_beside(load_rows(demo_cache, "cpu"), [other_cache])
    inputs = rows.inputs()
    assert {"center", "2:center", "2:prompt", "2:cosine", "2:stages"} <= set(inputs)
    every = np.arange(len(rows.rows))
    for name in ("center", "prompt", "cosine"):
        one, other = (inputs[key]._read(every).numpy() for key in (name, f"2:{name}"))
        # The same pictures and prompts in 16 and in 32 bits.
        assert np.abs(one - other).max() < 0.02


@pytest.mark.slow
def test_a_run_on_two_caches_scores_alike_from_caches_and_from_files(
    train_demo, tmp_path, *, demo_cache, other_cache, demo_folder, monkeypatch
):
    monkeypatch.setattr(
        bases,
        "image_candidates",
        lambda _: [bases.Candidate("kernel", ("center", "2:stages")), bases.Candidate("line", ("2:center",))],
    )
    monkeypatch.setattr(
        bases, "pair_candidates", lambda _, has_score: [bases.Candidate("line", ("2:cosine", "2:prompt"), has_score)]
    )
    run = train_demo(beside=[other_cache], base="auto").run
    config = read_json(run / "config.json")
    assert [each["path"] for each in config["beside"]] == [str(other_cache)]
    assert evaluate(EvaluateConfig(run=run)).metrics["test"] == read_json(run / "metrics.json")["test"]
    moved = EvaluateConfig(run=run, cache=demo_cache, beside=[other_cache])
    assert evaluate(moved).metrics["test"] == read_json(run / "metrics.json")["test"]
    table = [row for row in read_csv(run / "predictions.csv") if row["split"] == "test"][:12]
    write_csv(tmp_path / "some.csv", [{"image": row["image"], "prompt": row["prompt"]} for row in table])
    predict(PredictConfig(run=run, target=str(tmp_path / "some.csv"), image_root=demo_folder, out=tmp_path / "o.csv"))
    found = read_csv(tmp_path / "o.csv")
    for label in LABELS:
        # Another batch size: bf16 sums differ in their last bit, as in test_predict.
        assert numbers(found, label) == pytest.approx(numbers(table, label), abs=5e-3)
    with pytest.raises(UserError) as error:
        evaluate(EvaluateConfig(run=run, cache=demo_cache))
    assert str(error.value) == (
        "--beside: the run was trained on 1 cache beside the first, 0 are given; give each, in the order of `train`"
    )


def test_what_is_refused_and_what_is_said(train_demo, *, demo_cache, other_cache, small_cache, capsys):
    with pytest.raises(UserError) as error:
        train_demo(beside=[demo_cache])
    assert str(error.value) == (
        f"{demo_cache}: is by the same backbone as another cache that was given; "
        "give caches of the same data by different backbones, each once"
    )
    with pytest.raises(UserError) as error:
        train_demo(beside=[small_cache])
    assert str(error.value) == (
        f"{small_cache}: lacks 230 of the 240 rows of {demo_cache}: the same image with the same prompt; "
        "extract the same data with both backbones"
    )
    run = train_demo(beside=[other_cache], base="calibrated", epochs=1).run
    assert (
        f"warning: {other_cache} is not used: caches beside the first belong to --base auto\n"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError) as error:
        evaluate(EvaluateConfig(run=run, cache=demo_cache, beside=[other_cache]))
    assert str(error.value) == "--beside: would not be used; leave it out: the bases of this run see one cache"
