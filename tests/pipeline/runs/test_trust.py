"""What a run says of a single score: fitted, written, read again, and applied to rows of a cache."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from deltaclip.base.errors import UserError
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.rows.task import Task
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.prediction_table import ScoreColumns, Scores
from deltaclip.pipeline.runs.trust import (
    FILE,
    PROMPT,
    fit_trust,
    honest_scores,
    load_trust,
    save_trust,
    trusted,
)
from deltaclip.pipeline.settings import EvaluateConfig, TrainConfig
from deltaclip.tests.pipeline.conftest import numbers, read_csv, read_json

TARGETS = ("quality", "consistency")


@pytest.fixture(scope="module")
def task(demo_cache):
    rows = load_rows(demo_cache, "cpu")
    split = split_cache(rows, "grouped", fractions="0.5,0.25,0.25", seed=1)
    return Task(config=TrainConfig(cache=demo_cache), rows=rows, split=split)


def scores_of(task, error, *, seed=0):
    """Return scores that are off by a known error, larger in one source."""
    rng, found = np.random.default_rng(seed), {}
    wide_N = task.rows.rows.text["source"].codes == 0
    for target in TARGETS:
        noise_N = rng.standard_normal(len(task.rows.rows)) * np.where(wide_N, 3 * error, error)
        score_N = np.clip(task.rows.label(target) + noise_N, 0, 1).astype(np.float32)
        found[target] = ScoreColumns(score_N, score_N, np.zeros_like(score_N))
    return Scores(found)


def test_labels_of_test_rows_play_no_part(task):
    scores = scores_of(task, 0.1)
    honest = honest_scores(task, scores, left_out={}, kept={})
    first = fit_trust(task, honest)
    label_N = task.rows.rows.numbers["quality"]
    kept_N = label_N.copy()
    label_N[task.split.test] = 0
    try:
        second = fit_trust(task, honest)
    finally:
        label_N[:] = kept_N
    for target in TARGETS:
        assert np.array_equal(first.intervals[target].guessed.curve, second.intervals[target].guessed.curve)


def test_validation_rows_calibrate_where_nothing_is_left_out(task):
    scores = scores_of(task, 0.1)
    found = honest_scores(task, scores, left_out={}, kept={"quality": 3})["quality"]
    assert np.flatnonzero(np.isfinite(found.score_N)).tolist() == task.split.val.tolist()
    assert (found.ratio, found.origin) == (1.0, "validation")


def test_a_correction_changes_errors_by_what_it_changes_on_validation(task):
    base, scores = scores_of(task, 0.2), scores_of(task, 0.1, seed=1)
    left_out = {"quality": base.of("quality")}
    for kept, changes in ((0, False), (4, True)):
        found = honest_scores(task, scores, left_out=left_out, kept={"quality": kept})["quality"]
        val, label_N = task.split.val, task.rows.label("quality")
        expected = np.abs(scores.of("quality") - label_N)[val].mean() / np.abs(base.of("quality") - label_N)[val].mean()
        assert found.ratio == pytest.approx(expected if changes else 1.0, rel=1e-5)
        assert np.array_equal(found.score_N, base.of("quality"))


def test_what_is_written_is_read_again_and_tells_no_text(task, tmp_path):
    scores = scores_of(task, 0.1)
    trust = fit_trust(task, honest_scores(task, scores, left_out={}, kept={}))
    path = tmp_path / FILE
    save_trust(path, trust)
    again = load_trust(path)
    assert again.parts == trust.parts == ("center", PROMPT)
    first, second = (trusted(each, task.rows, scores, coverage=0.8).trust for each in (trust, again))
    assert np.array_equal(first.flag_N, second.flag_N)
    assert np.isfinite(first.rank_N).all()
    assert np.array_equal(first.rank_N, second.rank_N)
    names_N = np.arange(len(first.rank_N))
    assert trust.excess(first, names_N) == again.excess(second, names_N) < 1
    assert trust.excess(first, names_N // 100) is None
    for target in TARGETS:
        for end in ("low", "high"):
            assert np.array_equal(getattr(first, end)[target], getattr(second, end)[target])
    content = path.read_bytes()
    for name in ("prompt", "source", "file"):
        texts = {str(text) for text in task.rows.rows.text[name] if len(str(text)) > 4}
        assert not [text for text in texts if text.encode() in content], name
    with safe_open(path, framework="np") as file:
        assert set(json.loads(file.metadata()["deltaclip"])) == {"version", "missing", "intervals", "likeness"}


def test_no_validation_rows_are_said(task):
    rows = task.rows
    split = split_cache(rows, "grouped", fractions="0.8,0,0.2", seed=1)
    alone = Task(config=task.config, rows=rows, split=split)
    scores = scores_of(task, 0.1)
    trust = fit_trust(alone, honest_scores(alone, scores, left_out={}, kept={}))
    assert trust.missing == dict.fromkeys(TARGETS, "no validation row has a label")
    found = trusted(trust, rows, scores).trust
    assert np.isnan(found.low["quality"]).all()
    assert (found.flag_N >= 0).mean() < 0.05


def test_train_writes_intervals_and_flags_and_evaluate_finds_the_same(demo_run):
    table, metrics = read_csv(demo_run / "predictions.csv"), read_json(demo_run / "metrics.json")
    for target in TARGETS:
        score, low, high = (numbers(table, f"{target}{part}") for part in ("", "_low", "_high"))
        assert np.all((low >= 0) & (low <= score) & (score <= high) & (high <= 1))
        test = np.array([row["split"] == "test" for row in table])
        label = numbers(table, f"{target}_label")
        figures = metrics["intervals"][target]
        assert figures["asked"] == 0.9
        # Six digits of a table against float32.
        assert figures["coverage"] == pytest.approx(((low <= label) & (label <= high))[test].mean(), abs=0.01)
        assert figures["width"] == pytest.approx((high - low)[test].mean(), abs=1e-4)
    assert {row["flag"] for row in table} <= {"", "unlike: center", "unlike: prompt"}
    assert metrics["unlike"]["test"] == pytest.approx(
        np.mean([row["flag"] != "" for row in table if row["split"] == "test"])
    )
    found = evaluate(EvaluateConfig(run=demo_run)).metrics
    assert found["unlike"] == metrics["unlike"]
    for target in TARGETS:
        for name in ("asked", "coverage", "width", "n", "per_source"):
            assert found["intervals"][target][name] == pytest.approx(metrics["intervals"][target][name], abs=1e-3)


def test_runs_of_before_have_none_and_a_damaged_file_is_named(demo_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    (run / FILE).write_bytes(b"\0nothing of the kind")
    with pytest.raises(UserError, match="cannot be read") as refused:
        open_run(run)
    assert str(refused.value).startswith(f"{run / FILE}: cannot be read (")
    assert str(refused.value).endswith("); train again")
    (run / FILE).unlink()
    assert open_run(run).trust is None
    metrics = evaluate(EvaluateConfig(run=run)).metrics
    assert "intervals" not in metrics
