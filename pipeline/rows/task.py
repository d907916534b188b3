"""A training to do: settings, the rows of a cache and their split, with all that follows from the three.

Knows settings and what a cache has; where both do not meet, nothing is used, and `plan_words.warnings_of` says so. Must
not know heads or the training loop.

Shapes: N rows of the cache, B rows of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.pipeline.loop.epochs import Validation
from deltaclip.pipeline.model.losses import std_weights
from deltaclip.pipeline.rows.pair_rows import pairs_of, spoken_for
from deltaclip.pipeline.scoring.agreement import MIN_ROWS, pearson, srocc
from deltaclip.pipeline.scoring.ordering import MIN_PAIRS, ordered_share
from deltaclip.pipeline.settings import LearningSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.pipeline.loop.batches import Columns
    from deltaclip.pipeline.rows.cached_rows import Batches, CacheRows
    from deltaclip.pipeline.rows.pair_rows import RowPairs
    from deltaclip.pipeline.scoring.splits import Split

Config = TypeVar("Config", bound=LearningSettings)


class LossWeights(NamedTuple):
    """Weights in force of the parts of the loss: by target, and of explanations."""

    targets: Mapping[str, float]
    explanations: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Task(Generic[Config]):
    """One training: what is learned from, chosen by and judged with."""

    config: Config
    rows: CacheRows
    split: Split
    learns_pairs: bool = False  # of images that people chose between, where the cache has some

    @cached_property
    def weights(self) -> LossWeights:
        """Weights in force: see `loss_weights`."""
        return loss_weights(self.config, self.rows, learns_pairs=self.learns_pairs)

    def pairs_among(self, chosen: NDArray[np.int64]) -> dict[str, RowPairs]:
        """Return by target the pairs that are learned from, both of whose rows are chosen; no target without any."""
        if not self.learns_pairs:
            return {}
        weights = self.weights.targets
        found = {name: pairs_of(self.rows, name).among(chosen) for name in spoken_for(self.rows) if weights[name]}
        return {name: pairs for name, pairs in found.items() if len(pairs)}

    @cached_property
    def train_pairs(self) -> dict[str, RowPairs]:
        """Pairs of training rows, by target."""
        return self.pairs_among(self.split.train)

    @cached_property
    def val_pairs(self) -> dict[str, RowPairs]:
        """Pairs of validation rows, by target; too few say nothing."""
        found = self.pairs_among(self.split.val)
        return {name: pairs for name, pairs in found.items() if len(pairs) >= MIN_PAIRS and name in self.trained}

    @cached_property
    def trained(self) -> list[str]:
        """The targets that a head can learn: their loss weighs, and some training row has them."""
        weights, labelled = self.weights.targets, trainable_labels(self.rows, self.split.train)
        return [name for name in weights if weights[name] > 0 and (name in labelled or name in self.train_pairs)]

    @cached_property
    def sees_prompts(self) -> bool:
        """Whether any part of the loss that weighs sees the prompt."""
        pairs = [target.name for target in self.rows.targets if target.sees == "pair"]
        return self.weights.explanations > 0 or any(self.weights.targets[name] > 0 for name in pairs)

    @cached_property
    def ranked(self) -> list[str]:
        """The trained targets whose validation rows can be ranked, by which epochs are chosen."""
        return [name for name in rankable_labels(self.rows, self.split.val) if name in self.trained]

    @cached_property
    def truth(self) -> dict[str, NDArray[np.float32]]:
        """Labels of the validation rows, of the ranked targets."""
        return {name: self.rows.label(name)[self.split.val] for name in self.ranked}

    def train_batches(self, *, batch_size: int | None = None, columns: Columns | None = None) -> Batches:
        """Return the training rows, shuffled; `columns` are further fields of batches for all N rows."""
        return self.rows.batches(
            self.split.train,
            batch_size=batch_size or self.config.batch_size,
            seed=self.config.split_seed,
            columns={
                **training_columns(self.config, self.rows, self.split.train),
                **of_rows(columns, self.split.train),
            },
            explanations=self.weights.explanations > 0,
        )

    def val_batches(self, *, columns: Columns | None = None) -> Batches:
        """Return the validation rows, to be read in order."""
        return self.rows.batches(self.split.val, batch_size=1, columns=of_rows(columns, self.split.val))

    @property
    def judged(self) -> list[str]:
        """The trained targets by which epochs are chosen: by ranks of validation rows, by their pairs, or by both."""
        return list(dict.fromkeys([*self.ranked, *self.val_pairs]))

    def judge(self, predicted: Mapping[str, NDArray[np.floating]]) -> Validation:
        """Judge scores of the validation rows, by judged target.

        The figure of pairs is the share that is ordered rightly, less that of the others: from -1 to 1, as a
        correlation. Of a target with ratings and pairs it is the mean of both figures.
        """
        found = validation({name: predicted[name] for name in self.ranked}, self.truth)
        scores, figures = dict(found.scores), dict(found.figures)
        place_N = np.zeros(len(self.rows.rows), dtype=np.int64)
        place_N[self.split.val] = np.arange(len(self.split.val))
        for name, pairs in self.val_pairs.items():
            x_M = np.asarray(predicted[name], dtype=np.float64)
            share = ordered_share(x_M[place_N[pairs.a_P]] - x_M[place_N[pairs.b_P]], pairs.preferred_P)
            figures[f"val_{name}_pairs"] = share
            both = [score for score in (scores.get(name), 2 * share - 1) if score is not None]
            scores[name] = sum(both) / len(both)
        return Validation(scores, figures)


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


def present_labels(rows: CacheRows) -> list[str]:
    """Return the targets that at least one row has a label of."""
    return [target.name for target in rows.targets if not np.isnan(rows.label(target.name)).all()]


def trainable_labels(rows: CacheRows, train: NDArray[np.int64]) -> list[str]:
    """Return the targets that some training row has a label of."""
    return [target.name for target in rows.targets if not np.isnan(rows.label(target.name)[train]).all()]


def rankable_labels(rows: CacheRows, chosen: NDArray[np.int64]) -> list[str]:
    """Return the targets for which a correlation exists among the chosen rows: three labels, and two values."""
    found = {target.name: rows.label(target.name)[chosen] for target in rows.targets}
    known = {label: truth[~np.isnan(truth)] for label, truth in found.items()}
    return [label for label, truth in known.items() if truth.size >= MIN_ROWS and truth.min() < truth.max()]


def loss_weights(config: LearningSettings, rows: CacheRows, *, learns_pairs: bool = False) -> LossWeights:
    """Return the weights that are in force: a target that no row has a label of cannot weigh anything.

    Raises:
        UserError: no labels at all, every weight is 0, or a target that the cache does not have.
    """
    spoken = spoken_for(rows)
    present = [*present_labels(rows), *(spoken if learns_pairs else [])]
    if not present and not rows.has_text:
        remedy = "extract the data with a CLIP too: its cache first, this one beside it"
        what = f"has labels of image and prompt alone, and {rows.facts['backbone']} has no text tower"
        raise UserError(what, place=config.cache, remedy=remedy)
    if not present:
        remedy = "give the manifest a quality or consistency column and extract again"
        remedy = "learn from its pairs by `deltaclip train`" if spoken else remedy
        raise UserError("has no labels", place=config.cache, remedy=remedy)
    names = [target.name for target in rows.targets]
    for option, numbers in (("--scale", config.scales), ("--weight", config.weights)):
        for name in numbers.named:
            if name not in (*names, "quality", "consistency"):
                raise UserError(f"the cache has no target {name!r}", place=option, remedy=did_you_mean(name, names))
    weights = {name: config.weights.of(name) if name in present else 0.0 for name in names}
    if not any(weights.values()):
        remedy = "give one above 0"
        raise UserError("is 0 for every target that the cache has labels of", place="--weight", remedy=remedy)
    explained = (
        config.use_explanations and num_explained(rows) and any(target.sees == "pair" for target in rows.targets)
    )
    return LossWeights(weights, config.w_exp if explained else 0.0)


def num_explained(rows: CacheRows) -> int:
    """Return how many rows have an explanation."""
    return int((rows.rows.explanation >= 0).sum())


def labels_with_std(rows: CacheRows) -> list[str]:
    """Return the targets of which at least one row has the SD over raters too."""
    known = {t.name: ~np.isnan(rows.label(t.name)) & ~np.isnan(rows.label(t.std)) for t in rows.targets}
    return [label for label, both_N in known.items() if both_N.any()]


def training_columns(config: LearningSettings, rows: CacheRows, chosen: NDArray[np.int64]) -> dict[str, Any]:
    """Return the further fields of `Batch` that the settings ask for, by target, one value for each chosen row."""
    stds, weights = {}, {}
    for label in labels_with_std(rows):
        label_N, std_N = (torch.from_numpy(rows.label(name)[chosen]) for name in (label, f"{label}_std"))
        if config.loss == "fidelity":
            stds[label] = std_N
        if config.std_weighting:
            weights[label] = std_weights(label_N, std_N)
    return {"std_B": stds, "weight_B": weights}


def of_rows(columns: Columns | None, chosen: NDArray[np.int64]) -> dict[str, dict[str, Tensor]]:
    """Return some rows of columns."""
    return {
        name: {target: c[torch.from_numpy(chosen).to(c.device)] for target, c in by_target.items()}
        for name, by_target in (columns or {}).items()
    }
