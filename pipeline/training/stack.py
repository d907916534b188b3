"""Training of stacks of heads: one pass over the batches for all of them.

Each head ends where `fit` would leave it alone with the same seeds, up to rounding: batches, dropout masks, clipping,
schedule, best epoch and early stopping are those that it would have. Must not know grids or files.

Shapes: K heads of a stack, B rows, H width of the wide layer.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from deltaclip.pipeline.model.stacked import DropoutMasks, HeadStack, stacked_loss
from deltaclip.pipeline.training.choice import BestEpoch
from deltaclip.pipeline.training.fit import Validation
from deltaclip.pipeline.training.schedule import curriculum_fraction, lr_factor
from deltaclip.pipeline.training.stack_optimizer import StackAdamW

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from deltaclip.pipeline.model.scores import Batch
    from deltaclip.pipeline.training.batches import TrainBatches
    from deltaclip.pipeline.training.fit import FitPlan


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """What the heads of a stack do not share, K values each; neighbours of equal lr and weight_decay move together."""

    lr: Sequence[float]
    weight_decay: Sequence[float]
    loss: Sequence[str]
    weight: Sequence[float]
    dropout: Sequence[float]
    seed: Sequence[int]


@dataclass(frozen=True)
class StackEpoch:
    """One epoch of all heads of a stack, K values each; figures as `Validation` names them."""

    lr_factor: float
    train_loss: list[float]
    val_score: list[float]
    scale: list[float]
    figures: list[Mapping[str, float]]


@dataclass
class StackJob:
    """A stack in training: afterwards `best` holds the weights of each head's best epoch, laid out as in the stack."""

    stack: HeadStack
    own: HeadPlan
    history: list[StackEpoch] = field(default_factory=list)
    choice: list[BestEpoch] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def fit_stacks(
    jobs: Sequence[StackJob],
    train_batches: TrainBatches,
    *,
    plan: FitPlan,
    generators: Mapping[int, torch.Generator],
    validate: Callable[[HeadStack], list[Validation]] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> float:
    """Train stacks of heads together, in place, and return the seconds of the epochs.

    Args:
        jobs: the quality stack and the consistency stack.
        train_batches: shared by all heads.
        plan: what all heads share; its lr and weight_decay are not read.
        generators: dropout of each seed, in the state in which `fit` would find torch's own.
        validate: one `Validation` per head of a stack, without gradients; None keeps the last epoch.
        on_epoch: called with the number of each finished epoch.

    A head whose loss is not finite keeps an earlier epoch, and stops no one. With a patience, a head that validation
    cannot rank goes on to the last epoch, while `fit` ends with the other head.
    """
    for job in jobs:
        job.choice = [BestEpoch(plan.patience) for _ in range(len(job.stack))]
        job.best = {name: stacked.detach().clone() for name, stacked in job.stack.parameters.items()}
        _judge(job, 0, None, validate)
    loop = _StackLoop(jobs, train_batches, plan, generators)
    started = time.perf_counter()
    for epoch in range(1, plan.epochs + 1):
        losses = loop.run_epoch(epoch)
        for job, loss_K in zip(jobs, losses, strict=True):
            found = _judge(job, epoch, loss_K, validate)
            job.history.append(
                StackEpoch(
                    lr_factor=loop.lr_factor,
                    train_loss=loss_K,
                    val_score=[seen.scores.get(job.stack.label, math.nan) for seen in found],
                    scale=job.stack.scales().detach().tolist(),
                    figures=[seen.figures for seen in found],
                )
            )
        if on_epoch is not None:
            on_epoch(epoch)
        if all(choice.stopped for job in jobs for choice in job.choice):
            break
    return time.perf_counter() - started


def _judge(
    job: StackJob,
    epoch: int,
    loss_K: list[float] | None,
    validate: Callable[[HeadStack], list[Validation]] | None,
) -> list[Validation]:
    """Validate a stack, keep the weights of the heads that are better than ever; epoch 0 has no loss."""
    stack, label = job.stack, job.stack.label
    with torch.no_grad():
        found = validate(stack) if validate is not None else [Validation()] * len(stack)
    for k, (choice, seen) in enumerate(zip(job.choice, found, strict=True)):
        if loss_K is not None and not math.isfinite(loss_K[k]):
            continue  # a diverged head keeps what it was before
        if choice.take(epoch, seen.scores.get(label)):
            for name, stacked in stack.parameters.items():
                job.best[name][k].copy_(stacked.detach()[k])
    return found


class _StackLoop:
    """The state that lives between the epochs."""

    def __init__(
        self,
        jobs: Sequence[StackJob],
        train_batches: TrainBatches,
        plan: FitPlan,
        generators: Mapping[int, torch.Generator],
    ) -> None:
        self.jobs, self.train_batches, self.plan, self.generators = jobs, train_batches, plan, generators
        self.optimizers = [
            StackAdamW(job.stack, job.own.lr, job.own.weight_decay, max_grad_norm=plan.max_grad_norm) for job in jobs
        ]
        self.masks = [DropoutMasks(generators, job.own.seed, job.own.dropout) for job in jobs]
        self.weights = [torch.tensor(list(job.own.weight), device=job.stack.scales().device) for job in jobs]
        self.num_steps = plan.epochs * train_batches.steps_per_epoch
        self.step = 0
        self.lr_factor = 0.0

    def run_epoch(self, epoch: int) -> list[list[float]]:
        """Take one step per batch and return the mean loss of each head of each stack."""
        for job in self.jobs:
            if job.stack.scale_mode == "curriculum":
                job.stack.set_scale_fraction(curriculum_fraction(epoch, num_epochs=self.plan.epochs))
        losses: list[list[Tensor]] = [[] for _ in self.jobs]
        for batch in self.train_batches(epoch):
            self.lr_factor = lr_factor(
                self.step,
                num_steps=self.num_steps,
                warmup_ratio=self.plan.warmup_ratio,
                schedule=self.plan.schedule,
            )
            uniform = self._draw(len(batch.q_B))
            for index in range(len(self.jobs)):
                losses[index].append(self._step(index, batch, uniform[index]))
            self.step += 1
        return [torch.stack(each).double().mean(dim=0).tolist() for each in losses]

    def _draw(self, num_rows: int) -> list[dict[int, Tensor]]:
        """Draw the uniform numbers of dropout, (B, H) per seed and stack, in the order of training alone."""
        drawing = {seed for masks in self.masks for seed, p in masks.pairs if p > 0}
        drawn: list[dict[int, Tensor]] = [{} for _ in self.jobs]
        for seed in drawing:
            generator = self.generators[seed]
            for numbers, job in zip(drawn, self.jobs, strict=True):
                numbers[seed] = torch.rand(num_rows, job.stack.width, generator=generator, device=generator.device)
        return drawn

    def _step(self, index: int, batch: Batch, uniform: dict[int, Tensor]) -> Tensor:
        job, stack = self.jobs[index], self.jobs[index].stack
        mask_KHB = self.masks[index].of(uniform, (stack.width, len(batch.q_B)))
        scores, tape = stack.forward(batch, mask_KHB)
        loss_K = stacked_loss(
            scores.q_sum_N, batch, label=stack.label, names=job.own.loss, weight_K=self.weights[index]
        )
        torch.autograd.backward(loss_K.sum())
        self.optimizers[index].step(tape, self.lr_factor)
        return loss_K.detach()
