"""What rankings of generators and intervals of people's means keep of what they promise, on test rows of a real run.

`python -m benchmarks.ranking RUN` takes the test rows of a run that knew none of their prompts, with their labels. The
test prompts are the population: its means are known. A resampling draws prompts from it with replacement, all their
rows with them, each draw a prompt of its own; labels are then shown of some of the drawn rows, at random.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.pipeline.runs.prediction_table import read_predictions
from deltaclip.pipeline.scoring.prediction_powered import Rated, human_difference, human_mean
from deltaclip.pipeline.scoring.prompt_means import ranked_means, unit_means

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.scoring.prediction_powered import HumanMean

DRAWN = 300  # prompts of a resampling
LABELLED = (20, 50, 100, 200)  # rows of a generator whose label is shown


class Population(NamedTuple):
    """Rows of the test prompts: scores and labels, the prompt as a code below U, and the generator as a code."""

    score_N: NDArray[np.float64]
    label_N: NDArray[np.float64]
    prompt_N: NDArray[np.int64]
    source_N: NDArray[np.int64]
    names: list[str]

    @property
    def num_prompts(self) -> int:
        """U."""
        return int(self.prompt_N.max()) + 1

    def means(self, value_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean of each prompt by generator, (U, G), NaN where it has none."""
        return np.stack(
            [
                unit_means(np.where(self.source_N == g, value_N, np.nan), self.prompt_N, self.num_prompts)
                for g in range(len(self.names))
            ],
            axis=1,
        )


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--draws", type=int, default=200, help="resamplings of prompts for differences")
    parser.add_argument("--label-draws", type=int, default=1000, help="resamplings for intervals of people's means")
    given = parser.parse_args(arguments)
    for target in ("quality", "consistency"):
        sources = read_population(given.run, target, families=False)
        print(f"{target}: {len(sources.score_N):,} test rows, {sources.num_prompts} prompts", flush=True)
        _print_order(sources)
        _print_order(read_population(given.run, target, families=True))
        _print_differences(sources, given.draws)
        families = read_population(given.run, target, families=True)
        for scorer in ("the run's", "shuffled", "upside down"):
            _print_people(_wrong(families, scorer), scorer, given.label_draws)
        print(flush=True)


def read_population(run: Path, target: str, *, families: bool) -> Population:
    """Return the test rows of a run; with `families` the variants of a generator (NAME_variant) as one."""
    columns = ("split", "group", "source", target, f"{target}_label")
    rows = [row for row in read_predictions(run / "predictions.csv", columns) if row["split"] == "test"]
    sources = [row["source"].partition("_")[0] if families else row["source"] for row in rows]
    names, source_N = np.unique(sources, return_inverse=True)
    prompt_N = np.unique([row["group"] for row in rows], return_inverse=True)[1]
    score_N, label_N = (np.array([float(row[name]) for row in rows]) for name in (target, f"{target}_label"))
    return Population(score_N, label_N, prompt_N.astype(np.int64), source_N.astype(np.int64), names.tolist())


def _wrong(real: Population, scorer: str) -> Population:
    """Return a population whose scores are shuffled within generators, or turned and squeezed: wrong in every mean."""
    if scorer == "the run's":
        return real
    if scorer == "upside down":
        return real._replace(score_N=0.8 - real.score_N / 2)
    score_N, rng = real.score_N.copy(), np.random.default_rng(1)
    for source in range(len(real.names)):
        own = np.flatnonzero(real.source_N == source)
        score_N[own] = rng.permutation(score_N[own])
    return real._replace(score_N=score_N)


# ---- The order of generators


def _print_order(real: Population) -> None:
    from scipy.stats import kendalltau, spearmanr

    score_G, label_G = (np.nanmean(real.means(values), axis=0) for values in (real.score_N, real.label_N))
    order = np.argsort(-label_G)
    words = ", ".join(f"{real.names[g]} {score_G[g]:.3f}/{label_G[g]:.3f}" for g in order)
    rho, tau = spearmanr(score_G, label_G)[0], kendalltau(score_G, label_G)[0]
    print(f"  {len(order)} generators, means of scores/people: {words}")
    print(f"  rank agreement of the means: Spearman {rho:.3f}, Kendall {tau:.3f}", flush=True)


def _print_differences(real: Population, draws: int) -> None:
    """Print how often the paired interval holds the population's difference of scores, and that of people."""
    mean_UG, human_UG = real.means(real.score_N), real.means(real.label_N)
    rng, held = np.random.default_rng(0), defaultdict(list)
    for seed in range(draws):
        drawn = rng.integers(real.num_prompts, size=real.num_prompts)
        _, found = ranked_means(mean_UG[drawn], resamples=2000, seed=seed)
        for (a, b), difference in found.items():
            for what, value_UG in (("scores", mean_UG), ("people", human_UG)):
                truth = float(np.nanmean(value_UG[:, a] - value_UG[:, b]))
                held[what].append(difference.mean.lo <= truth <= difference.mean.hi)
                right = (difference.mean.value > 0) == (truth > 0)
                clear = not difference.mean.lo <= 0 <= difference.mean.hi
                held[f"{what}, sign"] += [right] if clear else []
    print(
        f"  95 % intervals of differences of scores, {draws} resamplings of {real.num_prompts} prompts: hold the "
        f"population's {np.mean(held['scores']):.3f}, people's {np.mean(held['people']):.3f}; where clear of 0 the "
        f"sign is people's in {np.mean(held['people, sign']):.3f}",
        flush=True,
    )


# ---- What people would say


def _print_people(real: Population, scorer: str, draws: int) -> None:
    """Print coverage and width of intervals of people's means by number of labels, and of their differences."""
    truth_UG, rows_of_G = real.means(real.label_N), _rows_by_prompt(real)
    print(f"  people's means, scorer {scorer}, {draws} resamplings of {DRAWN} prompts")
    print(f"    {'labelled':>8} {'alone':>7} {'powered':>8} {'widths':>7} {'saved':>6}   differences: the same")
    pairs = list(itertools.combinations(range(len(real.names)), 2))
    for labelled in LABELLED:
        rng, one, two = np.random.default_rng(labelled), [], []
        for draw in range(draws):
            drawn = rng.integers(real.num_prompts, size=DRAWN)
            parts = [_drawn(rows_of, drawn, real, labelled=labelled, rng=rng) for rows_of in rows_of_G]
            one += [_told(human_mean(part, DRAWN), truth_UG[:, g]) for g, part in enumerate(parts)]
            a, b = pairs[draw % len(pairs)]
            two.append(_told(human_difference(parts[a], parts[b], DRAWN), truth_UG[:, a] - truth_UG[:, b]))
        own, other = (np.nanmean(np.array(each, dtype=float), axis=0) for each in (one, two))
        print(
            f"    {labelled:8} {own[0]:7.3f} {own[1]:8.3f} {own[2]:7.3f} {own[3]:6.0f}   "
            f"{other[0]:7.3f} {other[1]:8.3f} {other[2]:7.3f} {other[3]:6.0f}",
            flush=True,
        )


def _drawn(
    rows_of: list[NDArray[np.int64]],
    drawn: NDArray[np.int64],
    real: Population,
    *,
    labelled: int,
    rng: np.random.Generator,
) -> Rated:
    """Return the rows of one generator of drawn prompts, of which `labelled` at random keep their label."""
    rows = np.concatenate([rows_of[prompt] for prompt in drawn])
    units = np.repeat(np.arange(DRAWN), [len(rows_of[prompt]) for prompt in drawn])
    label_N = np.full(len(rows), np.nan)
    shown = rng.choice(len(rows), min(labelled, len(rows)), replace=False)
    label_N[shown] = real.label_N[rows[shown]]
    return Rated(real.score_N[rows], label_N, units)


def _rows_by_prompt(real: Population) -> list[list[NDArray[np.int64]]]:
    """Return by generator and prompt which rows are its own."""
    return [
        [np.flatnonzero((real.source_N == g) & (real.prompt_N == prompt)) for prompt in range(real.num_prompts)]
        for g in range(len(real.names))
    ]


def _told(found: HumanMean | None, truth_U: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Return whether the intervals of labels alone and of both hold the truth, their ratio, and ratings saved."""
    truth = float(np.nanmean(truth_U))
    if found is None:
        return (np.nan,) * 4
    width = (found.hi - found.lo) / (found.alone_hi - found.alone_lo)
    alone = found.alone_lo <= truth <= found.alone_hi
    return alone, found.lo <= truth <= found.hi, width, found.saved


if __name__ == "__main__":
    main()
