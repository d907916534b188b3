"""One command of `finetune` while it runs: backbone, cut towers and their inputs, its repeats, the run at the end.

Heads of a finished run to start from are refused where they do not belong to it. Knows the settings of `finetune` and
where its unfinished state lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.device import arithmetic
from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer, sha256_file
from deltaclip.base.options import option_name, settings_to_json
from deltaclip.base.progress import say
from deltaclip.features.backbone.decode_ahead import default_workers, spread
from deltaclip.features.backbone.load import save_model
from deltaclip.features.backbone.low_rank import LowRank
from deltaclip.features.backbone.precision import Choice, autocast_type, probe_pixels, training_precision
from deltaclip.features.backbone.towers import cut_towers, tower_depth
from deltaclip.features.store.writer import differences
from deltaclip.pipeline.api.scorer import Scorer, score_images
from deltaclip.pipeline.loop.epochs import StateFile
from deltaclip.pipeline.rows.cached_rows import row_keys, text_keys
from deltaclip.pipeline.rows.task import Task
from deltaclip.pipeline.runs.folder import TunedBackbone, free_run_path, library_versions, open_run
from deltaclip.pipeline.runs.measure import repeat_configs
from deltaclip.pipeline.runs.prediction_table import ScoreColumns, Scores, read_blocks
from deltaclip.pipeline.runs.run_backbone import Recorded, image_files, load_recorded
from deltaclip.pipeline.runs.run_split import SIDES, read_run_rows, seen_rows
from deltaclip.pipeline.runs.save_run import judge, save_run
from deltaclip.pipeline.training.tower_inputs import SideMaker
from deltaclip.pipeline.training.tower_model import backbone_tensors
from deltaclip.pipeline.training.train_heads import head_spec
from deltaclip.pipeline.training.train_towers import Stage, tune_towers
from deltaclip.pipeline.words.plan_words import describe, mode_words, tune_warnings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.towers import CutTower
    from deltaclip.pipeline.model.heads import Heads, HeadSpec
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.runs.run_split import RunRows
    from deltaclip.pipeline.runs.save_run import Finished
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import FinetuneConfig
    from deltaclip.pipeline.training.processes import Processes
    from deltaclip.pipeline.training.train_heads import Learned


# ---- One command of `finetune` while it runs: backbone, cut towers and their inputs, its repeats, the run at the end


PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
IDLE = ("out", "workers", "save_minutes")  # settings that change nothing of the result


class TuningJob:
    """All that is known before the first step: checked, loaded, cut; nothing is computed yet."""

    def __init__(
        self,
        config: FinetuneConfig,
        rows: CacheRows,
        splits: Sequence[Split],
        *,
        device: str,
        processes: Processes,
    ) -> None:
        """Load the backbone and cut it.

        Raises:
            UserError: the cache was imported, images are missing, another backbone, heads that do not fit.
        """
        self.config, self.rows = config, rows
        self.tasks = [
            Task(config=one, rows=rows, split=split) for one, split in zip(repeat_configs(config), splits, strict=True)
        ]
        self.whole = Task(config=config, rows=rows, split=splits[0])
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
        self.started = heads_of_run(self.tasks) if config.init_heads else None
        self.backbone = load_recorded(
            Recorded(rows.facts, request, place=rows.path, what="is of"),
            device=device,
            backbone=config.backbone,
            pretrained=config.pretrained,
            precision="fp32",
        )
        if self.backbone.decode == "gpu" and processes.is_first:
            say("decoding      on the host, as by --decode fast: crops and boundary files need pixels there")
        choice = self._choose_precision()
        self.precision, self.precision_reason = choice
        self.image, self.text = self._cut()
        if config.checkpointing:
            for tower in (self.image, self.text):
                tower.use_checkpointing()
        if config.compile:
            for tower in self.towers:
                tower.use_compiling(self._autocast)
        self.mode = run_mode(config, self.image.frozen_blocks)
        words = mode_words(config, self.image, self.text, precision=choice, processes=processes)
        self.description = describe(self.whole, mode=words)
        self.warnings = list(dict.fromkeys(line for task in self.tasks for line in tune_warnings(task)))
        if config.freeze_text_layers is not None and not self.whole.sees_prompts:
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
            train_text=self.whole.sees_prompts,
            low_rank=low_rank_of(config),
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
            stage = self._stage()
            originals = self._copied() if len(self.tasks) > 1 else {}
            repeats: list[Finished] = []
            for number, task in enumerate(self.tasks, start=1):
                what = f"training {number} of {len(self.tasks)}" if len(self.tasks) > 1 else "training"
                if number > 1:
                    self._put_back(originals)
                for tower in self.towers:
                    tower.draw_additions(task.config.seed)
                done = self._repeat(task, stage, what=what)
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

    @property
    def _autocast(self) -> torch.dtype | None:
        return None if self.precision == "fp32" else autocast_type(self.precision)

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
            autocast=self._autocast,
            processes=self.processes,
            started=None if self.started is None else (self.started.spec, self.started.heads),
        )

    def _repeat(self, task: Task[FinetuneConfig], stage: Stage, *, what: str) -> Finished:
        config = task.config
        path = self.work / f"{config.split_seed}.safetensors"
        state = StateFile(path, writes=self.processes.is_first, device=self.device)
        if state.path.exists() and self.processes.is_first:
            say(f"{what}: goes on from {state.path}")
        learned, model = tune_towers(task, stage=stage, state=state, what=what)
        write_full = self._write_full if config.save_full else None
        tuned = TunedBackbone(tensors=self._copied(), low_rank=low_rank_of(config), write_full=write_full)
        learned = replace(learned, tuned=tuned)
        shown = self.processes.is_first
        # What rows are like is told from these embeddings also where scores need more digits than training has.
        embedded = model.embed(self.rows, np.arange(len(self.rows.rows)))
        scores = None if self._is_exact else self._predicted(learned)
        return judge(task, learned, embedded=embedded, scores=scores, shown=shown)

    @property
    def _is_exact(self) -> bool:
        """Whether training has computed in fp32, as prediction does."""
        return self.precision == "fp32" and not (self.text.all_frozen and self.rows.facts["precision"] != "fp32")

    def _predicted(self, learned: Learned) -> Scores:
        """Return the scores of all rows as `predict` computes them."""
        scorer = Scorer(learned.heads, self.backbone, learned.spec.names)
        everything = np.arange(len(self.rows.rows))
        mine = self.processes.share(len(everything))
        with self._merged():
            found = score_images(scorer, self.rows, self.files, everything[mine])
        return Scores(
            {
                target: ScoreColumns(
                    *(self.processes.gathered(column, mine, len(everything), self.device) for column in columns)
                )
                for target, columns in found.targets.items()
            }
        )

    def _write_full(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self._put_back(tensors)
        with self._merged():
            save_model(self.backbone, folder)

    @contextlib.contextmanager
    def _merged(self) -> Iterator[None]:
        """Have low-rank additions, where there are any, in the model's own weights meanwhile."""
        with contextlib.ExitStack() as stack:
            for tower in self.towers:
                stack.enter_context(tower.merged())
            yield

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
            self.whole,
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
            arithmetic=arithmetic(str(self.device)),
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
    if config.lora_rank:
        layers = "" if config.lora_layers == "all" else f"_{config.lora_layers}"
        what = f"lora_R{config.lora_rank}{layers}" + (f"_{frozen_blocks}L" if frozen_blocks else "")
    return f"{'residual' if config.residual_learning else 'direct'}_{what}"


def low_rank_of(config: FinetuneConfig) -> LowRank | None:
    """Return the additions that the settings ask for."""
    if not config.lora_rank:
        return None
    return LowRank(rank=config.lora_rank, alpha=config.lora_alpha or float(config.lora_rank), layers=config.lora_layers)


def _blocks(given: float, depth: int) -> int:
    return math.floor(given * depth + 0.5) if 0 < given < 1 else int(given)


# ---- Heads of a finished run to start a fine-tuning from, refused where they do not belong to it


# What shapes heads, by the option that asks for it; the rest of a spec is either fixed or does not outlive training.
OPTIONS = {
    "kind": "residual_learning",
    "scale_mode": "scale_mode",
    "two_branch": "two_branch",
    "refinement": "refinement",
    "rationale": "use_explanations",
}


@dataclass(frozen=True, kw_only=True)
class InitHeads:
    """Heads with what they are built from, and the SHA-256 of their checkpoint."""

    spec: HeadSpec
    heads: Heads
    fingerprint: str


def heads_of_run(tasks: Sequence[Task[FinetuneConfig]]) -> InitHeads:
    """Return the heads of --init-heads, for the repeats of a training.

    Raises:
        UserError: they were trained on another backbone, or on test rows of a split; they are others than the settings
            ask for; their bases are fitted to vectors that will change.
    """
    config, rows = tasks[0].config, tasks[0].rows
    assert config.init_heads is not None
    run = open_run(config.init_heads)
    run.check_has_rows()
    if run.is_tuned:
        remedy = "give a run of `deltaclip train`"
        raise UserError("its heads belong to the tower that it changed", place=run.path, remedy=remedy)
    if wrong := differences(run.config["request"], rows.header["request"]):
        remedy = "train heads on this cache first"
        raise UserError(f"was trained on another backbone: {'; '.join(wrong)}", place=run.path, remedy=remedy)
    if run.spec.bases:
        remedy = "give a run of `deltaclip train --base calibrated`"
        raise UserError("its bases are fitted to vectors that will change", place=run.path, remedy=remedy)
    _check_spec(run, head_spec(tasks[0]))
    _check_rows(run, rows, [task.split for task in tasks], config.init_heads)
    return InitHeads(spec=run.spec, heads=run.heads, fingerprint=sha256_file(run.checkpoint))


def _check_spec(run: RunFolder, wanted: HeadSpec) -> None:
    """Refuse heads that are not those that the settings ask for on this cache."""
    there, here = ({target.name: target for target in spec.targets} for spec in (run.spec, wanted))
    if [(name, target.sees) for name, target in there.items()] != [
        (name, target.sees) for name, target in here.items()
    ]:
        remedy = "train heads on this cache first"
        message = f"its heads predict {' and '.join(there)}, the cache has {' and '.join(here)}"
        raise UserError(message, place=run.path, remedy=remedy)
    shapes = [(name, option, getattr(run.spec, name), getattr(wanted, name)) for name, option in OPTIONS.items()]
    scales = [(f"a {name} scale of", "scale", there[name].scale, here[name].scale) for name in here]
    for name, option, found, asked in (*shapes, *scales):
        if found != asked:
            remedy = f"give {option_name(option)} as that run had it, or train heads anew"
            raise UserError(
                f"its heads have {name} {found}, the settings ask for {asked}", place=run.path, remedy=remedy
            )


def _check_rows(run: RunFolder, rows: CacheRows, splits: Sequence[Split], place: Path) -> None:
    """Refuse heads that have learned from test rows.

    In a split that leaks, these are the very rows; in one that does not, also others of the same image or a near copy,
    of the same prompt or group: it must not get a leak from the heads either.
    """
    found = read_run_rows(run, rows)
    learned = found.side_N < SIDES.index("test")
    for split in splits:
        leaks = learned[split.test]
        if not split.leaks_groups:
            seen, of_group = seen_rows(run, rows, found, split.test), _of_learned_groups(run, rows, found, split.test)
            leaks = seen.image_M | seen.prompt_M | seen.near_M | of_group
            if seen.note:
                say(f"warning: {seen.note}")
        if known := int(leaks.sum()):
            what = "test rows" if split.leaks_groups else "test rows, or others of their images, prompts or groups,"
            message = f"has seen {known:,} {what} of split seed {split.seeds[0]} in training"
            remedy = "give the --split, --fractions and seeds of that run"
            raise UserError(message, place=place, remedy=remedy)


def _of_learned_groups(run: RunFolder, rows: CacheRows, found: RunRows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell of some rows whether the run learned from others of their group, (M,) bool.

    A group's name may mean something else there: it counts where every row that both have is of the same group in both.
    """
    blocks = read_blocks(run.path / "predictions.csv", ("group",))
    group_R = np.concatenate([np.empty(0, dtype=np.uint64), *(text_keys(groups) for (groups,) in blocks)])
    group_N = row_keys(rows.rows.text["group"])
    pair_R, first_R = np.unique(found.of_run.pair, return_index=True)
    both = np.flatnonzero(np.isin(found.here.pair, pair_R))
    same = group_R[first_R[np.searchsorted(pair_R, found.here.pair[both])]] == group_N[both]
    means_the_same = bool(both.size and same.all())
    return np.isin(group_N[chosen], group_R[found.is_learned]) & means_the_same
