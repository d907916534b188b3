"""The torchmetrics metric against the scorer, in one process and over two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
    assert int(metric.q_count) == int(metric.failed) == 0


def test_what_cannot_be_read_is_counted_and_left_out(scorer, pairs):
    images, prompts = pairs
    metric = DeltaclipMetric(scorer)
    metric.update([images[0], "missing.png"], [prompts[0], "x"])
    assert (int(metric.q_count), int(metric.failed)) == (1, 1)
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
    assert torch.isnan(found["c"])
    assert 0 <= float(found["q"]) <= 1


def test_it_loads_a_run_by_its_name(demo_run):
    assert DeltaclipMetric(str(demo_run)).scorer.labels == ("quality", "consistency")
