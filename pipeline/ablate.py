"""STAGE ablate: floors, baselines, direct and residual heads, and residual heads with each part off, in one table.

All variants see the same grouped splits, one per repeat; whatever is chosen is chosen on training or validation rows.
CLIP stays frozen in all of them but those of `--finetune`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from deltaclip.base.device import choose_device
from deltaclip.base.errors import UserError
from deltaclip.base.files import keep_result, whole_folder
from deltaclip.base.options import settings_to_json
from deltaclip.base.progress import Progress, say
from deltaclip.pipeline.comparing.variant_table import comparable_labels, compare_variants, csv_columns, interval_kind
from deltaclip.pipeline.comparing.variants import (
    TUNED_VARIANTS,
    VARIANTS,
    announce_tuned,
    predict_tuned,
    predict_variants,
    variants_of,
)
from deltaclip.pipeline.rows.cached_rows import load_rows, view_there, views_there
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.rows.task import Task, present_labels
from deltaclip.pipeline.runs.folder import free_run_path, surroundings
from deltaclip.pipeline.runs.measure import combine, repeat_configs
from deltaclip.pipeline.runs.prediction_table import write_table
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.words.plan_words import warnings_of
from deltaclip.pipeline.words.result_words import subset_notes, variants_table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import AblateConfig

WORDS = {one.name: one.words for one in (*VARIANTS, *TUNED_VARIANTS)}


@dataclass(frozen=True, kw_only=True)
class AblateResult:
    """A finished ablation; `compared` has figures and differences by variant and label."""

    folder: Path
    split: dict[str, Any]
    against: str
    interval: str
    compared: dict[str, dict[str, Any]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return what stands in `ablate.json`, with the folder and the time."""
        return {**self.table(), "folder": str(self.folder), "seconds": self.seconds}

    def table(self) -> dict[str, Any]:
        """Return the content of `ablate.json`: docs/ablate.md."""
        words = _words(self.compared)
        variants = {name: {"words": words[name], "labels": found} for name, found in self.compared.items()}
        return {"split": self.split, "against": self.against, "interval": self.interval, "variants": variants}

    def summary(self) -> str:
        """Return a table per label, and where the files lie."""
        lines = variants_table(
            self.split, self.compared, _words(self.compared), against=self.against, interval=self.interval
        )
        return "\n".join([*lines, *subset_notes(self.compared), "", f"{self.folder} ({self.seconds:.1f} s)"])


def _words(compared: Mapping[str, Any]) -> dict[str, str]:
    """Return what each variant is: a candidate for the bases is called by what it is."""
    return {name: WORDS.get(name, name) for name in compared}


def ablate(config: AblateConfig) -> AblateResult:
    """Compare all variants on the same splits and write a folder with the table.

    Raises:
        UserError: no such variant, too few labelled rows, and all that `train` refuses.
    """
    started = time.monotonic()
    name = f"{config.cache.stem}_ablate"
    free_run_path(config.out, name)
    common = _train_config(config)
    configs = repeat_configs(common)
    named = view_there(config.cache, config.view)
    views = dict.fromkeys([*views_there(config.cache), *([named] if named else [])])
    rows = load_rows(config.cache, choose_device(config.device), views=list(views))
    splits = [split_cache(rows, config.split, fractions=config.fractions, seed=one.split_seed) for one in configs]
    _check_against(config, rows)
    labels = _labels(common, rows, splits)
    if config.finetune:
        announce_tuned(config, splits)
    predicted = []
    num_variants = len(variants_of(rows, config.view)) + 1 + (len(TUNED_VARIANTS) if config.finetune else 0)
    with Progress(len(configs) * num_variants, "ablating", unit="variants") as progress:
        for one, split in zip(configs, splits, strict=True):
            predicted.append(predict_variants(one, rows, split, labels, on_variant=progress.advance))
        if config.finetune:
            tuned = predict_tuned(config, splits, labels, on_variant=progress.advance)
            predicted = [each | more for each, more in zip(predicted, tuned, strict=True)]
    combined = combine([{"split": split.to_json(), "diagnostics": []} for split in splits])
    result = AblateResult(
        folder=free_run_path(config.out, name),
        split=combined["split"],
        against=config.against,
        interval=interval_kind(splits),
        compared=compare_variants(rows, splits, predicted, against=config.against),
        seconds=round(time.monotonic() - started, 3),
    )
    folder = keep_result(result.folder, lambda path: _write(path, result, config, rows))
    return replace(result, folder=folder)


def _check_against(config: AblateConfig, rows: CacheRows) -> None:
    against, view = config.against, config.view
    known = {one.name for one in TUNED_VARIANTS} | {one.name for one in variants_of(rows, config.view)}
    if against not in known:
        message = f"{against!r} needs the view {view!r}, which the cache does not have"
        raise UserError(message, place="--against", remedy=f"give --views {view} to `deltaclip extract`")


def _train_config(config: AblateConfig) -> TrainConfig:
    shared = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(config)} - {"out"}
    return TrainConfig(**{name: getattr(config, name) for name in sorted(shared)})


def _labels(common: TrainConfig, rows: CacheRows, splits: list[Split]) -> list[str]:
    """Return the labels to compare by, and say what is unwise or left out."""
    tasks = [Task(config=common, rows=rows, split=split) for split in splits]
    labels = comparable_labels(tasks)
    if not labels:
        what = "too few labelled rows: a label needs three, not all equal, on each side of every split"
        raise UserError(what, place=common.cache, remedy="add rows, or give other --fractions")
    plain = replace(common, view=TrainConfig.view)  # the kernel variants read it
    warnings = dict.fromkeys(line for task in tasks for line in warnings_of(replace(task, config=plain)))
    left_out = [label for label in present_labels(rows) if label not in labels]
    warnings |= dict.fromkeys(
        f"warning: {label} is left out: too few labelled rows on some side of a split" for label in left_out
    )
    for line in warnings:
        say(line)
    return labels


def _write(path: Path, result: AblateResult, config: AblateConfig, rows: CacheRows) -> Path:
    about = {
        "stage": "ablate",
        "settings": settings_to_json(config),
        "common": settings_to_json(_train_config(config)),
        "variants": {
            one.name: None if one.overrides is None else dict(one.overrides) for one in variants_of(rows, config.view)
        }
        | ({one.name: dict(one.overrides) for one in TUNED_VARIANTS} if config.finetune else {}),
        "cache": {"path": str(config.cache.resolve()), **rows.header, "dataset": rows.dataset},
        "backbone": rows.facts,
        **surroundings(),
    }
    with whole_folder(path, may_be_taken=True) as growing:  # it was not when the work began
        folder = growing.work
        write_table(folder / "ablate.csv", csv_columns(result.compared, _words(result.compared)))
        for name, values in (("ablate.json", result.table()), ("config.json", about)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return growing.path
