"""Task -> Learned; bases.

One training: heads on the training rows of a split, the epoch chosen on its validation rows.

Knows the settings of `train`, rows and heads. Must not know run directories or the test rows.

The bases of residual heads before training: plain, linear in closed form, or kernels on a view.

Knows rows, splits and heads. Must not know training or files.

Shapes: N rows of the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deltaclip.base.progress import Progress
from deltaclip.base.vocabulary import LABELS
from deltaclip.pipeline.loop.epochs import EpochRow, FitPlan, FitResult, Validation, fit, seeded
from deltaclip.pipeline.model.calibrate import Sums, calibrate, calibrate_branch, fit_line
from deltaclip.pipeline.model.heads import DirectHeads, HeadSpec, KernelShape, ResidualHeads, build_heads
from deltaclip.pipeline.model.kernel import Kernel, Part, Refits, fit_kernel
from deltaclip.pipeline.model.kernel_on_score import Score, fit_kernel_on_score
from deltaclip.pipeline.model.level import clamp_shift
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.rows.split_rows import joined_groups
from deltaclip.pipeline.rows.task import training_columns
from deltaclip.pipeline.runs.measure import rankable_labels, trained_labels
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, score
from deltaclip.pipeline.scoring.agreement import pearson, srocc

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from deltaclip.pipeline.rows.cached_rows import Batches, CacheRows
    from deltaclip.pipeline.rows.task import LossWeights
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
    heads: nn.Module
    calibration: dict[str, Any] | None
    fitted: FitResult
    columns: dict[str, Tensor] = field(default_factory=dict)
    tuned: TunedBackbone | None = None

    @property
    def scales(self) -> tuple[float | None, float | None]:
        """Quality and consistency scale in force, None for direct heads."""
        return self.heads.scales() if isinstance(self.heads, ResidualHeads) else (None, None)


def learn(
    config: TrainConfig,
    rows: CacheRows,
    split: Split,
    weights: LossWeights,
    *,
    what: str = "training",
    log: Callable[[EpochRow], None] | None = None,
) -> Learned:
    """Calibrate and fit heads; the test rows are not looked at.

    Args:
        config: settings of the training.
        rows: the cache.
        split: sides of its rows.
        weights: loss weights that are in force.
        what: stands before the progress bar.
        log: is given every epoch.

    Raises:
        UserError: a training loss that is not finite.
    """
    kernels = None
    if config.residual_learning and config.base_init == "kernel":
        trained = trained_labels(rows, split.train, weights[:2])
        kernels = fit_kernels(rows, split, labels=trained, view=config.view, seed=config.split_seed)
    spec = head_spec(config, rows, weights, kernels=None if kernels is None else kernels.shape)
    fields, device = {} if kernels is None else kernels.columns, rows.device
    ranked = sorted(set(rankable_labels(rows, split.val)) & set(trained_labels(rows, split.train, weights[:2])))
    truth = {label: rows.label(label)[split.val] for label in ranked}
    batches = rows.batches(
        split.train,
        batch_size=config.batch_size,
        seed=config.split_seed,
        columns=training_columns(config, rows, split.train) | of_rows(fields, split.train),
        explanations=spec.rationale,
    )
    val = rows.batches(split.val, batch_size=1, columns=of_rows(fields, split.val)) if ranked else batches
    with seeded(config.seed, device), Progress(config.epochs, what, unit="epochs") as progress:
        heads = build_heads(spec).to(device)
        calibration = None
        if isinstance(heads, DirectHeads) and heads.two_branch:
            calibration = calibrate_branch(heads, lambda: batches.in_order(SCORE_BATCH)).to_json()
        elif isinstance(heads, ResidualHeads):
            calibration = start_bases(heads, config.base_init, batches, kernels)
        fitted = fit(
            heads,
            batches,
            objective=weighted_loss(config.loss, w_q=weights.q, w_c=weights.c, w_exp=weights.exp),
            plan=fit_plan(config),
            validate=_validator(heads, val, truth) if ranked else None,
            on_epoch=_each_epoch(progress, log),
        )
    return Learned(spec=spec, heads=heads, calibration=calibration, fitted=fitted, columns=fields)


def _each_epoch(progress: Progress, log: Callable[[EpochRow], None] | None) -> Callable[[EpochRow], None]:
    def take(row: EpochRow) -> None:
        progress.advance(note=epoch_note(row))
        if log is not None:
            log(row)

    return take


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


def of_rows(columns: Mapping[str, Tensor], chosen: NDArray[np.int64]) -> dict[str, Tensor]:
    """Return some rows of columns."""
    return {name: column_N[torch.from_numpy(chosen).to(column_N.device)] for name, column_N in columns.items()}


def head_spec(
    config: TrainConfig, rows: CacheRows, weights: LossWeights, *, kernels: KernelShape | None = None
) -> HeadSpec:
    """Return the heads that the settings ask for."""
    direct = not config.residual_learning
    return HeadSpec(
        dim=rows.dim,
        kind="direct" if direct else "residual",
        scale_q=config.residual_scale_q,
        scale_c=config.residual_scale_c,
        scale_mode=config.scale_mode,
        dropout=config.dropout,
        two_branch=direct and config.two_branch,
        refinement=direct and config.refinement,
        rationale=weights.exp > 0,
        kernels=kernels,
    )


def _validator(
    heads: nn.Module, batches: Batches, labels: Mapping[str, NDArray[np.floating]]
) -> Callable[[], Validation]:
    """Return a hook that scores the validation rows and judges them by the labels that can be ranked."""

    def validate() -> Validation:
        scores = score(heads, batches.in_order(SCORE_BATCH))
        return validation({label: scores.of(label) for label in labels}, labels)

    return validate


def validation(predicted: Mapping[str, NDArray[np.floating]], labels: Mapping[str, NDArray[np.floating]]) -> Validation:
    """Judge scores of the validation rows: a head's figure to choose by is the mean of SROCC and PLCC (`main`).

    NaN for constant scores and for those of heads that diverged. Labels are NaN where missing.
    """
    mains, figures = {}, {}
    for label, truth in labels.items():
        known = ~np.isnan(truth)
        x, y = predicted[label][known], truth[known]
        finite = bool(np.isfinite(x).all())
        rank, linear = (srocc(x, y), pearson(x, y)) if finite else (math.nan, math.nan)
        figures[f"val_{label}_srocc"], figures[f"val_{label}_plcc"] = rank, linear
        mains[label] = (rank + linear) / 2
    return Validation(mains, figures)


def epoch_note(row: EpochRow) -> str:
    """Return loss and validation figures of an epoch, for a progress bar."""
    names = {"val_quality_srocc": "q", "val_consistency_srocc": "c"}
    shown = [f"{letter} {row.figures[name]:.3f}" for name, letter in names.items() if name in row.figures]
    return f"loss {row.train_loss:.4f}, SROCC {' '.join(shown)}" if shown else f"loss {row.train_loss:.4f}"


# ---- The bases of residual heads before training: plain, linear in closed form, or kernels on a view


# Mean squared distance of prompts and of the quality kernel's score in the consistency kernel (the view has 1): see
# docs/heads.md.
PROMPT_WEIGHT, QUALITY_WEIGHT = 0.15, 0.1


@dataclass(frozen=True)
class Kernels:
    """Kernels fitted on training and validation rows, in the state of heads, and what they say of every row.

    `columns` has the fields `q_kernel_B`, `c_kernel_B` of `Batch` for all N rows: of a fitted row what a fit without
    that row's group says, so that corrections learn from errors as large as those of new rows.
    """

    shape: KernelShape
    state: dict[str, Tensor]
    slope: float
    offset: float
    columns: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def put_into(self, heads: ResidualHeads) -> None:
        """Set kernels, a and b of heads that were built for them."""
        heads.load_state_dict({**heads.state_dict(), **self.state})
        with torch.no_grad():
            heads.c_slope.fill_(self.slope)
            heads.c_offset.fill_(self.offset)


def base_view(*settings: TrainConfig) -> str | None:
    """Return the view that some of the settings read for their bases, None if none does."""
    return next((one.view for one in settings if one.residual_learning and one.base_init == "kernel"), None)


def fit_kernels(rows: CacheRows, split: Split, *, labels: Collection[str], view: str, seed: int) -> Kernels:
    """Fit the kernels of both labels; the test rows are not looked at.

    Quality: kernel ridge of the label on the view. Consistency: least squares of the label on (s + 1)/2 first, as the
    calibrated base, then kernel ridge of what is left on view, prompt and what the quality kernel says without the row
    (`kernel_on_score.py`). Validation rows are fitted to as well: epochs are chosen on what the other groups say of
    them. A label that is not trained, not among `labels`, is as if it were missing.

    The mean of each base over the rows that it was fitted to is that of their labels, and so is the mean of what
    left-out fits say of training rows.

    Raises:
        UserError: the view holds values that are not finite.
    """
    fitted = np.zeros(len(rows.rows), dtype=bool)
    fitted[split.train] = fitted[split.val] = True
    known = {label: np.where(fitted & (label in labels), rows.label(label), np.nan) for label in LABELS}
    q_N, c_N = (torch.from_numpy(known[label].astype(np.float32)).to(rows.device) for label in LABELS)
    groups_N, part = joined_groups(rows), Part(rows.view(), 1.0)
    q = _on_view(part, q_N, groups_N, seed)
    parts, score = [part, Part(rows.prompts(), PROMPT_WEIGHT, each=False)], Score(q.said_N, q.refits, QUALITY_WEIGHT)
    z_N = (torch.from_numpy(rows.cosine()).to(rows.device) + 1) / 2
    c = _on_score(parts, score, c_N, groups_N, z_N=z_N, seed=seed)
    columns = {
        "q_kernel_B": _levelled(q.said_N, torch.zeros_like(z_N), q_N, train=split.train, fitted_N=fitted),
        "c_kernel_B": _levelled(c.said_N, c.slope * z_N + c.offset, c_N, train=split.train, fitted_N=fitted),
    }
    state = {
        f"{letter}_kernel.{name}": value
        for letter, kernel in (("q", q.kernel), ("c", c.kernel))
        for name, value in kernel.state_dict().items()
    }
    about = {"view": view, "slope": c.slope, "offset": c.offset, "q_kernel": q.fit, "c_kernel": c.fit}
    points = (len(kernel.beta_L) for kernel in (q.kernel, c.kernel))
    shape = KernelShape(view, int(part.vector_NW.shape[1]), *points)
    return Kernels(shape, state, c.slope, c.offset, columns, about)


class _Quality(NamedTuple):
    kernel: Kernel
    said_N: Tensor
    refits: Refits | None = None
    fit: dict[str, Any] | None = None


def _on_view(part: Part, label_N: Tensor, groups_N: NDArray[np.int64], seed: int) -> _Quality:
    """Return the kernel of quality; without two groups to fit to it is the mean of the labels, or 0, everywhere."""
    if not _two_groups(label_N, groups_N):
        kernel = Kernel(part.vector_NW.shape[1], 0).to(label_N.device)
        kernel.intercept += label_N.nanmean().nan_to_num(0.0)
        return _Quality(kernel, kernel.intercept.expand_as(label_N))
    kernel, said_N, fit, refits = fit_kernel([part], label_N, groups_N, seed=seed)
    level = clamp_shift(refits.own_M, label_N[refits.rows_M])
    kernel.intercept += level
    return _Quality(kernel, said_N + level, refits, fit.to_json())


class _Consistency(NamedTuple):
    kernel: Kernel
    slope: float
    offset: float
    said_N: Tensor
    fit: dict[str, Any] | None = None


def _on_score(
    parts: list[Part], score: Score, label_N: Tensor, groups_N: NDArray[np.int64], *, z_N: Tensor, seed: int
) -> _Consistency:
    """Return the kernel of consistency with its line; without two groups to fit to the line alone, or (s + 1)/2."""
    if not _two_groups(label_N, groups_N):
        width = sum(part.vector_NW.shape[1] for part in parts) + 1
        sums = Sums.zeros(1, z_N.device)
        sums.add(z_N.double()[:, None], label_N.double())
        slope, offset = fit_line(sums) if sums.num_rows else (1.0, 0.0)
        return _Consistency(Kernel(width, 0).to(z_N.device), slope, offset, torch.zeros_like(z_N))
    found = fit_kernel_on_score(parts, score, label_N, groups_N, x_N=z_N, seed=seed)
    offset = found.offset + clamp_shift(found.own_M, label_N[found.rows_M])
    return _Consistency(found.kernel, found.slope, offset, found.said_N, found.fit.to_json())


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


def start_bases(
    heads: ResidualHeads, base_init: str, batches: Batches, kernels: Kernels | None
) -> dict[str, Any] | None:
    """Put the bases of new heads in place and return what was fitted, None for the plain start."""
    if kernels is not None:
        kernels.put_into(heads)
        return kernels.about
    if base_init != "calibrated":
        return None
    return calibrate(heads, lambda: batches.in_order(SCORE_BATCH)).to_json()
