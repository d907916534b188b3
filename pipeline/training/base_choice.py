"""Which closed-form bases may be had from what a cache holds, and which one is taken: by left-out rows alone.

Knows names of inputs, left-out predictions and labels. Must not know rows, files or how a member is fitted.

Shapes: M rows with a label, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.pipeline.scoring.agreement import srocc

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from deltaclip.pipeline.model.kernel import MemberKind

# Mean squared distance of each input among rows, in a kernel that has several. Docs: heads.md.
WEIGHTS = {"center": 0.25, "stages": 1.0, "statistics": 0.5, "tiles": 1.0, "flip": 0.25, "prompt": 0.15, "score": 0.1}
# Entries of these are of one kind: scaled all alike.
_ALIKE = ("prompt", "anchors")
# Ranks of few groups say less than squared errors: with 60 rows of 6 prompts they chose by luck.
FEW_GROUPS = 100
# Members of a mixture. A fourth gave less than .001 on all data tried, and costs as much as the others.
MOST_MEMBERS = 3
# A share that moves no score by what can be seen.
_LEAST_SHARE = 0.05
_FOLDS = 5


@dataclass(frozen=True)
class Candidate:
    """A closed-form base: ridge (`line`) or ridge in a `kernel` on inputs; of pairs besides a line on their cosine.

    `with_score` adds what the base of the first image target says, of pairs alone.
    """

    kind: MemberKind
    inputs: tuple[str, ...]
    with_score: bool = False

    @property
    def name(self) -> str:
        """What it is called in words and tables."""
        seen = [*self.inputs, *(["score"] if self.with_score else [])]
        if not seen:
            return "cosine line"
        return f"{'kernel' if self.kind == 'kernel' else 'ridge'} on {' + '.join(seen)}"

    @property
    def score_weight(self) -> float:
        """Return the weight of the score among the inputs, 0 where it is none."""
        if not self.with_score:
            return 0.0
        return WEIGHTS["score"] if self.kind == "kernel" else 1.0

    def weight(self, name: str) -> float:
        """Return the weight of an input: of one by itself it does not matter."""
        return WEIGHTS.get(_plain(name), 1.0)

    def scales_each(self, name: str) -> bool:
        """Tell whether the entries of an input are of different kinds, each to be scaled by itself."""
        return _plain(name) not in _ALIKE


def image_candidates(inputs: Collection[str]) -> list[Candidate]:
    """Return the candidates of a target that sees the image, of the views and `anchors` that are there."""
    views = _views(inputs)
    lines = [Candidate("line", (name,)) for name in inputs if name in views or name == "anchors"]
    kernels = [Candidate("kernel", (name,)) for name in views]
    together = [Candidate("kernel", some) for some in _joined(views) if len(some) > 1]
    return [*lines, *kernels, *together]


def _views(inputs: Collection[str]) -> list[str]:
    """Return the names of views of the image; what does not depend on the backbone counts once."""
    views = [name for name in inputs if _plain(name) not in {"prompt", "cosine", "anchors"}]
    return [name for name in views if name == _plain(name) or _plain(name) != "statistics"]


def _joined(views: Collection[str]) -> list[tuple[str, ...]]:
    """Return the sets of views that are tried together, without `center` and with: of each cache, and of all."""
    numbers = dict.fromkeys(name.rpartition(":")[0] for name in views)
    shared = [name for name in views if name == "statistics"]
    groups = [[name for name in views if name.rpartition(":")[0] == number] for number in numbers]
    groups = [[*group, *(name for name in shared if name not in group)] for group in groups]
    found = []
    for group in [*groups, list(views)] if len(groups) > 1 else groups:
        found += [tuple(name for name in group if _plain(name) != "center"), tuple(group)]
    return [some for some in dict.fromkeys(found) if some]


def _has_center(names: Collection[str]) -> bool:
    return any(_plain(name) == "center" for name in names)


def _plain(name: str) -> str:
    """Return the name of an input without the number of its cache."""
    return name.rpartition(":")[2]


def pair_candidates(inputs: Collection[str], *, has_score: bool) -> list[Candidate]:
    """Return the candidates of a target that sees image and prompt; `has_score`: there is an image target too."""
    views = _views(inputs)
    sets = dict.fromkeys([*((name,) for name in views), *_joined(views)])
    kernels = [
        Candidate("kernel", (*some, "prompt"), has_score) for some in sets if len(some) == 1 or not _has_center(some)
    ]
    lines = [
        Candidate("line", ()),
        *(Candidate("line", (name,)) for name in inputs if _plain(name) == "cosine" != name),
    ]
    if has_score:
        lines.append(Candidate("line", (), with_score=True))
    if "anchors" in inputs:
        lines.append(Candidate("line", ("anchors",), has_score))
    return [*lines, Candidate("line", ("center", "prompt"), has_score), *kernels]


def plain_kernel(view: str, *, sees_pair: bool, has_score: bool) -> Candidate:
    """Return the base of `--base kernel`: on one view, of pairs on the prompt and the image's score too."""
    return Candidate("kernel", (view, "prompt"), has_score) if sees_pair else Candidate("kernel", (view,))


@dataclass(frozen=True)
class Choice:
    """What was chosen: shares of candidates, which sum to 1, and how every candidate did on left-out rows.

    `by` is `srocc` or `rmse`; `figures` has both by candidate, and of the mixture, whose shares were found without the
    rows that it is judged on.
    """

    shares: Mapping[str, float]
    by: str
    figures: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        found = {
            name: {figure: None if math.isnan(value) else value for figure, value in each.items()}
            for name, each in self.figures.items()
        }
        return {"shares": dict(self.shares), "by": self.by, "left_out": found}


MIXTURE = "mixture"


def figures(said_M: NDArray[np.float64], label_M: NDArray[np.float64]) -> dict[str, float]:
    """Return SROCC (NaN where all is said alike) and RMSE of left-out predictions."""
    rank = srocc(said_M, label_M) if np.ptp(said_M) > 0 and len(said_M) > 2 else math.nan
    return {"srocc": float(rank), "rmse": float(np.sqrt(np.mean(np.square(said_M - label_M))))}


def choose(
    said: Mapping[str, NDArray[np.float64]], label_M: NDArray[np.float64], groups_M: NDArray[Any], *, seed: int
) -> Choice:
    """Choose the candidate, or the mixture of some, that does best on left-out rows.

    Args:
        said: left-out predictions (M,) of every candidate.
        label_M: labels in [0, 1].
        groups_M: what was left out together; the shares of the mixture are judged on groups that they never saw.
        seed: of the folds of groups.
    """
    names, said_MC = list(said), np.stack(list(said.values()), axis=1)
    by = judged_by(len(np.unique(groups_M)))
    found = {name: figures(said_M, label_M) for name, said_M in said.items()}
    best = max(names, key=lambda name: _good(found[name], by))
    if len(names) == 1:
        return Choice({best: 1.0}, by, found)
    found[MIXTURE] = figures(_mixed_out_of_fold(said_MC, label_M, groups_M, seed=seed), label_M)
    if _good(found[MIXTURE], by) <= _good(found[best], by):
        return Choice({best: 1.0}, by, found)
    share_C = shares(said_MC, label_M)
    return Choice({name: float(share) for name, share in zip(names, share_C, strict=True) if share > 0}, by, found)


def judged_by(num_groups: int) -> str:
    """Return the figure that left-out rows of so many groups are judged by."""
    return "rmse" if num_groups <= FEW_GROUPS else "srocc"


def finalists(said: Mapping[str, NDArray[np.float64]], label_M: NDArray[np.float64], *, by: str) -> list[str]:
    """Return the candidates that are worth a fit to all rows: the best, and those that a mixture would take."""
    names = list(said)
    best = max(names, key=lambda name: _good(figures(said[name], label_M), by))
    share_C = shares(np.stack(list(said.values()), axis=1), label_M)
    mixed = [names[place] for place in np.argsort(-share_C, kind="stable") if share_C[place] > 0]
    return list(dict.fromkeys([best, *mixed]))[:MOST_MEMBERS]


def _good(found: Mapping[str, float], by: str) -> float:
    return -found["rmse"] if by == "rmse" else (-1.0 if math.isnan(found["srocc"]) else found["srocc"])


def shares(said_MC: NDArray[np.float64], label_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the convex weights of least squares (Breiman 1996, stacked regressions), (C,); small ones are dropped."""
    from scipy.optimize import nnls

    # One further row, of ones with the weight of all others many times over, makes the weights sum to 1.
    heavy = 1e3 * np.sqrt(len(label_M))
    ones = np.ones((1, said_MC.shape[1]))

    def solve(columns: NDArray[np.float64]) -> NDArray[np.float64]:
        found, _ = nnls(np.vstack([columns, heavy * ones[:, : columns.shape[1]]]), np.append(label_M, heavy))
        return np.asarray(found / found.sum())

    share_C = solve(said_MC)
    kept = share_C >= _LEAST_SHARE
    share_C = np.zeros(len(share_C))
    share_C[kept] = solve(said_MC[:, kept])
    return share_C


def _mixed_out_of_fold(
    said_MC: NDArray[np.float64], label_M: NDArray[np.float64], groups_M: NDArray[Any], *, seed: int
) -> NDArray[np.float64]:
    _, code_M = np.unique(groups_M, return_inverse=True)
    fold_M = np.random.default_rng(seed).permutation(int(code_M.max()) + 1)[code_M] % _FOLDS
    said_M = np.empty(len(label_M))
    for fold in np.unique(fold_M):
        own = fold_M == fold
        said_M[own] = said_MC[own] @ (shares(said_MC[~own], label_M[~own]) if not own.all() else _equal(said_MC))
    return said_M


def _equal(said_MC: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.full(said_MC.shape[1], 1 / said_MC.shape[1])
