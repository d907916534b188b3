"""The calibrated start of the bases, in closed form from training labels.

Knows least squares for a, b and ridge on logits for w, b0, both from sums that stream over batches, and the constant
that then gives each base the mean of its labels: memory is D x D and a number a row. Must not know where rows come
from: it fits to all it is given, so give it training rows only.

Shapes: N rows, D embedding width, K candidate strengths.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.level import clamp_shift, sigmoid_shift
from deltaclip.pipeline.model.scores import Batch, cosine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from deltaclip.pipeline.model.heads import DirectHeads, ResidualHeads

# Labels at the ends of the range have infinite logits. One hundredth is the step of a 0-100 opinion score,
# and keeps logits within +-4.6, where one row cannot pull the fit.
LABEL_MARGIN = 0.01

# Candidate ridge strengths in units of the mean squared norm of centred rows: then a strength is the ratio of
# noise to signal variance per row, whatever N, D and the size of the entries of v. Ten decades reach from
# an all but exact fit to an all but constant one; the minimum is flat, so quarter decades are fine enough.
RELATIVE_STRENGTHS = tuple(10 ** (k / 4) for k in range(-16, 25))


@dataclass(frozen=True)
class Calibration:
    """What was fitted; None where a label is entirely missing and the head stays at identity.

    `level_q`, `level_c` are what stands in b0 and `offset` beyond least squares, so that the mean of the base is that
    of the labels.
    """

    num_rows_q: int
    num_rows_c: int
    slope: float | None
    offset: float | None
    ridge_strength: float | None  # None also where the labels or the embeddings do not vary: w = 0
    level_q: float | None = None
    level_c: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def calibrate(heads: ResidualHeads, read: Callable[[], Iterable[Batch]]) -> Calibration:
    """Set w, b0, a, b of `heads` in place from two passes over labelled rows; labels in [0, 1], NaN = missing.

    a, b: least squares of consistency on (s + 1)/2. w, b0: ridge (intercept free) on the logit of quality,
    labels pulled into [LABEL_MARGIN, 1 - LABEL_MARGIN], strength by generalised cross-validation. Sums are in
    float64. Then b0 and b are moved until the mean of each base, as it is reported, is the mean of its labels; every
    row counts alike in all of this, also with `--std-weighting`.

    Args:
        heads: of a new model.
        read: called for each pass; the same rows in the same order.
    """
    device = heads.q_base.weight.device
    quality, consistency = Sums.zeros(heads.dim, device), Sums.zeros(1, device)
    for batch in read():
        v_ND = batch.v_BD.double()
        quality.add(v_ND, pulled_logit(batch.q_B))
        consistency.add((cosine(v_ND, batch.t_BD.double())[:, None] + 1) / 2, batch.c_B.double())

    slope = offset = strength = level_q = level_c = None
    with torch.no_grad():
        if quality.num_rows:
            ridge = fit_ridge(quality)
            strength = ridge.strength
            heads.q_base.weight.copy_(ridge.w_D[None, :])
            heads.q_base.bias.fill_(ridge.intercept)
        if consistency.num_rows:
            slope, offset = fit_line(consistency)
            heads.c_slope.fill_(slope)
            heads.c_offset.fill_(offset)
        (logit_N, q_N), (line_N, c_N) = _said(heads, read())
        if len(q_N):
            level_q = sigmoid_shift(logit_N, q_N)
            heads.q_base.bias.add_(level_q)
        if offset is not None:
            level_c = clamp_shift(line_N, c_N)
            offset += level_c
            heads.c_offset.fill_(offset)
    return Calibration(quality.num_rows, consistency.num_rows, slope, offset, strength, level_q, level_c)


def _said(heads: ResidualHeads, batches: Iterable[Batch]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (w . v + b0, label) and (a (s + 1)/2 + b, label) of the rows with that label, float64 and float32."""
    found: list[tuple[Tensor, ...]] = []
    parameters = (heads.q_base.weight[0], heads.q_base.bias[0], heads.c_slope, heads.c_offset)
    w_D, b0, a, b = (parameter.double() for parameter in parameters)
    for batch in batches:
        v_BD = batch.v_BD.double()
        logit_B, line_B = v_BD @ w_D + b0, a * ((cosine(v_BD, batch.t_BD.double()) + 1) / 2) + b
        has_q_B, has_c_B = ~torch.isnan(batch.q_B), ~torch.isnan(batch.c_B)
        found.append((logit_B[has_q_B], batch.q_B[has_q_B], line_B[has_c_B], batch.c_B[has_c_B]))
    logit_N, q_N, line_N, c_N = (torch.cat(column) for column in zip(*found, strict=True))
    return (logit_N, q_N), (line_N, c_N)


def calibrate_branch(heads: DirectHeads, read: Callable[[], Iterable[Batch]]) -> Calibration:
    """Set k, m of two-branch heads in place: least squares of the logit of consistency on s, over labelled rows.

    Labels are pulled in, and m is moved to their mean, as for w, b0. In the calibration `slope` is k, `offset` is m.
    """
    sums = Sums.zeros(1, heads.cosine_slope.device)
    s_N, c_N = [], []
    for batch in read():
        has_c_B = ~torch.isnan(batch.c_B)
        s_N.append(cosine(batch.v_BD.double(), batch.t_BD.double())[has_c_B])
        c_N.append(batch.c_B[has_c_B])
        sums.add(s_N[-1][:, None], pulled_logit(c_N[-1]))
    slope = offset = level = None
    if sums.num_rows:
        slope, offset = fit_line(sums)
        level = sigmoid_shift(slope * torch.cat(s_N) + offset, torch.cat(c_N))
        offset += level
        with torch.no_grad():
            heads.cosine_slope.fill_(slope)
            heads.cosine_offset.fill_(offset)
    return Calibration(0, sums.num_rows, slope, offset, None, None, level)


def pulled_logit(label_N: Tensor) -> Tensor:
    """Return the logit of labels pulled into [LABEL_MARGIN, 1 - LABEL_MARGIN], float64; NaN stays."""
    return torch.logit(label_N.double().clamp(LABEL_MARGIN, 1 - LABEL_MARGIN))


class Ridge(NamedTuple):
    """A ridge fit y = w . x + intercept and the strength that was chosen; None: nothing varies, w = 0."""

    w_D: Tensor
    intercept: float
    strength: float | None


@dataclass
class Sums:
    """What least squares needs of rows x_ND, y_N: counts, sums and products in float64."""

    x_sum_D: Tensor
    gram_DD: Tensor
    xy_D: Tensor
    y_sum: float = 0.0
    yy: float = 0.0
    num_rows: int = 0

    @classmethod
    def zeros(cls, dim: int, device: torch.device | None = None) -> Sums:
        """Return the sums of no rows."""
        zero_D = torch.zeros(dim, dtype=torch.float64, device=device)
        return cls(x_sum_D=zero_D, gram_DD=torch.outer(zero_D, zero_D), xy_D=zero_D.clone())

    def add(self, x_ND: Tensor, y_N: Tensor) -> None:
        """Add float64 rows; those whose y is NaN are left out."""
        present_N = ~torch.isnan(y_N)
        if not present_N.all():
            x_ND, y_N = x_ND[present_N], y_N[present_N]
        self.x_sum_D = self.x_sum_D + x_ND.sum(dim=0)
        self.gram_DD.addmm_(x_ND.T, x_ND)
        self.xy_D.addmv_(x_ND.T, y_N)
        self.y_sum += float(y_N.sum())
        self.yy += float(y_N @ y_N)
        self.num_rows += len(y_N)

    def centred(self) -> tuple[Tensor, Tensor, float]:
        """Return (gram_DD, xy_D, yy) of the rows less their means; UserError if anything is not finite."""
        mean_D, mean = self.x_sum_D / self.num_rows, self.y_sum / self.num_rows
        gram_DD = self.gram_DD - torch.outer(self.x_sum_D, mean_D)
        xy_D = self.xy_D - self.x_sum_D * mean
        if not (torch.isfinite(gram_DD).all() and torch.isfinite(xy_D).all()):
            raise UserError(
                "the training embeddings or labels hold values that are not finite",
                remedy="find the damaged rows with `deltaclip inspect --verify`",
            )
        return gram_DD, xy_D, max(self.yy - self.y_sum * mean, 0.0)


def fit_line(sums: Sums) -> tuple[float, float]:
    """Return (slope, intercept) of least squares on one column; slope 0 where that column does not vary."""
    gram_11, xy_1, _ = sums.centred()
    variation, floor = float(gram_11), 1e-13 * float(sums.gram_DD)  # below: rounding of equal values
    slope = float(xy_1) / variation if variation > floor else 0.0
    return slope, (sums.y_sum - slope * float(sums.x_sum_D)) / sums.num_rows


def fit_ridge(sums: Sums, strengths: Iterable[float] | None = None) -> Ridge:
    """Return the ridge fit (intercept not penalised) whose strength (> 0) minimises generalised cross-validation.

    GCV(alpha) = N RSS(alpha) / (N - 1 - tr H(alpha))^2: leave-one-out made invariant to rotations, from one
    eigendecomposition of the centred Gram matrix; the 1 is the intercept's. Ties go to the larger strength.
    Golub, Heath, Wahba, Technometrics 21 (1979) 215.
    """
    gram_DD, xy_D, yy = sums.centred()
    n, mean_D, mean = sums.num_rows, sums.x_sum_D / sums.num_rows, sums.y_sum / sums.num_rows
    eigen_D, basis_DD = torch.linalg.eigh(gram_DD)
    # Directions without variation (there are at least D - N + 1) hold only rounding of the sums: GCV, which
    # divides by their variation, leaves them out.
    kept_D = eigen_D > 1e-13 * len(eigen_D) * sums.gram_DD.trace()
    rank = int(kept_D.sum())
    if rank == 0 or yy <= 1e-13 * sums.yy:
        return Ridge(torch.zeros_like(mean_D), mean, None)
    z_D = basis_DD.T @ xy_D
    e_D, explained_D = eigen_D[kept_D], z_D[kept_D].square() / eigen_D[kept_D]

    unit = float(e_D.sum()) / n
    grid = [unit * relative for relative in RELATIVE_STRENGTHS] if strengths is None else list(strengths)
    alpha_K = torch.tensor(sorted(grid, reverse=True), dtype=torch.float64, device=e_D.device)
    # Both factors are sums of positive terms, which does not cancel when the fit is near exact (N <= D).
    shrunk_KD = alpha_K[:, None] / (e_D[None, :] + alpha_K[:, None])
    unexplained = max(yy - float(explained_D.sum()), 0.0) if rank < n - 1 else 0.0
    rss_K = unexplained + (explained_D * shrunk_KD.square()).sum(dim=1)
    freedom_K = max(n - 1 - rank, 0) + shrunk_KD.sum(dim=1)
    best = int(torch.argmin(rss_K / freedom_K.square()))

    # All directions: without one of 2e-9 of the mean variation, w was off by 5e-5 of its largest entry.
    w_D = basis_DD @ (z_D / (eigen_D.clamp(min=0) + alpha_K[best]))
    return Ridge(w_D, mean - float(w_D @ mean_D), float(alpha_K[best]))
