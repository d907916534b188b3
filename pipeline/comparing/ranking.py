"""Generators in order: means, differences, what people say on average, the gate, and the rows that fell most.

From scored rows to plain values, in the shape of `--json`. Knows no files and no words for a terminal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.pipeline.scoring.prediction_powered import ODD, Rated, human_difference, human_mean
from deltaclip.pipeline.scoring.prompt_means import holm, ranked_means, unit_means

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from deltaclip.pipeline.comparing.generators import ScoredGenerator
    from deltaclip.pipeline.scoring.prediction_powered import HumanMean
    from deltaclip.pipeline.scoring.prompt_means import Difference, Mean

PASSED, DROPPED, UNCLEAR = "passed", "dropped", "unclear"
PEOPLE, SCORES = "people", "scores"


class _Told(NamedTuple):
    """What one target says: units (codes) by generator, their means (U, G), and rows with labels."""

    mean_UG: NDArray[np.float64]
    rated: list[Rated]


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two generators, the first minus the second, by scores and by people where there are enough labels."""

    first: str
    second: str
    scores: Difference
    people: HumanMean | None

    @property
    def judged(self) -> Mean | HumanMean:
        """The difference that decides: that of people, whatever the bias of the scorer, where it is known."""
        return self.people or self.scores.mean

    def to_json(self, p_holm: float, confidence: float) -> dict[str, Any]:
        """Return plain values with the verdict: which of the two is better, None where nobody can tell."""
        sure = math.isfinite(p_holm) and p_holm < 1 - confidence
        better = (self.first if self.judged.value > 0 else self.second) if sure else None
        return {
            "first": self.first,
            "second": self.second,
            "scores": self.scores.mean.to_json(),
            "paired": self.scores.is_paired,
            "only_first": self.scores.only[0],
            "only_second": self.scores.only[1],
            "people": self.people.to_json() if self.people else None,
            "judged_by": PEOPLE if self.people else SCORES,
            "p_holm": p_holm if math.isfinite(p_holm) else None,
            "better": better,
        }


def rank_generators(
    scored: Sequence[ScoredGenerator],
    targets: Sequence[str],
    *,
    confidence: float,
    baseline: str | None,
    max_drop: float | None,
    most_fallen: int,
) -> dict[str, Any]:
    """Return what there is to say of generators, as plain values.

    Args:
        scored: at least two.
        targets: to rank by.
        confidence: share of all intervals.
        baseline: generator that the others are measured against; None takes the first in order for what fell.
        max_drop: below the baseline that is allowed; None without a gate.
        most_fallen: rows of each target that fell most.
    """
    names = [each.generator.name for each in scored]
    units = [each.generator.units for each in scored]
    code_of = {unit: code for code, unit in enumerate(dict.fromkeys(unit for own in units for unit in own))}
    code_GN = [np.array([code_of[unit] for unit in own], dtype=np.int64) for own in units]
    found: dict[str, Any] = {"targets": {}, "gate": None, "fell": []}
    checks = []
    for target in targets:
        told = _told(scored, target, code_GN, len(code_of))
        means, pairs = _compared(told, names, confidence=confidence)
        found["targets"][target] = table = _table(told, names, means, pairs, confidence=confidence)
        if baseline is not None and max_drop is not None:
            checks += [
                _check(pair, target, baseline, max_drop) for pair in pairs if baseline in (pair.first, pair.second)
            ]
        reference = baseline or table["means"][0]["generator"]
        found["fell"] += _fallen(scored, target, code_GN, told.mean_UG, reference=reference, most=most_fallen)
    if checks:
        verdicts = {check["verdict"] for check in checks}
        verdict = next(each for each in (DROPPED, UNCLEAR, PASSED) if each in verdicts)
        found["gate"] = {"baseline": baseline, "max_drop": max_drop, "verdict": verdict, "checks": checks}
    return found


def _told(
    scored: Sequence[ScoredGenerator], target: str, code_GN: Sequence[NDArray[np.int64]], num_units: int
) -> _Told:
    rated, means = [], []
    for each, code_N in zip(scored, code_GN, strict=True):
        score_N = each.scores[target]
        known = np.isfinite(score_N)
        rated.append(Rated(score_N[known], each.generator.labels(target)[known], code_N[known]))
        means.append(unit_means(score_N, code_N, num_units))
    return _Told(np.stack(means, axis=1), rated)


def _compared(told: _Told, names: Sequence[str], *, confidence: float) -> tuple[list[Mean], list[_Pair]]:
    num_units = len(told.mean_UG)
    means, differences = ranked_means(told.mean_UG, level=confidence)
    pairs = []
    for (a, b), difference in differences.items():
        people = human_difference(told.rated[a], told.rated[b], num_units, level=confidence)
        pairs.append(_Pair(first=names[a], second=names[b], scores=difference, people=people))
    return means, pairs


def _table(
    told: _Told, names: Sequence[str], means: Sequence[Mean], pairs: Sequence[_Pair], *, confidence: float
) -> dict[str, Any]:
    people = [human_mean(rated, len(told.mean_UG), level=confidence) for rated in told.rated]
    by_people = all(each is not None for each in people)
    values = [each.value if by_people and each else mean.value for each, mean in zip(people, means, strict=True)]
    order = sorted(range(len(names)), key=lambda place: (-np.nan_to_num(values[place], nan=-1.0), place))
    adjusted = holm([pair.judged.p_value for pair in pairs])
    return {
        "ordered_by": PEOPLE if by_people else SCORES,
        "means": [
            {
                "generator": names[place],
                "rows": len(told.rated[place].score_N),
                "labels": int(np.isfinite(told.rated[place].label_N).sum()),
                "scores": means[place].to_json(),
                "people": people[place].to_json() if people[place] else None,  # type: ignore[union-attr]
                "odd": bool(people[place] and people[place].oddness > ODD),  # type: ignore[union-attr]
            }
            for place in order
        ],
        "differences": [pair.to_json(p, confidence) for pair, p in zip(pairs, adjusted, strict=True)],
    }


def _check(pair: _Pair, target: str, baseline: str, max_drop: float) -> dict[str, Any]:
    """Return whether a generator drops further below the baseline than is allowed.

    Where the whole interval of the drop lies beyond what is allowed it is `dropped`, where none of it does `passed`.
    """
    is_first = pair.first == baseline
    judged = pair.judged
    drop, lo, hi = (judged.value, judged.lo, judged.hi) if is_first else (-judged.value, -judged.hi, -judged.lo)
    verdict = DROPPED if lo > max_drop else PASSED if hi <= max_drop else UNCLEAR
    gap, half = abs(drop - max_drop), (hi - lo) / 2
    # An interval is as narrow as the square root of what it rests on is large.
    times = (half / gap) ** 2 if verdict == UNCLEAR and gap > 0 and math.isfinite(half) else None
    return {
        "generator": pair.second if is_first else pair.first,
        "target": target,
        "drop": _plain(drop),
        "lo": _plain(lo),
        "hi": _plain(hi),
        "judged_by": PEOPLE if pair.people else SCORES,
        "verdict": verdict,
        "times_more": times,
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fallen(
    scored: Sequence[ScoredGenerator],
    target: str,
    code_GN: Sequence[NDArray[np.int64]],
    mean_UG: NDArray[np.float64],
    *,
    reference: str,
    most: int,
) -> list[dict[str, Any]]:
    """Return the prompts whose mean lies furthest below the reference's, of all other generators together."""
    names = [each.generator.name for each in scored]
    base = names.index(reference)
    drops = [
        (float(drop), place, int(unit))
        for place in range(len(names))
        if place != base
        for unit, drop in enumerate(mean_UG[:, base] - mean_UG[:, place])
        if drop > 0
    ]
    drops.sort(key=lambda one: (-one[0], one[1], one[2]))
    found = []
    for drop, place, unit in drops[:most]:
        own = _typical(scored[place], target, code_GN[place] == unit, mean_UG[unit, place])
        other = _typical(scored[base], target, code_GN[base] == unit, mean_UG[unit, base])
        prompt = scored[place].generator.rows.prompts[own["row"]]
        found.append(
            {"target": target, "generator": names[place], "reference": reference, "prompt": prompt, "drop": drop}
            | {name: value for name, value in own.items() if name != "row"}
            | {f"reference_{name}": value for name, value in other.items() if name not in ("row", "flag")}
        )
    return found


def _typical(each: ScoredGenerator, target: str, is_own_N: NDArray[np.bool_], mean: float) -> Mapping[str, Any]:
    """Return the row of a unit whose score is nearest to the unit's mean."""
    score_N = each.scores[target]
    own = np.flatnonzero(is_own_N & np.isfinite(score_N))
    row = int(own[np.argmin(np.abs(score_N[own] - mean))])
    flag = each.flags[row] if each.flags else ""
    return {"row": row, "image": each.generator.rows.images[row], "score": float(score_N[row]), "flag": flag}
