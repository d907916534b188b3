"""A base by kernel ridge regression on vectors of several sources: a view of the image, the prompt, another score.

Knows the closed form, what a fit without some rows says of them, and how many rows it is fitted to. Must not know
where rows come from; give it no test rows. Ridge in a kernel: Saunders, Gammerman, Vovk, ICML 1998; with landmarks
(Nystroem): Williams, Seeger, NIPS 2000.

Shapes: N rows, W width of a part, P of a point, which is all parts side by side, L landmarks, M rows that are fitted
to, G rows of a group or of folds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
        return self.intercept + torch.exp(-squared_distances(self.scaled(point_NP), self.points_LP)) @ self.beta_L

    def scaled(self, point_NP: Tensor) -> Tensor:
        """Return A p of every row, in which distances are measured."""
        return (point_NP - self.shift_P) * self.scale_P


@dataclass(frozen=True)
class KernelFit:
    """What was fitted: rows, landmarks, and the strength with the least squared error over left-out rows."""

    num_rows: int
    num_points: int
    strength: float
    rmse: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def fit_kernel(
    parts: Sequence[Part], label_N: Tensor, groups_N: NDArray[Any], *, seed: int
) -> tuple[Kernel, Tensor, KernelFit, Refits]:
    """Fit a kernel to rows, in float64; the intercept is not penalised.

    Args:
        parts: vectors of all rows; nothing in them may have been learned from labels, see `kernel_on_score.py`.
        label_N: targets; NaN = missing, not fitted to.
        groups_N: rows of one group are left out together, so that images of a prompt do not vouch for each other.
        seed: of the choice of rows and landmarks where there are too many.

    Returns:
        the kernel; its predictions (N,) float32, those of a fitted row from a fit without that row's group; what was
        fitted; and fits without other rows. Errors of these predictions are those of new rows, which makes them fit to
        train a correction on (the scaling of entries is that of all rows, and so is the strength, one of ten).

    Raises:
        UserError: fewer than two groups have a label, or vectors that are not finite.
    """
    generator = np.random.default_rng(seed)
    chosen_M = chosen_rows(~torch.isnan(label_N), groups_N, generator)
    if len(np.unique(groups_N[chosen_M])) < 2:
        raise UserError("a kernel base needs two groups with labels", place="--base-init", remedy="give calibrated")
    kernel = scaled_kernel([part._replace(vector_NW=part.vector_NW[chosen_M]) for part in parts])
    point_NP = torch.cat([part.vector_NW for part in parts], dim=1)
    a_MP = kernel.scaled(point_NP[chosen_M])
    kernel.points_LP = a_MP[chosen_marks(len(a_MP), generator)]
    y_M = label_N[chosen_M].double()
    ridge = _solve(a_MP.double(), kernel.points_LP.double(), y_M, groups_N[chosen_M])
    kernel.beta_L, kernel.intercept = ridge.beta_L.float(), ridge.intercept.float()
    with torch.no_grad():
        predicted_N = torch.cat([kernel(part) for part in point_NP.split(4096)])
    predicted_N[torch.from_numpy(chosen_M)] = (y_M - ridge.left_out_M).float()
    fit = KernelFit(len(a_MP), len(kernel.beta_L), ridge.strength, float(ridge.left_out_M.square().mean().sqrt()))
    return kernel, predicted_N, fit, Refits(kernel, point_NP, chosen_M, ridge)


def chosen_rows(labelled_N: Tensor, groups_N: NDArray[Any], generator: np.random.Generator) -> NDArray[np.int64]:
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


def chosen_marks(num_rows: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return which rows are landmarks: all, or MAX_POINTS of them at random."""
    return generator.permutation(num_rows)[:MAX_POINTS] if num_rows > MAX_POINTS else np.arange(num_rows)


def scaled_kernel(parts: Sequence[Part]) -> Kernel:
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
    """A ridge fit f = intercept + Psi w on features Psi (M, L), which have mean 0 over the fitted rows."""

    beta_L: Tensor
    intercept: Tensor
    left_out_M: Tensor  # y - f where f was fitted without the row's group
    strength: float
    basis_LL: Tensor  # Psi = (k_ML - mean) basis
    mean_L: Tensor
    shrunk_L: Tensor
    residual_M: Tensor  # y - f
    own_M: Tensor  # f


class Refits:
    """Fits without some rows, in closed form from the fit to all: the strength stays, the intercept does not."""

    def __init__(self, kernel: Kernel, point_NP: Tensor, rows_M: NDArray[np.int64], ridge: _Ridge) -> None:
        self._kernel, self._point_NP, self._ridge = kernel, point_NP, ridge
        self._place_N = np.full(len(point_NP), -1)
        self._place_N[rows_M] = np.arange(len(rows_M))
        self.rows_M, self.own_M = rows_M, ridge.own_M  # the fitted rows, and f of them

    def of(self, rows_G: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Tensor]:
        """Return a function of places in `rows_G`: what a fit without these rows, labelled or not, says of them.

        Float64, 0 where no row is left to fit to. Vectors are looked at once.
        """
        ridge, place_G = self._ridge, self._place_N[rows_G]
        a_GP = self._kernel.scaled(self._point_NP[rows_G]).double()
        k_GL = torch.exp(-squared_distances(a_GP, self._kernel.points_LP.double()))
        said_G = self._kernel.intercept.double() + k_GL @ ridge.beta_L  # moved with the kernel
        psi_GL = (k_GL - ridge.mean_L) @ ridge.basis_LL
        num_rows = len(ridge.residual_M)

        def without(out: NDArray[np.int64]) -> Tensor:
            fitted = out[place_G[out] >= 0]
            if len(fitted) == num_rows:
                return torch.zeros_like(said_G[out])
            residual_S = ridge.residual_M[place_G[fitted]]
            left_SL = psi_GL[fitted] * ridge.shrunk_L
            # Leaving out rows S: e_S = (I - H_SS)^-1 r_S, and what is said of any row u changes by -H_uS e_S.
            system_SS = torch.eye(len(fitted), dtype=said_G.dtype, device=said_G.device)
            system_SS -= 1 / num_rows + left_SL @ psi_GL[fitted].T
            error_S = torch.linalg.solve(system_SS, residual_S)
            moved_G: Tensor = error_S.sum() / num_rows + psi_GL[out] @ (left_SL.T @ error_S)
            return said_G[out] - moved_G

        return without


def _solve(a_MP: Tensor, z_LP: Tensor, y_M: Tensor, groups_M: NDArray[Any]) -> _Ridge:
    """Return the ridge fit of y on the features Phi = K_ML C^-T, K_LL = C C^T, for which Phi Phi^T is the kernel."""
    c_LL = landmark_root(torch.exp(-squared_distances(z_LP, z_LP)))
    k_LM = torch.exp(-squared_distances(z_LP, a_MP))
    mean_L = k_LM.mean(dim=1)
    phi_LM = torch.linalg.solve_triangular(c_LL, k_LM - mean_L[:, None], upper=False)
    eigen_L, rotation_LL = torch.linalg.eigh(phi_LM @ phi_LM.T)
    psi_ML = phi_LM.T @ rotation_LL
    mean = y_M.mean()
    z_L = psi_ML.T @ (y_M - mean)
    order = np.argsort(groups_M, kind="stable")
    cuts = np.flatnonzero(np.concatenate([[True], groups_M[order][1:] != groups_M[order][:-1]]))
    members = [torch.from_numpy(rows) for rows in np.split(order, cuts[1:])]
    found = []
    for strength in STRENGTHS:
        shrunk_L = 1 / (eigen_L.clamp(min=0) + strength)
        residual_M = y_M - mean - psi_ML @ (shrunk_L * z_L)
        left_out_M = torch.empty_like(residual_M)
        for rows in members:
            psi_GL = psi_ML[rows]
            # Leaving out a group: e_g = (I - H_gg)^-1 r_g, H = 1/M + Psi diag(1 / (eigen + strength)) Psi^T.
            system_GG = torch.eye(len(rows), dtype=y_M.dtype, device=y_M.device) - (psi_GL * shrunk_L) @ psi_GL.T
            left_out_M[rows] = torch.linalg.solve(system_GG - 1 / len(y_M), residual_M[rows])
        found.append((float(left_out_M.square().mean()), -strength, left_out_M, shrunk_L, residual_M))
    _, negative, left_out_M, shrunk_L, residual_M = min(found, key=lambda each: each[:2])
    basis_LL = torch.linalg.solve_triangular(c_LL.T, rotation_LL, upper=True)
    beta_L = basis_LL @ (shrunk_L * z_L)
    return _Ridge(
        beta_L=beta_L,
        intercept=mean - mean_L @ beta_L,
        left_out_M=left_out_M,
        strength=-negative,
        basis_LL=basis_LL,
        mean_L=mean_L,
        shrunk_L=shrunk_L,
        residual_M=residual_M,
        own_M=y_M - residual_M,
    )


def landmark_root(k_LL: Tensor) -> Tensor:
    """Return the lower triangular C of K = C C^T, K the kernel of landmarks, changed in place by what keeps C real."""
    k_LL.diagonal().add_(_JITTER)
    c_LL: Tensor = torch.linalg.cholesky(k_LL)
    return c_LL


def squared_distances(a_NP: Tensor, b_LP: Tensor) -> Tensor:
    """Return |a - b|^2 of every pair of rows, (N, L)."""
    squares = a_NP.square().sum(dim=1)[:, None] + b_LP.square().sum(dim=1)
    return (squares - 2 * a_NP @ b_LP.T).clamp(min=0)
