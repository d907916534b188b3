"""The shape of metrics where something is missing: a label, a side, a correction, a source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deltaclip.features.store.texts import TextColumn
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.runs.measure import measure, present_labels, rankable_labels, trained_labels
from deltaclip.pipeline.runs.prediction_table import Scores
from deltaclip.pipeline.words.result_words import metrics_table

LABELS = ["quality", "consistency"]


@pytest.fixture(scope="module")
def rows(demo_cache):
    return load_rows(demo_cache, "cpu")


def with_columns(rows, *, source=None, **labels):
    numbers = rows.rows.numbers | {name: np.asarray(values, dtype=np.float32) for name, values in labels.items()}
    text = rows.rows.text if source is None else rows.rows.text | {"source": TextColumn.of(source)}
    return replace(rows, rows=replace(rows.rows, numbers=numbers, text=text))


def perfect(rows, delta=0.1):
    """Scores that equal the labels, each made of a base and a correction."""
    q, c = (np.nan_to_num(rows.label(label), nan=0.5) for label in ("quality", "consistency"))
    part = np.full(len(q), delta, dtype=np.float32)
    return Scores(q=q, c=c, q_base=q - part, c_base=c - part, q_delta=part, c_delta=part)


def split_of(rows, fractions="0.7,0.1,0.2"):
    return split_cache(rows, "grouped", fractions=fractions, seed=0)


def test_perfect_scores_have_perfect_metrics(rows):
    metrics = measure(rows, perfect(rows), split_of(rows), labels=LABELS, scales=(0.2, 0.2))
    for side in ("test", "val", "train"):
        for figures in metrics[side].values():
            assert figures["srocc"] == pytest.approx(1, abs=1e-9)
            assert figures["plcc"] == pytest.approx(1, abs=1e-9)
    assert metrics["test"]["quality"]["srocc_ci"] == pytest.approx([1, 1], abs=1e-9)
    assert max(figures["srocc"] for figures in metrics["floors"]["cosine"].values()) < 1


def test_saturated_corrections_are_found_and_advised_against(rows):
    metrics = measure(rows, perfect(rows, delta=0.199), split_of(rows), labels=LABELS, scales=(0.2, 0.2))
    found = {entry["name"]: entry for entry in metrics["diagnostics"]}
    assert found["quality.saturated_share"]["value"] == 1
    outcome = found["quality.outcome"]
    assert (outcome["verdict"], outcome["advice"].endswith("raise --residual-scale-q.")) == ("bounded", True)
    assert f"outcome (quality): {outcome['advice']}" in metrics_table(metrics)


def test_a_missing_label_has_no_figures_anywhere(rows):
    half = with_columns(rows, consistency=np.full(240, np.nan))
    assert present_labels(half) == ["quality"]
    metrics = measure(half, perfect(half), split_of(half), labels=LABELS, scales=(0.2, 0.2))
    for part in ("test", "val", "train", "per_source"):
        assert list(metrics[part]) == ["quality"]
    assert list(metrics["floors"]["cosine"]) == ["quality"]
    assert all(entry["name"].startswith("quality.") for entry in metrics["diagnostics"])
    assert "consistency  " not in metrics_table(metrics)


def test_without_sources_there_is_no_table_of_them(rows):
    bare = with_columns(rows, source=[""] * 240)
    metrics = measure(bare, perfect(bare), split_of(bare), labels=LABELS, scales=(0.2, 0.2))
    assert metrics["per_source"] == {"quality": {}, "consistency": {}}
    assert "per source" not in metrics_table(metrics)


def test_direct_heads_and_missing_validation_have_no_diagnostics(rows):
    assert measure(rows, perfect(rows), split_of(rows), labels=LABELS, scales=(None, None))["diagnostics"] == []
    assert (
        measure(rows, perfect(rows), split_of(rows, "0.8,0,0.2"), labels=LABELS, scales=(0.2, 0.2))["diagnostics"] == []
    )


def test_what_can_rank(rows):
    everything, none = np.arange(240), np.empty(0, dtype=np.int64)
    assert rankable_labels(rows, everything) == LABELS
    assert rankable_labels(rows, none) == []
    assert rankable_labels(rows, everything[:2]) == []  # two rows always correlate
    flat = np.full(240, 0.5)
    assert rankable_labels(with_columns(rows, quality=flat, consistency=flat * np.nan), everything) == []
    assert rankable_labels(with_columns(rows, quality=flat), everything) == ["consistency"]


def test_what_is_trained(rows):
    train = np.arange(100)
    late = np.where(np.arange(240) < 100, np.nan, 0.5)
    assert trained_labels(rows, train, (0.5, 0.5)) == LABELS
    assert trained_labels(rows, train, (0.5, 0.0)) == ["quality"]
    assert trained_labels(with_columns(rows, quality=late), train, (0.5, 0.5)) == ["consistency"]
    metrics = measure(rows, perfect(rows), split_of(rows), labels=["quality"], scales=(0.2, 0.2))
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
    exact = measure(rows, scores, split, labels=LABELS, scales=(0.2, 0.2))
    monkeypatch.setattr("deltaclip.pipeline.runs.measure.JUDGED_ROWS", 40)
    drawn = measure(rows, scores, split, labels=LABELS, scales=(0.2, 0.2))
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
    assert rounded(measure(rows, scores, again, labels=LABELS, scales=(0.2, 0.2))) == rounded(drawn)
