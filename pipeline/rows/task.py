"""What a training learns from: which labels weigh, and what else of the rows joins the loss.

Knows settings and what a cache has; where both do not meet, nothing is used, and `describe.warnings_of` says so. Must
not know heads or the training loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import LABELS, need_prompts
from deltaclip.pipeline.model.losses import std_weights
from deltaclip.pipeline.runs.measure import present_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.settings import LearningSettings, TrainConfig


class LossWeights(NamedTuple):
    """Weights in force of the parts of the loss."""

    q: float
    c: float
    exp: float = 0.0

    @property
    def see_prompts(self) -> bool:
        """Whether any part of the loss sees the prompt."""
        return self.exp > 0 or need_prompts(self.labels)

    @property
    def labels(self) -> list[str]:
        """The labels whose loss weighs."""
        return [label for label, weight in zip(LABELS, self, strict=False) if weight > 0]


def loss_weights(config: LearningSettings, rows: CacheRows) -> LossWeights:
    """Return the weights that are in force: a label that no row has cannot weigh anything.

    Raises:
        UserError: no labels at all, or every weight is 0.
    """
    present = present_labels(rows)
    if not present:
        remedy = "give the manifest a quality or consistency column and extract again"
        raise UserError("has no labels", place=config.cache, remedy=remedy)
    w_q, w_c = (
        (config.w_q if "quality" in present else 0.0),
        (config.w_c if "consistency" in present else 0.0),
    )
    if w_q == w_c == 0:
        raise UserError(
            "every loss weight is 0 for the labels that the cache has",
            place="--w-q, --w-c",
            remedy="give one above 0",
        )
    explained = config.use_explanations and num_explained(rows)
    return LossWeights(w_q, w_c, config.w_exp if explained else 0.0)


def num_explained(rows: CacheRows) -> int:
    """Return how many rows have an explanation."""
    return int((rows.rows.explanation >= 0).sum())


def labels_with_std(rows: CacheRows) -> list[str]:
    """Return the labels of which at least one row has the SD over raters too."""
    known = {label: ~np.isnan(rows.label(label)) & ~np.isnan(rows.label(f"{label}_std")) for label in LABELS}
    return [label for label in LABELS if known[label].any()]


def training_columns(config: TrainConfig, rows: CacheRows, chosen: NDArray[np.int64]) -> dict[str, Tensor]:
    """Return the further fields of `Batch` that the settings ask for, one value for each of the chosen rows."""
    found = {}
    for label in labels_with_std(rows):
        head = label[0]
        label_N, std_N = (torch.from_numpy(rows.label(name)[chosen]) for name in (label, f"{label}_std"))
        if config.loss == "fidelity":
            found[f"{head}_std_B"] = std_N
        if config.std_weighting:
            found[f"{head}_weight_B"] = std_weights(label_N, std_N)
    return found
