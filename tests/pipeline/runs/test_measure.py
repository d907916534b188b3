"""The shape of metrics where something is missing: a label, a side, a correction, a source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deltaclip.features.store.texts import TextColumn
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import row_groups, split_cache
from deltaclip.pipeline.rows.task import present_labels
from deltaclip.pipeline.runs.measure import measure
from deltaclip.pipeline.runs.prediction_table import ScoreColumns, Scores
from deltaclip.pipeline.scoring.intervals import srocc_interval
from deltaclip.pipeline.words.result_words import metrics_table

LABELS = ["quality", "consistency"]
SCALES = {"quality": 0.2, "consistency": 0.2}


@pytest.fixture(scope="module")
def rows(demo_cache):
    return load_rows(demo_cache, "cpu")


def with_columns(rows, *, source=None, **labels):
    numbers = rows.rows.numbers | {name: np.asarray(values, dtype=np.float32) for name, values in labels.items()}
    text = rows.rows.text if source is None else rows.rows.text | {"source": TextColumn.of(source)}
    return replace(rows, rows=replace(rows.rows, numbers=numbers, text=text))


def perfect(rows, delta=0.1):
    """Scores that equal the labels, each made of a base and a correction."""
    part = np.full(len(rows.rows), delta, dtype=np.float32)
    scores = {label: np.nan_to_num(rows.label(label), nan=0.5) for label in LABELS}
    return Scores({label: ScoreColumns(score, score - part, part) for label, score in scores.items()})


def split_of(rows, fractions="0.7,0.1,0.2"):
    return split_cache(rows, "grouped", fractions=fractions, seed=0)


def test_perfect_scores_have_perfect_metrics(rows):
    metrics = measure(rows, perfect(rows), split_of(rows), labels=LABELS, scales=SCALES)
    for side in ("test", "val", "train"):
        for figures in metrics[side].values():
            assert figures["srocc"] == pytest.approx(1, abs=1e-9)
            assert figures["plcc"] == pytest.approx(1, abs=1e-9)
    assert metrics["test"]["quality"]["srocc_ci"] == pytest.approx([1, 1], abs=1e-9)
    assert max(figures["srocc"] for figures in metrics["floors"]["cosine"].values()) < 1


def test_groups_that_belong_together_are_drawn_together(rows):
    """Six prompts have the same tokens, and their pictures the same label: an interval knows 8 groups, not 48."""
    random, names = np.random.default_rng(0), TextColumn.of([f"prompt {place}" for place in range(240)])
    label_2N = 0.5 + 0.1 * np.repeat(random.normal(size=(2, 40)), 6, axis=1) + 0.001 * random.normal(size=(2, 240))
    label_2N[1] += label_2N[0] - 0.5
    told = with_columns(rows, quality=label_2N[0])
    text = told.rows.text | {"prompt": names, "group": names}
    number_T = np.array([int(name.split()[1]) for name in names.names.take(np.arange(240))])
    told = replace(
        told, rows=replace(told.rows, text=text, prompt=names.codes), tokens_T=number_T.astype("u8") // 6 + 1
    )
    assert len(np.unique(row_groups(told))) == 40
    split = split_of(told)
    nothing = np.zeros(240, dtype=np.float32)
    scores = Scores({"quality": ScoreColumns(label_2N[1].astype(np.float32), nothing, nothing)})
    found = measure(told, scores, split, labels=["quality"], scales={})
    apart = srocc_interval(label_2N[1][split.test], label_2N[0][split.test], seed=0, groups=split.test)
    assert np.ptp(found["test"]["quality"]["srocc_ci"]) > 1.5 * np.ptp(apart)


def test_saturated_corrections_are_found_and_advised_against(rows):
    metrics = measure(rows, perfect(rows, delta=0.199), split_of(rows), labels=LABELS, scales=SCALES)
    found = {entry["name"]: entry for entry in metrics["diagnostics"]}
    assert found["quality.saturated_share"]["value"] == 1
    outcome = found["quality.outcome"]
    assert outcome["state"] == "bounded"
    assert "--scale quality" in metrics["verdict"]["quality"]["advice"]


def test_a_missing_label_has_no_figures_anywhere(rows):
    half = with_columns(rows, consistency=np.full(240, np.nan))
    assert present_labels(half) == ["quality"]
    metrics = measure(half, perfect(half), split_of(half), labels=LABELS, scales=SCALES)
    for part in ("test", "val", "train", "per_source"):
        assert list(metrics[part]) == ["quality"]
    assert list(metrics["floors"]["cosine"]) == ["quality"]
    assert all(entry["name"].startswith("quality.") for entry in metrics["diagnostics"])
    assert "consistency  " not in metrics_table(metrics)


def test_without_sources_there_is_no_table_of_them(rows):
    bare = with_columns(rows, source=[""] * 240)
    metrics = measure(bare, perfect(bare), split_of(bare), labels=LABELS, scales=SCALES)
    assert metrics["per_source"] == {"quality": {}, "consistency": {}}
    assert "per source" not in metrics_table(metrics)


def test_direct_heads_and_missing_validation_have_no_diagnostics(rows):
    assert measure(rows, perfect(rows), split_of(rows), labels=LABELS, scales={})["diagnostics"] == []
    assert measure(rows, perfect(rows), split_of(rows, "0.8,0,0.2"), labels=LABELS, scales=SCALES)["diagnostics"] == []


def test_heads_that_were_not_trained_have_no_figures(rows):
    metrics = measure(rows, perfect(rows), split_of(rows), labels=["quality"], scales=SCALES)
    assert list(metrics["test"]) == list(metrics["floors"]["cosine"]) == ["quality"]


def rounded(figures):
    """Figures without what the fit of a curve to perfect scores leaves: 1e-12, and not the same every time."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return round(figures, 9) if isinstance(figures, float) else figures


def test_a_large_side_is_judged_by_rows_drawn_from_it(rows, monkeypatch):
    split, scores = split_of(rows), perfect(rows)
    exact = measure(rows, scores, split, labels=LABELS, scales=SCALES)
    monkeypatch.setattr("deltaclip.pipeline.runs.measure.JUDGED_ROWS", 40)
    drawn = measure(rows, scores, split, labels=LABELS, scales=SCALES)
    assert drawn["split"]["rows"] == exact["split"]["rows"] == {"train": 168, "val": 24, "test": 48}
    note = "figures of test are of 40 rows drawn from 48; figures of train are of 40 rows drawn from 168"
    assert drawn["split"]["note"] == note
    assert exact["split"]["note"] == ""
    for side, count in (("test", 40), ("val", 24), ("train", 40)):
        assert drawn[side]["quality"]["n"] == count
    assert drawn["floors"]["no_image"]["quality"]["n"] == drawn["floors"]["cosine"]["quality"]["n"] == 40
    assert rounded(drawn["val"]) == rounded(exact["val"])
    # The floor is fitted to all training rows, and a recorded note is not said twice.
    again = replace(split, note=note)
    assert rounded(measure(rows, scores, again, labels=LABELS, scales=SCALES)) == rounded(drawn)
