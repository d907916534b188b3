"""STAGE train: heads on cached embeddings, the backbone frozen.

Split, calibrate on the training rows, fit, choose the epoch on validation, look at the test rows once, write the run;
with repeats, all of that once per seed.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from deltaclip.base.device import choose_device
from deltaclip.base.progress import say
from deltaclip.pipeline.rows.beside import with_caches_beside
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.rows.task import Task, loss_weights
from deltaclip.pipeline.runs.curves import EpochLog, live_events
from deltaclip.pipeline.runs.folder import free_run_path
from deltaclip.pipeline.runs.measure import repeat_configs
from deltaclip.pipeline.runs.save_run import TrainedResult, judge, run_mode, save_run
from deltaclip.pipeline.runs.tracking import track_run
from deltaclip.pipeline.scoring.splits import repeat_seeds
from deltaclip.pipeline.training.presets import apply_preset
from deltaclip.pipeline.training.train_heads import learn, views_of
from deltaclip.pipeline.words.plan_words import describe, warnings_of
from deltaclip.pipeline.words.result_words import choice_lines

if TYPE_CHECKING:
    from deltaclip.pipeline.settings import TrainConfig


def train(config: TrainConfig) -> TrainedResult:
    """Train heads on a cache and write a run directory.

    Raises:
        UserError: no labels, a split that is not possible, a cache that cannot be read, a diverging loss.
    """
    started = time.monotonic()
    run_name = f"{config.cache.stem}_{run_mode(config)}"
    path = free_run_path(config.out, run_name)  # refused now if taken, not after the training
    config.check_more()
    rows = load_rows(config.cache, choose_device(config.device), views=views_of(config))
    rows = with_caches_beside(rows, config.beside or ())
    loss_weights(config, rows, learns_pairs=True)  # refused before anything is split
    seeds = repeat_seeds(config.split_seed, config.repeats)
    splits = [split_cache(rows, config.split, fractions=config.fractions, seed=seed) for seed in seeds]
    config, preset = apply_preset(config, num_rows=splits[0].train.size)
    tasks = [
        Task(config=one, rows=rows, split=split, learns_pairs=True)
        for one, split in zip(repeat_configs(config), splits, strict=True)
    ]
    whole = Task(config=config, rows=rows, split=splits[0], learns_pairs=True)
    warnings = dict.fromkeys(line for task in tasks for line in warnings_of(task))
    say(*warnings, *(preset.lines() if preset else ()), *describe(whole))
    with live_events(path) if config.tensorboard else nullcontext() as events:
        repeats = []
        for number, task in enumerate(tasks, start=1):
            what = f"training {number} of {len(tasks)}" if len(tasks) > 1 else "training"
            sub = f"seed-{task.split.seeds[0]}" if len(tasks) > 1 else ""
            with EpochLog(events / sub) if events else nullcontext() as log:
                learned = learn(task, what=what, log=log)
            say(*choice_lines(learned.calibration))
            repeats.append(judge(task, learned))
        done, *others = repeats
        about = {"preset": preset.to_json() if preset else None}
        run = save_run(whole, replace(done, events=events), name=run_name, others=others, **about)
    if config.track:
        track_run(config.track, run)
    return TrainedResult.of(repeats, run=run, started=started)
