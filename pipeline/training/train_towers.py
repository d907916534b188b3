"""One fine-tuning: heads and towers on the training rows of a split, the epoch chosen on its validation rows.

Knows the settings of `finetune`, rows, heads and towers. Must not know run directories or the test rows.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from deltaclip.base.progress import Progress
from deltaclip.pipeline.loop.batches import MemoryBatches
from deltaclip.pipeline.loop.epochs import Validation, seeded
from deltaclip.pipeline.loop.tower_learner import TunePlan, tune
from deltaclip.pipeline.model.calibrate import calibrate_branch
from deltaclip.pipeline.model.heads import DirectHeads, HeadSpec, build_heads
from deltaclip.pipeline.model.losses import BATCH_LOSSES, weighted_loss
from deltaclip.pipeline.rows.task import training_columns
from deltaclip.pipeline.runs.measure import rankable_labels, trained_labels
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, score
from deltaclip.pipeline.settings import LearningSettings, TrainConfig
from deltaclip.pipeline.training.tower_model import SideBatches, TunedModel
from deltaclip.pipeline.training.train_heads import Learned, epoch_note, head_spec, learn, start_bases, validation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from deltaclip.pipeline.loop.epochs import StateFile
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.rows.task import LossWeights
    from deltaclip.pipeline.scoring.splits import Split
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
    started: tuple[HeadSpec, nn.Module] | None


class _Start(NamedTuple):
    """Heads before the towers train, and what their bases were fitted to."""

    spec: HeadSpec
    heads: nn.Module
    calibration: dict[str, Any] | None


def heads_config(config: FinetuneConfig, **changes: Any) -> TrainConfig:
    """Return what `train` would be told to train the same heads, at their own learning rate."""
    shared = {field.name: getattr(config, field.name) for field in fields(LearningSettings)}
    return TrainConfig(**{**shared, "lr": config.head_lr, **changes})


def tune_towers(
    config: FinetuneConfig,
    rows: CacheRows,
    split: Split,
    weights: LossWeights,
    *,
    stage: Stage,
    state: StateFile | None,
    what: str = "training",
) -> tuple[Learned, TunedModel]:
    """Train heads and towers; the test rows are not looked at. `what` stands before the progress bar.

    Returns:
        what was learned, and the model with the weights of its best epoch.

    Raises:
        UserError: a training loss that is not finite.
    """
    device, plain = stage.device, heads_config(config)
    batches = rows.batches(
        split.train,
        batch_size=config.batch_size * config.accumulate,
        seed=config.split_seed,
        columns=training_columns(plain, rows, split.train),
        explanations=weights.exp > 0,
    )
    assert isinstance(batches, MemoryBatches), "the stage reads the cache into memory"
    ranked = sorted(set(rankable_labels(rows, split.val)) & set(trained_labels(rows, split.train, weights[:2])))
    truth = {label: rows.label(label)[split.val] for label in ranked}
    start = _start(config, rows, split, weights, batches=batches, started=stage.started)
    steps = SideBatches(
        memory=batches,
        image_N=rows.rows.image[split.train],
        prompt_N=rows.rows.prompt[split.train],
        image=stage.image,
        text=stage.text,
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
            objective=weighted_loss(config.loss, w_q=weights.q, w_c=weights.c, w_exp=weights.exp),
            processes=stage.processes,
            autocast=stage.autocast,
        )
        fitted = tune(
            model,
            steps,
            plan=tune_plan(config, scale_loss=stage.autocast == torch.float16),
            validate=_validator(model, rows, split.val, truth) if ranked else None,
            on_epoch=lambda row: notes.append(epoch_note(row)),
            on_steps=lambda count: progress.advance(count, note=notes[-1]),
            state=state,
        )
    return Learned(spec=start.spec, heads=model.heads, calibration=start.calibration, fitted=fitted), model


def tune_plan(config: FinetuneConfig, *, scale_loss: bool) -> TunePlan:
    """Return how long and how fast to train."""
    return TunePlan(
        epochs=config.epochs,
        lr=config.lr,
        head_lr=config.head_lr,
        layer_decay=config.layer_decay,
        weight_decay=config.weight_decay,
        warmup_ratio=config.warmup_ratio,
        schedule=config.schedule,
        max_grad_norm=config.max_grad_norm,
        patience=config.patience,
        scale_loss=scale_loss,
        save_seconds=60 * config.save_minutes,
    )


def _start(
    config: FinetuneConfig,
    rows: CacheRows,
    split: Split,
    weights: LossWeights,
    *,
    batches: MemoryBatches,
    started: tuple[HeadSpec, nn.Module] | None,
) -> _Start:
    """Return heads as they are before the towers train: of another run, trained alone first, or calibrated."""
    if started is not None:
        spec, given = started
        heads = build_heads(spec)
        heads.load_state_dict(given.state_dict())
        return _Start(spec, heads, None)
    if config.head_epochs:
        alone = heads_config(config, epochs=config.head_epochs, preset=None)
        learned = learn(alone, rows, split, weights, what="training heads alone")
        heads = build_heads(learned.spec)
        heads.load_state_dict(learned.heads.state_dict())
        return _Start(learned.spec, heads, learned.calibration)
    spec = head_spec(heads_config(config), rows, weights)
    calibration = None
    with seeded(config.seed):
        heads = build_heads(spec)
    if isinstance(heads, DirectHeads):
        if heads.two_branch:
            calibration = calibrate_branch(heads, lambda: batches.in_order(SCORE_BATCH)).to_json()
    else:
        calibration = start_bases(heads, config.base_init, batches, None)
    return _Start(spec, heads, calibration)


def _validator(
    model: TunedModel, rows: CacheRows, chosen: NDArray[np.int64], labels: Mapping[str, NDArray[np.floating]]
) -> Callable[[], Validation]:
    """Return a hook that embeds the validation rows with the towers as they are, and judges their scores."""

    def validate() -> Validation:
        embedded = model.embed(rows, chosen)
        scores = score(model.heads, embedded.batches(chosen, batch_size=1).in_order(SCORE_BATCH))
        return validation({label: scores.of(label) for label in labels}, labels)

    return validate
