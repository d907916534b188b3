"""The bases of residual heads before training: plain, linear in closed form, or fitted to what the cache holds.

Knows rows, their split, and the closed forms. Must not know settings, run directories or the test rows' labels.

Shapes: N rows of the cache, M rows that are fitted to, W width of an input, A anchors, D width of the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deltaclip.pipeline.model.calibrate import Sums, calibrate, calibrate_branch, fit_line
from deltaclip.pipeline.model.fitted_base import ANCHORS, BaseShape, MemberShape
from deltaclip.pipeline.model.heads import DirectHeads
from deltaclip.pipeline.model.kernel import MAX_ROWS, Line, Part, fit_member, with_left_out
from deltaclip.pipeline.model.kernel_on_score import Nested, Score, fit_on_score
from deltaclip.pipeline.model.level import clamp_shift
from deltaclip.pipeline.model.pair_ridge import Said
from deltaclip.pipeline.model.scores import head_name
from deltaclip.pipeline.rows.split_rows import joined_groups
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH
from deltaclip.pipeline.training.base_choice import (
    Candidate,
    Choice,
    choose,
    figures,
    finalists,
    image_candidates,
    judged_by,
    pair_candidates,
    plain_kernel,
)
from deltaclip.pipeline.training.pair_bases import PairFitter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.base.vocabulary import Target
    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.model.kernel import Fitted, Member, MemberFit, Vectors
    from deltaclip.pipeline.model.kernel_on_score import OnScore
    from deltaclip.pipeline.rows.cached_rows import Batches, CacheRows
    from deltaclip.pipeline.rows.pair_rows import RowPairs
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.training.pair_bases import PairBase

NO_PAIRS: Mapping[str, RowPairs] = MappingProxyType({})
# Rows on which all candidates are tried; those that may win are then fitted to all. Whole groups. 1,000 take a fifth
# more time and are worth nothing: docs/log.md.
SCREEN_ROWS = 600


@dataclass(frozen=True)
class Bases:
    """Bases fitted on training and validation rows, in the state of heads, and what they say of every row.

    `columns` has what they say of all N rows by target, `fitted_B` of `Batch`: of a fitted row what a fit without that
    row's group says, so that corrections learn from errors as large as those of new rows. `lines` are slope and offset
    of the pairs' lines. `left_out` has, by target, the whole base of the fitted rows from fits without their groups,
    (N,) float32 in [0, 1], NaN elsewhere.
    """

    shape: BaseShape
    state: dict[str, Tensor]
    lines: dict[str, tuple[float, float]]
    columns: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, PairBase] = field(default_factory=dict)

    def put_into(self, heads: Heads) -> None:
        """Set the bases, a and b of heads that were built for them."""
        lines = {
            f"{head_name(target)}.{name}": torch.tensor(value)
            for target, line in self.lines.items()
            for name, value in zip(("slope", "offset"), line, strict=True)
        }
        heads.load_state_dict({**heads.state_dict(), **self.state, **lines})


class _Fit(NamedTuple):
    """The base of one target: members by candidate, what it says, and how it was chosen.

    `said_N` is the term beyond a line slope * z + offset, left out of fitted rows; `own_M` all of the fit.
    """

    members: list[tuple[Candidate, Member, float]]
    said_N: Tensor
    rows_M: NDArray[np.int64]
    own_M: Tensor
    slope: float = 0.0
    offset: float = 0.0
    choice: Choice | None = None
    fits: tuple[MemberFit, ...] = ()
    refits: _Mixed | None = None
    pairs: PairBase | None = None


class _Taken(NamedTuple):
    """A candidate that was chosen, what was fitted, and its share."""

    candidate: Candidate
    found: Any
    share: float


class _Mixed:
    """What fits of a mixture without some rows say of them: see `group_ridge.Refits`."""

    def __init__(self, parts: Sequence[tuple[float, Any]], rows_M: NDArray[np.int64], level: float) -> None:
        self._parts, self.rows_M, self._level = parts, rows_M, level

    def of(self, rows_G: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Tensor]:
        prepared = [(share, refits.of(rows_G)) for share, refits in self._parts]

        def without(out: NDArray[np.int64]) -> Tensor:
            said = sum(share * say(out) for share, say in prepared)
            assert isinstance(said, torch.Tensor)
            return said + self._level

        return without


@dataclass(frozen=True)
class _Fitter:
    """What all fits share: inputs of rows by name, groups, the line's z, and the seed."""

    inputs: Mapping[str, Vectors]
    groups_N: NDArray[np.int64]
    z_N: Tensor
    seed: int

    def parts(self, candidate: Candidate) -> list[Part]:
        return [
            Part(self.inputs[name], candidate.weight(name), candidate.scales_each(name), f"view {name!r}")
            for name in candidate.inputs
        ]

    def of_image(self, candidates: Sequence[Candidate], label_N: Tensor) -> _Fit:
        """Fit the base of an image target; without two groups to fit to it is the mean of the labels, or 0."""
        if not _two_groups(label_N, self.groups_N):
            line = Line(0).to(label_N.device)
            line.intercept += label_N.nanmean().nan_to_num(0.0)
            none = np.empty(0, dtype=np.int64)
            return _Fit([(Candidate("line", ()), line, 1.0)], line.intercept.expand_as(label_N), none, label_N[:0])

        def fit(candidate: Candidate, most: int, strength: float | None) -> Fitted:
            parts = self.parts(candidate)
            return fit_member(
                candidate.kind, parts, label_N, self.groups_N, seed=self.seed, most=most, strength=strength
            )

        taken, choice = self._two_rounds(candidates, label_N, fit)
        rows_M = taken[0].found.rows_M
        own_M = _mix([(one.share, one.found.refits.own_M) for one in taken])
        level = clamp_shift(own_M, label_N[rows_M])
        taken[0].found.member.intercept += level / taken[0].share
        said_N = _mix([(one.share, one.found.say(self.parts(one.candidate))) for one in taken])
        said_N[torch.from_numpy(rows_M)] += level  # of other rows the member says it
        return _Fit(
            [(one.candidate, one.found.member, one.share) for one in taken],
            said_N,
            rows_M,
            own_M + level,
            choice=choice,
            fits=tuple(one.found.fit for one in taken),
            refits=_Mixed([(one.share, one.found.refits) for one in taken], rows_M, level),
        )

    def of_pair(self, candidates: Sequence[Candidate], score: Score, label_N: Tensor) -> _Fit:
        """Fit the base of a pair target with its line; without two groups to fit to it is the line, or (s + 1)/2."""
        if not _two_groups(label_N, self.groups_N):
            sums, known = Sums.zeros(1, self.z_N.device), torch.nonzero(~torch.isnan(label_N))[:, 0]
            sums.add(self.z_N[known].double()[:, None], label_N[known].double())
            slope, offset = fit_line(sums) if len(known) else (1.0, 0.0)
            if len(known):
                offset += clamp_shift(slope * self.z_N[known] + offset, label_N[known])
            return _Fit([], torch.zeros_like(self.z_N), np.empty(0, dtype=np.int64), label_N[:0], slope, offset)
        nested = Nested.of(score, label_N, self.groups_N, seed=self.seed)

        def fit(candidate: Candidate, most: int, strength: float | None) -> OnScore:
            on = nested.fewer(self.groups_N, most=most)
            parts, weight = self.parts(candidate), candidate.score_weight
            return fit_on_score(candidate.kind, parts, label_N, on, weight=weight, x_N=self.z_N, strength=strength)

        taken, choice = self._two_rounds(candidates, label_N, fit)
        slope, offset = (sum(one.share * getattr(one.found, name) for one in taken) for name in ("slope", "offset"))
        own_M, said_N = _mix([(one.share, one.found.own_M) for one in taken]), torch.zeros_like(self.z_N)
        for one in taken:
            parts = self.parts(one.candidate)
            if one.candidate.with_score:
                parts.append(Part(score.said_N[:, None], one.candidate.score_weight))
            term_N = with_left_out(one.found.member, parts, nested.rows_M, one.found.term_M, num_rows=len(said_N))
            said_N += one.share * term_N
        return _Fit(
            [(one.candidate, one.found.member, one.share) for one in taken if one.found.member is not None],
            said_N,
            nested.rows_M,
            own_M,
            slope,
            offset + clamp_shift(own_M, label_N[nested.rows_M]),
            choice,
            tuple(one.found.fit for one in taken),
        )

    def of_pairs(self, target: Target, pairs: RowPairs, labels: Mapping[str, Tensor], view: str | None) -> _Fit | None:
        """Fit the base of a target that pairs speak for; None where they are of fewer than two groups.

        Scores that it is fitted to may be no input of another base: nothing refits it without some rows.
        """
        columns = (pairs.a_P, pairs.b_P, pairs.preferred_P)
        said = Said(labels[target.name].cpu(), *(torch.from_numpy(column) for column in columns))
        only = plain_kernel(view, sees_pair=target.sees == "pair", has_score=False) if view else None
        fitter = PairFitter(inputs=self.inputs, parts=self.parts, groups_N=self.groups_N, said=said, seed=self.seed)
        label_N = labels[target.name]
        if target.sees == "image" and fitter.is_rated and _two_groups(label_N, self.groups_N):
            return self._of_ratings_and_pairs(fitter, [only] if only else image_candidates(self.inputs), label_N)
        found = fitter.fit(target, only=only)
        if found is None:
            return None
        own_M, said_N = found.own_M, found.said_N.to(self.z_N.device)
        return _Fit(found.members, said_N, found.rows_M, own_M, fits=found.fits, pairs=found)

    def _of_ratings_and_pairs(self, fitter: PairFitter, candidates: Sequence[Candidate], label_N: Tensor) -> _Fit:
        """Fit to ratings, which choose, and then to pairs besides, where left-out rows are better for it."""
        before = self.of_image(candidates, label_N)
        members = [
            (candidate, share, fit.strength)
            for (candidate, _, share), fit in zip(before.members, before.fits, strict=True)
        ]
        after = fitter.refit(members, before.said_N.cpu())
        if after is None:
            return before
        said_N = after.said_N.to(self.z_N.device)
        return _Fit(
            after.members, said_N, after.rows_M, after.own_M, choice=before.choice, fits=after.fits, pairs=after
        )

    def _two_rounds(
        self, candidates: Sequence[Candidate], label_N: Tensor, fit: Callable[[Candidate, int, float | None], Any]
    ) -> tuple[list[_Taken], Choice]:
        """Fit candidates to some rows, those that may win to all with the strength found, and choose among these."""
        lone, first = len(candidates) == 1, {}
        for candidate in candidates:
            first[candidate] = fit(candidate, MAX_ROWS if lone else SCREEN_ROWS, None)
        rows_S = first[candidates[0]].rows_M
        label_S, said = _numbers(label_N[rows_S]), {c.name: _clipped(found.left_out_M) for c, found in first.items()}
        num_groups = len(np.unique(self.groups_N[~torch.isnan(label_N).cpu().numpy()]))
        kept = finalists(said, label_S, by=judged_by(num_groups))
        has_all = lone or len(rows_S) == min(int((~torch.isnan(label_N)).sum()), MAX_ROWS)
        last = {
            c: found if has_all else fit(c, MAX_ROWS, found.fit.strength)
            for c, found in first.items()
            if c.name in kept
        }
        rows_M = last[next(iter(last))].rows_M
        label_M, left_out = _numbers(label_N[rows_M]), {c.name: _clipped(found.left_out_M) for c, found in last.items()}
        choice = choose(left_out, label_M, self.groups_N[rows_M], seed=self.seed)
        of_first = {name: figures(said_S, label_S) for name, said_S in said.items()}
        taken = [_Taken(c, found, choice.shares[c.name]) for c, found in last.items() if c.name in choice.shares]
        return taken, replace(choice, figures={**of_first, **choice.figures})


def fit_bases(
    rows: CacheRows,
    split: Split,
    *,
    labels: Collection[str],
    seed: int,
    view: str | None = None,
    pairs: Mapping[str, RowPairs] = NO_PAIRS,
) -> Bases:
    """Fit the bases of all targets; the labels of test rows are not looked at.

    Every target chooses among candidates (`base_choice.py`) by left-out rows; with a `view` there is one, a kernel on
    it. A target of a pair fits least squares of the label on (s + 1)/2 first, as the calibrated base, then its members
    to what is left; among their inputs may be what the base of the first image target says without the row
    (`kernel_on_score.py`). Validation rows are fitted to as well: epochs are chosen on what the other groups say of
    them. A target that is not trained, not among `labels`, is as if it were missing. One that `pairs` of these rows
    speak for is fitted to ratings and pairs together (`pair_bases.py`); no test row may be among them.

    The mean of each base over the rows that it was fitted to is that of their labels, and so is the mean of what
    left-out fits say of training rows.

    Raises:
        UserError: a view holds values that are not finite.
    """
    fitter, label_N = _prepared(rows, split, labels=labels, seed=seed)
    found: dict[str, _Fit] = {}
    score = Score(torch.zeros_like(fitter.z_N), None)
    for target in rows.targets:
        if target.sees == "image":
            candidates = _candidates(target, fitter.inputs, view, has_score=False)
            fit = fitter.of_pairs(target, pairs[target.name], label_N, view) if target.name in pairs else None
            found[target.name] = fit = fit or fitter.of_image(candidates, label_N[target.name])
            score = score if len(found) > 1 else Score(fit.said_N, fit.refits)
    for target in rows.targets:
        if target.sees == "pair":
            candidates = _candidates(target, fitter.inputs, view, has_score=score.refits is not None)
            fit = fitter.of_pairs(target, pairs[target.name], label_N, view) if target.name in pairs else None
            found[target.name] = fit or fitter.of_pair(candidates, score, label_N[target.name])
    ordered = {target.name: found[target.name] for target in rows.targets}
    return _bases(rows, split, ordered, label_N, z_N=fitter.z_N)


def candidate_scores(
    rows: CacheRows, split: Split, *, labels: Collection[str], seed: int
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Return what every candidate alone says of the test rows, (M,) in [0, 1], by its name and target.

    Those with a score among their inputs have that of the base that was chosen for the first image target.
    """
    fitter, label_N = _prepared(rows, split, labels=labels, seed=seed)
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    score = Score(torch.zeros_like(fitter.z_N), None)
    images = [target for target in rows.targets if target.sees == "image"]
    for target in images[:1]:
        chosen = fitter.of_image(image_candidates(fitter.inputs), label_N[target.name])
        score = Score(chosen.said_N, chosen.refits)
    for target in rows.targets:
        if target.name not in labels:
            continue
        is_pair = target.sees == "pair"
        for candidate in _candidates(target, fitter.inputs, None, has_score=score.refits is not None):
            if is_pair:
                fit = fitter.of_pair([candidate], score, label_N[target.name])
            else:
                fit = fitter.of_image([candidate], label_N[target.name])
            line_N = fit.slope * fitter.z_N + fit.offset if is_pair else 0.0
            said_N = (line_N + fit.said_N).clamp(0, 1).cpu().numpy()
            found.setdefault(candidate.name, {})[target.name] = said_N[split.test]
    return found


def _prepared(
    rows: CacheRows, split: Split, *, labels: Collection[str], seed: int
) -> tuple[_Fitter, dict[str, Tensor]]:
    """Return what all fits share, and the labels that they may see: of train and validation rows, NaN elsewhere."""
    fitted_N = _fitted_rows(rows, split)
    label_N = {
        each.name: torch.from_numpy(
            np.where(fitted_N & (each.name in labels), rows.label(each.name), np.nan).astype(np.float32)
        ).to(rows.device)
        for each in rows.targets
    }
    z_N = (torch.from_numpy(rows.cosine()).to(rows.device) + 1) / 2
    return _Fitter(dict(rows.inputs()), joined_groups(rows), z_N, seed), label_N


def _fitted_rows(rows: CacheRows, split: Split) -> NDArray[np.bool_]:
    fitted_N = np.zeros(len(rows.rows), dtype=bool)
    fitted_N[split.train] = fitted_N[split.val] = True
    return fitted_N


def _candidates(target: Target, inputs: Mapping[str, Any], view: str | None, *, has_score: bool) -> list[Candidate]:
    is_pair = target.sees == "pair"
    if view is not None:
        return [plain_kernel(view, sees_pair=is_pair, has_score=has_score)]
    return pair_candidates(inputs, has_score=has_score) if is_pair else image_candidates(inputs)


def _bases(
    rows: CacheRows,
    split: Split,
    found: Mapping[str, _Fit],
    label_N: Mapping[str, Tensor],
    *,
    z_N: Tensor,
) -> Bases:
    fitted_N = _fitted_rows(rows, split)
    pairs = {target.name for target in rows.targets if target.sees == "pair"}
    lines = {name: (fit.slope, fit.offset) for name, fit in found.items() if name in pairs}
    columns, left_out, members = {}, {}, {}
    state: dict[str, Tensor] = {}
    used = dict.fromkeys(name for fit in found.values() for c, _, _ in fit.members for name in c.inputs)
    inputs = rows.inputs()
    widths = {
        name: int(inputs[name][torch.zeros(1, dtype=torch.int64)].shape[1])
        for name in used
        if name not in {"center", "prompt", "cosine"}
    }
    for name, fit in found.items():
        line_N = lines[name][0] * z_N + lines[name][1] if name in pairs else torch.zeros_like(z_N)
        columns[name] = _levelled(fit.said_N, line_N, label_N[name], train=split.train, fitted_N=fitted_N)
        whole_N = (line_N + columns[name]).clamp(0, 1).cpu().numpy()
        is_left_out = np.zeros(len(whole_N), dtype=bool)
        is_left_out[fit.rows_M] = True
        left_out[name] = np.where(is_left_out, whole_N, np.nan).astype(np.float32)
        members[name] = tuple(
            MemberShape(
                c.kind, (*c.inputs, *(("score",) if c.with_score else ())), len(getattr(m, "points_LP", ())), share
            )
            for c, m, share in fit.members
        )
        state |= {
            f"{head_name(name)}.fitted.members.{place}.{part}": value
            for place, (_, member, _) in enumerate(fit.members)
            for part, value in member.state_dict().items()
        }
        if rows.anchors is not None and any(ANCHORS in c.inputs for c, _, _ in fit.members):
            state[f"{head_name(name)}.fitted.anchors_AD"] = rows.anchors
    about = {
        "choice": {name: fit.choice.to_json() if fit.choice else None for name, fit in found.items()},
        "members": {name: [each.to_json() for each in fit.fits] for name, fit in found.items()},
        "lines": lines,
    }
    if of_pairs := {name: fit.pairs for name, fit in found.items() if fit.pairs}:
        about["pairs"] = {name: base.about for name, base in of_pairs.items()}
    return Bases(BaseShape(widths, members), state, lines, columns, left_out, about, of_pairs)


def _two_groups(label_N: Tensor, groups_N: NDArray[np.int64]) -> bool:
    return len(np.unique(groups_N[~torch.isnan(label_N).cpu().numpy()])) > 1


def _numbers(column: Tensor) -> NDArray[np.float64]:
    return np.asarray(column.double().cpu().numpy())


def _clipped(said_M: Tensor) -> NDArray[np.float64]:
    """Return predictions as a base reports them."""
    return np.clip(_numbers(said_M), 0, 1)


def _mix(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    mixed = torch.zeros_like(parts[0][1])
    for share, value in parts:
        mixed = mixed + share * value
    return mixed


def _levelled(
    said_N: Tensor, line_N: Tensor, label_N: Tensor, *, train: NDArray[np.int64], fitted_N: NDArray[np.bool_]
) -> Tensor:
    """Return what a base says, of fitted rows moved until it has the mean of the labels on training rows."""
    known = train[~torch.isnan(label_N[train]).cpu().numpy()]
    if not len(known):
        return said_N
    level = clamp_shift((line_N + said_N)[known], label_N[known])
    return said_N + level * torch.from_numpy(fitted_N).to(said_N)


def start_bases(heads: Heads, base: str, batches: Batches, fitted: Bases | None) -> dict[str, Any] | None:
    """Put the bases of new heads in place and return what was fitted, None for the plain start."""
    if fitted is not None:
        fitted.put_into(heads)
        return fitted.about
    if isinstance(heads, DirectHeads):
        return calibrate_branch(heads, lambda: batches.in_order(SCORE_BATCH)) if heads.two_branch else None
    return calibrate(heads, lambda: batches.in_order(SCORE_BATCH)) if base == "calibrated" else None
