"""One command of `finetune` while it runs: backbone, cut towers and their inputs, its repeats, the run at the end.

Knows the settings of `finetune` and where its unfinished state lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.base.progress import say
from deltaclip.base.settings import settings_to_json
from deltaclip.base.targets import LABELS
from deltaclip.features.backbone.anatomy import tower_depth
from deltaclip.features.backbone.batches import default_workers, spread
from deltaclip.features.backbone.choose import Choice, autocast_type, probe_pixels, training_precision
from deltaclip.features.backbone.save_model import save_model
from deltaclip.features.backbone.towers import cut_towers
from deltaclip.pipeline.run.checkpoint import TunedBackbone
from deltaclip.pipeline.run.describe import describe
from deltaclip.pipeline.run.finish import judge, save_run
from deltaclip.pipeline.run.folder import free_run_path, library_versions
from deltaclip.pipeline.run.init_heads import heads_of_run
from deltaclip.pipeline.run.predictions import Scores
from deltaclip.pipeline.run.recorded_backbone import Recorded, load_recorded
from deltaclip.pipeline.run.repeats import repeat_configs
from deltaclip.pipeline.run.scorer import Scorer
from deltaclip.pipeline.run.tower_sides import SideMaker, image_files
from deltaclip.pipeline.run.tune_words import mode_words, tune_warnings
from deltaclip.pipeline.run.tuned import backbone_tensors
from deltaclip.pipeline.run.tuned_scores import score_images
from deltaclip.pipeline.run.tuning import Stage, heads_config, tune_towers
from deltaclip.pipeline.training.resume import StateFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.towers import CutTower
    from deltaclip.pipeline.run.finish import Finished
    from deltaclip.pipeline.run.learning import Learned
    from deltaclip.pipeline.run.processes import Processes
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.run.targets import LossWeights
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import FinetuneConfig

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
IDLE = ("out", "workers", "save_minutes")  # settings that change nothing of the result


class TuningJob:
    """All that is known before the first step: checked, loaded, cut; nothing is computed yet."""

    def __init__(
        self,
        config: FinetuneConfig,
        rows: CacheRows,
        splits: Sequence[Split],
        weights: LossWeights,
        *,
        device: str,
        processes: Processes,
    ) -> None:
        """Load the backbone and cut it.

        Raises:
            UserError: the cache was imported, images are missing, another backbone, heads that do not fit.
        """
        self.config, self.rows, self.splits, self.weights = config, rows, splits, weights
        self.device, self.processes = torch.device(device), processes
        request = rows.header["request"]
        if request.get("imported"):
            remedy = "extract the images with `deltaclip extract`"
            raise UserError(
                "holds imported embeddings: which weights made them is not known", place=rows.path, remedy=remedy
            )
        if config.batch_size < 2 * processes.size and processes.size > 1:
            remedy = f"give at least {2 * processes.size}"
            raise UserError(
                f"{config.batch_size} rows are too few for {processes.size} processes",
                place="--batch-size",
                remedy=remedy,
            )
        self.files = image_files(rows, config.image_root, allow_outside=config.allow_outside)
        self.started = heads_of_run(config, rows, splits, weights) if config.init_heads else None
        self.backbone = load_recorded(
            Recorded(rows.facts, request, place=rows.path, what="is of"),
            device=device,
            backbone=config.backbone,
            pretrained=config.pretrained,
            precision="fp32",
        )
        choice = self._choose_precision()
        self.precision, self.precision_reason = choice
        self.image, self.text = self._cut()
        if config.checkpointing:
            for tower in (self.image, self.text):
                tower.use_checkpointing()
        self.mode = run_mode(config, self.image.frozen_blocks)
        words = mode_words(config, self.image, self.text, precision=choice, processes=processes)
        self.description = describe(heads_config(config), rows, weights, mode=words)
        self.warnings = list(dict.fromkeys(line for split in splits for line in tune_warnings(config, rows, split)))
        if config.freeze_text_layers is not None and not weights.see_prompts:
            self.warnings.append("warning: --freeze-text-layers is not used: nothing that trains sees the prompt")
        # Where the run will lie, and its state until then.
        self.name = f"{config.cache.stem}_{self.mode}"
        self.path = free_run_path(config.out, self.name)
        own_name = self.path.name if config.out else self.name  # whatever number is free by then
        self.work = self.path.with_name(f".{own_name}.{self._digest()[:8]}.resume")

    def _choose_precision(self) -> Choice:
        """Return the number format that the first process has chosen, in all of them."""
        choice = Choice("fp32", "as the first process")
        if self.processes.is_first:
            files = [self.files.files[entry] for entry in sorted(self.files.files)]
            probe = [files[place] for place in spread(len(files))]
            choice = training_precision(
                self.backbone,
                self.config.precision,
                extracted=self.rows.facts,
                probe=lambda backbone: probe_pixels(backbone, probe, self.files.root),
            )
        chosen = self.processes.joined(torch.tensor(PRECISIONS.index(choice.precision), device=self.device))
        return choice._replace(precision=PRECISIONS[int(chosen)])

    def _cut(self) -> tuple[CutTower, CutTower]:
        """Cut both towers, at a share of their depth where one was given; what sees no prompt trains no text tower."""
        config, model = self.config, self.backbone.model
        image, text = 0.0 if config.trains_all else config.freeze_layers, config.freeze_text_layers
        return cut_towers(
            self.backbone,
            freeze_layers=_blocks(image, tower_depth(model, "image")),
            freeze_text_layers=None if text is None else _blocks(text, tower_depth(model, "text")),
            train_text=self.weights.see_prompts,
        )

    def _digest(self) -> str:
        """Return a fingerprint of all that decides the result: the same command on the same data goes on."""
        settings = {name: value for name, value in settings_to_json(self.config).items() if name not in IDLE}
        init = None if self.started is None else self.started.fingerprint
        known = [settings, self.rows.header, self.precision, self.processes.size, init, library_versions()]
        # A plan does not say which of its images could be read.
        usable = self.rows.rows.image.tobytes()
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode() + usable).hexdigest()

    def learn(self) -> list[Finished]:
        """Train every repeat and judge it; of an interrupted run, only what is left."""
        with self._writing():
            stage, configs = self._stage(), repeat_configs(self.config)
            originals = self._copied() if len(configs) > 1 else {}
            repeats: list[Finished] = []
            for number, (config, split) in enumerate(zip(configs, self.splits, strict=True), start=1):
                what = f"training {number} of {len(configs)}" if len(configs) > 1 else "training"
                if number > 1:
                    self._put_back(originals)
                done = self._repeat(config, split, stage, what=what)
                if number > 1:  # the run keeps the weights of the first
                    done = replace(done, learned=replace(done.learned, tuned=None))
                repeats.append(done)
            return repeats

    def _copied(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in backbone_tensors(self.towers).items()}

    @property
    def towers(self) -> list[CutTower]:
        """The towers of which something trains."""
        return [self.image, *([] if self.text.all_frozen else [self.text])]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the state's folder against a second run of the same command; only the first process writes."""
        if not self.processes.is_first:
            yield
            return
        with one_writer(self.work):
            yield

    def _stage(self) -> Stage:
        config = self.config
        sides = SideMaker(
            backbone=self.backbone,
            rows=self.rows,
            files=self.files,
            processes=self.processes,
            boundary_cache=config.boundary_cache,
            augment=config.augment,
            crops=config.crops,
            precision=self.precision,
            workers=config.workers or default_workers(),
            seed=config.split_seed,
        )
        return Stage(
            image=sides.image(self.image),
            text=sides.text(self.text),
            device=self.device,
            autocast=None if self.precision == "fp32" else autocast_type(self.precision),
            processes=self.processes,
            started=None if self.started is None else (self.started.spec, self.started.heads),
        )

    def _repeat(self, config: FinetuneConfig, split: Split, stage: Stage, *, what: str) -> Finished:
        path = self.work / f"{config.split_seed}.safetensors"
        state = StateFile(path, writes=self.processes.is_first, device=self.device)
        if state.path.exists() and self.processes.is_first:
            say(f"{what}: goes on from {state.path}")
        learned, model = tune_towers(config, self.rows, split, self.weights, stage=stage, state=state, what=what)
        write_full = self._write_full if config.save_full else None
        learned = replace(learned, tuned=TunedBackbone(tensors=self._copied(), write_full=write_full))
        shown = self.processes.is_first
        if not self._is_exact:
            return judge(self.rows, split, self.weights, learned, scores=self._predicted(learned), shown=shown)
        embedded = model.embed(self.rows, np.arange(len(self.rows.rows)))
        return judge(self.rows, split, self.weights, learned, embedded=embedded, shown=shown)

    @property
    def _is_exact(self) -> bool:
        """Whether training has computed in fp32, as prediction does."""
        return self.precision == "fp32" and not (self.text.all_frozen and self.rows.facts["precision"] != "fp32")

    def _predicted(self, learned: Learned) -> Scores:
        """Return the scores of all rows as `predict` computes them."""
        scorer = Scorer(learned.heads, self.backbone, LABELS)
        everything = np.arange(len(self.rows.rows))
        mine = self.processes.share(len(everything))
        found = score_images(scorer, self.rows, self.files, everything[mine])
        return Scores(
            **{
                name: self.processes.gathered(column, mine, len(everything), self.device)
                for name, column in found.columns().items()
            }
        )

    def _write_full(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self._put_back(tensors)
        save_model(self.backbone, folder)

    def _put_back(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in backbone_tensors(self.towers).items():
                tensor.copy_(tensors[name])

    def save(self, repeats: Sequence[Finished], **about: Any) -> Path:
        """Write the run, and forget the state that led to it."""
        config, (done, *others) = self.config, repeats
        if not self.processes.is_first:
            self.processes.wait()
            return self.path
        run = save_run(
            heads_config(config),
            self.rows,
            self.weights,
            done,
            name=self.name,
            others=others,
            stage="finetune",
            mode=self.mode,
            settings=settings_to_json(config),
            description=self.description,
            frozen={tower.kind: tower.frozen_blocks for tower in (self.image, self.text)},
            precision=self.precision,
            precision_reason=self.precision_reason,
            scored_in="fp32",
            **about,
        )
        self.forget()
        self.processes.wait()
        return run

    def forget(self) -> None:
        """Remove the state that led to the result."""
        shutil.rmtree(self.work, ignore_errors=True)


def run_mode(config: FinetuneConfig, frozen_blocks: int) -> str:
    """Return the name of a mode, which is that of its checkpoint."""
    what = f"partial_freeze_{frozen_blocks}L" if frozen_blocks else "full"
    return f"{'residual' if config.residual_learning else 'direct'}_{what}"


def _blocks(given: float, depth: int) -> int:
    return math.floor(given * depth + 0.5) if 0 < given < 1 else int(given)
