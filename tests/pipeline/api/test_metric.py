"""The torchmetrics metric against the scorer, in one process and over two."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import deltaclip
from deltaclip import DeltaclipMetric, Scorer


@pytest.fixture(scope="module")
def scorer(demo_run):
    return Scorer.load(demo_run, device="cpu")


@pytest.fixture(scope="module")
def pairs(demo_folder, demo_rows):
    return [demo_folder / row["image"] for row in demo_rows[:5]], [row["prompt"] for row in demo_rows[:5]]


def test_it_is_the_mean_over_all_updates(scorer, pairs):
    images, prompts = pairs
    metric = DeltaclipMetric(scorer, batch_size=1)
    metric.update(images[:3], prompts[:3])
    metric.update(images[3:], prompts[3:])
    alone = [scorer.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    found = metric.compute()
    assert float(found["q"]) == pytest.approx(np.mean([float(each.q[0]) for each in alone]), abs=1e-6)
    assert float(found["c"]) == pytest.approx(np.mean([float(each.c[0]) for each in alone]), abs=1e-6)


def test_reset_and_the_value_of_a_batch(scorer, pairs):
    images, prompts = pairs
    metric = DeltaclipMetric(scorer)
    of_batch = metric(images[:2], prompts[:2])
    assert of_batch == metric.compute()
    metric.reset()
    assert int(metric.quality_count) == int(metric.failed) == 0


def test_what_cannot_be_read_is_counted_and_left_out(scorer, pairs):
    images, prompts = pairs
    metric = DeltaclipMetric(scorer)
    metric.update([images[0], "missing.png"], [prompts[0], "x"])
    assert (int(metric.quality_count), int(metric.failed)) == (1, 1)
    assert float(metric.compute()["q"]) == pytest.approx(float(scorer.score(images[0], prompts[0]).q[0]), abs=1e-6)


def test_over_processes_sums_are_added(scorer, pairs):
    """Two replicas as torchmetrics sees them: what `gather` gives of each state is every process's value."""
    images, prompts = pairs
    first, second = DeltaclipMetric(scorer), DeltaclipMetric(scorer)
    first.update(images[:1], prompts[:1])
    second.update(images[1:], prompts[1:])
    states = [{name: getattr(metric, name) for name in first._defaults} for metric in (first, second)]
    whole = DeltaclipMetric(scorer)
    whole.update(images[:1], prompts[:1])
    whole.update(images[1:], prompts[1:])
    gathered = iter(zip(states[0].values(), states[1].values(), strict=True))
    first.dist_sync_fn = lambda *_arguments, **_names: list(next(gathered))
    first.distributed_available_fn = lambda: True
    assert first.compute() == whole.compute()


def test_a_label_that_was_not_learned_is_nan(scorer, pairs):
    quality_only = Scorer(scorer.heads, scorer.backbone, ["quality"])
    metric = DeltaclipMetric(quality_only)
    metric.update(*pairs)
    found = metric.compute()
    assert found.keys() == {"quality", "consistency", "q", "c"}
    assert torch.isnan(found["consistency"])
    assert torch.isnan(found["c"])
    assert 0 <= float(found["quality"]) == float(found["q"]) <= 1


def test_it_loads_a_run_by_its_name(demo_run):
    assert DeltaclipMetric(str(demo_run)).scorer.labels == ("quality", "consistency")


PROCESS = """
import json, sys
import torch.distributed as dist
from deltaclip import DeltaclipMetric
rank, store, run, images, prompts = int(sys.argv[1]), sys.argv[2], sys.argv[3], *map(json.loads, sys.argv[4:])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
metric = DeltaclipMetric(run)
metric.update(images, prompts)
found = metric.compute()
print(json.dumps({"q": float(found["q"]), "c": float(found["c"])}))
dist.destroy_process_group()
"""


def test_without_the_extra_all_else_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "deltaclip.pipeline.api.metric")
    names = {}
    exec("from deltaclip import *", names)  # noqa: S102 - as a user writes it; only a module's top level can
    assert names["Scorer"] is Scorer
    with pytest.raises(ImportError, match=r"^DeltaclipMetric needs torchmetrics: pip install 'deltaclip\[metrics\]'$"):
        deltaclip.DeltaclipMetric  # noqa: B018


@pytest.mark.slow
def test_two_processes_of_torch_distributed_agree_on_the_mean_of_all(scorer, pairs, demo_run, tmp_path):
    images, prompts = pairs
    sides = [(images[:1], prompts[:1]), (images[1:], prompts[1:])]  # unequal: a mean of means would show
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store"), str(demo_run)),
                *(json.dumps([str(part) for part in side]) for side in sides[rank]),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=200)[0].splitlines()[-1]) for process in running)
    assert first == second
    expected = scorer.score(images, prompts)
    assert first == pytest.approx({"q": expected.q.mean(), "c": expected.c.mean()}, abs=5e-3)  # bf16, other batches
