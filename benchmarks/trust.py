"""What intervals and flags keep of what they promise, on test rows of real caches.

`python -m benchmarks.trust cache.h5 --splits 5` trains on each split and counts labels of fresh groups inside
intervals, over all test rows and by source, once where sources are told and once where the run has to guess them.
`--left-out` also trains without each source in turn: what a generator that nobody rated meets.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.features.store.texts import TextColumn
from deltaclip.pipeline.rows.cached_rows import load_rows, views_there
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.rows.task import Task
from deltaclip.pipeline.runs.save_run import judge
from deltaclip.pipeline.runs.trust import trusted
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.training.train_heads import learn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.runs.save_run import Finished
    from deltaclip.pipeline.scoring.splits import Split

ASKED = (0.8, 0.9, 0.95)
SET_SIZE, NUM_SETS = 20, 200
FRACTIONS = "0.7,0.1,0.2"


class Counted(NamedTuple):
    """Of test rows with a label: whether it lies inside, how wide the interval is, and the source."""

    inside_M: NDArray[np.bool_]
    width_M: NDArray[np.float32]
    source_M: NDArray[np.int64]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("caches", nargs="+", type=Path)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=42)
    parser.add_argument("--base", default="auto")
    parser.add_argument("--left-out", action="store_true", help="also train without each source in turn")
    given = parser.parse_args(arguments)
    for cache in given.caches:
        rows, config = _rows(cache, given.base)
        splits = [
            split_cache(rows, "grouped", fractions=FRACTIONS, seed=seed)
            for seed in range(given.first_seed, given.first_seed + given.splits)
        ]
        print(f"{cache}, base {given.base}, {given.splits} splits by group", flush=True)
        _print_fresh_groups(rows, config, splits)
        if given.left_out:
            _print_left_out(rows, config, splits)


def _rows(cache: Path, base: str) -> tuple[CacheRows, TrainConfig]:
    return load_rows(cache, "cpu", views=views_there(cache)), TrainConfig(cache=cache, base=base)


def _trained(rows: CacheRows, config: TrainConfig, split: Split) -> Finished:
    task = Task(config=replace(config, seed=split.seeds[0]), rows=rows, split=split)
    return judge(task, learn(task), shown=False)


def _nameless(rows: CacheRows) -> CacheRows:
    """Return rows of which nobody knows the source."""
    none = TextColumn(np.full(len(rows.rows), -1), rows.rows.text["source"].names)
    return replace(rows, rows=replace(rows.rows, text={**rows.rows.text, "source": none}))


# ---- Fresh groups of sources that the training had


def _print_fresh_groups(rows: CacheRows, config: TrainConfig, splits: list[Split]) -> None:
    found: dict[tuple[str, float, str], list[Counted]] = {}
    flagged = []
    for split in splits:
        finished = _trained(rows, config, split)
        assert finished.scores.trust is not None
        flagged.append(float((finished.scores.trust.flag_N[split.test] >= 0).mean()))
        for known, judged in (("told", rows), ("guessed", _nameless(rows))):
            for asked in ASKED:
                for target, counted in _counted(finished, judged, split.test, asked).items():
                    found.setdefault((target, asked, known), []).append(
                        counted._replace(
                            source_M=rows.rows.text["source"].codes[split.test][_labelled(rows, target, split.test)]
                        )
                    )
    print(f"{'':40}  {'all':>5}  {'by source':>11}  {'width':>5}")
    for (target, asked, known), parts in found.items():
        inside = mean(float(part.inside_M.mean()) for part in parts)
        width = mean(float(part.width_M.mean()) for part in parts)
        shares = _by_source(parts)
        spread = f"{min(shares):.2f} to {max(shares):.2f}" if shares else ""
        print(f"{f'{target}, asked {asked:g}, sources {known}':40}  {inside:5.3f}  {spread:>11}  {width:5.2f}")
    print(f"flagged: {mean(flagged):.4f} of test rows\n", flush=True)


def _labelled(rows: CacheRows, target: str, chosen_M: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.isfinite(rows.label(target)[chosen_M])


def _counted(finished: Finished, rows: CacheRows, chosen_M: NDArray[np.int64], asked: float) -> dict[str, Counted]:
    columns = trusted(finished.trust, rows, finished.scores, coverage=asked).trust
    assert columns is not None
    found = {}
    for target in finished.labels:
        own_M = chosen_M[_labelled(rows, target, chosen_M)]
        low_M, high_M, label_M = columns.low[target][own_M], columns.high[target][own_M], rows.label(target)[own_M]
        inside_M = (low_M <= label_M) & (label_M <= high_M)
        found[target] = Counted(inside_M, high_M - low_M, rows.rows.text["source"].codes[own_M])
    return found


def _by_source(parts: list[Counted]) -> list[float]:
    """Return the share of labels inside by source, all splits together."""
    inside_M, source_M = (np.concatenate([getattr(part, name) for part in parts]) for name in ("inside_M", "source_M"))
    return [float(inside_M[source_M == code].mean()) for code in np.unique(source_M[source_M >= 0])]


# ---- Sources that the training lacked


def _print_left_out(rows: CacheRows, config: TrainConfig, splits: list[Split]) -> None:
    sources = rows.rows.text["source"]
    for code in np.unique(sources.codes[sources.codes >= 0]):
        of_source_N = sources.codes == code
        shares: dict[str, list[float]] = {}
        for split in splits:
            without = replace(split, train=_lacking(split.train, of_source_N), val=_lacking(split.val, of_source_N))
            finished, odd_M = _trained(rows, config, without), split.test[of_source_N[split.test]]
            columns: Any = finished.scores.trust
            shares.setdefault("flagged", []).append(float((columns.flag_N[odd_M] >= 0).mean()))
            shares.setdefault("told by sets of 20", []).append(_told_by_sets(finished, odd_M))
            for known, judged in (("told", rows), ("guessed", _nameless(rows))):
                for target, counted in _counted(finished, judged, odd_M, 0.9).items():
                    shares.setdefault(f"{target}, {known}", []).append(float(counted.inside_M.mean()))
                    shares.setdefault(f"{target} width, {known}", []).append(float(counted.width_M.mean()))
        words = "  ".join(f"{name} {mean(each):.2f}" for name, each in shares.items())
        print(f"without {sources.names[int(code)]}: {words}", flush=True)


def _told_by_sets(finished: Finished, odd_M: NDArray[np.int64]) -> float:
    """Return the share of random sets that are found unlike all sources together."""
    assert finished.scores.trust is not None
    if finished.trust.set_likeness is None:
        return float("nan")
    rng, rank_N, found = np.random.default_rng(0), finished.scores.trust.rank_N, []
    for _ in range(NUM_SETS):
        own = rng.choice(odd_M, min(SET_SIZE, len(odd_M)), replace=False)
        found.append((finished.trust.set_likeness.usual.excess(rank_N[own], own) or 0) > 1)
    return mean(found)


def _lacking(chosen_M: NDArray[np.int64], odd_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    return chosen_M[~odd_N[chosen_M]]


if __name__ == "__main__":
    main()
