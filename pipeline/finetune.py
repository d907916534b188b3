"""STAGE finetune: heads and the later blocks of CLIP on the images of a cache.

As `train`, but embeddings change: the frozen part of each tower is run once, its activations are cached, and every
epoch runs only what trains. With repeats, all of that but the frozen part once per seed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from deltaclip.base.device import choose_device, choose_precision
from deltaclip.base.progress import say
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.runs.folder import free_run_path
from deltaclip.pipeline.runs.save_run import TrainedResult
from deltaclip.pipeline.runs.tracking import track_run
from deltaclip.pipeline.scoring.splits import repeat_seeds
from deltaclip.pipeline.training.finetune_job import TuningJob
from deltaclip.pipeline.training.presets import apply_preset
from deltaclip.pipeline.training.processes import OneVoice

if TYPE_CHECKING:
    from deltaclip.pipeline.settings import FinetuneConfig


def finetune(config: FinetuneConfig) -> TrainedResult:
    """Fine-tune CLIP with heads and write a run directory; goes on where an interrupted run of this command was.

    Raises:
        UserError: as `train`; or images are missing or have changed, the backbone is not that of the cache or cannot be
            cut, the disk has no room for the activations.
    """
    started = time.monotonic()
    config.check_more()
    with OneVoice() as voice:
        if config.out is not None:
            free_run_path(config.out, "")  # refused now if taken, not after the training
        device = choose_device(config.device)
        choose_precision(config.precision, device)  # refused now if it cannot be
        rows = load_rows(config.cache, "cpu", in_memory=True)
        seeds = repeat_seeds(config.split_seed, config.repeats)
        splits = [split_cache(rows, config.split, fractions=config.fractions, seed=seed) for seed in seeds]
        config, preset = apply_preset(config, num_rows=splits[0].train.size)
        with voice.joined(device) as (processes, device):
            job = TuningJob(config, rows, splits, device=device, processes=processes)
            if processes.is_first:
                for line in (*job.warnings, *(preset.lines() if preset else ()), *job.description):
                    say(line)
            repeats = job.learn()
            run = job.save(repeats, preset=preset.to_json() if preset else None)
    if config.track and processes.is_first:
        track_run(config.track, run)
    return TrainedResult.of(repeats, run=run, started=started, is_silent=not processes.is_first)
