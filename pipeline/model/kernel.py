"""Closed-form members of a base: ridge on vectors of several sources, straight or in a kernel.

Knows the closed forms, what a fit without some rows says of them, and how many rows it is fitted to. Must not know
where rows come from; give it no test rows. Ridge in a kernel: Saunders, Gammerman, Vovk, ICML 1998; with landmarks
(Nystroem): Williams, Seeger, NIPS 2000.

Shapes: N rows, W width of a part, P of a point, which is all parts side by side, L landmarks or features, M rows that
are fitted to.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.group_ridge import DualRidge, DualSolved, GroupRidge, Refits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Rows that are fitted to, whole groups of them, and landmarks: the closed form costs rows * landmarks^2, some seconds.
MAX_ROWS, MAX_POINTS = 10_000, 2_500
MemberKind = Literal["kernel", "line"]
# Candidate strengths: the ratio of noise to signal variance a row, as the kernel of a row with itself is 1, and points
# of a line have a mean squared distance of the sum of weights. Of many equal features a line needs less.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "kernel": tuple(2.0**k for k in range(-9, 4)),
    "line": tuple(4.0**k for k in range(-8, 4)),
}
FIRST_STRENGTH: dict[str, float] = {"kernel": 0.25, "line": 0.25}
_JITTER = 1e-6  # keeps Cholesky's pivots positive where rows are equal
BLOCK = 4096  # rows that are scored at a time


class Vectors(Protocol):
    """(N, W) numbers of rows: a tensor, or something that reads the rows that it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Tensor:
        """Return some rows, float32."""


class Part(NamedTuple):
    """Vectors (N, W) of one source; `weight` is their mean squared distance among rows, whatever their own size.

    `each` scales every entry to variance 1 (entries of different kinds), else all alike (an embedding). `name` is what
    messages call it.
    """

    vector_NW: Vectors
    weight: float
    each: bool = True
    name: str = "a view"

    def taken(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the vectors of some rows, float32.

        Raises:
            UserError: some are not finite.
        """
        vector_GW = self.vector_NW[torch.from_numpy(rows)].float()
        if not torch.isfinite(vector_GW).all():
            message = f"{self.name} holds values that are not finite"
            raise UserError(message, place="--base", remedy="extract it again, or give calibrated")
        return vector_GW


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


class Line(nn.Module):
    """f(p) = intercept + sum_p weight_p (p - shift_p); (N, P) -> (N,). A new one is 0 everywhere."""

    shift_P: Tensor
    weight_P: Tensor
    intercept: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (
            ("shift_P", torch.zeros(width)),
            ("weight_P", torch.zeros(width)),
            ("intercept", torch.zeros(())),
        ):
            self.register_buffer(name, value)

    def forward(self, point_NP: Tensor) -> Tensor:
        """Return f of every row, float32."""
        said_N: Tensor = self.intercept + (point_NP - self.shift_P) @ self.weight_P
        return said_N


Member = Kernel | Line


class MemberFit(NamedTuple):
    """What was fitted: rows, landmarks (0: none), and the strength with the least squared error over left-out rows."""

    num_rows: int
    num_points: int
    strength: float
    rmse: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self._asdict()


@dataclass(frozen=True)
class Fitted:
    """A member fitted to `rows_M`, what fits without a row's group say of these rows, and fits without other rows."""

    member: Member
    fit: MemberFit
    rows_M: NDArray[np.int64]
    left_out_M: Tensor
    refits: Refits

    def say(self, parts: Sequence[Part]) -> Tensor:
        """Return what it says of all rows (N,) float32: of a fitted row what a fit without that row's group says.

        Errors of these predictions are those of new rows, which makes them fit to train a correction on (the scaling of
        entries is that of all fitted rows, and so is the strength).
        """
        num_rows = len(parts[0].vector_NW)
        return with_left_out(self.member, parts, self.rows_M, self.left_out_M, num_rows=num_rows)


def with_left_out(
    member: Member | None, parts: Sequence[Part], rows_M: NDArray[np.int64], left_out_M: Tensor, *, num_rows: int
) -> Tensor:
    """Return what a member says of all rows, (N,) float32, but of `rows_M` what is given; None says 0."""
    said_N = torch.zeros(num_rows, device=left_out_M.device)
    said_N[torch.from_numpy(rows_M)] = left_out_M.float()
    if member is not None:
        others = np.setdiff1d(np.arange(num_rows), rows_M)
        with torch.no_grad():
            for first in range(0, len(others), BLOCK):
                block = others[first : first + BLOCK]
                said_N[torch.from_numpy(block)] = member(points(parts, block))
    return said_N


def fit_member(
    kind: MemberKind,
    parts: Sequence[Part],
    label_N: Tensor,
    groups_N: NDArray[Any],
    *,
    seed: int,
    most: int = MAX_ROWS,
    strength: float | None = None,
) -> Fitted:
    """Fit a member to rows, in float64; the intercept is not penalised.

    Args:
        kind: `kernel`, or `line` for none.
        parts: vectors of all rows; nothing in them may have been learned from labels, see `kernel_on_score.py`.
        label_N: targets; NaN = missing, not fitted to.
        groups_N: rows of one group are left out together, so that images of a prompt do not vouch for each other.
        seed: of the choice of rows and landmarks where there are too many.
        most: rows that are fitted to.
        strength: of the penalty; None: the one of `STRENGTHS` with the least error over left-out rows.

    Raises:
        UserError: fewer than two groups have a label, or vectors that are not finite.
    """
    generator = np.random.default_rng(seed)
    rows_M = chosen_rows(~torch.isnan(label_N), groups_N, generator, most=most)
    if len(np.unique(groups_N[rows_M])) < 2:
        raise UserError("a base needs two groups with labels", place="--base", remedy="give calibrated")
    marks_L = chosen_marks(len(rows_M), generator)
    space = Space.of(kind, parts, rows_M, marks_L)
    y_M, groups_M = label_N[rows_M].double(), groups_N[rows_M]

    def features(scaled_NP: Tensor) -> Tensor:
        return products(kind, scaled_NP, space.scaled_MP) if is_dual else space.phi(scaled_NP)

    # Where every row is a landmark the kernel itself is less work than features of it.
    is_dual = kind == "kernel" and len(marks_L) == len(rows_M)
    ridge = (DualRidge if is_dual else GroupRidge)(features(space.scaled_MP), y_M, groups_M)
    solved = ridge.best(STRENGTHS[kind], first=FIRST_STRENGTH[kind]) if strength is None else ridge.solve(strength)
    rmse = float((solved.left_out_M - y_M).square().mean().sqrt())
    fit = MemberFit(len(rows_M), space.num_points, solved.strength, rmse)
    refits = Refits(lambda rows: features(space.scaled(points(parts, rows))), rows_M, solved)
    if isinstance(solved, DualSolved):
        member = space.of_marks(solved.beta_M, solved.intercept)
    else:
        member = space.member(solved.w_L, solved.intercept)
    return Fitted(member, fit, rows_M, solved.left_out_M, refits)


def points(parts: Sequence[Part], rows: NDArray[np.int64]) -> Tensor:
    """Return the points of some rows, (N, P) float32."""
    return torch.cat([part.taken(rows) for part in parts], dim=1)


@dataclass(frozen=True)
class Space:
    """Features of points for ridge: the points of a line, where they are few (`is_plain`), else those of landmarks.

    `scaled_MP` are the fitted rows, `marks_L` which of them are landmarks; float32, as distances of scaled rows are
    right to 1e-7 there, a tenth of the jitter.
    """

    kind: MemberKind
    shift_P: Tensor
    scale_P: Tensor
    scaled_MP: Tensor
    marks_L: NDArray[np.int64]
    is_plain: bool

    @classmethod
    def of(
        cls, kind: MemberKind, parts: Sequence[Part], rows_M: NDArray[np.int64], marks_L: NDArray[np.int64]
    ) -> Space:
        """Return the space of parts, scaled by the rows that are fitted to."""
        scaled_MP, shift_P, scale_P = scaled_points(parts, rows_M)
        is_plain = kind == "line" and scaled_MP.shape[1] <= len(marks_L)
        return cls(kind, shift_P, scale_P, scaled_MP, marks_L, is_plain)

    @functools.cached_property
    def root(self) -> Tensor:
        """C of K = C C^T over the landmarks."""
        marks_LP = self.scaled_MP[self.marks_L]
        return landmark_root(products(self.kind, marks_LP, marks_LP))

    @property
    def num_points(self) -> int:
        """Number of landmarks that the member has."""
        return len(self.marks_L) if self.kind == "kernel" else 0

    def scaled(self, point_NP: Tensor) -> Tensor:
        """Return points as distances are measured."""
        return (point_NP - self.shift_P) * self.scale_P

    def phi(self, scaled_NP: Tensor) -> Tensor:
        """Return the features (N, L) float64 of scaled points, Phi Phi^T being the kernel."""
        if self.is_plain:
            return scaled_NP.double()
        k_NL = products(self.kind, scaled_NP, self.scaled_MP[self.marks_L])
        phi_LN: Tensor = torch.linalg.solve_triangular(self.root, k_NL.T, upper=False)
        return phi_LN.T

    def member(self, w_L: Tensor, intercept: Tensor) -> Member:
        """Return the member that says intercept + phi(p) w."""
        if self.is_plain:
            return self._line(w_L, intercept)
        beta_L = torch.linalg.solve_triangular(self.root.T, w_L[:, None], upper=True)[:, 0]
        return self.of_marks(beta_L, intercept)

    def of_marks(self, beta_L: Tensor, intercept: Tensor) -> Member:
        """Return the member that says intercept + k(p, landmarks) beta."""
        marks_LP = self.scaled_MP[self.marks_L]
        if self.kind == "line":
            return self._line(marks_LP.double().T @ beta_L, intercept)
        kernel = Kernel(len(self.shift_P), len(beta_L)).to(beta_L.device)
        kernel.shift_P, kernel.scale_P, kernel.points_LP = self.shift_P, self.scale_P, marks_LP
        kernel.beta_L, kernel.intercept = beta_L.float(), intercept.float()
        return kernel

    def _line(self, weight_P: Tensor, intercept: Tensor) -> Line:
        line = Line(len(self.shift_P)).to(weight_P.device)
        line.shift_P, line.weight_P = self.shift_P, (weight_P * self.scale_P).float()
        line.intercept = intercept.float()
        return line


def chosen_rows(
    labelled_N: Tensor, groups_N: NDArray[Any], generator: np.random.Generator, *, most: int = MAX_ROWS
) -> NDArray[np.int64]:
    """Return the labelled rows, or of more than `most` whole groups at random up to that many."""
    rows = np.flatnonzero(labelled_N.cpu().numpy())
    if len(rows) <= most:
        return rows
    _, code_N, size_G = np.unique(groups_N[rows], return_inverse=True, return_counts=True)
    order_G = generator.permutation(len(size_G))
    kept = order_G[: max(2, int(np.searchsorted(np.cumsum(size_G[order_G]), most, side="right")))]
    found = rows[np.isin(code_N, kept)]
    # Two groups may be more than that: then a part of each.
    return found if len(found) <= most else np.sort(generator.permutation(found)[:most])


def chosen_marks(num_rows: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return which rows are landmarks: all, or MAX_POINTS of them at random."""
    return generator.permutation(num_rows)[:MAX_POINTS] if num_rows > MAX_POINTS else np.arange(num_rows)


def scaled_points(parts: Sequence[Part], rows_M: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the points of rows, scaled until each part has the mean squared distance of its weight; shift and scale.

    All float32: (M, P), (P,), (P,).

    Raises:
        UserError: vectors that are not finite.
    """
    found, shifts, scales = [], [], []
    for part in parts:
        vector_MW = part.taken(rows_M)
        mean_W = vector_MW.mean(dim=0, dtype=torch.float64)
        centred_MW = vector_MW.double() - mean_W
        variance_W = centred_MW.square().mean(dim=0)
        varies_W = variance_W > 1e-12 * variance_W.max().clamp(min=1e-30)
        scale_W = torch.where(varies_W, variance_W.clamp(min=1e-30).rsqrt() if part.each else 1.0, 0.0)
        # Two rows are twice the sum of variances apart, in the mean.
        spread = 2 * (variance_W * scale_W.square()).sum()
        shifts.append(mean_W.float())
        scales.append((scale_W * (part.weight / spread.clamp(min=1e-30)).sqrt()).float())
        found.append((vector_MW - shifts[-1]) * scales[-1])
    return torch.cat(found, dim=1), torch.cat(shifts), torch.cat(scales)


def products(kind: MemberKind, a_NP: Tensor, b_LP: Tensor) -> Tensor:
    """Return k(a, b) of every pair of scaled points, (N, L) float64."""
    if kind == "line":
        return (a_NP @ b_LP.T).double()
    return torch.exp(-squared_distances(a_NP, b_LP).double())


def landmark_root(k_LL: Tensor) -> Tensor:
    """Return the lower triangular C of K = C C^T, K the kernel of landmarks, changed in place by what keeps C real."""
    k_LL.diagonal().add_(_JITTER * max(1.0, float(k_LL.diagonal().max())))
    c_LL: Tensor = torch.linalg.cholesky(k_LL)
    return c_LL


def squared_distances(a_NP: Tensor, b_LP: Tensor) -> Tensor:
    """Return |a - b|^2 of every pair of rows, (N, L)."""
    squares = a_NP.square().sum(dim=1)[:, None] + b_LP.square().sum(dim=1)
    return (squares - 2 * a_NP @ b_LP.T).clamp(min=0)
