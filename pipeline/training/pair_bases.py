"""Bases of a target that pairs speak for, from pairs alone or from ratings and pairs: candidates, and which is taken.

The candidates are those of ratings (`base_choice.py`), each fitted by `pair_ridge.py`; what was said of left-out groups
decides. Knows inputs of rows and what was said of them. Must not know caches, heads or test rows.

Shapes: N rows, M rows that are fitted to, P pairs of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaclip.pipeline.model.group_ridge import walk
from deltaclip.pipeline.model.kernel import (
    FIRST_STRENGTH,
    MAX_ROWS,
    STRENGTHS,
    MemberFit,
    Part,
    Space,
    chosen_rows,
    with_left_out,
)
from deltaclip.pipeline.model.level import clamp_shift
from deltaclip.pipeline.model.pair_ridge import PairNoise, PairRidge, Said, said_loss
from deltaclip.pipeline.model.preference import PairScale, fit_scale
from deltaclip.pipeline.training.base_choice import Candidate, image_candidates, pair_candidates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.base.vocabulary import Target
    from deltaclip.pipeline.model.kernel import Member, Vectors
    from deltaclip.pipeline.model.pair_ridge import PairSolved

# Rows and landmarks of the first round, in which all candidates take part, and landmarks of the second.
SCREEN_ROWS, SCREEN_POINTS, MOST_POINTS = 1_000, 400, 2_000
MOST_MEMBERS, _PICKS = 3, 10
# Without ratings the unit of f is the logit: these are the inverse variances of f that are tried.
LOGIT_STRENGTHS = tuple(2.0**k for k in range(-9, 8))
FIRST_LOGIT_STRENGTH = 1.0
# Worths have neither an origin nor a unit. Of pairs alone scores get this mean and SD over the rows that were fitted
# to, and a logit no more than a third of the range, else noise would fill it.
MEAN, SD, MOST_OF_LOGIT = 0.5, 1 / 6, 1 / 3


@dataclass(frozen=True, kw_only=True)
class PairBase:
    """A base: members by candidate with their shares, what they say of all rows (N,), and of fitted ones left out (M,).

    `scale` makes differences of what it says, in left-out rows, logits; `noise` is the variance of ratings about it.
    """

    members: list[tuple[Candidate, Member, float]]
    said_N: Tensor
    own_M: Tensor
    rows_M: NDArray[np.int64]
    scale: PairScale
    variance: float | None
    about: dict[str, Any]
    fits: tuple[MemberFit, ...]


@dataclass(frozen=True)
class _Trial:
    """A candidate that was fitted."""

    candidate: Candidate
    space: Space
    parts: list[Part]
    solved: PairSolved

    def member(self, gain: float, shift: float) -> Member:
        """Return the member that says gain f + shift, on the device of its space."""
        device = self.space.shift_P.device
        w_L, intercept = gain * self.solved.w_L, gain * self.solved.intercept + shift
        return self.space.member(w_L.to(device), intercept.to(device))


@dataclass(frozen=True, kw_only=True)
class PairFitter:
    """What all fits share: inputs of rows by name, groups, and what was said of the N rows that may be learned from."""

    inputs: Mapping[str, Vectors]
    parts: Callable[[Candidate], list[Part]]
    groups_N: NDArray[np.int64]
    said: Said
    seed: int

    @property
    def is_rated(self) -> bool:
        """Whether at least half of the rows that are spoken of have a rating: then ratings choose among candidates."""
        rated = int((~torch.isnan(self.said.label_M)).sum())
        return 2 * rated >= len(self._spoken())

    def fit(self, target: Target, *, only: Candidate | None = None) -> PairBase | None:
        """Return the base, None where fewer than two groups are spoken of.

        Args:
            target: what it sees decides the candidates.
            only: the one candidate that there is.
        """
        candidates = [only] if only else _candidates(target, self.inputs)
        first = self._chosen(SCREEN_ROWS if len(candidates) > 1 else MAX_ROWS)
        if len(np.unique(self.groups_N[first])) < 2:
            return None
        noise: PairNoise | None = None
        trials = []
        for candidate in candidates:
            points = SCREEN_POINTS if len(candidates) > 1 else MOST_POINTS
            trials.append(self._trial(candidate, first, points=points, noise=noise))
            noise = noise or trials[0].solved.noise
        if len(candidates) == 1:
            return self._base(trials, first, trials)
        last = self._chosen(MAX_ROWS)
        shares = mixture([one.solved.left_out_M for one in trials], self._said_of(first), trials[0].solved.noise)
        found = [
            self._trial(
                trials[at].candidate,
                last,
                points=MOST_POINTS,
                noise=trials[at].solved.noise,
                strength=trials[at].solved.strength,
            )
            for at in shares
        ]
        return self._base(found, last, trials)

    def refit(self, members: Sequence[tuple[Candidate, float, float]], said_N: Tensor) -> PairBase | None:
        """Return members that were chosen by ratings, fitted to pairs as well; None where left-out rows are no better.

        Args:
            members: candidates with their shares and strengths.
            said_N: what they say of rows, fitted to ratings alone; of fitted rows without their groups.
        """
        rows_M = self._chosen(MAX_ROWS)
        said, before_M = self._said_of(rows_M), said_N[torch.from_numpy(rows_M)].double()
        noise = noise_of(before_M, said)
        trials = [
            self._trial(candidate, rows_M, points=MOST_POINTS, noise=noise, strength=strength)
            for candidate, _, strength in members
        ]
        best = [(share, trial) for (_, share, _), trial in zip(members, trials, strict=True)]
        after_M = torch.zeros_like(before_M)
        for share, trial in best:
            after_M += share * trial.solved.left_out_M
        if said_loss(after_M, said, noise) >= said_loss(before_M, said, noise):
            return None
        return self._mixed(best, rows_M, said, losses={})

    def _chosen(self, most: int) -> NDArray[np.int64]:
        """Return the rows that something is said of, whole groups up to so many."""
        spoken_N = torch.zeros(len(self.groups_N), dtype=torch.bool)
        spoken_N[torch.from_numpy(self._spoken())] = True
        return chosen_rows(spoken_N, self.groups_N, np.random.default_rng(self.seed), most=most)

    def _spoken(self) -> NDArray[np.int64]:
        """Return the rows that something is said of."""
        rated = torch.nonzero(~torch.isnan(self.said.label_M))[:, 0]
        return np.unique(torch.cat([rated, self.said.a_P, self.said.b_P]).numpy())

    def _trial(
        self,
        candidate: Candidate,
        rows_M: NDArray[np.int64],
        *,
        points: int,
        noise: PairNoise | None = None,
        strength: float | None = None,
    ) -> _Trial:
        marks = np.random.default_rng(self.seed).permutation(len(rows_M))[:points]
        parts = self.parts(candidate)
        space = Space.of(candidate.kind, parts, rows_M, np.sort(marks))
        said = self._said_of(rows_M)
        ridge = PairRidge(space.phi(space.scaled_MP).cpu(), said, self.groups_N[rows_M])
        rated = said.has_ratings
        strengths = STRENGTHS[candidate.kind] if rated else LOGIT_STRENGTHS
        start = strength or (FIRST_STRENGTH[candidate.kind] if rated else FIRST_LOGIT_STRENGTH)
        known = noise or ridge.settle(start)
        if strength is None:
            strength = walk(lambda each: ridge.solve(each, known).loss, strengths, first=start)
        return _Trial(candidate, space, parts, ridge.solve(strength, known))

    def _said_of(self, rows_M: NDArray[np.int64]) -> Said:
        """Return what was said of some rows, and of pairs both of whose rows are among them."""
        said, place_N = self.said, torch.full((len(self.groups_N),), -1, dtype=torch.int64)
        place_N[torch.from_numpy(rows_M)] = torch.arange(len(rows_M))
        kept = (place_N[said.a_P] >= 0) & (place_N[said.b_P] >= 0)
        return Said(
            said.label_M[torch.from_numpy(rows_M)].double(),
            place_N[said.a_P[kept]],
            place_N[said.b_P[kept]],
            said.preferred_P[kept].double(),
        )

    def _base(self, found: list[_Trial], rows_M: NDArray[np.int64], trials: Sequence[_Trial]) -> PairBase:
        """Mix candidates, as left-out rows like it best, and give scores their unit and, with ratings, their mean."""
        said = self._said_of(rows_M)
        noise = found[0].solved.noise
        shares = mixture([one.solved.left_out_M for one in found], said, noise)
        losses = {one.candidate.name: one.solved.loss for one in trials}
        return self._mixed([(share, found[at]) for at, share in shares.items()], rows_M, said, losses=losses)

    def _mixed(
        self, best: Sequence[tuple[float, _Trial]], rows_M: NDArray[np.int64], said: Said, *, losses: dict[str, float]
    ) -> PairBase:
        left_out_M, own_M = torch.zeros_like(said.label_M), torch.zeros_like(said.label_M)
        for share, one in best:
            left_out_M, own_M = left_out_M + share * one.solved.left_out_M, own_M + share * one.solved.own_M
        gain, shift, known_M = 1.0, 0.0, ~torch.isnan(said.label_M)
        if said.has_ratings:
            shift = clamp_shift(own_M[known_M], said.label_M[known_M])
        else:
            gain = min(SD / max(float(left_out_M.std()), 1e-12), MOST_OF_LOGIT)
            shift = MEAN - gain * float(left_out_M.mean())
        left_out_M, own_M = gain * left_out_M + shift, gain * own_M + shift
        members = [(one.candidate, one.member(gain, shift), share) for share, one in best]
        num_rows, said_N = len(self.groups_N), torch.zeros(len(self.groups_N))
        for (share, one), (_, member, _) in zip(best, members, strict=True):
            left = (gain * one.solved.left_out_M + shift).to(one.space.shift_P.device)
            said_N += share * with_left_out(member, one.parts, rows_M, left, num_rows=num_rows).cpu()
        scale = best[0][1].solved.noise.scale
        if len(said.a_P):
            scale = fit_scale(left_out_M[said.a_P] - left_out_M[said.b_P], said.preferred_P)
        errors = (left_out_M - said.label_M)[known_M].square()
        about = {
            "pairs": len(said.a_P),
            "ratings": int(known_M.sum()),
            "shares": {one.candidate.name: share for share, one in best},
            "loss": losses,
            "kappa": scale.kappa,
            "log_nu": scale.log_nu,
            "unit": "ratings" if said.has_ratings else f"mean {MEAN}, SD {SD:.3f} over the rows that were fitted to",
        }
        return PairBase(
            members=members,
            said_N=said_N,
            own_M=own_M,
            rows_M=rows_M,
            scale=scale,
            variance=float(errors.mean()) if len(errors) else None,
            about=about,
            fits=tuple(
                MemberFit(len(rows_M), one.space.num_points, one.solved.strength, float(errors.mean().sqrt()))
                for _, one in best
            ),
        )


def noise_of(said_M: Tensor, said: Said) -> PairNoise:
    """Return how much an observation says, by predictions that did not learn from it."""
    known_M = ~torch.isnan(said.label_M)
    variance = float((said_M - said.label_M)[known_M].square().mean())
    return PairNoise(variance, fit_scale(said_M[said.a_P] - said_M[said.b_P], said.preferred_P))


def mixture(left_out: Sequence[Tensor], said: Said, noise: PairNoise) -> dict[int, float]:
    """Return the shares of at most MOST_MEMBERS predictions, by their places, the largest first.

    Predictions are added one at a time, with replacement, the one that lowers the loss most; shares are how often each
    was. Caruana, Niculescu-Mizil, Crew, Ksikes, ICML 2004.

    Args:
        left_out: what each says of the M rows without their groups.
        said: of these rows.
        noise: how much an observation says.
    """
    counts, total_M = dict[int, int](), torch.zeros_like(left_out[0])
    for number in range(1, _PICKS + 1):
        open_to = range(len(left_out)) if len(counts) < MOST_MEMBERS else list(counts)
        best = min(open_to, key=lambda at: said_loss((total_M + left_out[at]) / number, said, noise))
        counts[best] = counts.get(best, 0) + 1
        total_M = total_M + left_out[best]
    return {at: count / _PICKS for at, count in sorted(counts.items(), key=lambda each: -each[1])}


def _candidates(target: Target, inputs: Mapping[str, Any]) -> list[Candidate]:
    """Return the candidates of a target; one that sees prompts may be of the image alone too."""
    of_image = image_candidates(inputs)
    if target.sees == "image":
        return of_image
    lines = [Candidate("line", ("cosine",))]
    return [*lines, *(one for one in pair_candidates(inputs, has_score=False) if one.inputs), *of_image]
