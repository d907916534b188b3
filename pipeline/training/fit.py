"""The one training loop.

Knows steps, validation, choice of the best epoch, early stopping and the check for non-finite losses. Must
not know files, splits or metrics: it gets batches and asks `validate`. Spec sections 2, 3 and 5.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.training.optimizer import AdamW
from deltaclip.pipeline.training.schedule import Schedule, curriculum_fraction, lr_factor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from deltaclip.pipeline.model.losses import Objective
    from deltaclip.pipeline.training.batches import TrainBatches

# Reading a loss waits for the device, so losses are kept as tensors and read together: at the end of each
# epoch, and within long ones after this many steps, so that a diverged run does not go on for an hour.
_STEPS_PER_CHECK = 256


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """How long and how fast to train; a `patience` or `max_grad_norm` of 0 means off."""

    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_ratio: float = 0.05
    schedule: Schedule = "cosine"
    max_grad_norm: float = 1.0
    patience: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1], not {self.warmup_ratio}")
        for name in ("lr", "weight_decay", "max_grad_norm", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class Validation(NamedTuple):
    """What `validate` says of the heads: the figure to choose by (higher is better) and any others."""

    score: float
    figures: Mapping[str, float] = {}


@dataclass(frozen=True)
class EpochRow:
    """One epoch, counted from 1; val_score is NaN without validation, scales are None without scales."""

    epoch: int
    train_loss: float
    val_score: float
    lr: float
    scale_q: float | None
    scale_c: float | None
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FitResult:
    """History of a fit and the epoch whose weights the heads hold now."""

    history: tuple[EpochRow, ...]
    best_epoch: int
    best_score: float
    stopped_early: bool


def fit(
    heads: nn.Module,
    train_batches: TrainBatches,
    *,
    objective: Objective,
    plan: FitPlan,
    validate: Callable[[], Validation] | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
) -> FitResult:
    """Train `heads` in place; they end in evaluation mode with the weights of the best validation epoch.

    `validate` is called after each epoch, in evaluation mode and without gradients. The highest score wins, the
    earlier epoch on a tie; NaN loses to any number and, while there is none, to a later NaN. Without `validate` the
    last epoch is kept and nothing stops early. The only randomness is dropout, from torch's global generator: call
    inside `seeded`. Raises UserError at the first loss that is not finite.
    """
    loop = _Loop(heads, train_batches, objective, plan)
    history: list[EpochRow] = []
    best_epoch, best_rank, best_state = 0, -math.inf, heads.state_dict()
    for epoch in range(1, plan.epochs + 1):
        started = time.perf_counter()
        train_loss = loop.run_epoch(epoch)
        found = _validated(heads, validate)
        scale_q, scale_c = loop.scales()
        row = EpochRow(
            epoch=epoch,
            train_loss=train_loss,
            val_score=found.score,
            lr=loop.lr,
            scale_q=scale_q,
            scale_c=scale_c,
            seconds=time.perf_counter() - started,
            figures=found.figures,
        )
        history.append(row)
        rank = -math.inf if math.isnan(found.score) else found.score
        if validate is None or rank > best_rank or best_rank == -math.inf:
            best_epoch, best_rank, best_state = epoch, rank, copy.deepcopy(heads.state_dict())
        if on_epoch is not None:
            on_epoch(row)
        if plan.patience and epoch - best_epoch >= plan.patience:
            break
    heads.load_state_dict(best_state)
    heads.eval()
    return FitResult(
        history=tuple(history),
        best_epoch=best_epoch,
        best_score=history[best_epoch - 1].val_score,
        stopped_early=len(history) < plan.epochs,
    )


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch inside the block, for new weights and dropout; afterwards the generators are as before.

    Those of the CPU and of `device` are restored. On one machine and thread count, the same seed gives the
    same bits.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class _Loop:
    """The state that lives between the epochs of one fit."""

    def __init__(self, heads: nn.Module, train_batches: TrainBatches, objective: Objective, plan: FitPlan) -> None:
        self.heads, self.train_batches, self.objective, self.plan = heads, train_batches, objective, plan
        self.optimizer = AdamW(heads, weight_decay=plan.weight_decay)
        self.num_steps = plan.epochs * train_batches.steps_per_epoch
        self.step = 0
        self.lr = 0.0

    def scales(self) -> tuple[float, float] | tuple[None, None]:
        """Return the scales in force, None for heads without."""
        return self.heads.scales() if isinstance(self.heads, ResidualHeads) else (None, None)

    def run_epoch(self, epoch: int) -> float:
        """Take one step per batch and return the mean loss."""
        if isinstance(self.heads, ResidualHeads) and self.heads.scale_mode == "curriculum":
            self.heads.set_scale_fraction(curriculum_fraction(epoch, num_epochs=self.plan.epochs))
        self.heads.train()
        total, num_read, unread = 0.0, 0, []
        for batch in self.train_batches(epoch):
            loss = self.objective(self.heads(batch.v_BD, batch.t_BD), batch)
            torch.autograd.backward(loss)
            self._update()
            unread.append(loss.detach())
            if len(unread) == _STEPS_PER_CHECK:
                total += self._read(unread, epoch, num_read)
                num_read, unread = num_read + len(unread), []
        if unread:
            total += self._read(unread, epoch, num_read)
        num_read += len(unread)
        if not num_read:
            raise ValueError(f"epoch {epoch} has no batch")
        return total / num_read

    def _update(self) -> None:
        plan = self.plan
        if plan.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.optimizer.parameters, plan.max_grad_norm, foreach=True)
        self.lr = plan.lr * lr_factor(
            self.step, num_steps=self.num_steps, warmup_ratio=plan.warmup_ratio, schedule=plan.schedule
        )
        self.optimizer.step(self.lr)
        self.step += 1

    def _read(self, losses: list[Tensor], epoch: int, num_before: int) -> float:
        values = torch.stack(losses).tolist()
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise self._diverged(value, epoch, num_before + index + 1)
        return math.fsum(values)

    def _diverged(self, loss: float, epoch: int, step: int) -> UserError:
        message = f"the training loss is {loss} at epoch {epoch}, step {step}"
        # An epoch gives the same batches again, so the batch that failed can be looked at: is it the data or
        # the rate?
        for batch in islice(self.train_batches(epoch), step - 1, step):
            if not (torch.isfinite(batch.v_BD).all() and torch.isfinite(batch.t_BD).all()):
                return UserError(
                    f"{message}, where an embedding is not finite",
                    remedy="find the damaged rows with `deltaclip inspect --verify`",
                )
        return UserError(message, remedy=f"lower --lr, which is {self.plan.lr:g}")


def _validated(heads: nn.Module, validate: Callable[[], Validation] | None) -> Validation:
    if validate is None:
        return Validation(math.nan)
    heads.eval()
    with torch.no_grad():
        return validate()
