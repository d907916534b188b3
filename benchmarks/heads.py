"""What questions about heads cost from a warm cache: one training, and 64 settings together.

The sweep is compared with 64 trainings by our own loop, one after the other, over the same rows in memory: what both
share (Python's start, reading the cache) is left out of both sides.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.caches import random_cache
from benchmarks.measuring import Row, seconds
from deltaclip.base.device import choose_device, choose_precision
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.rows.task import Task
from deltaclip.pipeline.runs.save_run import judge
from deltaclip.pipeline.settings import SweepConfig, TrainConfig
from deltaclip.pipeline.training.sweep_grid import sweep_settings
from deltaclip.pipeline.training.train_heads import learn
from deltaclip.pipeline.training.train_stacks import Stacked

if TYPE_CHECKING:
    from deltaclip.pipeline.training.train_heads import Learned

ROWS, DIM, SINGLES, REPEATS = 3000, 768, 6, 3
EPOCHS = 10  # of the sweeps and the trainings that they are compared with: half the default, for half the time
GRIDS = {
    # Every head differs from every other: 64 of each label.
    "64 settings of lr, dropout, loss, seed": {
        "lr": "5e-4,1e-3,2e-3,5e-3",
        "dropout": "0,0.1,0.2,0.3",
        "loss": "mse,huber",
        "seed": "1,2",
    },
    # Each label's head sees half of what varies: 16 of each label.
    "64 settings of both scales, lr": {
        "scale": "quality=0.05,0.1,0.2,0.4,consistency=0.05,0.1,0.2,0.4",
        "lr": "5e-4,1e-3,2e-3,5e-3",
    },
}


def measure() -> list[Row]:
    """Return the rows of training and of sweeps."""
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as folder:
        cache = random_cache(Path(folder) / "random.h5", rows=ROWS, dim=DIM)
        device = choose_device("auto")
        rows = load_rows(cache, device)
        config = TrainConfig(cache=cache, base="calibrated")  # the heads are timed, not the choice of a base
        split = split_cache(rows, "grouped", fractions=config.fractions, seed=config.split_seed)
        found = [*_train_rows(Task(config=config, rows=rows, split=split), Path(folder))]
        for name, grid in GRIDS.items():
            settings = sweep_settings(SweepConfig(cache=cache, epochs=EPOCHS, base="calibrated", **grid))
            tasks = [Task(config=each, rows=rows, split=split) for each in settings]
            found += _sweep_rows(name, tasks, device=device)
    return found


def _train_rows(task: Task[TrainConfig], folder: Path) -> list[Row]:
    config = task.config

    def command(number: int) -> None:
        words = ["train", str(config.cache), "--base", config.base, "--out", str(folder / f"run{number}")]
        subprocess.run([sys.executable, "-m", "deltaclip", *words], check=True, capture_output=True)

    whole = median(
        [seconds(partial(command, number)) for number in range(4)][1:]
    )  # the first reads torch from the disk
    loop = median(_loop_seconds(learn(task)) for _ in range(3))
    what = f"{ROWS:,} rows, D = {DIM}, {config.epochs} epochs"
    return [
        Row(name=f"train, whole command: {what}", value=whole, unit="s", goal="at most 6", met=whole <= 6),
        Row(name=f"train, epoch loop: {what}", value=loop, unit="s", goal="at most 2", met=loop <= 2),
    ]


def _loop_seconds(learned: Learned) -> float:
    return sum(row.seconds for row in learned.fitted.history)


def _sweep_rows(name: str, tasks: list[Task[TrainConfig]], *, device: str) -> list[Row]:
    """Return the ratio of 64 single trainings over a sweep, and how far the figures of both are apart."""
    half = choose_precision("auto", device) != "fp32"
    # A few of the 64, spread over the grid: their mean time stands for all.
    chosen = [tasks[int(place)] for place in np.linspace(0, len(tasks) - 1, SINGLES)]
    ratios: dict[bool, list[float]] = {precise: [] for precise in sorted({False, half})}
    stacks: dict[bool, Stacked] = {}
    singles: list[Learned] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        singles = [learn(each) for each in chosen]
        alone = (time.perf_counter() - started) / SINGLES * len(tasks)
        for precise, found in ratios.items():
            started = time.perf_counter()
            stacks[precise] = Stacked(tasks, half=precise)
            found.append(alone / (time.perf_counter() - started))
    needed = 20 if device.startswith("cuda") else 3
    shown = []
    for precise, found in ratios.items():
        what, ratio, is_goal = f"{name}, {'bf16 products' if precise else 'fp32'}", median(found), precise == half
        goal, met = (f"at least {needed}", ratio >= needed) if is_goal else ("", None)
        shown.append(Row(name=f"64 trainings over a sweep: {what}", value=ratio, unit="x", goal=goal, met=met))
        apart = []
        for one, single in zip(chosen, singles, strict=True):
            pair = (single, stacks[precise].learned(one))
            apart.append(_apart(*(judge(one, each).metrics for each in pair)))
        goal, met = ("", None) if precise else ("at most 0.001", max(apart) <= 1e-3)
        shown.append(Row(name=f"largest difference of a metric: {what}", value=max(apart), unit="", goal=goal, met=met))
    noise = _sensitivity(chosen, singles)
    shown.append(Row(name=f"the same, one training and its embeddings off by a last bit: {name}", value=noise, unit=""))
    return shown


def _sensitivity(chosen: list[Task[TrainConfig]], singles: list[Learned]) -> float:
    """Return how far figures move when embeddings change by a unit in the last place: what no reordering can beat."""
    rows = chosen[0].rows
    assert rows.v_ID is not None, "they are in memory"
    exact = rows.v_ID.float()
    moved = replace(rows, v_ID=exact * (1 + 6e-8 * torch.randn_like(exact).sign()))
    found = []
    for one, single in zip(chosen, singles, strict=True):
        task = replace(one, rows=moved)
        found.append(_apart(judge(one, single).metrics, judge(task, learn(task)).metrics))
    return max(found)


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of any figure of two metrics, all sides and labels."""
    places = itertools.product(("train", "val", "test"), ("quality", "consistency"), ("srocc", "krocc", "plcc", "rmse"))
    return max(abs(one[side][label][name] - other[side][label][name]) for side, label, name in places)
