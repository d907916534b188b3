"""Whether a row is like those that a run was trained on: its distance to them, against what left-out groups show.

A row has several parts: the embedding of its image, further vectors of it, the embedding of its prompt. Each is put
into a few coordinates, and how far it lies off these is one more; the distance is the mean to the nearest of some
training rows (Ramaswamy, Rastogi, Shim, SIGMOD 2000). What is usual is what training rows show when their own group is
left out, of the nearest rows as of the coordinates: the distance that 99 of 100 rows of a fresh group keep, groups
counted as in `conformal.py`. Knows arrays alone. Must not know what parts mean, or files.

Shapes: N rows, W width of a part, C coordinates, L landmarks, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.conformal import group_curve
from deltaclip.pipeline.scoring.groups import mix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from deltaclip.pipeline.scoring.agreement import FloatArray

LEVEL = 0.99  # share of the rows of fresh groups that are not to be flagged
# On AGIQA-3K 32 to 64 directions tell odd pictures best; whitened ones tell nothing. A thousand landmarks tell what
# all 2,000 rows do, and a run of three parts grows by less than 2 MB.
DIRECTIONS, LANDMARKS, NEAREST = 64, 1000, 5
FOLDS, MIN_GROUPS = 5, 10
BLOCK = 8192  # rows whose distances to all landmarks are in memory at a time


@dataclass(frozen=True)
class Part:
    """One kind of vector: c = [(x - shift) / scale . basis, what is left of the length / rest], and landmarks of it.

    `usual` is the distance that LEVEL of the rows of a fresh group keep.
    """

    shift_W: NDArray[np.float32]
    scale_W: NDArray[np.float32]
    basis_WC: NDArray[np.float32]
    rest: float
    landmark_LC: NDArray[np.float32]
    usual: float

    def coordinates(self, vector_NW: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return the coordinates of rows, (N, C)."""
        return _coordinates(_Frame(self.shift_W, self.scale_W, self.basis_WC, self.rest), vector_NW)

    def ratio(self, coordinates_NC: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the distance of rows to the nearest landmarks, in units of the usual one."""
        return np.asarray(_distance(coordinates_NC, self.landmark_LC) / self.usual, dtype=np.float32)


@dataclass(frozen=True)
class Likeness:
    """The parts by name, and the largest ratio of any part that is usual; `num_groups` were left out in turn."""

    parts: Mapping[str, Part]
    limit: float
    num_groups: int

    def judge(self, coordinates: Mapping[str, NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Return how unlike rows are, (N,), more than 1 where they are flagged, and which part is most so, (N,) int8.

        Parts may be missing for all rows, or be NaN in some: these say nothing. A row without any is 0, its part -1.
        """
        names = [name for name in self.parts if name in coordinates]
        ratio_PN = np.stack([self.parts[name].ratio(coordinates[name]) for name in names])
        known_PN = np.where(np.isnan(ratio_PN), -1.0, ratio_PN)
        place_N = known_PN.argmax(axis=0)
        most_N = np.take_along_axis(known_PN, place_N[None], axis=0)[0]
        place = np.array([list(self.parts).index(name) for name in names], dtype=np.int8)[place_N]
        return (
            np.where(most_N < 0, 0, most_N / self.limit).astype(np.float32),
            np.where(most_N < 0, -1, place).astype(np.int8),
        )


def fit_likeness(
    vectors: Mapping[str, NDArray[np.floating]], groups_N: NDArray[Any], *, each: Mapping[str, bool], seed: int = 0
) -> Likeness | None:
    """Fit to training rows; None with fewer than MIN_GROUPS groups, of which nothing is usual yet.

    Args:
        vectors: the parts, (N, W) each, NaN in rows that lack one; a part that fewer groups have is left out.
        groups_N: rows of one group do not vouch for each other.
        each: by part, whether every entry is scaled to variance 1 (numbers of different kinds), else all alike.
        seed: of landmarks and of the folds of whole groups.
    """
    group_N = np.unique(groups_N, return_inverse=True)[1]
    found, ratios = dict[str, Part](), []
    for name, vector_NW in vectors.items():
        known = np.flatnonzero(np.isfinite(vector_NW).all(axis=1))
        if len(np.unique(group_N[known])) < MIN_GROUPS:
            continue
        part, distance_M = _fit_part(vector_NW[known].astype(np.float32), group_N[known], each=each[name], seed=seed)
        found[name] = part
        ratios.append(np.full(len(group_N), -np.inf))
        ratios[-1][known] = distance_M / part.usual
    if not found:
        return None
    most_N = np.max(ratios, axis=0)
    seen = np.isfinite(most_N)
    return Likeness(found, _usual(most_N[seen], group_N[seen]), len(np.unique(group_N[seen])))


def _usual(distance_N: FloatArray, group_N: NDArray[np.int64]) -> float:
    """Return the distance that LEVEL of the rows keep, every group counting alike; never 0, which equal rows have.

    The point itself and no bound of it: one that held for the next group would be infinite with fewer than 100.
    """
    curve = group_curve(distance_N, group_N)
    return max(curve.at(LEVEL * float(curve.mass_Q[-1])), 1e-6)


class _Frame(NamedTuple):
    shift_W: NDArray[np.float32]
    scale_W: NDArray[np.float32]
    basis_WC: NDArray[np.float32]
    rest: float


def _fit_part(
    vector_NW: NDArray[np.float32], group_N: NDArray[np.int64], *, each: bool, seed: int
) -> tuple[Part, FloatArray]:
    """Return a part, and the distance of every row to the rows of other groups, in coordinates that never saw it."""
    generator = np.random.default_rng(seed)
    # Equal rows, such as the images of one prompt have of it, are one landmark.
    first_of = dict[bytes, int]()
    for row, vector_W in enumerate(vector_NW):
        first_of.setdefault(vector_W.tobytes(), row)
    mark_L = np.sort(generator.permutation(np.array(list(first_of.values())))[:LANDMARKS])
    distance_N = np.empty(len(vector_NW))
    fold_N = (mix(group_N.astype(np.uint64), seed=seed) % np.uint64(FOLDS)).astype(np.int64)
    for fold in np.unique(fold_N):
        own, others = np.flatnonzero(fold_N == fold), np.flatnonzero(fold_N != fold)
        frame = _fit_frame(vector_NW[others if len(others) else own], each=each)
        marks_LC = _coordinates(frame, vector_NW[mark_L])
        distance_N[own] = _distance(
            _coordinates(frame, vector_NW[own]), marks_LC, own_N=group_N[own], mark_L=group_N[mark_L]
        )
    frame = _fit_frame(vector_NW, each=each)
    # A landmark's own group may be all there is: its rows have no distance.
    told = np.isfinite(distance_N)
    usual = _usual(distance_N[told], group_N[told]) if told.any() else 1.0
    distance_N[~told] = -np.inf
    return Part(*frame, _coordinates(frame, vector_NW[mark_L]), usual), distance_N


def _fit_frame(vector_NW: NDArray[np.float32], *, each: bool) -> _Frame:
    shift_W = vector_NW.mean(axis=0, dtype=np.float64).astype(np.float32)
    deviation_W = vector_NW.std(axis=0, dtype=np.float64)
    top = float(deviation_W.max())
    # An entry that never varies tells odd rows from the others as soon as it does: it counts like the least that does.
    floor = 1e-3 * top if top > 0 else 1.0
    scale_W = np.maximum(deviation_W, floor) if each else np.full(len(shift_W), top or 1.0)
    centred_NW = (vector_NW - shift_W) / scale_W.astype(np.float32)
    basis_WC = _directions(centred_NW)
    square_N = (centred_NW**2).sum(axis=1) - ((centred_NW @ basis_WC) ** 2).sum(axis=1)
    left_N = np.sqrt(np.maximum(square_N, 0))
    # All lie in the plane: whatever leaves it counts in units of the plane's own spread.
    spread = max(float(left_N.std()), 0.1 * float(np.sqrt((centred_NW**2).sum(axis=1).mean())), 1e-6)
    return _Frame(shift_W, scale_W.astype(np.float32), basis_WC, spread)


def _directions(centred_NW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return orthonormal directions of much variance, (W, C), by subspace iteration (Halko, Martinsson, Tropp 2011).

    Two rounds: any directions serve, as what is off them counts too, and a row is measured like those it is held to.
    """
    rows, width = centred_NW.shape
    count = min(DIRECTIONS, width, max(1, rows // 4))  # few rows lie in any plane of as many directions
    start_WC = np.random.default_rng(0).standard_normal((width, min(width, count + 8))).astype(np.float32)
    basis_WC = np.linalg.qr(start_WC)[0]
    for _ in range(2):
        basis_WC = np.linalg.qr(centred_NW.T @ (centred_NW @ basis_WC) + 1e-6 * basis_WC)[0]
    _, turn_CC = np.linalg.eigh((centred_NW @ basis_WC).T @ (centred_NW @ basis_WC))
    return np.ascontiguousarray((basis_WC @ turn_CC[:, ::-1])[:, :count])


def _coordinates(frame: _Frame, vector_NW: NDArray[np.floating]) -> NDArray[np.float32]:
    centred_NW = (np.asarray(vector_NW, dtype=np.float32) - frame.shift_W) / frame.scale_W
    along_NC = centred_NW @ frame.basis_WC
    square_N = (centred_NW**2).sum(axis=1) - (along_NC**2).sum(axis=1)
    left_N1 = np.sqrt(np.maximum(square_N, 0))[:, None] / np.float32(frame.rest)
    return np.concatenate([along_NC, left_N1], axis=1, dtype=np.float32)


def _distance(
    point_NC: NDArray[np.float32],
    mark_LC: NDArray[np.float32],
    *,
    own_N: NDArray[np.int64] | None = None,
    mark_L: NDArray[np.int64] | None = None,
) -> FloatArray:
    """Return the mean distance to the NEAREST landmarks, of those of other groups where groups are given; NaN if none.

    Rows with NaN have NaN.
    """
    found_N = np.empty(len(point_NC))
    square_L = (mark_LC.astype(np.float64) ** 2).sum(axis=1)
    for start in range(0, len(point_NC), BLOCK):
        rows = slice(start, start + BLOCK)
        point_BC = point_NC[rows].astype(np.float64)
        square_BL = (point_BC**2).sum(axis=1)[:, None] + square_L - 2 * point_BC @ mark_LC.T.astype(np.float64)
        if own_N is not None and mark_L is not None:
            square_BL[own_N[rows, None] == mark_L] = np.inf
        near = min(NEAREST, len(mark_LC))
        near_BK = np.partition(square_BL, near - 1, axis=1)[:, :near]
        there_BK = ~np.isinf(near_BK)
        count_B = there_BK.sum(axis=1)
        total_B = np.where(there_BK, np.sqrt(np.maximum(np.where(there_BK, near_BK, 0), 0)), 0).sum(axis=1)
        found_N[rows] = np.where(count_B > 0, total_B / np.maximum(count_B, 1), np.nan)
    return found_N
