"""From heads that have learned to a run directory, and what is said of it; the test rows are scored here, once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.device import arithmetic
from deltaclip.base.errors import UserError
from deltaclip.base.options import settings_to_json
from deltaclip.features.data.views import CENTER, RECIPES, STATISTICS
from deltaclip.features.store.texts import TextColumn, Texts
from deltaclip.pipeline.rows.cached_rows import lacking_views
from deltaclip.pipeline.runs.curves import FOLDER as EVENTS
from deltaclip.pipeline.runs.folder import RunContents, surroundings, write_run
from deltaclip.pipeline.runs.measure import combine, measure
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, Scores, blank_untrained, score
from deltaclip.pipeline.runs.run_split import SIDES
from deltaclip.pipeline.runs.trust import fit_trust, honest_scores, trusted
from deltaclip.pipeline.words.plan_words import describe
from deltaclip.pipeline.words.result_words import metrics_table, verdict_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Self

    from deltaclip.pipeline.loop.epochs import EpochRow
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.rows.task import Task
    from deltaclip.pipeline.runs.trust import Trust
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import LearningSettings
    from deltaclip.pipeline.training.train_heads import Learned


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Heads that have learned, judged on every side of the split; `events` is a folder of TensorBoard's."""

    learned: Learned
    split: Split
    labels: list[str]
    scores: Scores
    metrics: dict[str, Any]
    trust: Trust
    events: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedResult:
    """A finished run, whatever was trained; of repeats, the metrics are those of all, epoch and scales of the first."""

    run: Path
    metrics: dict[str, Any]
    best_epoch: dict[str, int]
    scales: dict[str, float]
    fit_seconds: float
    seconds: float
    is_silent: bool = False  # of a process that is not the first

    @classmethod
    def of(cls, repeats: Sequence[Finished], *, run: Path, started: float, **other: Any) -> Self:
        """Return the result of repeats that were written to `run`, of a stage that started at that monotonic time."""
        learned, seconds = repeats[0].learned, sum(row.seconds for one in repeats for row in one.learned.fitted.history)
        found = {
            "metrics": combine([one.metrics for one in repeats]),
            "best_epoch": learned.fitted.best_epoch,
            "scales": learned.heads.scales(),
            "fit_seconds": round(seconds, 3),
            "seconds": round(time.monotonic() - started, 3),
        }
        return cls(run=run, **{**found, **other})

    def to_json(self) -> dict[str, Any]:
        """Return the metrics in the shape of `metrics.json`, with the run and its times."""
        times = {"fit_seconds": self.fit_seconds, "seconds": self.seconds}
        return {**self.metrics, "run": str(self.run), "best_epoch": self.best_epoch, "scales": self.scales, **times}

    def summary(self) -> str:
        """Return the metrics table, where the run lies, and the verdict."""
        found = " ".join(f"{target} {scale:.3f}" for target, scale in self.scales.items())
        scales = f", scales {found}" if found else ""
        times = f"fit {self.fit_seconds:.1f} s, all {self.seconds:.1f} s"
        best = " ".join(f"{label} {self.best_epoch[label]}" for label in _trained(self.metrics))
        seeds = self.metrics["split"]["seeds"]
        kept = f"keeps the first of {len(seeds)} repeats, split seed {seeds[0]}: " if len(seeds) > 1 else ""
        where = f"run: {self.run} ({kept}best epoch {best}{scales}, {times})"
        return "\n".join([metrics_table(self.metrics), "", where, *verdict_lines(self.metrics)])


def _trained(metrics: dict[str, Any]) -> list[str]:
    """Return the targets that were trained, by ratings or by pairs."""
    pairs = metrics.get("pairs", {})
    return list(dict.fromkeys([*metrics["test"], *(name for side in SIDES for name in pairs.get(side, {}))]))


def judge(
    task: Task[Any],
    learned: Learned,
    *,
    embedded: CacheRows | None = None,
    scores: Scores | None = None,
    shown: bool = True,
) -> Finished:
    """Score every row and compute the metrics, those of the test rows too.

    `embedded` are the rows with the embeddings of a tuned backbone, `scores` those of all rows where they are there
    already; floors are those of the task's. A bar is on the terminal where it is to be `shown`.
    """
    rows, split = task.rows, task.split
    if scores is None:
        batches = (embedded or rows).batches(None, batch_size=1, columns=learned.columns).in_order(SCORE_BATCH)
        scores = score(learned.heads, batches, total=len(rows.rows) if shown else 0)
    labels = task.trained
    for label in labels:
        known_N = ~np.isnan(rows.label(label))
        if not np.isfinite(scores.of(label)[known_N]).all():
            message = f"training diverged: its last step left weights that score {label} as no number"
            raise UserError(message, remedy=f"lower --lr, which is {task.config.lr:g}")
    sees_all = learned.spec.bases is not None and task.config.base == "auto"
    lacks_views = lacking_views(rows) if sees_all else []
    trust = _trust_of(task, learned, scores, embedded)
    scores = trusted(trust, rows, scores, embedded=embedded)
    metrics = measure(rows, scores, split, labels=labels, scales=learned.heads.scales(), lacks_views=lacks_views)
    return Finished(learned=learned, split=split, labels=labels, scores=scores, metrics=metrics, trust=trust)


def _trust_of(task: Task[Any], learned: Learned, scores: Scores, embedded: CacheRows | None) -> Trust:
    honest = honest_scores(task, scores, left_out=learned.left_out, kept=learned.fitted.best_epoch)
    # What the bases see of an image, and the statistics of its pixels, which tell most of what is strange.
    bases = learned.spec.bases.views if learned.spec.bases else ()
    there = [] if embedded is not None else list(task.rows.inputs())
    views = [
        name
        for name in there
        if name == STATISTICS or (name in bases and name.rpartition(":")[2] in RECIPES and name != CENTER)
    ]
    return fit_trust(task, honest, views=views, embedded=embedded)


def run_mode(config: LearningSettings) -> str:
    """Return the name of a mode, which is that of its checkpoint."""
    return "residual_frozen" if config.residual_learning else "direct_frozen"


def save_run(
    task: Task[Any],
    done: Finished,
    *,
    name: str,
    others: Sequence[Finished] = (),
    tables: Mapping[str, dict[str, Any]] | None = None,
    **about: Any,
) -> Path:
    """Write the run directory: the heads and the history of `done`, the metrics and the predictions of all.

    Args:
        task: what was learned; of repeats, the first.
        done: the heads to keep.
        name: of the directory, without `--out`.
        others: further repeats of the same training.
        tables: columns of further tables by file name.
        about: further JSON values of `config.json`, or such that stand in place of those of `train`.
    """
    config, rows, learned = task.config, task.rows, done.learned
    mode = about.get("mode", run_mode(config))
    further = {f"predictions_{one.split.seeds[0]}.csv": _predictions(rows, one) for one in others}
    contents = RunContents(
        mode=mode,
        heads=learned.heads,
        spec=learned.spec,
        config={
            "stage": "train",
            "mode": mode,
            "settings": settings_to_json(config),
            "description": describe(task),
            "cache": {"path": str(config.cache.resolve()), **rows.header, "dataset": rows.dataset},
            "labels": done.labels,
            "request": rows.header["request"],
            "beside": [
                {
                    "path": str(other.rows.path.resolve()),
                    "request": other.rows.header["request"],
                    "backbone": other.rows.facts,
                }
                for other in rows.others
            ],
            "backbone": rows.facts,
            "calibration": learned.calibration,
            "scales": learned.heads.scales(),
            "targets": [target.to_json() for target in rows.targets],
            "best_epoch": learned.fitted.best_epoch,
            "arithmetic": arithmetic(str(rows.device)),
            **(_about_repeats((done, *others)) if others else {}),
            **about,
            **surroundings(),
        },
        history=_history(learned.fitted.history),
        metrics=combine([one.metrics for one in (done, *others)]),
        predictions=_predictions(rows, done),
        keys=rows.keys,
        trust=done.trust,
        tables={**further, **(tables or {})},
        folders={EVENTS: done.events} if done.events else {},
        tuned=learned.tuned,
    )
    return write_run(config.out, name, contents)


def _about_repeats(repeats: Sequence[Finished]) -> dict[str, Any]:
    seed = repeats[0].split.seeds[0]
    return {
        "kept": f"heads, history.csv and predictions.csv are those of the first repeat, split seed {seed}",
        "repeats": [
            {
                "best_epoch": one.learned.fitted.best_epoch,
                "scales": one.learned.heads.scales(),
                "split": one.split.to_json(),
            }
            for one in repeats
        ],
    }


def _history(history: tuple[EpochRow, ...]) -> dict[str, Any]:
    """Return the columns of `history.csv`, one row per epoch."""
    columns = {
        name: np.array([getattr(row, name) for row in history], dtype=np.float64)
        for name in ("train_loss", "val_score", "lr", "seconds")
    }
    scales = {f"scale_{target}": np.array([row.scales[target] for row in history]) for target in history[0].scales}
    figures = {name: np.array([row.figures[name] for row in history]) for name in history[0].figures}
    return {"epoch": [row.epoch for row in history], **columns, **scales, **figures}


def _predictions(rows: CacheRows, done: Finished) -> dict[str, Any]:
    """Return the columns of `predictions.csv`, every usable row of the cache."""
    side = np.empty(len(rows.rows), dtype=np.int8)
    for code, name in enumerate(SIDES):
        side[getattr(done.split, name)] = code
    scores = blank_untrained(done.scores, done.labels)
    text = rows.rows.text
    about = {
        "image": text["file"],
        "prompt": text["prompt"],
        "group": text["group"],
        "source": text["source"],
        "split": TextColumn(side, Texts.of(SIDES)),
    }
    labels = {f"{target.name}_label": rows.label(target.name) for target in rows.targets}
    return {**about, **labels, **scores.columns()}
