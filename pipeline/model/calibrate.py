"""The calibrated start of the bases, in closed form from training labels.

Knows least squares for a, b and ridge on logits for w, b0, both from sums that stream over batches, and the constant
that then gives each base the mean of its labels: memory is D x D and a number a row. Must not know where rows come
from: it fits to all it is given, so give it training rows only.

Shapes: N rows, D embedding width, K candidate strengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.heads import DirectPairHead, ImageHead
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


def calibrate(heads: ResidualHeads, read: Callable[[], Iterable[Batch]]) -> dict[str, Any]:
    """Set the bases of `heads` in place from two passes over labelled rows; labels in [0, 1], NaN = missing.

    a, b of a pair target: least squares of the label on (s + 1)/2. w, b0 of an image target: ridge (intercept free) on
    the logit of the label, pulled into [LABEL_MARGIN, 1 - LABEL_MARGIN], strength by generalised cross-validation. Sums
    are in float64. Then b0 and b are moved until the mean of each base, as it is reported, is the mean of its labels;
    every row counts alike in all of this, also with `--std-weighting`.

    Args:
        heads: of a new model.
        read: called for each pass; the same rows in the same order.

    Returns:
        of each target, as plain JSON values: `num_rows`, and `strength` of the ridge (None: w = 0, as labels or
        embeddings do not vary) or `slope` and `offset`; and `level`, what stands in b0 or b beyond least squares. None
        where no row has a label: the base stays at identity.
    """
    device = next(heads.parameters()).device
    sees_image = {target.name: target.sees == "image" for target in heads.targets}
    sums = {name: Sums.zeros(heads.dim if is_image else 1, device) for name, is_image in sees_image.items()}
    for batch in read():
        v_ND = batch.v_BD.double()
        z_N1 = (cosine(v_ND, batch.t_BD.double())[:, None] + 1) / 2
        for name, is_image in sees_image.items():
            label_N = batch.label_B[name]
            sums[name].add(v_ND if is_image else z_N1, pulled_logit(label_N) if is_image else label_N.double())
    about = {name: _least_squares(heads, name, found) for name, found in sums.items()}
    with torch.no_grad():
        for name, (said_N, label_N) in _said(heads, read()).items():
            if not len(label_N):
                continue
            head = heads.head(name)
            if isinstance(head, ImageHead):
                level = sigmoid_shift(said_N, label_N)
                assert head.base is not None, "new heads have no fitted bases"
                head.base.bias.add_(level)
            else:
                level = clamp_shift(said_N, label_N)
                about[name]["offset"] += level
                head.offset.fill_(about[name]["offset"])
            about[name]["level"] = level
    return about


def _least_squares(heads: ResidualHeads, target: str, sums: Sums) -> dict[str, Any]:
    """Put the fit to some sums into the base of a target and return it."""
    head, has_rows = heads.head(target), sums.num_rows > 0
    about: dict[str, Any] = {"num_rows": sums.num_rows}
    with torch.no_grad():
        if isinstance(head, ImageHead):
            ridge = fit_ridge(sums) if has_rows else None
            if ridge:
                assert head.base is not None, "new heads have no fitted bases"
                head.base.weight.copy_(ridge.w_D[None, :])
                head.base.bias.fill_(ridge.intercept)
            return about | {"strength": ridge.strength if ridge else None, "level": None}
        slope, offset = fit_line(sums) if has_rows else (None, None)
        if slope is not None and offset is not None:
            head.slope.fill_(slope)
            head.offset.fill_(offset)
        return about | {"slope": slope, "offset": offset, "level": None}


def _said(heads: ResidualHeads, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by target what goes into the sigmoid or clamp of its base, float64, and the label, of labelled rows."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {target.name: [] for target in heads.targets}
    for batch in batches:
        v_BD = batch.v_BD.double()
        z_B = (cosine(v_BD, batch.t_BD.double()) + 1) / 2
        for name, parts in found.items():
            head, label_B = heads.head(name), batch.label_B[name]
            if isinstance(head, ImageHead):
                assert head.base is not None, "new heads have no fitted bases"
                said_B = v_BD @ head.base.weight[0].double() + head.base.bias[0].double()
            else:
                said_B = head.slope.double() * z_B + head.offset.double()
            has_B = ~torch.isnan(label_B)
            parts.append((said_B[has_B], label_B[has_B]))
    columns = {name: list(zip(*parts, strict=True)) for name, parts in found.items()}
    return {name: (torch.cat(said), torch.cat(labels)) for name, (said, labels) in columns.items()}


def calibrate_branch(heads: DirectHeads, read: Callable[[], Iterable[Batch]]) -> dict[str, Any]:
    """Set k, m of two-branch heads in place: least squares of the logit of a pair's label on s, over labelled rows.

    Labels are pulled in, and m is moved to their mean, as for w, b0. What is returned is that of `calibrate`:
    `slope` is k, `offset` is m.
    """
    device = next(heads.parameters()).device
    pairs = {target.name: heads.head(target.name) for target in heads.targets if target.sees == "pair"}
    sums = {name: Sums.zeros(1, device) for name in pairs}
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in pairs}
    for batch in read():
        s_B = cosine(batch.v_BD.double(), batch.t_BD.double())
        for name in pairs:
            has_B = ~torch.isnan(batch.label_B[name])
            rows[name].append((s_B[has_B], batch.label_B[name][has_B]))
            sums[name].add(s_B[has_B][:, None], pulled_logit(batch.label_B[name][has_B]))
    about: dict[str, Any] = {}
    for name, head in pairs.items():
        slope = offset = level = None
        if sums[name].num_rows:
            s_N, label_N = (torch.cat(column) for column in zip(*rows[name], strict=True))
            slope, offset = fit_line(sums[name])
            level = sigmoid_shift(slope * s_N + offset, label_N)
            offset += level
            assert isinstance(head, DirectPairHead), "it sees the prompt"
            with torch.no_grad():
                head.cosine_slope.fill_(slope)
                head.cosine_offset.fill_(offset)
        about[name] = {"num_rows": sums[name].num_rows, "slope": slope, "offset": offset, "level": level}
    return about


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
