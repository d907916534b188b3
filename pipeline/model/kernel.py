"""A base by kernel ridge regression on vectors of several sources: a view of the image, the prompt, another score.

Knows the closed form, its leave-one-group-out predictions and how many rows it is fitted to. Must not know where rows
come from; give it no test rows. Ridge in a kernel: Saunders, Gammerman, Vovk, ICML 1998; with landmarks (Nystroem):
Williams, Seeger, NIPS 2000.

Shapes: N rows, W width of a part, P of a point, which is all parts side by side, L landmarks, G rows of a group.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Rows that are fitted to, whole groups of them, and landmarks: the closed form costs rows * landmarks^2, some seconds.
MAX_ROWS, MAX_POINTS = 10_000, 2_500
# Candidate strengths. The kernel of a row with itself is 1, so a strength is the ratio of noise to signal variance.
STRENGTHS = tuple(2.0**k for k in range(-6, 4))
_JITTER = 1e-6  # keeps Cholesky's pivots positive where rows are equal


class Part(NamedTuple):
    """Vectors (N, W) of one source; `weight` is their mean squared distance in the kernel, whatever their own size.

    `each` scales every entry to variance 1 (entries of different kinds), else all alike (an embedding).
    """

    vector_NW: Tensor
    weight: float
    each: bool = True


class Kernel(nn.Module):
    """f(p) = intercept + sum_l beta_l exp(-|A p - z_l|^2), A a shift and scale of each entry; (N, P) -> (N,).

    `points` landmarks of `width`; a new one is 0 everywhere.
    """

    shift_P: Tensor
    scale_P: Tensor
    points_LP: Tensor
    beta_L: Tensor
    intercept: Tensor

    def __init__(self, width: int, points: int) -> None:
        super().__init__()
        for name, value in (
            ("shift_P", torch.zeros(width)),
            ("scale_P", torch.zeros(width)),
            ("points_LP", torch.zeros(points, width)),
            ("beta_L", torch.zeros(points)),
            ("intercept", torch.zeros(())),
        ):
            self.register_buffer(name, value)

    def forward(self, point_NP: Tensor) -> Tensor:
        """Return f of every row, float32."""
        a_NP = (point_NP - self.shift_P) * self.scale_P
        return self.intercept + torch.exp(-_squared_distances(a_NP, self.points_LP)) @ self.beta_L


@dataclass(frozen=True)
class KernelFit:
    """What was fitted: rows, landmarks, and the strength with the least squared error over left-out groups."""

    num_rows: int
    num_points: int
    strength: float
    rmse: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def fit_kernel(
    parts: Sequence[Part], label_N: Tensor, groups_N: NDArray[Any], *, seed: int
) -> tuple[Kernel, Tensor, KernelFit]:
    """Fit a kernel to rows, in float64.

    Args:
        parts: vectors of all rows.
        label_N: targets; NaN = missing, not fitted to.
        groups_N: rows of one group are left out together, so that images of a prompt do not vouch for each other.
        seed: of the choice of rows and landmarks where there are too many.

    Returns:
        the kernel; its predictions (N,) float32, those of a fitted row from a fit without that row's group; and what
        was fitted. Errors of these predictions are those of new rows, which makes them fit to train a correction on
        (intercept and scaling are those of all fitted rows: of 100 groups that is .0003 of the error, of 10 .03).

    Raises:
        UserError: fewer than two groups have a label, or vectors that are not finite.
    """
    generator = np.random.default_rng(seed)
    chosen_N = _chosen(~torch.isnan(label_N), groups_N, generator)
    if len(np.unique(groups_N[chosen_N])) < 2:
        raise UserError("a kernel base needs two groups with labels", place="--base-init", remedy="give calibrated")
    kernel = _scaled([part._replace(vector_NW=part.vector_NW[chosen_N]) for part in parts])
    point_NP = torch.cat([part.vector_NW for part in parts], dim=1)
    a_NP = (point_NP[chosen_N] - kernel.shift_P) * kernel.scale_P
    marks = generator.permutation(len(a_NP))[:MAX_POINTS] if len(a_NP) > MAX_POINTS else np.arange(len(a_NP))
    kernel.points_LP = a_NP[marks]
    y_N = label_N[chosen_N].double()
    ridge = _solve(a_NP.double(), kernel.points_LP.double(), y_N - y_N.mean(), groups_N[chosen_N])
    kernel.beta_L, kernel.intercept = ridge.beta_L.float(), y_N.mean().float()
    with torch.no_grad():
        predicted_N = torch.cat([kernel(part) for part in point_NP.split(4096)])
    predicted_N[torch.from_numpy(chosen_N)] = (y_N - ridge.left_out_N).float()
    return (
        kernel,
        predicted_N,
        KernelFit(len(a_NP), len(marks), ridge.strength, float(ridge.left_out_N.square().mean().sqrt())),
    )


def _chosen(labelled_N: Tensor, groups_N: NDArray[Any], generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the labelled rows, or of more than MAX_ROWS whole groups at random up to that many."""
    rows = np.flatnonzero(labelled_N.cpu().numpy())
    if len(rows) <= MAX_ROWS:
        return rows
    _, code_N, size_G = np.unique(groups_N[rows], return_inverse=True, return_counts=True)
    order_G = generator.permutation(len(size_G))
    kept = order_G[: max(2, int(np.searchsorted(np.cumsum(size_G[order_G]), MAX_ROWS, side="right")))]
    found = rows[np.isin(code_N, kept)]
    # Two groups may be more than that: then a part of each.
    return found if len(found) <= MAX_ROWS else np.sort(generator.permutation(found)[:MAX_ROWS])


def _scaled(parts: Sequence[Part]) -> Kernel:
    """Return a kernel of no landmarks whose squared distances have the mean of its weight over each part."""
    shifts, scales = [], []
    for part in parts:
        vector_NW = part.vector_NW.double()
        if not torch.isfinite(vector_NW).all():
            raise UserError("a view holds values that are not finite", place="--view", remedy="extract it again")
        mean_W = vector_NW.mean(dim=0)
        variance_W = (vector_NW - mean_W).square().mean(dim=0)
        varies_W = variance_W > 1e-12 * variance_W.max().clamp(min=1e-30)
        scale_W = torch.where(varies_W, variance_W.clamp(min=1e-30).rsqrt() if part.each else 1.0, 0.0)
        # Two rows are twice the sum of variances apart, in the mean.
        spread = 2 * (variance_W * scale_W.square()).sum()
        shifts.append(mean_W)
        scales.append(scale_W * (part.weight / spread.clamp(min=1e-30)).sqrt())
    kernel = Kernel(sum(map(len, shifts)), 0).to(shifts[0].device)
    kernel.shift_P, kernel.scale_P = torch.cat(shifts).float(), torch.cat(scales).float()
    return kernel


class _Ridge(NamedTuple):
    beta_L: Tensor
    left_out_N: Tensor  # y - f where f was fitted without the row's group
    strength: float


def _solve(a_NP: Tensor, z_LP: Tensor, y_N: Tensor, groups_N: NDArray[Any]) -> _Ridge:
    """Return the ridge fit of y on the features Phi = K_NL C^-T, K_LL = C C^T, for which Phi Phi^T is the kernel."""
    k_LL = torch.exp(-_squared_distances(z_LP, z_LP))
    k_LL.diagonal().add_(_JITTER)
    c_LL = torch.linalg.cholesky(k_LL)
    k_LN = torch.exp(-_squared_distances(z_LP, a_NP))
    phi_LN = torch.linalg.solve_triangular(c_LL, k_LN, upper=False)
    eigen_L, basis_LL = torch.linalg.eigh(phi_LN @ phi_LN.T)
    psi_NL = phi_LN.T @ basis_LL
    z_L = psi_NL.T @ y_N
    order = np.argsort(groups_N, kind="stable")
    cuts = np.flatnonzero(np.concatenate([[True], groups_N[order][1:] != groups_N[order][:-1]]))
    members = [torch.from_numpy(rows) for rows in np.split(order, cuts[1:])]
    found = []
    for strength in STRENGTHS:
        shrunk_L = 1 / (eigen_L.clamp(min=0) + strength)
        residual_N = y_N - psi_NL @ (shrunk_L * z_L)
        left_out_N = torch.empty_like(residual_N)
        for rows in members:
            psi_GL = psi_NL[rows]
            # Leaving out a group: e_g = (I - H_gg)^-1 r_g, H = Psi diag(1 / (eigen + strength)) Psi^T.
            system_GG = torch.eye(len(rows), dtype=y_N.dtype, device=y_N.device) - (psi_GL * shrunk_L) @ psi_GL.T
            left_out_N[rows] = torch.linalg.solve(system_GG, residual_N[rows])
        found.append((float(left_out_N.square().mean()), -strength, left_out_N, shrunk_L))
    _, negative, left_out_N, shrunk_L = min(found, key=lambda each: each[:2])
    beta_L = torch.linalg.solve_triangular(c_LL.T, (basis_LL @ (shrunk_L * z_L))[:, None], upper=True)[:, 0]
    return _Ridge(beta_L, left_out_N, -negative)


def _squared_distances(a_NP: Tensor, b_LP: Tensor) -> Tensor:
    squares = a_NP.square().sum(dim=1)[:, None] + b_LP.square().sum(dim=1)
    return (squares - 2 * a_NP @ b_LP.T).clamp(min=0)
