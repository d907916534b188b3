"""Stacks of heads as a learner: one pass over the batches for all of them, AdamW and clipping for every head by itself.

Each head ends where `fit` would leave it alone with the same seeds, up to rounding: batches, dropout masks, clipping,
schedule, best epoch and early stopping are those that it would have. Must not know grids or files.

Shapes: K heads of a stack, P heads of a part, B rows, H and F outputs and inputs of the wide layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from deltaclip.pipeline.loop.epochs import BestEpoch, Validation, run_epochs
from deltaclip.pipeline.loop.optimizer import Moments, adamw_step, decays
from deltaclip.pipeline.model.stack import DropoutMasks, HeadStack, heads_by_loss, stacked_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from deltaclip.pipeline.loop.batches import TrainBatches
    from deltaclip.pipeline.loop.epochs import EpochEnd, FitPlan, NotFinite
    from deltaclip.pipeline.model.scores import Batch
    from deltaclip.pipeline.model.stack import WideTape


# ---- Training of stacks of heads: one pass over the batches for all of them


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
        jobs: one stack for each target.
        train_batches: shared by all heads.
        plan: what all heads share; its lr and weight_decay are not read.
        generators: dropout of each seed, in the state in which `fit` would find torch's own.
        validate: one `Validation` per head of a stack, without gradients; None keeps the last epoch.
        on_epoch: called with the number of each finished epoch.

    A head whose loss is not finite keeps an earlier epoch, and stops no one. With a patience, a head that validation
    cannot rank goes on to the last epoch, while `fit` ends with the other heads.
    """
    learner = _StackLearner(jobs, plan, generators, validate)
    run_epochs(learner, train_batches, plan=plan, on_epoch=on_epoch)
    return learner.seconds


class _StackLearner:
    """Stacks of heads with their optimizers; what was seen of them has a `Validation` per head of each."""

    def __init__(
        self,
        jobs: Sequence[StackJob],
        plan: FitPlan,
        generators: Mapping[int, torch.Generator],
        validate: Callable[[HeadStack], list[Validation]] | None,
    ) -> None:
        self.jobs, self.generators, self.validate = jobs, generators, validate
        self.optimizers = [
            StackAdamW(job.stack, job.own.lr, job.own.weight_decay, max_grad_norm=plan.max_grad_norm) for job in jobs
        ]
        self.masks = [DropoutMasks(generators, job.own.seed, job.own.dropout) for job in jobs]
        self.weights = [torch.tensor(list(job.own.weight), device=job.stack.scales().device) for job in jobs]
        self.losses = [heads_by_loss(job.own.loss, job.stack.scales().device) for job in jobs]
        self.seconds = 0.0
        for job in jobs:
            job.choice = [BestEpoch(plan.patience, plan.margin) for _ in range(len(job.stack))]
            job.best = {name: stacked.detach().clone() for name, stacked in job.stack.parameters.items()}

    @property
    def stopped(self) -> bool:
        return all(choice.stopped for job in self.jobs for choice in job.choice)

    def start_epoch(self, fraction: float) -> None:
        for job in self.jobs:
            if job.stack.scale_mode == "curriculum":
                job.stack.set_scale_fraction(fraction)

    def step(self, batch: Batch, lr_factor: float) -> Tensor:
        uniform = self._draw(batch.num_rows)
        return torch.cat([self._step(index, batch, drawn, lr_factor) for index, drawn in enumerate(uniform)])

    def _draw(self, num_rows: int) -> list[dict[int, Tensor]]:
        """Draw the uniform numbers of dropout, (B, H) per seed and stack, in the order of training alone."""
        drawing = {seed for masks in self.masks for seed, p in masks.pairs if p > 0}
        drawn: list[dict[int, Tensor]] = [{} for _ in self.jobs]
        for seed in drawing:
            generator = self.generators[seed]
            for numbers, job in zip(drawn, self.jobs, strict=True):
                numbers[seed] = torch.rand(num_rows, job.stack.width, generator=generator, device=generator.device)
        return drawn

    def _step(self, index: int, batch: Batch, uniform: dict[int, Tensor], lr_factor: float) -> Tensor:
        stack = self.jobs[index].stack
        mask_KHB = self.masks[index].of(uniform, (stack.width, batch.num_rows))
        scores, tape = stack.forward(batch, mask_KHB)
        loss_K = stacked_loss(
            scores.sum_N, batch, target=stack.target, heads=self.losses[index], weight_K=self.weights[index]
        )
        torch.autograd.backward(loss_K.sum())
        self.optimizers[index].step(tape, lr_factor)
        return loss_K.detach()

    def diverged(self, wrong: NotFinite, epoch: int) -> None:
        """Stop no one: `choose` leaves out the head whose loss it is."""

    def validated(self) -> list[list[Validation]]:
        stacks = [job.stack for job in self.jobs]
        return [[Validation()] * len(stack) if self.validate is None else self.validate(stack) for stack in stacks]

    def record(self, end: EpochEnd, seen: list[list[Validation]]) -> None:
        losses = end.loss.split([len(job.stack) for job in self.jobs])
        for job, loss_K, found in zip(self.jobs, losses, seen, strict=True):
            job.history.append(
                StackEpoch(
                    lr_factor=end.lr_factor,
                    train_loss=loss_K.tolist(),
                    val_score=[one.scores.get(job.stack.target, math.nan) for one in found],
                    scale=job.stack.scales().detach().tolist(),
                    figures=[one.figures for one in found],
                )
            )
        self.seconds += end.seconds

    def choose(self, epoch: int, seen: list[list[Validation]]) -> None:
        for job, found in zip(self.jobs, seen, strict=True):
            for k, (choice, one) in enumerate(zip(job.choice, found, strict=True)):
                if epoch and not math.isfinite(job.history[-1].train_loss[k]):
                    continue  # a diverged head keeps what it was before
                if choice.take(epoch, one.scores.get(job.stack.target)):
                    for name, stacked in job.stack.parameters.items():
                        job.best[name][k].copy_(stacked.detach()[k])

    def take_best(self) -> None:
        """Leave the stacks where they are: `best` of each job is what was kept."""


# ---- AdamW and clipping for every head of a stack by itself


# Heads whose wide gradients are made and used before the next ones (1.6 MB each for consistency at D = 768): product,
# norm and update then find them in the processor's cache. A GPU has no use for that, and each part costs it launches:
# there a part has as many as have one rate and decay, 200 MB of gradients for 128.
CHUNK = 4


class _Part(NamedTuple):
    """Neighbouring heads that move together."""

    heads: slice
    lr: float
    weight_decay: float


class StackAdamW:
    """AdamW by torch's fused kernel on slices of a stack, each head with its own rate, decay and clipping."""

    def __init__(
        self, stack: HeadStack, lr: Sequence[float], weight_decay: Sequence[float], *, max_grad_norm: float
    ) -> None:
        self.stack, self.max_grad_norm = stack, max_grad_norm
        weight_KHF = stack.parameters[stack.wide_weight]
        most = CHUNK if weight_KHF.device.type == "cpu" else len(stack)
        self.parts = list(_parts(list(zip(lr, weight_decay, strict=True)), most))
        self._moments = {name: Moments.of(stacked.detach()) for name, stacked in stack.parameters.items()}
        self._num_steps = torch.zeros((), device=weight_KHF.device)
        most = max(part.heads.stop - part.heads.start for part in self.parts)
        self._grad = torch.empty_like(weight_KHF[:most])
        self._product = self._grad.bfloat16() if stack.half else self._grad

    def step(self, tape: WideTape, lr_factor: float) -> None:
        """Move all heads by one step at lr_factor times their own rates, and forget the gradients."""
        parameters = self.stack.parameters
        small = {name: stacked.grad for name, stacked in parameters.items() if stacked.grad is not None}
        squares = [grad.square().flatten(1).sum(dim=1) if grad.ndim > 1 else grad.square() for grad in small.values()]
        square_K = torch.stack(squares).sum(dim=0)
        for part in self.parts:
            grads = {name: grad[part.heads] for name, grad in small.items()}
            grads[self.stack.wide_weight] = self._wide_grad(tape, part.heads)
            if self.max_grad_norm:
                self._clip(grads, square_K[part.heads])
            self._move(grads, part, lr_factor)
            self.stack.refresh(part.heads)
        self._num_steps += 1
        for stacked in parameters.values():
            stacked.grad = None

    def _wide_grad(self, tape: WideTape, heads: slice) -> Tensor:
        """Return the gradient of some heads' wide weights, (P, H, F) float32, in memory that is used again."""
        assert tape.h_KHB.grad is not None
        rows_RB = tape.h_KHB.grad[heads].flatten(0, 1).to(tape.x_BF.dtype)
        count = heads.stop - heads.start
        product, grad = self._product[:count], self._grad[:count]
        torch.mm(rows_RB, tape.x_BF, out=product.flatten(0, 1))
        return grad.copy_(product) if self.stack.half else grad

    def _clip(self, grads: dict[str, Tensor], small_square_P: Tensor) -> None:
        wide = grads[self.stack.wide_weight]
        square_P = small_square_P + torch.linalg.vector_norm(wide, dim=(1, 2)).square()
        # The factor of torch.nn.utils.clip_grad_norm_, which scales even where it changes nothing.
        factor_P = (self.max_grad_norm / (square_P.sqrt() + 1e-6)).clamp(max=1.0)
        if factor_P.device.type == "cpu" and bool((factor_P == 1).all()):
            return
        for grad in grads.values():
            grad.mul_(factor_P.view(-1, *(1,) * (grad.ndim - 1)))

    def _move(self, grads: dict[str, Tensor], part: _Part, lr_factor: float) -> None:
        for decayed in (True, False):
            names = [name for name in grads if decays(name) is decayed]
            if not names:
                continue
            moments = [self._moments[name] for name in names]
            adamw_step(
                [self.stack.parameters[name].detach()[part.heads] for name in names],
                [grads[name] for name in names],
                # The kernel counts its own step, in a number that every part must see alike.
                [Moments(each.mean[part.heads], each.square[part.heads], self._num_steps.clone()) for each in moments],
                lr=part.lr * lr_factor,
                weight_decay=part.weight_decay if decayed else 0.0,
            )


def _parts(kinds: Sequence[tuple[float, float]], most: int) -> Iterator[_Part]:
    """Cut heads into neighbours of one (lr, weight decay), at most so many of them."""
    start = 0
    for (lr, weight_decay), same in groupby(kinds):
        end = start + sum(1 for _ in same)
        for first in range(start, end, most):
            yield _Part(slice(first, min(first + most, end)), lr, weight_decay)
        start = end
