"""What earlier releases wrote, when quality and consistency were all there was, says today what it said then.

`tests/data/two_labels` is of such a release: a run with its cache of imported embeddings (one row has no prompt), and
small heads of four kinds with what they said of some rows.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deltaclip.pipeline.compare import compare
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.model.scores import Batch, run_heads
from deltaclip.pipeline.report import report
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.runs.folder import load_heads, open_run
from deltaclip.pipeline.runs.prediction_table import read_predictions, recorded_targets, score
from deltaclip.pipeline.runs.run_split import split_of_run
from deltaclip.pipeline.settings import CompareConfig, EvaluateConfig, ReportConfig
from deltaclip.tests.pipeline.conftest import numbers, read_csv

FOLDER = Path(__file__).parents[2] / "data" / "two_labels"
RUN, CACHE = FOLDER / "run", FOLDER / "cache.h5"
SHORT = {"quality": "q", "consistency": "c"}


@pytest.mark.parametrize("kind", ["learned", "curriculum", "kernels", "direct"])
def test_heads_give_the_scores_that_they_gave(kind):
    told = load_file(FOLDER / "heads" / "scores.safetensors")
    heads, header = load_heads(FOLDER / "heads" / f"{kind}.safetensors")
    assert "targets" not in header["spec"]  # or these were no heads of then
    views = dict.fromkeys(heads.bases.views, told["x"]) if kind == "kernels" else {}
    with torch.no_grad():
        terms = heads.base_terms(views, told["v"], told["t"])
        found = run_heads(heads, Batch(told["v"], told["t"], {}, fitted_B=terms))
    assert list(views) == (["stages"] if kind == "kernels" else [])
    assert list(found.targets) == list(SHORT)
    for target in SHORT:
        # Float32 sums of 3 to 17 products, on another machine perhaps in another order.
        torch.testing.assert_close(found.of(target), told[f"{kind}.{target}"], rtol=0, atol=1e-6)


def test_a_run_gives_its_rows_the_scores_that_it_recorded():
    run, rows = open_run(RUN), load_rows(CACHE, "cpu")
    assert run.labels == ("quality", "consistency")
    assert run.config["scales"] == pytest.approx({"quality": 0.311, "consistency": 0.248}, abs=1e-3)
    assert run.config["scales"] == pytest.approx(run.heads.scales(), rel=1e-6)
    found, recorded = score(run.heads, rows.batches(None, batch_size=1).in_order()), read_csv(RUN / "predictions.csv")
    for target, short in SHORT.items():
        columns = found.targets[target]
        for part, values in (("", columns.score), ("_base", columns.base), ("_delta", columns.delta)):
            # The table has six digits.
            np.testing.assert_allclose(values, numbers(recorded, f"{short}{part}"), rtol=2e-6, atol=1e-6)
        assert rows.label(target) == pytest.approx(numbers(recorded, target), abs=1e-6, nan_ok=True)
        assert np.abs(columns.delta[~np.isnan(columns.delta)]).max() > 0.05  # or the corrections would not show
    assert np.flatnonzero(np.isnan(found.of("consistency"))).tolist() == [5]


def test_its_table_is_read_by_the_names_of_today():
    recorded = read_csv(RUN / "predictions.csv")
    assert recorded_targets(RUN / "predictions.csv") == ["quality", "consistency"]
    for target, short in SHORT.items():
        now_and_then = {
            target: short,
            f"{target}_label": target,
            f"{target}_base": f"{short}_base",
            f"{target}_delta": f"{short}_delta",
        }
        for row, then in zip(read_predictions(RUN / "predictions.csv", list(now_and_then)), recorded, strict=True):
            assert row == {now: then[old] for now, old in now_and_then.items()}


def test_it_is_evaluated_compared_and_reported(tmp_path):
    then = json.loads((RUN / "metrics.json").read_text(encoding="utf-8"))
    split = split_of_run(open_run(RUN), load_rows(CACHE, "cpu"))
    assert (len(split.train), len(split.val), len(split.test)) == (16, 8, 8)
    found = evaluate(EvaluateConfig(run=RUN, cache=CACHE)).metrics
    for side in ("train", "val", "test"):
        for target in SHORT:
            for name in ("srocc", "krocc", "plcc", "rmse", "n"):
                assert found[side][target][name] == pytest.approx(then[side][target][name], rel=1e-4)
    compared = compare(CompareConfig(runs=[RUN, RUN])).comparison
    for target in SHORT:
        told = compared["labels"][target][0]["srocc"]
        assert told == pytest.approx(then["test"][target]["srocc"], rel=1e-4)
    report(ReportConfig(runs=[RUN], out=tmp_path / "report.html"))
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
