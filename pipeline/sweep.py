"""STAGE sweep: many settings of residual heads in one pass over a cache; the winner becomes a run.

Settings are ranked on validation rows alone; the test rows are looked at once, by the winner and the default setting
that it is compared with.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.device import choose_device, choose_precision
from deltaclip.base.errors import UserError
from deltaclip.base.options import settings_to_json
from deltaclip.base.progress import say
from deltaclip.pipeline.rows.beside import with_caches_beside
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import row_groups, split_cache
from deltaclip.pipeline.rows.task import Task, of_rows, rankable_labels, trainable_labels
from deltaclip.pipeline.runs.folder import free_run_path
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, score
from deltaclip.pipeline.runs.save_run import Finished, TrainedResult, judge, save_run
from deltaclip.pipeline.runs.tracking import track_run
from deltaclip.pipeline.scoring.verdict import margin
from deltaclip.pipeline.training.sweep_grid import (
    axis_names,
    axis_value,
    default_setting,
    edges,
    sweep_settings,
    varied,
)
from deltaclip.pipeline.training.train_heads import views_of
from deltaclip.pipeline.training.train_stacks import Stacked
from deltaclip.pipeline.words.plan_words import describe, warnings_of
from deltaclip.pipeline.words.result_words import (
    heatmap_lines,
    heatmaps,
    metrics_table,
    table_lines,
    verdict_lines,
    winner_lines,
)

if TYPE_CHECKING:
    from deltaclip.pipeline.settings import SweepConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class SweepResult(TrainedResult):
    """The winner of a sweep; `table` has a row per setting, best first, without test figures."""

    varied: list[str]
    table: list[dict[str, Any]]
    heatmaps: list[dict[str, Any]]
    num_heads: int
    edges: dict[str, str]
    over_default: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the winner's metrics in the shape of `metrics.json`, with the sweep beside them."""
        names = ("varied", "table", "heatmaps", "num_heads", "edges", "over_default")
        about = {name: getattr(self, name) for name in names}
        return {**TrainedResult.to_json(self), "sweep": about}

    def summary(self) -> str:
        """Return the best settings, a heat map of the validation scores, the winner's test metrics and the verdict."""
        lines = [
            *table_lines(self.table, self.varied),
            *heatmap_lines(self.heatmaps),
            "",
            *winner_lines(self.table[0], self.edges, self.over_default),
            "the winner on test rows, looked at once:",
            metrics_table(self.metrics),
            "",
            f"run: {self.run} ({len(self.table):,} settings as {self.num_heads:,} heads, "
            f"fit {self.fit_seconds:.1f} s, all {self.seconds:.1f} s)",
            *verdict_lines(self.metrics),
        ]
        return "\n".join(lines)


def sweep(config: SweepConfig) -> SweepResult:
    """Train every setting together, choose on validation, write the winner as a run.

    Raises:
        UserError: settings that cannot be, too few validation rows to choose by, and all that `train` refuses.
    """
    config.check_more()
    started, settings = time.monotonic(), sweep_settings(config)
    run_name = f"{config.cache.stem}_sweep"
    free_run_path(config.out, run_name)
    device = choose_device(config.device)
    half = choose_precision(config.precision, device) != "fp32"
    rows = load_rows(config.cache, device, views=views_of(*settings))
    rows = with_caches_beside(rows, config.beside or ())
    split = split_cache(rows, config.split, fractions=config.fractions, seed=config.data_seed)
    tasks = [Task(config=one, rows=rows, split=split) for one in settings]
    found = [warnings_of(task) for task in tasks]
    for line in (line for line in found[0] if all(line in lines for lines in found)):  # what holds for all settings
        say(line)
    if not set(rankable_labels(rows, split.val)) & set(trainable_labels(rows, split.train)):
        remedy = "give --fractions with more validation rows"
        raise UserError("too few validation rows to choose a setting by", place=config.cache, remedy=remedy)
    default = replace(tasks[0], config=default_setting(config, settings))
    stacked = Stacked([*tasks, default], half=half)
    axes = axis_names(config)
    table = _table(tasks, stacked, axes)
    best = next(task for task in tasks if all(axis_value(task.config, axis) == table[0][axis] for axis in axes))
    winner = replace(best, config=replace(best.config, out=config.out))
    say(*describe(winner))
    done = judge(winner, stacked.learned(best))
    names = varied(settings, axes)
    maps = heatmaps(table, names)
    found_edges = edges(best.config, config, settings)
    over_default = _over_default(done, default, stacked) if names and best.config != default.config else {}
    about = {
        "settings": settings_to_json(config),
        "products": "bf16" if half else "fp32",
        "varied": names,
        "edges": found_edges,
        "over_default": over_default,
    }
    run = save_run(
        winner,
        done,
        name=run_name,
        stage="sweep",
        tables={"sweep.csv": {name: [row[name] for row in table] for name in table[0]}},
        sweep={**about, "num_settings": len(settings), "num_heads": stacked.num_heads, "heatmaps": maps},
    )
    if config.track:
        track_run(config.track, run)
    return SweepResult.of(
        [done],
        run=run,
        started=started,
        varied=names,
        table=table,
        heatmaps=maps,
        num_heads=stacked.num_heads,
        edges=found_edges,
        over_default=over_default,
        fit_seconds=round(stacked.seconds, 3),
    )


def _over_default(done: Finished, default: Task[TrainConfig], stacked: Stacked) -> dict[str, dict[str, Any]]:
    """Return of each target how far the winner is ahead of the default setting on the test rows, paired."""
    learned, rows, test = stacked.learned(default), default.rows, default.split.test
    batches = rows.batches(test, batch_size=1, columns=of_rows(learned.columns, test))
    scores, group_M = score(learned.heads, batches.in_order(SCORE_BATCH)), row_groups(rows)[test]
    return {
        label: margin(done.scores.of(label)[test], scores.of(label), rows.label(label)[test], groups=group_M).to_json()
        for label in done.labels
        if label in default.trained
    }


def _table(tasks: list[Task[TrainConfig]], stacked: Stacked, axes: list[str]) -> list[dict[str, Any]]:
    """Return a row per setting, best first: what was swept, validation scores, and their mean over seeds.

    Settings that differ in the seed alone share the mean by which they are ranked, so that a lucky seed does not choose
    the setting; among its seeds the best one comes first. Settings that train another set of labels than the rest are
    compared on the labels of all: with a weight of 0 a label counts as 0, and one that diverged as -1, the lowest.
    """
    rows = []
    for task in tasks:
        found = stacked.val_scores(task)
        scores = {label: found.get(label, math.nan) for label in stacked.ranked}
        counted = [np.nan_to_num(found[label], nan=-1.0) if label in found else 0.0 for label in scores]
        best = stacked.best_epochs(task)
        rows.append(
            {axis: axis_value(task.config, axis) for axis in axes}
            | {f"val_{label}": score for label, score in scores.items()}
            | {f"best_epoch_{label}": best[label] for label in scores}
            | {"val_score": float(np.mean(counted))}
        )
    of_kind = defaultdict(list)
    for row in rows:
        of_kind[_without_seed(row, axes)].append(row["val_score"])
    for row in rows:
        of_seeds = of_kind[_without_seed(row, axes)]
        row |= {"val_score_mean": float(np.mean(of_seeds)), "num_seeds": len(of_seeds)}
    return sorted(rows, key=lambda row: (-row["val_score_mean"], -row["val_score"]))


def _without_seed(row: dict[str, Any], axes: list[str]) -> tuple[Any, ...]:
    return tuple(row[axis] for axis in axes if axis != "seed")
