"""The training loop of heads and towers together: as `fit`, and it can be interrupted anywhere.

Learning rates go by depth, decay by rule, both by names and shapes of parameters. Must not know files, splits, metrics
or how a batch is made: it gets batches and asks `validate`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.loop.epochs import (
    BestEpoch,
    EpochRow,
    FitPlan,
    FitResult,
    NotFinite,
    StepLosses,
    Validation,
    curriculum_fraction,
    lr_factor,
)
from deltaclip.pipeline.loop.layout import laid_out_like
from deltaclip.pipeline.loop.optimizer import check_layouts, decays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from deltaclip.pipeline.loop.epochs import StateFile
    from deltaclip.pipeline.model.heads import Heads


# ---- The training loop of heads and towers together: as `fit`, and it can be interrupted anywhere


MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of them in the state of AdamW


@dataclass(frozen=True, kw_only=True)
class TunePlan(FitPlan):
    """How to train: `lr` is that of the towers; a `save_seconds` of 0 saves after epochs alone."""

    head_lr: float = 1e-3
    layer_decay: float = 1.0
    scale_loss: bool = False  # fp16: small gradients would be 0 without
    save_seconds: float = 0.0


class Part(Protocol):
    """Rows of a step that go through the towers together."""

    def __len__(self) -> int:
        """Return the number of rows."""


class TuneBatches(Protocol):
    """Where the loop takes its steps from: each is a list of parts, whose gradients are averaged over rows."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that every epoch has."""

    def __call__(self, epoch: int, *, first: int = 0) -> Iterable[Sequence[Part]]:
        """Return the steps of one epoch from step `first` on; the same epoch gives the same steps again."""


class Tunable(Protocol):
    """Heads and towers that train together."""

    heads: Heads

    @property
    def towers(self) -> Sequence[Tower]:
        """The towers of which something trains."""

    def loss(self, part: Any) -> Tensor:
        """Return the loss of rows, with gradients."""

    def share_gradients(self) -> None:
        """Sum the gradients over all processes, where there are several."""


def tune(
    model: Tunable,
    batches: TuneBatches,
    *,
    plan: TunePlan,
    validate: Callable[[], Validation] | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
    on_steps: Callable[[int], None] | None = None,
    state: StateFile | None = None,
) -> FitResult:
    """Train heads and towers in place; they end with the weights of the best epoch, heads in evaluation mode.

    Both heads share the tower, so one epoch is chosen for all, by the mean of their validation scores. `validate` is
    called at the start and after each epoch. With a `state` the loop saves itself after each epoch and
    `plan.save_seconds` within it, and goes on from there when called again with the same arguments: on one machine
    the losses are those of an unbroken run, bit for bit. `on_steps` is told of steps that are done. Call inside
    `seeded`.

    Raises:
        UserError: a loss that is not finite; a damaged state.
    """
    tuning = _Tuning(model, batches, plan, state)
    if tuning.restore():
        tuning.tell(on_steps, tuning.step)
    else:
        tuning.choose(_validated(model, validate))
    while tuning.epoch < plan.epochs and not tuning.best.stopped:
        train_loss = tuning.run_epoch(on_steps)
        found = _validated(model, validate)
        row = tuning.finish_epoch(train_loss, found)
        if on_epoch is not None:
            on_epoch(row)
    tuning.take_best()
    chosen = {target.name: tuning.best.epoch for target in model.heads.targets}
    return FitResult(
        history=tuple(tuning.history),
        best_epoch=chosen,
        best_score=dict.fromkeys(chosen, tuning.best.score),
        stopped_early=tuning.epoch < plan.epochs,
    )


def trained_tensors(model: Tunable) -> dict[str, Tensor]:
    """Return all that training changes, by name: the state of the heads and the trainable parameters of the towers."""
    heads = {f"heads.{name}": tensor for name, tensor in model.heads.state_dict().items()}
    towers = {f"backbone.{name}": p for tower in model.towers for name, p in tower.named_trainable().items()}
    return heads | {name: parameter.detach() for name, parameter in towers.items()}


def _check_layouts(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                moments = optimizer.state.get(parameter, {})
                check_layouts(parameter, parameter.grad, *(moments[name] for name in MOMENTS if name in moments))


def _validated(model: Tunable, validate: Callable[[], Validation] | None) -> Validation:
    if validate is None:
        return Validation()
    model.heads.eval()
    with torch.no_grad():
        return validate()


class _Tuning:
    """The state that lives between the steps of one training."""

    def __init__(self, model: Tunable, batches: TuneBatches, plan: TunePlan, state: StateFile | None) -> None:
        self.model, self.batches, self.plan, self.state = model, batches, plan, state
        groups = tuning_groups(
            model.heads,
            model.towers,
            lr=plan.lr,
            head_lr=plan.head_lr,
            layer_decay=plan.layer_decay,
            weight_decay=plan.weight_decay,
        )
        self.peaks = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, fused=True)
        self.optimizer.register_step_pre_hook(_check_layouts)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=plan.scale_loss)
        self.kept = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
        self.best, self.history = BestEpoch(plan.patience), list[EpochRow]()
        self.epoch, self.step = 0, 0
        self.losses, self.seconds = StepLosses(), 0.0
        self.saved_at = self.started = time.perf_counter()

    def choose(self, found: Validation) -> None:
        """Judge the weights as they are, and keep them where they are the best so far."""
        if self.best.take(self.epoch, found.mean if found.scores else None):
            for name, tensor in trained_tensors(self.model).items():
                self.kept[name].copy_(tensor)

    def tell(self, on_steps: Callable[[int], None] | None, count: int = 1) -> None:
        """Tell of steps that are done."""
        if on_steps is not None:
            on_steps(count)

    def run_epoch(self, on_steps: Callable[[int], None] | None) -> float:
        """Take the steps of the epoch that are left and return its mean loss."""
        heads, plan, epoch = self.model.heads, self.plan, self.epoch + 1
        heads.start_epoch(curriculum_fraction(epoch, num_epochs=plan.epochs))
        heads.train()
        self.started = time.perf_counter()
        for parts in self.batches(epoch, first=self.step - self.epoch * self.batches.steps_per_epoch):
            self._take_step(parts, epoch)
            self.tell(on_steps)
            if plan.save_seconds and time.perf_counter() - self.saved_at >= plan.save_seconds:
                self._check(self.losses.read(), epoch)
                self._save(self.seconds + time.perf_counter() - self.started)
        self._check(self.losses.read(), epoch)
        return self.losses.mean()

    def _take_step(self, parts: Sequence[Part], epoch: int) -> None:
        num_rows = sum(len(part) for part in parts)
        total = torch.zeros((), device=self.parameters[0].device)
        for part in parts:
            loss = self.model.loss(part) * (len(part) / num_rows)
            torch.autograd.backward(self.scaler.scale(loss))
            total = total + loss.detach()
        self.model.share_gradients()
        plan, factor = self.plan, self._lr_factor(self.step)
        self.scaler.unscale_(self.optimizer)
        if plan.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, plan.max_grad_norm, foreach=True)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._check(self.losses.add(total), epoch)

    def _lr_factor(self, step: int) -> float:
        plan, num_steps = self.plan, self.plan.epochs * self.batches.steps_per_epoch
        return lr_factor(step, num_steps=num_steps, warmup_ratio=plan.warmup_ratio, schedule=plan.schedule)

    def _check(self, wrong: NotFinite | None, epoch: int) -> None:
        if wrong:
            message = f"the training loss is {wrong.loss} at epoch {epoch}, step {wrong.step}"
            rates = f"--lr, which is {self.plan.lr:g}, or --head-lr, which is {self.plan.head_lr:g}"
            raise UserError(message, remedy=f"lower {rates}")

    def finish_epoch(self, train_loss: float, found: Validation) -> EpochRow:
        """Record an epoch, judge it and save the state behind it."""
        heads = self.model.heads
        self.epoch += 1
        row = EpochRow(
            epoch=self.epoch,
            train_loss=train_loss,
            val_score=found.mean,
            lr=self.plan.lr * self._lr_factor(self.step - 1),
            scales=heads.scales(),
            seconds=self.seconds + time.perf_counter() - self.started,
            figures=found.figures,
        )
        self.history.append(row)
        self.choose(found)
        self.losses, self.seconds = StepLosses(), 0.0
        self._save(0.0)
        return row

    def take_best(self) -> None:
        """Put the weights of the best epoch in place."""
        with torch.no_grad():
            for name, tensor in trained_tensors(self.model).items():
                tensor.copy_(self.kept[name])
        self.model.heads.eval()

    def _save(self, seconds: float) -> None:
        self.saved_at = time.perf_counter()
        if self.state is None:
            return
        tensors = {f"now.{name}": tensor for name, tensor in trained_tensors(self.model).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.kept.items()}
        for number, parameter in enumerate(self.parameters):
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"moment.{number}.{name}": value for name, value in moments.items()}
        tensors["losses"] = torch.tensor(self.losses.values, dtype=torch.float64)
        values = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": seconds,
            "best": {"epoch": self.best.epoch, "score": self.best.score, "stopped": self.best.stopped},
            "history": [asdict(row) for row in self.history],
            "scaler": self.scaler.state_dict(),
        }
        self.state.save(tensors, values)

    def restore(self) -> bool:
        """Go on from the saved state, where there is one."""
        found = self.state.load() if self.state is not None else None
        if found is None:
            return False
        tensors, values = found
        with torch.no_grad():
            for name, tensor in trained_tensors(self.model).items():
                tensor.copy_(tensors[f"now.{name}"])
                self.kept[name].copy_(tensors[f"best.{name}"])
        for number, parameter in enumerate(self.parameters):
            moments = {name: tensors.get(f"moment.{number}.{name}") for name in ("step", *MOMENTS)}
            self.optimizer.state[parameter] = {
                name: laid_out_like(parameter, value) if name in MOMENTS else value.to(parameter.device)
                for name, value in moments.items()
                if value is not None  # before the first step there are none
            }
        self.losses = StepLosses(tensors["losses"].tolist())
        self.epoch, self.step, self.seconds = values["epoch"], values["step"], values["seconds"]
        best = values["best"]
        self.best.epoch, self.best.score, self.best.stopped = best["epoch"], best["score"], best["stopped"]
        self.history = [EpochRow(**row) for row in values["history"]]
        if self.plan.scale_loss:
            self.scaler.load_state_dict(values["scaler"])
        return True


# ---- Parameter groups of heads and towers that train together: learning rates by depth, decay by rule


class Tower(Protocol):
    """What training must know of a tower of CLIP."""

    depth: int

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by their names in the whole model."""

    def block_of(self, name: str) -> int:
        """Return the block of a parameter: 0 before the first, depth + 1 behind the last."""


def tuning_groups(
    heads: Heads,
    towers: Sequence[Tower],
    *,
    lr: float,
    head_lr: float,
    layer_decay: float = 1.0,
    weight_decay: float = 1e-4,
) -> list[dict[str, Any]]:
    """Return torch's parameter groups, every trainable parameter in exactly one; `lr` in them is the peak.

    A tower's parameter in block b of L learns at lr * layer_decay ** (L + 1 - b) (Clark et al., arXiv:2003.10555,
    as in BEiT). In towers vectors and scalars do not decay, also those with axes of length 1: biases, norms, scales,
    class embeddings.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in heads.named_parameters():
        if parameter.requires_grad:
            key = head_lr, weight_decay if decays(name) else 0.0
            groups.setdefault(key, []).append(parameter)
    for tower in towers:
        for name, parameter in tower.named_trainable().items():
            rate = lr * layer_decay ** (tower.depth + 1 - tower.block_of(name))
            groups.setdefault((rate, weight_decay if parameter.squeeze().ndim > 1 else 0.0), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
