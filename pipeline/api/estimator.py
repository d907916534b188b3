"""A scikit-learn estimator over feature matrices: one residual head with its calibrated base.

Knows scikit-learn's conventions and the heads. Must not know caches or run directories.

Shapes: N rows, D width of an embedding, F features: D of images (quality), 2D of [images, prompts] (consistency).
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, check_random_state, column_or_1d, validate_data

from deltaclip.base.device import own_modes
from deltaclip.pipeline.loop.batches import MemoryBatches, memory_batches
from deltaclip.pipeline.loop.epochs import FitPlan, Validation, seeded
from deltaclip.pipeline.loop.head_learner import fit
from deltaclip.pipeline.model.calibrate import calibrate
from deltaclip.pipeline.model.heads import HeadSpec, ResidualHeads, TargetSpec
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.scores import score_rows
from deltaclip.pipeline.scoring.agreement import pearson, srocc
from deltaclip.pipeline.scoring.groups import group_keys
from deltaclip.pipeline.scoring.splits import VAL, deal

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    FloatArray = NDArray[np.float64]
    IndexArray = NDArray[np.int64]

MIN_VALIDATION_ROWS = 5  # fewer have no rank correlation worth choosing an epoch by
UNIT_TOLERANCE = 0.02  # embeddings stored in 16 bits are a little longer or shorter than 1


class DeltaclipRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn is not typed
    """y = clamp(base + scale tanh(MLP)), the head that `deltaclip train` fits, on rows of features.

    `head="quality"` takes image embeddings v (N, D): base sigmoid(w . v + b0), correction of v. `head="consistency"`
    takes [v, t] (N, 2D), both of unit length: base a (v . t + 1)/2 + b, correction of [v, t, v . t]. The base is
    calibrated in closed form; the epoch is chosen on rows kept from training.

    Args:
        head: which of the two.
        scale: largest correction, as a share of the label range.
        label_range: (lowest, highest) label; None takes [0, 1] where all training labels lie in it, else their own
            smallest and largest. Predictions stay in this range.
        epochs: passes over the training rows.
        batch_size: rows per step.
        lr: peak learning rate; sane: 1e-3 to 5e-3.
        weight_decay: of AdamW.
        dropout: in the correction.
        validation_fraction: share of the rows (whole groups of them, where `fit` is given groups) to choose the
            epoch by; 0 keeps the last epoch.
        random_state: seed of the initial weights, dropout, order and choice of validation rows.

    Attributes:
        heads_: the fitted module; `best_epoch_`: epoch that was chosen, 0 for the base alone; `label_range_`.
    """

    _parameter_constraints = {  # noqa: RUF012 - the name and form that scikit-learn looks for
        "head": [StrOptions({"quality", "consistency"})],
        "scale": [Interval(numbers.Real, 0, 1, closed="both")],
        "label_range": [tuple, list, None],
        "epochs": [Interval(numbers.Integral, 1, None, closed="left")],
        "batch_size": [Interval(numbers.Integral, 1, None, closed="left")],
        "lr": [Interval(numbers.Real, 0, None, closed="left")],
        "weight_decay": [Interval(numbers.Real, 0, None, closed="left")],
        "dropout": [Interval(numbers.Real, 0, 1, closed="left")],
        "validation_fraction": [Interval(numbers.Real, 0, 1, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(  # noqa: PLR0913 - scikit-learn wants every setting by its name
        self,
        head: Literal["quality", "consistency"] = "quality",
        *,
        scale: float = 0.2,
        label_range: tuple[float, float] | None = None,
        epochs: int = 20,
        batch_size: int = 64,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        dropout: float = 0.1,
        validation_fraction: float = 0.1,
        random_state: int | np.random.RandomState | None = 42,
    ) -> None:
        self.head = head
        self.scale = scale
        self.label_range = label_range
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    @own_modes(learns=True)
    def fit(self, X: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Self:
        """Fit base and correction.

        Args:
            X: (N, F) features, finite.
            y: (N,) labels.
            groups: (N,) such as prompts: rows of one group are never on both sides of the inner validation.

        Raises:
            ValueError: a label outside `label_range`, embeddings that are not what the head takes, or rows without a
                group beside others that have one.
        """
        self._validate_params()
        found = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        x_NF, y_N = np.asarray(found[0]), column_or_1d(found[1], warn=True).astype(np.float64)
        dim = self._dim(x_NF)
        self.label_range_ = _label_range(self.label_range, y_N)
        seed = int(check_random_state(self.random_state).randint(2**31))
        train, val = _sides(len(y_N), groups, self.validation_fraction, seed)
        low, high = self.label_range_
        share_N = (y_N - low) / (high - low)
        plan = FitPlan(epochs=self.epochs, lr=self.lr, weight_decay=self.weight_decay)
        objective = weighted_loss("mse", weights={self.head: 1.0})
        with seeded(seed):
            targets = (TargetSpec(self.head, "image" if self.head == "quality" else "pair", self.scale),)
            heads = ResidualHeads(HeadSpec(dim=dim, targets=targets, dropout=self.dropout))
            batches = self._batches(x_NF[train], share_N[train], seed)
            calibrate(heads, batches.in_order)
            validate = self._validator(heads, x_NF[val], share_N[val], seed) if len(val) else None
            fitted = fit(heads, batches, objective=objective, plan=plan, validate=validate)
        self.best_epoch_ = fitted.best_epoch[self.head]
        self.heads_ = heads.double()  # so that a row scores the same alone and among others
        return self

    @own_modes()
    def predict(self, X: ArrayLike) -> FloatArray:
        """Return the predictions of (N, F) rows, (N,) float64 in `label_range_`."""
        check_is_fitted(self)
        x_NF = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))
        self._dim(x_NF)
        v_ND, t_ND = self._embeddings(x_NF)
        with torch.no_grad():
            found = self.heads_(v_ND, t_ND)
        low, high = self.label_range_
        share_N = found.of(self.head).numpy()
        return np.asarray(low + (high - low) * share_N)

    def _dim(self, x_NF: FloatArray) -> int:
        if self.head == "quality":
            return int(x_NF.shape[1])
        if x_NF.shape[1] % 2:
            message = f"consistency takes [v, t] side by side, an even number of features, not {x_NF.shape[1]}"
            raise ValueError(message)
        half = int(x_NF.shape[1]) // 2
        for name, part in (("v", x_NF[:, :half]), ("t", x_NF[:, half:])):
            length_N = np.linalg.norm(part, axis=1)
            if (np.abs(length_N - 1) > UNIT_TOLERANCE).any():
                row = int(np.argmax(np.abs(length_N - 1)))
                message = f"consistency takes embeddings of unit length; {name} of row {row} has {length_N[row]:.4g}"
                raise ValueError(message)
        return half

    def _embeddings(self, x_NF: FloatArray) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.from_numpy(np.array(x_NF))  # a copy: memory maps may be read-only
        if self.head == "consistency":
            v_ND, t_ND = whole.chunk(2, dim=1)
            return v_ND, t_ND
        return whole, torch.zeros_like(whole)  # the quality head never looks at the prompt

    def _batches(self, x_NF: FloatArray, share_N: FloatArray, seed: int) -> MemoryBatches:
        v_ND, t_ND = self._embeddings(x_NF)
        labels = {str(self.head): torch.from_numpy(share_N).float()}
        return memory_batches(v_ND.float(), t_ND.float(), labels, batch_size=self.batch_size, seed=seed)

    def _validator(
        self, heads: ResidualHeads, x_NF: FloatArray, share_N: FloatArray, seed: int
    ) -> Callable[[], Validation]:
        batches = self._batches(x_NF, share_N, seed)

        def validate() -> Validation:
            found = score_rows(heads, batches.in_order())
            said_N = found.of(self.head).numpy()
            return Validation({self.head: (srocc(said_N, share_N) + pearson(said_N, share_N)) / 2})

        return validate


def _label_range(given: Any, y: FloatArray) -> tuple[float, float]:
    smallest, largest = float(y.min()), float(y.max())
    if given is None:
        low, high = (0.0, 1.0) if smallest >= 0 and largest <= 1 else (smallest, largest)
        return (low, high) if low < high else (low - 0.5, low + 0.5)
    low, high = (float(end) for end in given)
    if not low < high or not np.isfinite(high - low):
        raise ValueError(f"label_range must rise, not go from {low:g} to {high:g}")
    if smallest < low or largest > high:
        message = f"labels from {smallest:g} to {largest:g} do not lie in label_range ({low:g}, {high:g})"
        raise ValueError(message)
    return low, high


def _sides(num_rows: int, groups: Any, fraction: float, seed: int) -> tuple[IndexArray, IndexArray]:
    """Return the rows to train on and those to choose the epoch by, which are none where they would be too few."""
    key_N = group_keys(np.arange(num_rows) if groups is None else groups)
    if len(key_N) != num_rows:
        raise ValueError(f"{num_rows} rows but {len(key_N)} groups")
    keys_G, code_N, size_G = np.unique(key_N, return_inverse=True, return_counts=True)
    is_val_N = np.zeros(num_rows, dtype=bool)
    if fraction and len(keys_G) > 1:
        is_val_N = deal(keys_G, size_G, np.array([1 - fraction, fraction, 0.0]), seed=seed)[code_N] == VAL
    if is_val_N.sum() < MIN_VALIDATION_ROWS:
        is_val_N[:] = False
    return np.flatnonzero(~is_val_N), np.flatnonzero(is_val_N)
