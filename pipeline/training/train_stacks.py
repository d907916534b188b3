"""Many trainings of residual heads at once, in stacks; each gives what `train_heads.learn` gives alone.

Heads share nothing, so what the head of a target does not see is trained once: a grid of 8 scales for each of two
targets has 64 settings, but 8 heads of each. Must not know grids, run directories or the test rows.

Shapes: K heads of a stack, N rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.progress import Progress
from deltaclip.pipeline.loop.epochs import EpochRow, FitResult, seeded
from deltaclip.pipeline.loop.stack_learner import HeadPlan, StackJob, fit_stacks
from deltaclip.pipeline.model.heads import HeadSpec, ResidualHeads, build_heads
from deltaclip.pipeline.model.stack import HeadStack
from deltaclip.pipeline.rows.task import rankable_labels, trainable_labels, validation
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH
from deltaclip.pipeline.training.bases import Bases, fit_bases, start_bases
from deltaclip.pipeline.training.train_heads import Learned, fit_plan, has_fitted_bases, head_spec, margin_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deltaclip.pipeline.loop.batches import Columns
    from deltaclip.pipeline.loop.epochs import Validation
    from deltaclip.pipeline.rows.cached_rows import Batches
    from deltaclip.pipeline.rows.task import Task
    from deltaclip.pipeline.settings import Base, TrainConfig


# Heads of one target that train together: parameters, two moments, best weights and a bf16 copy are 18 bytes a weight,
# 1 GB for 128 heads at D = 768.
MAX_HEADS = 128


@dataclass(frozen=True)
class HeadKey:
    """All that decides a head of one target, beside what the settings of a sweep have in common; sorts by rate."""

    lr: float
    weight_decay: float
    seed: int
    scale: float
    weight: float
    dropout: float
    loss: str
    base: Base


class Stacked:
    """Settings that were trained together; `scores` are known for all, heads are made on demand."""

    def __init__(self, tasks: Sequence[Task[TrainConfig]], *, half: bool) -> None:
        """Train all tasks, of one cache and split, whose settings differ in nothing but what `HeadKey` names."""
        self.first, self.half = tasks[0], half
        self.rows, self.split = self.first.rows, self.first.split
        self.targets = [target.name for target in self.rows.targets]
        trainable = trainable_labels(self.rows, self.split.train)
        self.ranked = [label for label in rankable_labels(self.rows, self.split.val) if label in trainable]
        settings = [task.config for task in tasks]
        self.fitted: dict[str, Bases] = {}
        for base in dict.fromkeys(one.base for one in settings if has_fitted_bases(one)):
            trained = {label for task in tasks for label in task.trained}
            seed, view = self.first.config.split_seed, self.first.config.view if base == "kernel" else None
            self.fitted[base] = fit_bases(self.rows, self.split, labels=trained, seed=seed, view=view)
        keys = {label: sorted({self.key(task, label) for task in tasks}, key=_order) for label in self.targets}
        self.num_heads = sum(map(len, keys.values()))
        self._place: dict[tuple[str, HeadKey], tuple[StackJob, int]] = {}
        self._starts: dict[tuple[int, Base], tuple[ResidualHeads, dict[str, Any] | None]] = {}
        self._generators: dict[int, torch.Generator] = {}
        passes = list(_passes(keys))
        self.seconds = 0.0
        with Progress(self.first.config.epochs * len(passes), "sweeping", unit="epochs") as progress:
            for here in passes:
                self._train(here, progress)

    def key(self, task: Task[TrainConfig], label: str) -> HeadKey:
        """Return what decides the head of a target."""
        config = task.config
        return HeadKey(
            lr=config.lr,
            weight_decay=config.weight_decay,
            seed=config.seed,
            scale=config.scales.of(label),
            weight=task.weights.targets[label],
            dropout=config.dropout,
            loss=config.loss,
            base=config.base,
        )

    def val_scores(self, task: Task[TrainConfig]) -> dict[str, float]:
        """Return of each target that a task trains what its best epoch reached on validation (`main`)."""
        found = {}
        for label in self.ranked:
            key = self.key(task, label)
            if key.weight > 0:
                job, k = self._place[label, key]
                found[label] = job.choice[k].score
        return found

    def best_epochs(self, task: Task[TrainConfig]) -> dict[str, int]:
        """Return the epoch that each head of a task keeps."""
        places = {label: self._place[label, self.key(task, label)] for label in self.targets}
        return {label: job.choice[k].epoch for label, (job, k) in places.items()}

    def learned(self, task: Task[TrainConfig]) -> Learned:
        """Return the heads of one task as `learn` would, with their history."""
        config, spec = task.config, self._spec(task)
        _, calibration = self._start(config.seed, config.base)
        columns = self._columns(config.base)
        with seeded(config.seed):
            heads = build_heads(spec).to(self.rows.device)
        assert isinstance(heads, ResidualHeads)
        if config.base in self.fitted:
            self.fitted[config.base].put_into(heads)
        best_epoch, best_score, jobs = {}, {}, {}
        for label in self.targets:
            job, k = self._place[label, self.key(task, label)]
            jobs[label] = (job, k)
            best_epoch[label], best_score[label] = job.choice[k].epoch, job.choice[k].score
            with torch.no_grad():
                for name, parameter in heads.head(label).named_parameters():
                    parameter.copy_(job.best[name][k])
        if config.scale_mode == "curriculum":
            self._set_curriculum(heads, jobs, best_epoch)
        left_out = self.fitted[config.base].left_out if config.base in self.fitted else {}
        fitted = FitResult(self._history(config, jobs), best_epoch, best_score, stopped_early=False)
        return Learned(
            spec=spec, heads=heads.eval(), calibration=calibration, fitted=fitted, columns=columns, left_out=left_out
        )

    def _spec(self, task: Task[TrainConfig]) -> HeadSpec:
        bases = self.fitted.get(task.config.base)
        return head_spec(task, bases=bases.shape if bases else None)

    def _columns(self, base: Base) -> Columns:
        return {"fitted_B": self.fitted[base].columns} if base in self.fitted else {}

    def _batches(self, base: Base) -> Batches:
        return self.first.train_batches(columns=self._columns(base))

    def _with_base(self, base: Base) -> Task[TrainConfig]:
        return replace(self.first, config=replace(self.first.config, base=base))

    def _start(self, seed: int, base: Base) -> tuple[ResidualHeads, dict[str, Any] | None]:
        """Return new heads of a seed with their base, made once; what scales and dropout are does not matter."""
        if (seed, base) not in self._starts:
            device = self.rows.device
            with seeded(seed, device):
                heads = build_heads(self._spec(self._with_base(base))).to(device)
                assert isinstance(heads, ResidualHeads)
                # Training alone goes on with torch's own generator from here: its dropout.
                self._generators[seed] = _generator_now(device)
            calibration = start_bases(heads, base, self._batches(base), self.fitted.get(base))
            self._starts[seed, base] = heads, calibration
        return self._starts[seed, base]

    def _train(self, keys: dict[str, list[HeadKey]], progress: Progress) -> None:
        jobs, base = [], next(iter(keys.values()))[0].base
        for label, found in keys.items():
            stack = HeadStack([self._built(key) for key in found], label, half=self.half)
            names = ("lr", "weight_decay", "loss", "weight", "dropout", "seed")
            own = HeadPlan(**{name: [getattr(key, name) for key in found] for name in names})
            jobs.append(StackJob(stack, own))
            self._place |= {(label, key): (jobs[-1], k) for k, key in enumerate(found)}
        generators = {seed: _copied(generator) for seed, generator in self._generators.items()}
        self.seconds += fit_stacks(
            jobs,
            self._batches(base),
            plan=fit_plan(self.first.config, margin=margin_of(self._with_base(base))),
            generators=generators,
            validate=self._validator(base) if self.ranked else None,
            on_epoch=lambda _: progress.advance(note=_best_note(jobs)),
        )

    def _built(self, key: HeadKey) -> ResidualHeads:
        start, _ = self._start(key.seed, key.base)
        spec = self._spec(self._with_base(key.base)).with_scales(dict.fromkeys(self.targets, key.scale))
        with seeded(key.seed):
            heads = build_heads(spec)
        assert isinstance(heads, ResidualHeads)
        own = {name: value for name, value in heads.state_dict().items() if "_head.scale." in name}
        state = {**start.state_dict(), **own}
        heads.load_state_dict(state)
        return heads.to(self.rows.device)

    def _validator(self, base: Base) -> Callable[[HeadStack], list[Validation]]:
        val = self.first.val_batches(columns=self._columns(base))
        truth = {label: self.rows.label(label)[self.split.val] for label in self.ranked}

        def validate(stack: HeadStack) -> list[Validation]:
            label = stack.target
            if label not in truth:
                return [validation({}, {})] * len(stack)
            parts = [stack.forward(batch)[0].reported for batch in val.in_order(SCORE_BATCH // 4)]
            score_KN = torch.cat(parts, dim=1).cpu().numpy()
            return [validation({label: score_N}, {label: truth[label]}) for score_N in score_KN]

        return validate

    def _history(self, config: TrainConfig, jobs: dict[str, tuple[StackJob, int]]) -> tuple[EpochRow, ...]:
        length = max(len(job.history) for job, _ in jobs.values())
        rows = []
        for index in range(length):
            seen = {label: (job.history[index], k) for label, (job, k) in jobs.items()}
            scores = [each.val_score[k] for label, (each, k) in seen.items() if label in self.ranked]
            figures: dict[str, float] = {}
            for each, k in seen.values():
                figures |= each.figures[k]
            scales = {label: each.scale[k] for label, (each, k) in seen.items()}
            loss = sum(each.train_loss[k] for each, k in seen.values())
            mean = float(np.mean(np.nan_to_num(scores))) if scores else math.nan
            lr = config.lr * next(iter(seen.values()))[0].lr_factor
            rows.append(EpochRow(index + 1, loss, mean, lr, scales, self.seconds / length, figures))
        return tuple(rows)

    def _set_curriculum(
        self, heads: ResidualHeads, jobs: dict[str, tuple[StackJob, int]], best_epoch: dict[str, int]
    ) -> None:
        for label, (job, k) in jobs.items():
            if best_epoch[label]:  # at the start there is no correction, whatever the scale
                heads.head(label).scale.value.fill_(job.history[best_epoch[label] - 1].scale[k])


def _passes(keys: dict[str, list[HeadKey]]) -> Iterator[dict[str, list[HeadKey]]]:
    """Cut the heads of each target into passes: at most MAX_HEADS, and fitted bases, of other shapes, apart."""
    for bases in (("calibrated", "identity"), ("kernel",), ("auto",)):
        found = {label: [key for key in each if key.base in bases] for label, each in keys.items()}
        for first in range(0, max(map(len, found.values())), MAX_HEADS):
            # All targets always: their dropout is drawn in turns from one stream, so a finished target keeps one head.
            yield {label: each[first : first + MAX_HEADS] or each[:1] for label, each in found.items()}


def _order(key: HeadKey) -> tuple[float, float, int, float]:
    # Heads of one rate and decay side by side: the optimizer moves neighbours together.
    return key.lr, key.weight_decay, key.seed, key.scale


def _generator_now(device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    on_gpu = device.type == "cuda"
    generator.set_state(torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state())
    return generator


def _copied(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy


def _best_note(jobs: list[StackJob]) -> str:
    best = {job.stack.target[0]: max((c.score for c in job.choice if c.score == c.score), default=None) for job in jobs}
    return ", ".join(f"best {letter} {score:.3f}" for letter, score in best.items() if score is not None)
