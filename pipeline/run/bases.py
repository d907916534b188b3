"""The bases of residual heads before training: plain, linear in closed form, or kernels on a view.

Knows rows, splits and heads. Must not know training or files.

Shapes: N rows of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.base.targets import LABELS
from deltaclip.pipeline.model.calibrate import Sums, calibrate, fit_line
from deltaclip.pipeline.model.heads import KernelShape, ResidualHeads
from deltaclip.pipeline.model.kernel import Kernel, Part, fit_kernel
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
    calibrated base, then kernel ridge of what is left on view, prompt and what the quality kernel says. Validation rows
    are fitted to as well: epochs are chosen on what the other groups say of them. A label that is not trained, not
    among `labels`, is as if it were missing.

    Raises:
        UserError: the view holds values that are not finite.
    """
    fitted = np.zeros(len(rows.rows), dtype=bool)
    fitted[split.train] = fitted[split.val] = True
    known = {label: np.where(fitted & (label in labels), rows.label(label), np.nan) for label in LABELS}
    target = {label: torch.from_numpy(found.astype(np.float32)).to(rows.device) for label, found in known.items()}
    groups_N, x_NF = joined_groups(rows), rows.view()
    line_N, slope, offset = _line(rows, target["consistency"])
    q_parts = [Part(x_NF, 1.0)]
    q_kernel, q_N, q_fit = _fitted(q_parts, target["quality"], groups_N, seed)
    c_parts = [*q_parts, Part(rows.prompts(), PROMPT_WEIGHT, each=False), Part(q_N[:, None], QUALITY_WEIGHT)]
    c_kernel, c_N, c_fit = _fitted(c_parts, target["consistency"] - line_N, groups_N, seed)
    state = {
        f"{letter}_kernel.{name}": value
        for letter, kernel in (("q", q_kernel), ("c", c_kernel))
        for name, value in kernel.state_dict().items()
    }
    about = {"view": view, "slope": slope, "offset": offset, "q_kernel": q_fit, "c_kernel": c_fit}
    columns = {"q_kernel_B": q_N, "c_kernel_B": c_N}
    points = (len(kernel.beta_L) for kernel in (q_kernel, c_kernel))
    shape = KernelShape(view, int(x_NF.shape[1]), *points)
    return Kernels(shape, state, slope, offset, columns, about)


def _fitted(
    parts: list[Part], label_N: Tensor, groups_N: NDArray[np.int64], seed: int
) -> tuple[Kernel, Tensor, dict[str, Any] | None]:
    if (
        len(np.unique(groups_N[~torch.isnan(label_N).cpu().numpy()])) < 2
    ):  # nothing to fit: a kernel that is 0 everywhere
        width = sum(part.vector_NW.shape[1] for part in parts)
        return Kernel(width, 0).to(label_N.device), torch.zeros_like(label_N), None
    kernel, said_N, fit = fit_kernel(parts, label_N, groups_N, seed=seed)
    return kernel, said_N, fit.to_json()


def start_bases(
    heads: ResidualHeads, base_init: str, batches: Batches, kernels: Kernels | None
) -> dict[str, Any] | None:
    """Put the bases of new heads in place and return what was fitted, None for the plain start."""
    if kernels is not None:
        kernels.put_into(heads)
        return kernels.about
    return calibrate(heads, batches.in_order(SCORE_BATCH)).to_json() if base_init == "calibrated" else None


def _line(rows: CacheRows, label_N: Tensor) -> tuple[Tensor, float, float]:
    """Return a (s + 1)/2 + b of every row with a, b of least squares on the labelled rows; 1, 0 without any."""
    z_N = (torch.from_numpy(rows.cosine()).to(label_N.device).double() + 1) / 2
    sums = Sums.zeros(1, label_N.device)
    sums.add(z_N[:, None], label_N.double())
    slope, offset = fit_line(sums) if sums.num_rows else (1.0, 0.0)
    return (slope * z_N + offset).float(), slope, offset
