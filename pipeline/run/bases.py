"""The bases of residual heads before training: plain, linear in closed form, or kernels on a view.

Knows rows, splits and heads. Must not know training or files.

Shapes: N rows of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deltaclip.base.targets import LABELS
from deltaclip.pipeline.model.calibrate import Sums, calibrate, fit_line
from deltaclip.pipeline.model.heads import KernelShape, ResidualHeads
from deltaclip.pipeline.model.kernel import Kernel, Part, Refits, fit_kernel
from deltaclip.pipeline.model.kernel_on_score import Score, fit_kernel_on_score
from deltaclip.pipeline.model.level import clamp_shift
from deltaclip.pipeline.run.predictions import SCORE_BATCH
from deltaclip.pipeline.run.sides import joined_groups

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.pipeline.run.rows import Batches, CacheRows
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import TrainConfig

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
