"""Heads and towers together as a learner that can be interrupted anywhere.

Learning rates go by depth, decay by rule, both by names and shapes of parameters. Must not know files, splits, metrics
or how a batch is made: it gets batches and asks `validate`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.loop.epochs import BestEpoch, EpochRow, FitPlan, FitResult, Saves, Validation, run_epochs
from deltaclip.pipeline.loop.optimizer import check_layouts, decays, laid_out_like

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from deltaclip.pipeline.loop.epochs import Batches, EpochEnd, NotFinite, StateFile
    from deltaclip.pipeline.model.heads import Heads


# ---- Training of heads and towers together


MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of them in the state of AdamW


@dataclass(frozen=True, kw_only=True)
class TunePlan(FitPlan):
    """How to train: `lr` is that of the towers; a `save_seconds` of 0 saves after each epoch."""

    head_lr: float = 1e-3
    layer_decay: float = 1.0
    scale_loss: bool = False  # fp16: small gradients would be 0 without
    save_seconds: float = 0.0


class Part(Protocol):
    """Rows of a step that go through the towers together."""

    def __len__(self) -> int:
        """Return the number of rows."""


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
    batches: Batches,
    *,
    plan: TunePlan,
    validate: Callable[[], Validation] | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
    on_steps: Callable[[int], None] | None = None,
    state: StateFile | None = None,
) -> FitResult:
    """Train heads and towers in place; they end with the weights of the best epoch, heads in evaluation mode.

    Step by step batches give lists of parts, whose gradients are averaged over rows. All heads share the tower, so one
    epoch is chosen for all, by the mean of their validation scores. With a `state` the training goes on where it was,
    as `run_epochs` says.

    Raises:
        UserError: a loss that is not finite; a damaged state.
    """
    learner = _TowerLearner(model, plan, validate)
    told = on_epoch or (lambda _: None)
    num_epochs = run_epochs(
        learner,
        batches,
        plan=plan,
        on_epoch=lambda _: told(learner.history[-1]),
        on_steps=on_steps,
        saves=Saves(state, learner, plan.save_seconds) if state is not None else None,
    )
    chosen = {target.name: learner.best.epoch for target in model.heads.targets}
    return FitResult(
        history=tuple(learner.history),
        best_epoch=chosen,
        best_score=dict.fromkeys(chosen, learner.best.score),
        stopped_early=num_epochs < plan.epochs,
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


class _TowerLearner:
    """Heads and towers with their optimizer, history, and the weights of the best epoch."""

    def __init__(self, model: Tunable, plan: TunePlan, validate: Callable[[], Validation] | None) -> None:
        self.model, self.plan, self.validate = model, plan, validate
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

    @property
    def stopped(self) -> bool:
        return self.best.stopped

    def start_epoch(self, fraction: float) -> None:
        self.model.heads.start_epoch(fraction)
        self.model.heads.train()

    def step(self, batch: Sequence[Part], lr_factor: float) -> Tensor:
        num_rows, losses = sum(len(part) for part in batch), []
        for part in batch:
            loss = self.model.loss(part)
            if len(batch) > 1:
                loss = loss * (len(part) / num_rows)
            torch.autograd.backward(self.scaler.scale(loss))
            losses.append(loss.detach())
        self.model.share_gradients()
        self.scaler.unscale_(self.optimizer)
        if self.plan.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.max_grad_norm, foreach=True)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * lr_factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(losses[1:], losses[0])

    def diverged(self, wrong: NotFinite, epoch: int) -> None:
        message = f"the training loss is {wrong.loss} at epoch {epoch}, step {wrong.step}"
        rates = f"--lr, which is {self.plan.lr:g}, or --head-lr, which is {self.plan.head_lr:g}"
        raise UserError(message, remedy=f"lower {rates}")

    def validated(self) -> Validation:
        if self.validate is None:
            return Validation()
        self.model.heads.eval()
        return self.validate()

    def record(self, end: EpochEnd, seen: Validation) -> None:
        self.history.append(EpochRow.of(end, seen, lr=self.plan.lr, scales=self.model.heads.scales()))

    def choose(self, epoch: int, seen: Validation) -> None:
        if self.best.take(epoch, seen.mean if seen.scores else None):
            for name, tensor in trained_tensors(self.model).items():
                self.kept[name].copy_(tensor)

    def take_best(self) -> None:
        with torch.no_grad():
            for name, tensor in trained_tensors(self.model).items():
                tensor.copy_(self.kept[name])
        self.model.heads.eval()

    def state(self, *, is_done: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"best.{name}": tensor for name, tensor in self.kept.items()}
        if not is_done:
            tensors |= {f"now.{name}": tensor for name, tensor in trained_tensors(self.model).items()}
            for number, parameter in enumerate(self.parameters):
                moments = self.optimizer.state.get(parameter, {})
                tensors |= {f"moment.{number}.{name}": value for name, value in moments.items()}
        return tensors, {
            "best": {"epoch": self.best.epoch, "score": self.best.score, "stopped": self.best.stopped},
            "history": [asdict(row) for row in self.history],
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in trained_tensors(self.model).items():
                self.kept[name].copy_(tensors[f"best.{name}"])
                tensor.copy_(tensors.get(f"now.{name}", self.kept[name]))  # of a training that is done
        for number, parameter in enumerate(self.parameters):
            moments = {name: tensors.get(f"moment.{number}.{name}") for name in ("step", *MOMENTS)}
            self.optimizer.state[parameter] = {
                name: laid_out_like(parameter, value) if name in MOMENTS else value.to(parameter.device)
                for name, value in moments.items()
                if value is not None  # before the first step there are none
            }
        best = values["best"]
        self.best.epoch, self.best.score, self.best.stopped = best["epoch"], best["score"], best["stopped"]
        self.history = [EpochRow(**row) for row in values["history"]]
        if self.plan.scale_loss:
            self.scaler.load_state_dict(values["scaler"])


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
