"""The training loop, the same whatever learns: steps, rates, validation, the epoch that is kept, early stopping.

A training can be interrupted anywhere: its state is one file, written whole by a thread, from which it goes on exactly.
Losses that are not finite are shown to the learner. Must not know heads, towers, files but that one, splits or metrics.

Shapes: S steps, K heads that learn side by side.
"""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import torch

from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_file
from deltaclip.base.kinds import refuse_other
from deltaclip.base.transfers import Leaving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from concurrent.futures import Future
    from pathlib import Path

    from torch import Tensor


# ---- How long and how fast to train, what validation says, and what is left of a training


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """How long and how fast to train; a `patience` or `max_grad_norm` of 0 means off.

    With a `margin` above 0 a head leaves its start only for an epoch that is better by more than that.
    """

    epochs: int = 20
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_ratio: float = 0.05
    schedule: Schedule = "cosine"
    max_grad_norm: float = 1.0
    patience: int = 0
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1], not {self.warmup_ratio}")
        for name in ("lr", "weight_decay", "max_grad_norm", "patience", "margin"):
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

    @classmethod
    def of(cls, end: EpochEnd, seen: Validation, *, lr: float, scales: Mapping[str, float]) -> EpochRow:
        """Return the row of an epoch of one loss; `lr` is the peak."""
        return cls(end.epoch, end.loss.item(), seen.mean, lr * end.lr_factor, scales, end.seconds, seen.figures)


@dataclass(frozen=True)
class FitResult:
    """History of a fit, and of each head the epoch whose weights it holds now and its validation score there.

    Epoch 0 is the start: for calibrated residual heads the base alone.
    """

    history: tuple[EpochRow, ...]
    best_epoch: dict[str, int]
    best_score: dict[str, float]
    stopped_early: bool


# ---- The loop, and what learns in it


Seen = TypeVar("Seen")


class EpochEnd(NamedTuple):
    """What the loop knows of an epoch, counted from 1, that has ended: the mean loss, () or (K,), as steps gave it."""

    epoch: int
    loss: Tensor
    lr_factor: float
    seconds: float


class Batches(Protocol):
    """Where the loop takes its steps from."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that every epoch has."""

    def __call__(self, epoch: int, *, first: int = 0) -> Iterable[Any]:
        """Return what the steps of an epoch see, from step `first` on; the same epoch gives the same again."""


class Learner(Protocol[Seen]):
    """What learns in a loop: heads, stacks of heads, heads with towers. It decides what an epoch is chosen by."""

    @property
    def stopped(self) -> bool:
        """Whether nothing would be kept any more, however long the training goes on."""

    def start_epoch(self, fraction: float) -> None:
        """Go into training mode, with this share of curriculum scales in force."""

    def step(self, batch: Any, lr_factor: float) -> Tensor:
        """Take one step at so many times the peak rates and return its loss, () or (K,), still on the device."""

    def diverged(self, wrong: NotFinite, epoch: int) -> None:
        """Raise UserError where a loss that is not finite ends the training."""

    def validated(self) -> Seen:
        """Judge the weights as they are, in evaluation mode."""

    def record(self, end: EpochEnd, seen: Seen) -> None:
        """Add an epoch to the history."""

    def choose(self, epoch: int, seen: Seen) -> None:
        """Keep the weights where they are better than ever; epoch 0 is the start, before any step."""

    def take_best(self) -> None:
        """Put the weights in place that were kept, in evaluation mode."""


class Resumable(Learner[Seen], Protocol[Seen]):
    """A learner whose training can go on in another process."""

    def state(self, *, is_done: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return as tensors and JSON values all that later steps and choices depend on; with `is_done` there are none.

        The tensors may change as soon as another step is taken.
        """

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""


class Saves(NamedTuple):
    """The file that the state of a loop is saved in, whose learner it is, and the seconds between saves.

    With 0 seconds it is saved after each epoch.
    """

    file: StateFile
    learner: Resumable[Any]
    every_s: float


def run_epochs(
    learner: Learner[Any],
    batches: Batches,
    *,
    plan: FitPlan,
    on_epoch: Callable[[int], None] | None = None,
    on_steps: Callable[[int], None] | None = None,
    saves: Saves | None = None,
) -> int:
    """Train a learner, which ends with the weights that it kept; return the number of epochs that it took.

    It is validated at the start and after each epoch. With `saves` the state is saved every so many seconds, wherever
    in an epoch, and at the end, and the loop goes on from there when called again with the same arguments: on one
    machine the losses are those of an unbroken run, bit for bit. `on_epoch` is told the number of an epoch that has
    ended, `on_steps` of steps that are done. The only randomness is torch's global generators: call inside `seeded`.

    Raises:
        UserError: as `Learner.diverged`; a damaged state.
        OSError: the state cannot be written, told at the next save or at the end.
    """
    loop = _Loop(learner, batches, plan=plan, saves=saves, on_steps=on_steps)
    try:
        if loop.restore():
            loop.tell(loop.step)
        else:
            learner.choose(0, _validated(learner))
        while not loop.is_done:
            loop.run_epoch()
            if on_epoch is not None:
                on_epoch(loop.epoch)
    finally:  # whatever ends the training, the last state is whole
        if saves is not None:
            saves.file.wait()
    learner.take_best()
    return loop.epoch


def _validated(learner: Learner[Seen]) -> Seen:
    with torch.no_grad():
        return learner.validated()


class _Loop:
    """The state that lives between the steps of one training."""

    def __init__(
        self,
        learner: Learner[Any],
        batches: Batches,
        *,
        plan: FitPlan,
        saves: Saves | None,
        on_steps: Callable[[int], None] | None,
    ) -> None:
        self.learner, self.batches, self.plan, self.saves, self.on_steps = learner, batches, plan, saves, on_steps
        self.epoch, self.step = 0, 0  # that are done
        self.losses, self.seconds = StepLosses(), 0.0  # of the epoch under way, in earlier processes too
        self.saved_at = self.started = time.perf_counter()

    @property
    def is_done(self) -> bool:
        """Whether no epoch is left, or none could change what is kept."""
        return self.epoch >= self.plan.epochs or self.learner.stopped

    def tell(self, count: int) -> None:
        """Tell of steps that are done."""
        if self.on_steps is not None:
            self.on_steps(count)

    def run_epoch(self) -> None:
        """Take the steps of the epoch that are left, then judge, record and save it."""
        learner, epoch = self.learner, self.epoch + 1
        learner.start_epoch(curriculum_fraction(epoch, num_epochs=self.plan.epochs))
        self.started = time.perf_counter()
        for batch in self.batches(epoch, first=self.step - self.epoch * self.batches.steps_per_epoch):
            loss = learner.step(batch, self._lr_factor(self.step))
            self.step += 1
            self._check(self.losses.add(loss), epoch)
            self.tell(1)
            if self.saves and self.saves.every_s and self._is_save_due():
                self._check(self.losses.read(), epoch)
                self._save(self._seconds())
        self._check(self.losses.read(), epoch)
        if not len(self.losses):
            raise ValueError(f"epoch {epoch} has no batch")
        seen = _validated(learner)
        learner.record(EpochEnd(epoch, self.losses.mean(), self._lr_factor(self.step - 1), self._seconds()), seen)
        learner.choose(epoch, seen)
        self.epoch, self.losses, self.seconds = epoch, StepLosses(), 0.0
        if self.is_done or self._is_save_due():
            self._save(0.0)

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def _lr_factor(self, step: int) -> float:
        plan, num_steps = self.plan, self.plan.epochs * self.batches.steps_per_epoch
        return lr_factor(step, num_steps=num_steps, warmup_ratio=plan.warmup_ratio, schedule=plan.schedule)

    def _check(self, wrong: NotFinite | None, epoch: int) -> None:
        if wrong:
            self.learner.diverged(wrong, epoch)

    def _is_save_due(self) -> bool:
        return self.saves is not None and time.perf_counter() - self.saved_at >= self.saves.every_s

    def _save(self, seconds: float) -> None:
        self.saved_at = time.perf_counter()
        if self.saves is None or not self.saves.file.writes:
            return
        tensors, values = self.saves.learner.state(is_done=self.is_done)
        own = {"epoch": self.epoch, "step": self.step, "seconds": seconds}
        self.saves.file.save({**tensors, "losses": self.losses.values()}, {**values, **own})

    def restore(self) -> bool:
        """Go on from the saved state, where there is one."""
        found = self.saves.file.load() if self.saves is not None else None
        if self.saves is None or found is None:
            return False
        tensors, values = found
        self.losses = StepLosses(tensors["losses"])
        self.epoch, self.step, self.seconds = values["epoch"], values["step"], values["seconds"]
        self.saves.learner.load_state(tensors, values)
        return True


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


# ---- Which epoch of a head is kept, and when to stop waiting for a better one


class BestEpoch:
    """The best epoch so far of one head; epoch 0 is the start, before any step.

    The highest score wins, the earlier epoch on a tie; NaN loses to any number and, while there is none, to a later
    NaN. With a `patience` above 0, nothing is taken any more after so many epochs without a better score. With a
    `margin` above 0, the start is left only for a score that is higher by more than that, and never without a score.
    """

    def __init__(self, patience: int = 0, margin: float = 0.0) -> None:
        self.patience, self.margin = patience, margin
        self.epoch, self.score = 0, math.nan
        self.stopped = False

    def take(self, epoch: int, score: float | None) -> bool:
        """Judge an epoch; True where its weights are to be kept. None: the head is not judged, the last one is kept."""
        if self.stopped:
            return False
        better = score is None or math.isnan(self.score) or score > self.score + (self.margin if self.epoch == 0 else 0)
        if epoch and self.margin and score is None:
            better = False
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
    """Losses of an epoch in the order of its steps, () or (K,) each; those that an earlier process `read` go before."""

    def __init__(self, read: Tensor | None = None) -> None:
        self._read = [] if read is None or not len(read) else [read]
        self._unread: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._read)) + len(self._unread)

    def add(self, loss: Tensor) -> NotFinite | None:
        """Take the loss of a step, and read what has gathered where that is much."""
        self._unread.append(loss.detach())
        return self.read() if len(self._unread) == STEPS_PER_CHECK else None

    def read(self) -> NotFinite | None:
        """Read what has gathered; the first loss that is not finite is returned."""
        if not self._unread:
            return None
        losses_SK = torch.stack(self._unread).double().cpu()
        start, self._unread = len(self) - len(losses_SK), []
        self._read.append(losses_SK)
        wrong = (~losses_SK.isfinite()).nonzero().tolist()
        return NotFinite(start + wrong[0][0] + 1, float(losses_SK[tuple(wrong[0])])) if wrong else None

    def values(self) -> Tensor:
        """Return the losses that were read, (S,) or (S, K) float64."""
        return torch.cat(self._read) if self._read else torch.empty(0, dtype=torch.float64)

    def mean(self) -> Tensor:
        """Return the mean over the steps that were read, () or (K,) float64, the same however often they were read."""
        losses_SK = self.values()
        if losses_SK.ndim > 1:
            return losses_SK.mean(dim=0)
        return torch.tensor(math.fsum(losses_SK.tolist()) / len(losses_SK), dtype=torch.float64)


# ---- State of a training in one file, written whole, from which it goes on exactly


_KEY = "deltaclip_state"


class StateFile:
    """A file with the state of one training; each save replaces it as a whole, so a kill leaves the one before.

    Of several processes with one state, the one that `writes` saves it, and all load it. The generators of random
    numbers are those of the CPU and of `device`. Saving costs the training a copy: a thread writes it.
    """

    def __init__(self, path: Path, *, writes: bool = True, device: torch.device | None = None) -> None:
        self.path, self.writes = path, writes
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._writing: Future[None] | None = None

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write tensors and JSON values as they are now, and the state of the generators of random numbers.

        They are copied when this returns, and on the disk after `wait`. A save that is under way is waited for.

        Raises:
            OSError: the save before this one failed.
        """
        self.wait()
        if not self.writes:
            return
        state = {**tensors, **dict(self._generators())}
        copies, words = Leaving(list(state.values())), {_KEY: json.dumps(values)}
        thread = ThreadPoolExecutor(1, thread_name_prefix="save-state")
        self._writing = thread.submit(self._write, list(state), copies, words)
        thread.shutdown(wait=False)  # ends when the file is written

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, names: list[str], copies: Leaving, words: dict[str, str]) -> None:
        from safetensors.torch import save_file

        with whole_file(self.path) as temporary:
            save_file(dict(zip(names, copies.there(), strict=True)), temporary, metadata=words)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and values, None where there is no file; generators go on where they were.

        Raises:
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        self.wait()
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                values = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            refuse_other(self.path, {"safetensors"}, what="training state")
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
