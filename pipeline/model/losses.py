"""Losses over rows that may lack a label, for one head or for several side by side.

Knows each loss by name, its mask and its weights. Must not know heads or the training loop. A new
loss is one function with the signature of `Loss` and one line in LOSSES: a loss sees all rows of the batch.

Shapes: B rows of a batch, P pairs of rows i < j, N rows of a training set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaclip.base.errors import did_you_mean
from deltaclip.pipeline.model.heads import rationale_loss
from deltaclip.pipeline.model.preference import PairScale  # noqa: TC001 - of a field
from deltaclip.pipeline.model.scores import Batch, HeadScores

# Errors above are outliers to `huber`: good scorers reach an RMSE of about 0.1 on labels in [0, 1].
HUBER_DELTA = 0.1

# Keeps the gradient of `plcc` finite where all predictions are equal. A product of variances is about 1e-3 on real
# labels, so correlations move by 1e-5.
PLCC_EPS = 1e-8

# Variance below which labels count as constant: the rounding of equal float32 labels leaves 1e-15.
_CONSTANT = 1e-12

# Rater SD of a row that states none, in units of the label range: the median of AGIQA-3K is 0.12 (quality), 0.14
# (consistency). A stated SD counts as at least MIN_STD, one step of a 0-100 score: two raters who happen to agree do
# not make a label certain.
DEFAULT_STD = 0.13
MIN_STD = 0.01

# `std_weights`: squared error of a good scorer. Below this label noise no longer matters, so weights level off.
WEIGHT_FLOOR = 0.1**2

Objective = Callable[[HeadScores, Batch], Tensor]


class Loss(Protocol):
    """A loss of one head; 0 with a zero gradient where the labelled rows have nothing to say."""

    def __call__(
        self, prediction_B: Tensor, label_B: Tensor, *, weight_B: Tensor | None = None, std_B: Tensor | None = None
    ) -> Tensor:
        """Return one loss over the last axis, for each head where the predictions of several are given, (K, B).

        Label and std (B,) are NaN where the row lacks them, weights (B,) have mean 1 over the data.
        """


def mse_loss(
    prediction_B: Tensor, label_B: Tensor, *, weight_B: Tensor | None = None, std_B: Tensor | None = None
) -> Tensor:
    """Return the mean over the labelled rows of weight (prediction - label)^2."""
    del std_B
    # False for NaN only, in one kernel.
    present_B = label_B == label_B  # noqa: PLR0124
    # `where` selects before the square, so a missing label gives neither a NaN value nor a NaN gradient,
    # while a NaN prediction on a labelled row still shows.
    error_B = torch.where(present_B, prediction_B - label_B, 0.0)
    weighted_B = error_B if weight_B is None else weight_B * error_B
    return _dot(weighted_B, error_B) / present_B.sum().clamp(min=1)


def huber_loss(
    prediction_B: Tensor, label_B: Tensor, *, weight_B: Tensor | None = None, std_B: Tensor | None = None
) -> Tensor:
    """Return the mean over the labelled rows of weight h(e): e^2/2 up to HUBER_DELTA = d, then d (|e| - d/2).

    Huber, Annals of Mathematical Statistics 35 (1964) 73.
    """
    del std_B
    rows = _labelled(prediction_B, label_B, weight_B)
    h_B = F.huber_loss(rows.x_B, rows.y_B.expand_as(rows.x_B), reduction="none", delta=HUBER_DELTA)
    return _dot(rows.w_B, h_B) / rows.present_B.sum().clamp(min=1)


def plcc_loss(
    prediction_B: Tensor, label_B: Tensor, *, weight_B: Tensor | None = None, std_B: Tensor | None = None
) -> Tensor:
    """Return (1 - rho)/2 in [0, 1], rho the (weighted) linear correlation over the labelled rows of the batch.

    0 where fewer than two labels differ. Blind to offset and scale of the scores: what is trained is their order
    and spacing. Li, Jiang, Jiang, Norm-in-Norm loss, arXiv:2008.03889, which is this with p = q = 2.
    """
    del std_B
    rows = _labelled(prediction_B, label_B, weight_B)
    share_B = rows.w_B / rows.w_B.sum().clamp(min=torch.finfo(rows.w_B.dtype).tiny)
    x_B = rows.x_B - _dot(share_B, rows.x_B).unsqueeze(-1)
    y_B = rows.y_B - _dot(share_B, rows.y_B)
    var_x, var_y = _dot(share_B, x_B.square()), _dot(share_B, y_B.square())
    rho = _dot(share_B, x_B * y_B) / (var_x * var_y + PLCC_EPS).sqrt()
    return (1 - rho) / 2 * (var_y > _CONSTANT)


def rank_loss(
    prediction_B: Tensor, label_B: Tensor, *, weight_B: Tensor | None = None, std_B: Tensor | None = None
) -> Tensor:
    """Return the mean over pairs of labelled rows with y_i > y_j of max(0, (y_i - y_j) - (x_i - x_j)).

    The margin is the difference of the labels y, so the better row shall lead by as much as people say; equal
    labels order nothing. Pairs weigh the product of their rows' weights. Sun, Min, Lu, Zhai, arXiv:2204.14047.
    """
    del std_B
    rows = _labelled(prediction_B, label_B, weight_B)
    pairs = _pairs(rows)
    # From the better row's side: sign(y_i - y_j) (x_i - x_j), and 0 for equal labels.
    short_P = torch.relu(pairs.dy_P.abs() - pairs.dy_P.sign() * pairs.dx_P)
    ordered_P = pairs.present_P & (pairs.dy_P != 0)
    return _dot(pairs.w_P * ordered_P, short_P) / ordered_P.sum().clamp(min=1)


def fidelity_loss(
    prediction_B: Tensor, label_B: Tensor, *, weight_B: Tensor | None = None, std_B: Tensor | None = None
) -> Tensor:
    """Return the mean over pairs of labelled rows of 1 - sqrt(p p') - sqrt((1 - p)(1 - p')), in [0, 1].

    p = Phi((y_i - y_j) / sqrt(std_i^2 + std_j^2)) is the chance that a rater prefers i to j when opinions are normal
    (Thurstone, Psychological Review 34 (1927) 273), p' the same of the predictions x under the same SDs: raters
    disagree about an image, not about who scores it. Loss: Tsai, Liu, Qin, Chen, Ma, SIGIR 2007; on image quality
    with label SDs: Zhang, Ma, Zhai, Yang (UNIQUE), arXiv:2005.13983. A row without std has DEFAULT_STD.
    """
    rows = _labelled(prediction_B, label_B, weight_B)
    pairs = _pairs(rows)
    spread_P = torch.full_like(pairs.dy_P, DEFAULT_STD * 2**0.5)
    if std_B is not None:
        variance_B = std_B.nan_to_num(DEFAULT_STD).clamp(min=MIN_STD).square()
        spread_P = (variance_B[pairs.i_P] + variance_B[pairs.j_P]).sqrt()
    z_P, z_label_P = pairs.dx_P / spread_P, pairs.dy_P / spread_P
    # sqrt(p p') through logarithms: far from the label, p' underflows to 0 and the gradient of its root is NaN.
    first_P = (torch.special.log_ndtr(z_P) + torch.special.log_ndtr(z_label_P)).mul(0.5).exp()
    second_P = (torch.special.log_ndtr(-z_P) + torch.special.log_ndtr(-z_label_P)).mul(0.5).exp()
    return _dot(pairs.w_P, 1 - first_P - second_P) / pairs.present_P.sum().clamp(min=1)


LOSSES: dict[str, Loss] = {
    "mse": mse_loss,
    "huber": huber_loss,
    "plcc": plcc_loss,
    "rank": rank_loss,
    "fidelity": fidelity_loss,
}

# Losses that compare the rows of a batch with each other.
BATCH_LOSSES = ("plcc", "rank", "fidelity")


class PairTerm(NamedTuple):
    """How pairs enter the loss of a target: what makes differences of scores logits, and the weight of their mean."""

    scale: PairScale
    weight: float


NO_PAIRS: Mapping[str, PairTerm] = {}


def weighted_loss(
    name: str = "mse", *, weights: Mapping[str, float], w_exp: float = 0.0, pairs: Mapping[str, PairTerm] = NO_PAIRS
) -> Objective:
    """Return the sum of weight * L over targets, plus w_exp * MSE(e), on unclamped sums; a weight of 0 leaves out.

    Args:
        name: of the loss L, the same for all targets.
        weights: by target; none negative, one above 0.
        w_exp: of the explanation loss.
        pairs: by target, what pairs add: weight times the mean of `davidson_loss` over the pairs of a batch.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; {did_you_mean(name, LOSSES)}")
    if min(weights.values()) < 0 or max(weights.values()) == 0:
        given = ", ".join(f"{target}={weight}" for target, weight in weights.items())
        raise ValueError(f"loss weights must not be negative nor all 0, got {given}")
    if w_exp < 0:
        raise ValueError(f"w_exp must not be negative, got {w_exp}")
    loss = LOSSES[name]
    weighing = {target: weight for target, weight in weights.items() if weight}

    def objective(scores: HeadScores, batch: Batch) -> Tensor:
        parts = [
            weight
            * loss(
                scores.targets[target].sum_N,
                batch.label_B[target],
                weight_B=batch.weight_B.get(target),
                std_B=batch.std_B.get(target),
            )
            for target, weight in weighing.items()
        ]
        for target, pair_P3 in batch.pair_P3.items():
            if target in weighing and len(pair_P3):
                sum_N, term, places_2P = scores.targets[target].sum_N, pairs[target], pair_P3[:, :2].long().T
                difference_P = sum_N[..., places_2P[0]] - sum_N[..., places_2P[1]]
                loss_P = term.scale.loss(difference_P, pair_P3[:, 2].to(difference_P.dtype))
                parts.append(weighing[target] * term.weight * loss_P.mean(dim=-1))
        if w_exp:
            if scores.e_ND is None or batch.e_BD is None:
                raise ValueError("w_exp needs heads with a rationale, and batches with explanations")
            parts.append(w_exp * rationale_loss(scores.e_ND, batch.e_BD))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    return objective


def std_weights(label_N: Tensor, std_N: Tensor) -> Tensor:
    """Return row weights 1 / (std^2 + WEIGHT_FLOOR), scaled to mean 1 over the labelled rows that have a std.

    Inverse variance (Aitken, Proc. Roy. Soc. Edinburgh 55 (1936) 42), with the floor for the scorer's own error.
    Rows without std weigh 1, the mean. Give it training rows only.
    """
    known_N = ~(torch.isnan(label_N) | torch.isnan(std_N))
    raw_N = 1 / (std_N.double().square() + WEIGHT_FLOOR)
    mean = raw_N[known_N].mean() if known_N.any() else 1.0
    return torch.where(known_N, raw_N / mean, 1.0).to(label_N.dtype)


def _dot(a_B: Tensor, b_B: Tensor) -> Tensor:
    return (a_B * b_B).sum(dim=-1)


class _Rows(NamedTuple):
    """Predictions x, labels y and weights w; all 0 where the row has no label."""

    x_B: Tensor
    y_B: Tensor
    w_B: Tensor
    present_B: Tensor


def _labelled(prediction_B: Tensor, label_B: Tensor, weight_B: Tensor | None) -> _Rows:
    present_B = ~torch.isnan(label_B)
    x_B, y_B = torch.where(present_B, prediction_B, 0.0), torch.where(present_B, label_B, 0.0)
    w_B = present_B.to(x_B.dtype)
    return _Rows(x_B, y_B, w_B if weight_B is None else w_B * weight_B, present_B)


class _Pairs(NamedTuple):
    """Differences of all pairs i < j; weight 0 unless both rows have a label."""

    i_P: Tensor
    j_P: Tensor
    dx_P: Tensor
    dy_P: Tensor
    w_P: Tensor
    present_P: Tensor


def _pairs(rows: _Rows) -> _Pairs:
    i_P, j_P = torch.triu_indices(len(rows.y_B), len(rows.y_B), offset=1, device=rows.x_B.device)
    return _Pairs(
        i_P=i_P,
        j_P=j_P,
        dx_P=rows.x_B.index_select(-1, i_P) - rows.x_B.index_select(-1, j_P),
        dy_P=rows.y_B.index_select(0, i_P) - rows.y_B.index_select(0, j_P),
        w_P=rows.w_B.index_select(0, i_P) * rows.w_B.index_select(0, j_P),
        present_P=rows.present_B.index_select(0, i_P) & rows.present_B.index_select(0, j_P),
    )
