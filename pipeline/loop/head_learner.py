"""Heads on cached vectors as a learner: each head is clipped, judged and kept by itself.

Must not know files, splits or metrics: it gets batches and asks `validate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.loop.epochs import BestEpoch, EpochRow, FitResult, Validation, run_epochs
from deltaclip.pipeline.loop.optimizer import AdamW
from deltaclip.pipeline.model.scores import head_of, run_heads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from deltaclip.pipeline.loop.batches import TrainBatches
    from deltaclip.pipeline.loop.epochs import EpochEnd, FitPlan, NotFinite
    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.model.losses import Objective
    from deltaclip.pipeline.model.scores import Batch


def fit(
    heads: Heads,
    train_batches: TrainBatches,
    *,
    objective: Objective,
    plan: FitPlan,
    validate: Callable[[], Validation] | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
) -> FitResult:
    """Train `heads` in place; they end in evaluation mode, each with the weights of its best validation epoch.

    `validate` is called at the start and after each epoch, in evaluation mode and without gradients; how an epoch is
    chosen says `BestEpoch`. A head without a score, and all without `validate`, keep the last epoch.
    Each target is chosen for, and its gradients clipped, by itself: heads share no parameter. The only
    randomness is dropout, from torch's global generator: call inside `seeded`. Raises UserError at the first loss that
    is not finite.
    """
    learner = _HeadLearner(heads, train_batches, objective=objective, plan=plan, validate=validate)
    told = on_epoch or (lambda _: None)
    num_epochs = run_epochs(learner, train_batches, plan=plan, on_epoch=lambda _: told(learner.history[-1]))
    return FitResult(
        history=tuple(learner.history),
        best_epoch={head: each.epoch for head, each in learner.best.items()},
        best_score={head: each.score for head, each in learner.best.items()},
        stopped_early=num_epochs < plan.epochs,
    )


class _HeadLearner:
    """Heads with their optimizer, history, and the weights of each head's best epoch."""

    def __init__(
        self,
        heads: Heads,
        train_batches: TrainBatches,
        *,
        objective: Objective,
        plan: FitPlan,
        validate: Callable[[], Validation] | None,
    ) -> None:
        self.heads, self.train_batches, self.objective, self.plan = heads, train_batches, objective, plan
        self.validate = validate
        self.optimizer = AdamW(heads, weight_decay=plan.weight_decay)
        named = [(head_of(name), parameter) for name, parameter in heads.named_parameters()]
        self.clipped = [[parameter for head, parameter in named if head == each.name] for each in heads.targets]
        self.best = {target.name: BestEpoch(plan.patience, plan.margin) for target in heads.targets}
        self.kept = {name: tensor.detach().clone() for name, tensor in heads.state_dict().items()}
        self.history: list[EpochRow] = []
        self.stopped = False

    def start_epoch(self, fraction: float) -> None:
        self.heads.start_epoch(fraction)
        self.heads.train()

    def step(self, batch: Batch, lr_factor: float) -> Tensor:
        loss = self.objective(run_heads(self.heads, batch), batch)
        torch.autograd.backward(loss)
        if self.plan.max_grad_norm:
            for parameters in self.clipped:
                torch.nn.utils.clip_grad_norm_(parameters, self.plan.max_grad_norm, foreach=True)
        self.optimizer.step(self.plan.lr * lr_factor)
        return loss

    def diverged(self, wrong: NotFinite, epoch: int) -> None:
        message = f"the training loss is {wrong.loss} at epoch {epoch}, step {wrong.step}"
        # An epoch gives the same batches again, so the batch that failed can be looked at: is it the data or
        # the rate?
        batch = next(iter(self.train_batches(epoch, first=wrong.step - 1)))
        if torch.isfinite(batch.v_BD).all() and torch.isfinite(batch.t_BD).all():
            raise UserError(message, remedy=f"lower --lr, which is {self.plan.lr:g}")
        remedy = "find the damaged rows with `deltaclip inspect --verify`"
        raise UserError(f"{message}, where an embedding is not finite", remedy=remedy)

    def validated(self) -> Validation:
        if self.validate is None:
            return Validation()
        self.heads.eval()
        return self.validate()

    def record(self, end: EpochEnd, seen: Validation) -> None:
        self.history.append(EpochRow.of(end, seen, lr=self.plan.lr, scales=self.heads.scales()))

    def choose(self, epoch: int, seen: Validation) -> None:
        better = [head for head, each in self.best.items() if each.take(epoch, seen.scores.get(head))]
        for name, tensor in self.heads.state_dict().items():
            if head_of(name) in better:
                self.kept[name].copy_(tensor)
        self.stopped = all(self.best[head].stopped for head in seen.scores or self.best)

    def take_best(self) -> None:
        self.heads.load_state_dict(self.kept)
        self.heads.eval()
