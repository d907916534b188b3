"""One training: heads on the training rows of a split, the epoch chosen on its validation rows.

Bases of residual heads are there before: plain, linear in closed form, or kernels on a view. Knows the settings of
`train`, rows and heads. Must not know run directories or the test rows.

Shapes: N rows of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deltaclip.base.progress import Progress
from deltaclip.pipeline.loop.epochs import EpochRow, FitPlan, FitResult, Validation, seeded
from deltaclip.pipeline.loop.head_learner import fit
from deltaclip.pipeline.model.calibrate import Sums, calibrate, calibrate_branch, fit_line
from deltaclip.pipeline.model.heads import DirectHeads, HeadSpec, KernelShape, TargetSpec, build_heads
from deltaclip.pipeline.model.kernel import Kernel, Part, Refits, fit_kernel
from deltaclip.pipeline.model.kernel_on_score import Score, fit_kernel_on_score
from deltaclip.pipeline.model.level import clamp_shift
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.scores import head_name
from deltaclip.pipeline.rows.split_rows import joined_groups
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, score

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.pipeline.loop.batches import Columns
    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.model.losses import Objective
    from deltaclip.pipeline.rows.cached_rows import Batches, CacheRows
    from deltaclip.pipeline.rows.task import Task
    from deltaclip.pipeline.runs.folder import TunedBackbone
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import TrainConfig


# ---- One training: heads on the training rows of a split, the epoch chosen on its validation rows


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Heads that have learned, with the weights of their best epoch; `calibration` is None for a plain start.

    `columns` are further fields of `Batch` that the heads need of the cache's rows, (N,) each. `tuned` is what training
    changed of the backbone, None where it was frozen.
    """

    spec: HeadSpec
    heads: Heads
    calibration: dict[str, Any] | None
    fitted: FitResult
    columns: Columns = field(default_factory=dict)
    tuned: TunedBackbone | None = None


def learn(task: Task[TrainConfig], *, what: str = "training", log: Callable[[EpochRow], None] | None = None) -> Learned:
    """Calibrate and fit heads; the test rows are not looked at.

    Args:
        task: what to learn.
        what: stands before the progress bar.
        log: is given every epoch.

    Raises:
        UserError: a training loss that is not finite.
    """
    config, rows = task.config, task.rows
    kernels = None
    if config.residual_learning and config.base_init == "kernel":
        kernels = fit_kernels(rows, task.split, labels=task.trained, view=config.view, seed=config.split_seed)
    spec = head_spec(task, kernels=None if kernels is None else kernels.shape)
    columns = {} if kernels is None else {"kernel_B": kernels.columns}
    batches = task.train_batches(columns=columns)
    val = task.val_batches(columns=columns) if task.ranked else batches
    with seeded(config.seed, rows.device), Progress(config.epochs, what, unit="epochs") as progress:
        heads = build_heads(spec).to(rows.device)
        calibration = start_bases(heads, config.base_init, batches, kernels)

        def validate() -> Validation:
            scores = score(heads, val.in_order(SCORE_BATCH))
            return task.judge({target: scores.of(target) for target in task.ranked})

        fitted = fit(
            heads,
            batches,
            objective=objective_of(task),
            plan=fit_plan(config),
            validate=validate if task.ranked else None,
            on_epoch=_each_epoch(progress, log),
        )
    return Learned(spec=spec, heads=heads, calibration=calibration, fitted=fitted, columns=columns)


def _each_epoch(progress: Progress, log: Callable[[EpochRow], None] | None) -> Callable[[EpochRow], None]:
    def take(row: EpochRow) -> None:
        progress.advance(note=epoch_note(row))
        if log is not None:
            log(row)

    return take


def objective_of(task: Task[Any]) -> Objective:
    """Return the loss that the settings ask for."""
    weights = task.weights
    return weighted_loss(task.config.loss, weights=weights.targets, w_exp=weights.explanations)


def fit_plan(config: TrainConfig) -> FitPlan:
    """Return how long and how fast to train."""
    return FitPlan(
        epochs=config.epochs,
        lr=config.lr,
        weight_decay=config.weight_decay,
        warmup_ratio=config.warmup_ratio,
        schedule=config.schedule,
        max_grad_norm=config.max_grad_norm,
        patience=config.patience,
    )


def head_spec(task: Task[Any], *, kernels: KernelShape | None = None) -> HeadSpec:
    """Return the heads that the settings ask for, one for each target of the cache."""
    config = task.config
    direct = not config.residual_learning
    return HeadSpec(
        dim=task.rows.dim,
        targets=tuple(TargetSpec(each.name, each.sees, config.scales.of(each.name)) for each in task.rows.targets),
        kind="direct" if direct else "residual",
        scale_mode=config.scale_mode,
        dropout=config.dropout,
        two_branch=direct and config.two_branch,
        refinement=direct and config.refinement,
        rationale=task.weights.explanations > 0,
        kernels=kernels,
    )


def epoch_note(row: EpochRow) -> str:
    """Return loss and validation figures of an epoch, for a progress bar."""
    found = {name.removeprefix("val_").removesuffix("_srocc"): f for name, f in row.figures.items() if "srocc" in name}
    shown = [f"{target} {figure:.3f}" for target, figure in found.items()]
    return f"loss {row.train_loss:.4f}, SROCC {' '.join(shown)}" if shown else f"loss {row.train_loss:.4f}"


# ---- The bases of residual heads before training: plain, linear in closed form, or kernels on a view


# Mean squared distance of prompts and of an image kernel's score in the kernel of a pair (the view has 1): see
# docs/heads.md.
PROMPT_WEIGHT, SCORE_WEIGHT = 0.15, 0.1


@dataclass(frozen=True)
class Kernels:
    """Kernels fitted on training and validation rows, in the state of heads, and what they say of every row.

    `columns` has what kernels say of all N rows by target, `kernel_B` of `Batch`: of a fitted row what a fit without
    that row's group says, so that corrections learn from errors as large as those of new rows. `lines` are slope and
    offset of the pairs' lines.
    """

    shape: KernelShape
    state: dict[str, Tensor]
    lines: dict[str, tuple[float, float]]
    columns: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def put_into(self, heads: Heads) -> None:
        """Set kernels, a and b of heads that were built for them."""
        lines = {
            f"{head_name(target)}.{name}": torch.tensor(value)
            for target, line in self.lines.items()
            for name, value in zip(("slope", "offset"), line, strict=True)
        }
        heads.load_state_dict({**heads.state_dict(), **self.state, **lines})


def base_view(*settings: TrainConfig) -> str | None:
    """Return the view that some of the settings read for their bases, None if none does."""
    return next((one.view for one in settings if one.residual_learning and one.base_init == "kernel"), None)


def fit_kernels(rows: CacheRows, split: Split, *, labels: Collection[str], view: str, seed: int) -> Kernels:
    """Fit the kernels of all targets; the test rows are not looked at.

    A target of the image: kernel ridge of the label on the view. One of a pair: least squares of the label on (s + 1)/2
    first, as the calibrated base, then kernel ridge of what is left on view, prompt and what the kernel of the first
    image target says without the row (`kernel_on_score.py`). Validation rows are fitted to as well: epochs are chosen
    on what the other groups say of them. A target that is not trained, not among `labels`, is as if it were missing.

    The mean of each base over the rows that it was fitted to is that of their labels, and so is the mean of what
    left-out fits say of training rows.

    Raises:
        UserError: the view holds values that are not finite.
    """
    fitted = np.zeros(len(rows.rows), dtype=bool)
    fitted[split.train] = fitted[split.val] = True
    groups_N, part, targets = joined_groups(rows), Part(rows.view(), 1.0), rows.targets
    label_N = {
        each.name: torch.from_numpy(
            np.where(fitted & (each.name in labels), rows.label(each.name), np.nan).astype(np.float32)
        ).to(rows.device)
        for each in targets
    }
    nothing_N = torch.zeros(len(rows.rows), device=rows.device)
    found: dict[str, _OfImage | _OfPair] = {}
    score = Score(nothing_N, None, SCORE_WEIGHT)
    for target in (each.name for each in targets if each.sees == "image"):
        of_image = _of_image(part, label_N[target], groups_N, seed)
        score = score if found else Score(of_image.said_N, of_image.refits, SCORE_WEIGHT)
        found[target] = of_image
    if pairs := [each.name for each in targets if each.sees == "pair"]:
        parts = [part, Part(rows.prompts(), PROMPT_WEIGHT, each=False)]
        z_N = (torch.from_numpy(rows.cosine()).to(rows.device) + 1) / 2
        found |= {name: _of_pair(parts, score, label_N[name], groups_N, z_N=z_N, seed=seed) for name in pairs}
    lines = {name: (base.slope, base.offset) for name, base in found.items() if isinstance(base, _OfPair)}
    columns = {}
    for name, base in found.items():
        line_N = lines[name][0] * z_N + lines[name][1] if name in lines else nothing_N
        columns[name] = _levelled(base.said_N, line_N, label_N[name], train=split.train, fitted_N=fitted)
    state = {
        f"{head_name(name)}.kernel.{part_name}": value
        for name, base in found.items()
        for part_name, value in base.kernel.state_dict().items()
    }
    about = {"view": view, "lines": lines, "kernels": {name: base.fit for name, base in found.items()}}
    points = {name: len(base.kernel.beta_L) for name, base in found.items()}
    return Kernels(KernelShape(view, int(part.vector_NW.shape[1]), points), state, lines, columns, about)


class _OfImage(NamedTuple):
    kernel: Kernel
    said_N: Tensor
    refits: Refits | None = None
    fit: dict[str, Any] | None = None


def _of_image(part: Part, label_N: Tensor, groups_N: NDArray[np.int64], seed: int) -> _OfImage:
    """Return the kernel of an image target; without two groups to fit to it is the mean of the labels, or 0."""
    if not _two_groups(label_N, groups_N):
        kernel = Kernel(part.vector_NW.shape[1], 0).to(label_N.device)
        kernel.intercept += label_N.nanmean().nan_to_num(0.0)
        return _OfImage(kernel, kernel.intercept.expand_as(label_N))
    kernel, said_N, fit, refits = fit_kernel([part], label_N, groups_N, seed=seed)
    level = clamp_shift(refits.own_M, label_N[refits.rows_M])
    kernel.intercept += level
    return _OfImage(kernel, said_N + level, refits, fit.to_json())


class _OfPair(NamedTuple):
    kernel: Kernel
    slope: float
    offset: float
    said_N: Tensor
    fit: dict[str, Any] | None = None


def _of_pair(
    parts: list[Part], score: Score, label_N: Tensor, groups_N: NDArray[np.int64], *, z_N: Tensor, seed: int
) -> _OfPair:
    """Return the kernel of a pair target with its line; without two groups to fit to the line alone, or (s + 1)/2."""
    if not _two_groups(label_N, groups_N):
        width = sum(part.vector_NW.shape[1] for part in parts) + 1
        sums = Sums.zeros(1, z_N.device)
        sums.add(z_N.double()[:, None], label_N.double())
        slope, offset = fit_line(sums) if sums.num_rows else (1.0, 0.0)
        return _OfPair(Kernel(width, 0).to(z_N.device), slope, offset, torch.zeros_like(z_N))
    found = fit_kernel_on_score(parts, score, label_N, groups_N, x_N=z_N, seed=seed)
    offset = found.offset + clamp_shift(found.own_M, label_N[found.rows_M])
    return _OfPair(found.kernel, found.slope, offset, found.said_N, found.fit.to_json())


def _two_groups(label_N: Tensor, groups_N: NDArray[np.int64]) -> bool:
    return len(np.unique(groups_N[~torch.isnan(label_N).cpu().numpy()])) > 1


def _levelled(
    said_N: Tensor, line_N: Tensor, label_N: Tensor, *, train: NDArray[np.int64], fitted_N: NDArray[np.bool_]
) -> Tensor:
    """Return what a kernel says, of fitted rows moved until their base has the mean of the labels on training rows."""
    known = train[~torch.isnan(label_N[train]).cpu().numpy()]
    if not len(known):
        return said_N
    level = clamp_shift((line_N + said_N)[known], label_N[known])
    return said_N + level * torch.from_numpy(fitted_N).to(said_N)


def start_bases(heads: Heads, base_init: str, batches: Batches, kernels: Kernels | None) -> dict[str, Any] | None:
    """Put the bases of new heads in place and return what was fitted, None for the plain start."""
    if kernels is not None:
        kernels.put_into(heads)
        return kernels.about
    if isinstance(heads, DirectHeads):
        return calibrate_branch(heads, lambda: batches.in_order(SCORE_BATCH)) if heads.two_branch else None
    return calibrate(heads, lambda: batches.in_order(SCORE_BATCH)) if base_init == "calibrated" else None
