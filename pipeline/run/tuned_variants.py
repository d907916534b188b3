"""The variants of an ablation that train CLIP too, and their predictions of the test rows of every split.

As `variants`, but each is a fine-tuning with the defaults of `finetune`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.device import choose_device
from deltaclip.base.progress import say
from deltaclip.pipeline.run.processes import Processes
from deltaclip.pipeline.run.references import Predicted
from deltaclip.pipeline.run.rows import load_rows
from deltaclip.pipeline.run.targets import loss_weights
from deltaclip.pipeline.run.tuning_job import TuningJob
from deltaclip.pipeline.settings import FinetuneConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import AblateConfig


@dataclass(frozen=True)
class TunedVariant:
    """One line of the table; `overrides` are settings of `finetune` that differ from its defaults."""

    name: str
    words: str
    overrides: Mapping[str, Any]


TUNED_VARIANTS = (
    TunedVariant("partial-freeze", "residual, 75 % of CLIP frozen", {}),
    TunedVariant("full", "residual, all of CLIP trains", {"freeze_layers": 0.0}),
)


def predict_tuned(
    config: AblateConfig, splits: Sequence[Split], labels: Sequence[str], *, on_variant: Callable[[], None]
) -> list[dict[str, dict[str, Predicted]]]:
    """Fine-tune every variant on every split and return its predictions of the test rows, by split, variant and label.

    Their state is kept until they are through, so that an interrupted ablation does not train them again.

    Raises:
        UserError: as `finetune`.
    """
    device = choose_device(config.device)
    rows = load_rows(config.cache, "cpu", in_memory=True)
    found: list[dict[str, dict[str, Predicted]]] = [{} for _ in splits]
    jobs = []
    for variant in TUNED_VARIANTS:
        tuning = _tuning_config(config, variant)
        job = TuningJob(
            tuning,
            rows,
            splits,
            loss_weights(tuning, rows),
            device=device,
            processes=Processes(),
        )
        for done, each in zip(job.learn(), found, strict=True):
            scores, epochs = done.scores, done.learned.fitted.best_epoch
            each[variant.name] = {
                label: Predicted(score_M=scores.of(label)[done.split.test], about={"best_epoch": epochs[label]})
                for label in labels
            }
            on_variant()
        jobs.append(job)
    for job in jobs:
        job.forget()
    return found


def announce_tuned(config: AblateConfig, splits: Sequence[Split]) -> None:
    """Say what the variants that train CLIP cost, before anything is trained."""
    num_rows = splits[0].train.size
    trainings = len(TUNED_VARIANTS) * len(splits)
    passes = f"{trainings * config.epochs * num_rows:,} images forward and back"
    line = f"finetune      {trainings} trainings x {config.epochs} epochs x {num_rows:,} rows: {passes}"
    say(line)


def _tuning_config(config: AblateConfig, variant: TunedVariant) -> FinetuneConfig:
    names = ("cache", "repeats", "epochs", "split", "fractions", "seed", "device", "image_root")
    return FinetuneConfig(**{name: getattr(config, name) for name in names}, **variant.overrides)
