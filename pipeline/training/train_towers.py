"""One fine-tuning: heads and towers on the training rows of a split, the epoch chosen on its validation rows.

Knows the settings of `finetune`, rows, heads and towers. Must not know run directories or the test rows.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from deltaclip.base.errors import MachineError
from deltaclip.base.progress import Progress
from deltaclip.pipeline.loop.batches import MemoryBatches
from deltaclip.pipeline.loop.epochs import Validation, seeded
from deltaclip.pipeline.loop.tower_learner import TunePlan, tune
from deltaclip.pipeline.model.heads import HeadSpec, build_heads
from deltaclip.pipeline.model.losses import BATCH_LOSSES
from deltaclip.pipeline.rows.task import Task
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, score
from deltaclip.pipeline.training.bases import start_bases
from deltaclip.pipeline.training.tower_model import SideBatches, TunedModel
from deltaclip.pipeline.training.train_heads import Learned, epoch_note, fit_plan, head_spec, learn, objective_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltaclip.pipeline.loop.epochs import StateFile
    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.settings import FinetuneConfig
    from deltaclip.pipeline.training.processes import Processes
    from deltaclip.pipeline.training.tower_model import TowerSide


class Stage(NamedTuple):
    """What every repeat trains with: the towers with their inputs, the device and number format, the processes.

    `started` are heads of another run to start from, None for new ones.
    """

    image: TowerSide
    text: TowerSide | None
    device: torch.device
    autocast: torch.dtype | None
    processes: Processes
    started: tuple[HeadSpec, Heads] | None


class _Start(NamedTuple):
    """Heads before the towers train, and what their bases were fitted to."""

    spec: HeadSpec
    heads: Heads
    calibration: dict[str, Any] | None


def tune_towers(
    task: Task[FinetuneConfig], *, stage: Stage, state: StateFile | None, what: str = "training"
) -> tuple[Learned, TunedModel]:
    """Train heads and towers; the test rows are not looked at. `what` stands before the progress bar.

    Returns:
        what was learned, and the model with the weights of its best epoch.

    Raises:
        UserError: a training loss that is not finite.
        MachineError: the memory of a GPU does not hold a pass; names how many rows it does hold.
    """
    config, rows, split, device = task.config, task.rows, task.split, stage.device
    batches = task.train_batches(batch_size=config.batch_size * config.accumulate)
    assert isinstance(batches, MemoryBatches), "the stage reads the cache into memory"
    start = _start(task, batches=batches, started=stage.started)
    steps = SideBatches(
        memory=batches,
        image_N=rows.rows.image[split.train],
        prompt_N=rows.rows.prompt[split.train],
        image=stage.image,
        text=stage.text,
        device=device,
        parts=config.accumulate,
        processes=stage.processes,
        by_row=config.loss not in BATCH_LOSSES,
    )
    num_steps, notes = config.epochs * steps.steps_per_epoch, [""]
    with (
        seeded(config.seed, device),
        Progress(num_steps, what, unit="steps", shown=stage.processes.is_first) as progress,
    ):
        model = TunedModel(
            start.heads.to(device),
            stage.image,
            stage.text,
            objective=objective_of(task),
            processes=stage.processes,
            autocast=stage.autocast,
        )
        fitted = None
        with contextlib.suppress(torch.OutOfMemoryError):
            fitted = tune(
                model,
                steps,
                plan=tune_plan(config, scale_loss=stage.autocast == torch.float16),
                validate=_validator(task, model) if task.ranked else None,
                on_epoch=lambda row: notes.append(epoch_note(row)),
                on_steps=lambda count: progress.advance(count, note=notes[-1]),
                state=state,
            )
        if fitted is None:  # here nothing of that training is held any more
            raise _too_many_rows(config, model, steps)
    return Learned(spec=start.spec, heads=model.heads, calibration=start.calibration, fitted=fitted), model


def _too_many_rows(config: FinetuneConfig, model: TunedModel, steps: SideBatches) -> MachineError:
    """Find by trying how many rows a pass may have; several processes, which would have to try together, do not."""
    words, rows = f"the memory of {model.device} does not hold a pass of {config.batch_size} rows", config.batch_size
    otherwise = "" if config.checkpointing else ", or add --checkpointing"
    if steps.processes.size > 1:
        return MachineError(words, place="--batch-size", remedy=f"give a smaller one{otherwise}")
    while rows := rows // 2:
        if _fits(model, replace(steps, memory=replace(steps.memory, batch_size=rows), parts=1)):
            accumulate = config.accumulate * math.ceil(config.batch_size / rows)
            fitting = f"give --batch-size {rows} --accumulate {accumulate}: a pass fits, a step sees as many rows"
            return MachineError(words, place="--batch-size", remedy=fitting + otherwise)
    remedy = f"not one row fits: freeze more with --freeze-layers, or give --device cpu{otherwise}"
    return MachineError(words, place="--batch-size", remedy=remedy)


def _fits(model: TunedModel, steps: SideBatches) -> bool:
    """Tell whether the first step goes through, with the memory set aside that moments and best weights take."""
    trained = [*model.heads.parameters(), *(p for tower in model.towers for p in tower.named_trainable().values())]
    torch.cuda.empty_cache()
    fits = False
    with contextlib.suppress(torch.OutOfMemoryError):
        _set_aside = [torch.empty_like(parameter) for parameter in trained for _ in range(3)]
        for (part,) in steps(1):
            torch.autograd.backward(model.loss(part))
            fits = True
            break
    for parameter in trained:
        parameter.grad = None
    return fits


def tune_plan(config: FinetuneConfig, *, scale_loss: bool) -> TunePlan:
    """Return how long and how fast to train."""
    return TunePlan(
        **asdict(fit_plan(config)),
        head_lr=config.head_lr,
        layer_decay=config.layer_decay,
        scale_loss=scale_loss,
        save_seconds=60 * config.save_minutes,
    )


def _start(task: Task[FinetuneConfig], *, batches: MemoryBatches, started: tuple[HeadSpec, Heads] | None) -> _Start:
    """Return heads as they are before the towers train: of another run, trained alone first, or calibrated."""
    config = task.config
    if started is not None:
        spec, given = started
        heads = build_heads(spec)
        heads.load_state_dict(given.state_dict())
        return _Start(spec, heads, None)
    if config.head_epochs:
        alone = config.heads(epochs=config.head_epochs, preset=None)
        learned = learn(Task(config=alone, rows=task.rows, split=task.split), what="training heads alone")
        heads = build_heads(learned.spec)
        heads.load_state_dict(learned.heads.state_dict())
        return _Start(learned.spec, heads, learned.calibration)
    spec = head_spec(task)
    with seeded(config.seed):
        heads = build_heads(spec)
    return _Start(spec, heads, start_bases(heads, config.base, batches, None))


def _validator(task: Task[FinetuneConfig], model: TunedModel) -> Callable[[], Validation]:
    """Return a hook that embeds the validation rows with the towers as they are, and judges their scores."""
    chosen = task.split.val

    def validate() -> Validation:
        embedded = model.embed(task.rows, chosen)
        scores = score(model.heads, embedded.batches(chosen, batch_size=1).in_order(SCORE_BATCH))
        return task.judge({target: scores.of(target) for target in task.ranked})

    return validate
