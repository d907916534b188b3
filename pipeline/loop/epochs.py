"""The training loop: steps, learning rate, validation, the epoch of each head that is kept, early stopping.

A training can be interrupted anywhere: its state is one file, written whole, from which it goes on exactly. Losses that
are not finite end it. Must not know files but that one, splits or metrics: it gets batches and asks `validate`.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_file
from deltaclip.pipeline.loop.optimizer import AdamW
from deltaclip.pipeline.model.scores import head_of, run_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from deltaclip.pipeline.loop.batches import TrainBatches
    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.model.losses import Objective


# ---- The one training loop


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
    """What `validate` says: for each head that can be judged the figure to choose by (higher is better), and others."""

    scores: Mapping[str, float] = {}
    figures: Mapping[str, float] = {}

    @property
    def mean(self) -> float:
        """Mean over the heads, where one that has no score counts as 0; NaN without heads."""
        known = [0.0 if math.isnan(score) else score for score in self.scores.values()]
        return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class EpochRow:
    """One epoch, counted from 1; val_score, a mean over heads, is NaN without validation; scales by target, if any."""

    epoch: int
    train_loss: float
    val_score: float
    lr: float
    scales: Mapping[str, float]
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FitResult:
    """History of a fit, and of each head the epoch whose weights it holds now and its validation score there.

    Epoch 0 is the start: for calibrated residual heads the base alone.
    """

    history: tuple[EpochRow, ...]
    best_epoch: dict[str, int]
    best_score: dict[str, float]
    stopped_early: bool


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
    loop = _Loop(heads, train_batches, objective, plan)
    history: list[EpochRow] = []
    best = {target.name: BestEpoch(plan.patience) for target in heads.targets}
    kept = {name: tensor.detach().clone() for name, tensor in heads.state_dict().items()}
    _choose(best, 0, _validated(heads, validate), heads=heads, kept=kept)
    for epoch in range(1, plan.epochs + 1):
        started = time.perf_counter()
        train_loss = loop.run_epoch(epoch)
        found = _validated(heads, validate)
        row = EpochRow(
            epoch=epoch,
            train_loss=train_loss,
            val_score=found.mean,
            lr=loop.lr,
            scales=heads.scales(),
            seconds=time.perf_counter() - started,
            figures=found.figures,
        )
        history.append(row)
        _choose(best, epoch, found, heads=heads, kept=kept)
        if on_epoch is not None:
            on_epoch(row)
        if all(best[head].stopped for head in found.scores or best):
            break
    heads.load_state_dict(kept)
    heads.eval()
    return FitResult(
        history=tuple(history),
        best_epoch={head: each.epoch for head, each in best.items()},
        best_score={head: each.score for head, each in best.items()},
        stopped_early=len(history) < plan.epochs,
    )


def _choose(
    best: dict[str, BestEpoch], epoch: int, found: Validation, *, heads: Heads, kept: dict[str, Tensor]
) -> None:
    """Judge an epoch for each head, and keep its weights where it is the best so far."""
    better = [head for head, each in best.items() if each.take(epoch, found.scores.get(head))]
    for name, tensor in heads.state_dict().items():
        if head_of(name) in better:
            kept[name].copy_(tensor)


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

    def __init__(self, heads: Heads, train_batches: TrainBatches, objective: Objective, plan: FitPlan) -> None:
        self.heads, self.train_batches, self.objective, self.plan = heads, train_batches, objective, plan
        self.optimizer = AdamW(heads, weight_decay=plan.weight_decay)
        named = [(head_of(name), parameter) for name, parameter in heads.named_parameters()]
        self.clipped = [[parameter for head, parameter in named if head == each.name] for each in heads.targets]
        self.num_steps = plan.epochs * train_batches.steps_per_epoch
        self.step = 0
        self.lr = 0.0

    def run_epoch(self, epoch: int) -> float:
        """Take one step per batch and return the mean loss."""
        self.heads.start_epoch(curriculum_fraction(epoch, num_epochs=self.plan.epochs))
        self.heads.train()
        losses = StepLosses()
        for batch in self.train_batches(epoch):
            loss = self.objective(run_heads(self.heads, batch), batch)
            torch.autograd.backward(loss)
            self._update()
            if wrong := losses.add(loss):
                raise self._diverged(wrong, epoch)
        if wrong := losses.read():
            raise self._diverged(wrong, epoch)
        if not losses.values:
            raise ValueError(f"epoch {epoch} has no batch")
        return losses.mean()

    def _update(self) -> None:
        plan = self.plan
        if plan.max_grad_norm:
            for parameters in self.clipped:
                torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm, foreach=True)
        self.lr = plan.lr * lr_factor(
            self.step, num_steps=self.num_steps, warmup_ratio=plan.warmup_ratio, schedule=plan.schedule
        )
        self.optimizer.step(self.lr)
        self.step += 1

    def _diverged(self, wrong: NotFinite, epoch: int) -> UserError:
        message = f"the training loss is {wrong.loss} at epoch {epoch}, step {wrong.step}"
        # An epoch gives the same batches again, so the batch that failed can be looked at: is it the data or
        # the rate?
        for batch in islice(self.train_batches(epoch), wrong.step - 1, wrong.step):
            if not (torch.isfinite(batch.v_BD).all() and torch.isfinite(batch.t_BD).all()):
                return UserError(
                    f"{message}, where an embedding is not finite",
                    remedy="find the damaged rows with `deltaclip inspect --verify`",
                )
        return UserError(message, remedy=f"lower --lr, which is {self.plan.lr:g}")


def _validated(heads: Heads, validate: Callable[[], Validation] | None) -> Validation:
    if validate is None:
        return Validation()
    heads.eval()
    with torch.no_grad():
        return validate()


# ---- Which epoch of a head is kept, and when to stop waiting for a better one


class BestEpoch:
    """The best epoch so far of one head; epoch 0 is the start, before any step.

    The highest score wins, the earlier epoch on a tie; NaN loses to any number and, while there is none, to a later
    NaN. With a `patience` above 0, nothing is taken any more after so many epochs without a better score.
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.epoch, self.score = 0, math.nan
        self.stopped = False

    def take(self, epoch: int, score: float | None) -> bool:
        """Judge an epoch; True where its weights are to be kept. None: the head is not judged, the last one is kept."""
        if self.stopped:
            return False
        better = score is None or math.isnan(self.score) or score > self.score
        if better:
            self.epoch, self.score = epoch, math.nan if score is None else score
        self.stopped = bool(self.patience) and score is not None and epoch - self.epoch >= self.patience
        return better


# ---- Learning rate and curriculum scale as functions of progress


Schedule = Literal["cosine", "linear", "constant"]

# A curriculum starts at a tenth of the given scale: small against any base error, yet not so small that the
# correction gets no gradient (it is proportional to the scale).
CURRICULUM_START = 0.1


def lr_factor(step: int, *, num_steps: int, warmup_ratio: float = 0.05, schedule: Schedule = "cosine") -> float:
    """Return the factor in [0, 1] on the learning rate at `step` = 0 .. num_steps - 1.

    Warm-up rises linearly over the first warmup_ratio * num_steps steps (rounded) and is never 0; then
    cosine: (1 + cos(pi p)) / 2, linear: 1 - p, constant: 1, with p in [0, 1) the share of the remaining
    steps.
    """
    warmup_steps = round(warmup_ratio * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if schedule == "linear" else 1.0


def curriculum_fraction(epoch: int, *, num_epochs: int) -> float:
    """Return the share of the given scale in epoch 1 .. num_epochs: linear from CURRICULUM_START to 1.

    The scale stays the same within an epoch, so that validation judges an epoch under the scale it trained
    with.
    """
    remaining = (num_epochs - epoch) / max(num_epochs - 1, 1)
    return 1 - (1 - CURRICULUM_START) * remaining


# ---- Losses of the steps of one epoch, read from the device together


# Reading a loss waits for the device, so losses are kept as tensors and read together: at the end of each
# epoch, and within long ones after this many steps, so that a diverged run does not go on for an hour.
STEPS_PER_CHECK = 256


class NotFinite(NamedTuple):
    """A loss that is no number, and the step of the epoch that gave it, counted from 1."""

    step: int
    loss: float


class StepLosses:
    """Losses of an epoch in the order of its steps; `values` are those that were read, from an earlier process too."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.values = list(values)
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> NotFinite | None:
        """Take the loss of a step, and read what has gathered where that is much."""
        self._unread.append(loss.detach())
        return self.read() if len(self._unread) == STEPS_PER_CHECK else None

    def read(self) -> NotFinite | None:
        """Read what has gathered; the first loss that is not finite is returned."""
        if not self._unread:
            return None
        start = len(self.values)
        self.values += torch.stack(self._unread).tolist()
        self._unread = []
        found = (NotFinite(step, loss) for step, loss in enumerate(self.values[start:], start + 1))
        return next((one for one in found if not math.isfinite(one.loss)), None)

    def mean(self) -> float:
        """Return the mean loss of the steps that were read, the same however often they were read."""
        return math.fsum(self.values) / len(self.values)


# ---- State of a training in one file, written whole, from which it goes on exactly


_KEY = "deltaclip_state"


class StateFile:
    """A file with the state of one training; `save` replaces it as a whole, so a kill leaves the one before.

    Of several processes with one state, the one that `writes` saves it, and all load it. The generators of random
    numbers are those of the CPU and of `device`.
    """

    def __init__(self, path: Path, *, writes: bool = True, device: torch.device | None = None) -> None:
        self.path, self.writes = path, writes
        self._gpu = device if device is not None and device.type == "cuda" else None

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write tensors and JSON values, and the state of the generators of random numbers."""
        from safetensors.torch import save_file

        if not self.writes:
            return
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in (*tensors.items(), *self._generators())}
        with whole_file(self.path) as temporary:
            save_file(state, temporary, metadata={_KEY: json.dumps(values)})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and values, None where there is no file; generators go on where they were.

        Raises:
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                values = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            detail = str(error).splitlines()[0][:160]
            remedy = "remove it to start again"
            raise UserError(f"cannot be resumed from ({detail})", place=self.path, remedy=remedy) from error
        torch.set_rng_state(tensors.pop("random.cpu"))
        cuda = tensors.pop("random.cuda", None)
        if cuda is not None and self._gpu is not None:
            torch.cuda.set_rng_state(cuda, self._gpu)
        return tensors, values

    def _generators(self) -> list[tuple[str, Tensor]]:
        on_gpu = [] if self._gpu is None else [("random.cuda", torch.cuda.get_rng_state(self._gpu))]
        return [("random.cpu", torch.get_rng_state()), *on_gpu]
