"""Pace: the batch that measures fastest, the threads that keep up, and shares that add up."""

from __future__ import annotations

import time

import pytest
import torch

from deltaclip.features.extraction import pace
from deltaclip.features.extraction.pace import StageClock, bottleneck, fastest_batch, needed_workers, share_words


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test says so."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds_of", "expected"),
    [
        (lambda size: 1 + size / 10, 64),  # a fixed cost a batch
        (lambda size: size, 64),  # none: the largest
        (lambda size: size * (3 if size > 16 else 1) + 1, 8),  # large ones fall out of the cache
        (lambda size: size * (1.04 if size == 64 else 1), 64),  # four percent are noise
        (lambda size: size * (1.06 if size == 64 else 1), 8),
    ],
)
def test_fastest_batch(clock, seconds_of, expected):
    def encode(batch):
        assert sorted(set(batch.flatten().tolist())) == list(range(min(5, len(batch))))
        clock[0] += seconds_of(len(batch))

    assert fastest_batch(encode, torch.arange(5.0)[:, None], on_gpu=False) == expected


def test_a_gpu_takes_the_smallest_that_is_close(clock):
    def encode(batch):
        clock[0] += 10 + len(batch)

    assert fastest_batch(encode, torch.zeros(5, 1), on_gpu=True) == 256  # .97 of what 1,024 reach; 128 have .94


def test_a_batch_that_does_not_fit_ends_the_search(clock):
    def encode(batch):
        if len(batch) > 512:  # two lanes of 256
            raise torch.OutOfMemoryError
        clock[0] += 1 + len(batch) / 100

    assert fastest_batch(encode, torch.zeros(5, 1), on_gpu=True) == 256


@pytest.mark.parametrize(
    ("busy", "lanes", "expected"),
    [
        ((0, 0.2, 1.5), 1, 1),
        ((0.1, 0.4, 0.25), 1, 3),
        ((0.1, 0.4, 0.25), 2, 6),
        ((0, 9, 0.1), 1, 8),
        ((0, 0, 0), 1, 8),
        ((0, 0, 1), 1, 1),
    ],
)
def test_needed_workers(busy, lanes, expected):
    busy_s = dict(zip(("read", "decode", "forward"), busy, strict=True))
    assert needed_workers(busy_s, lanes=lanes, processors=8) == expected


def test_shares(clock):
    stages = StageClock(workers=4, lanes=2)
    clock[0] = 5
    stages.add({"read": 1, "decode": 2, "forward": 9, "write": 0.1})
    clock[0] = 10
    stages.workers = 8
    stages.add({})  # the threads that counted until now are those that are there now
    clock[0] = 15
    stages.add({"read": 0, "decode": 4, "forward": 9, "write": 0.2})
    # read and decode share 4 x 5 + 8 x 5 + 8 x 5 seconds of threads, forward 2 x 15, write 15.
    assert stages.shares() == {"read": 0.01, "decode": 0.06, "forward": 0.6, "write": 0.02}
    assert share_words(stages.shares()) == "read 1 %, decode 6 %, forward 60 %, write 2 %"


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((0.1, 0.5, 0.9, 0.1), "forward"), ((0.4, 0.5, 0.8, 0.1), "decode"), ((0.6, 0.3, 0.1, 0.8), "read")],
)
def test_bottleneck(shares, expected):
    assert bottleneck(dict(zip(pace.STAGES, shares, strict=True))) == expected


def test_a_clock_that_runs():
    stages = StageClock(workers=1, lanes=1)
    time.sleep(0.02)
    stages.add({"forward": 0.02, "write": 0.0})
    assert 0 < stages.shares()["forward"] <= 1
    assert stages.shares()["decode"] == 0
