"""STAGE compare: runs beside each other on the rows that are test in all of them.

With one training each, differences are judged by a bootstrap over prompts; with repeats, over the split seeds that all
runs have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.files import keep_result, write_json
from deltaclip.base.places import check_outside
from deltaclip.base.progress import Progress
from deltaclip.pipeline.comparing.run_differences import Round, compare_label, read_round, source_of_spread
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.run_split import near_pairs, with_near_trained
from deltaclip.pipeline.words.result_words import comparison_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.settings import CompareConfig


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """Figures of every run on the same rows, and their differences from the first."""

    comparison: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return runs, seeds, rows, and for each label the figures of every run."""
        return self.comparison

    def summary(self) -> str:
        """Return the comparison as a table."""
        return comparison_table(self.comparison)


def compare(config: CompareConfig) -> CompareResult:
    """Compare runs with the first one, on the rows that are test in all.

    Raises:
        UserError: no row is test in all runs, their labels differ, or no label was trained in all.
    """
    check_outside(config.out, config.runs)
    runs = [open_run(path) for path in config.runs]
    for run in runs:
        run.check_has_rows()
    seeds, rounds = _rounds(runs)
    labels = [label for label in rounds[0].labels if all(label in one.labels for one in rounds)]
    if not labels:
        raise UserError("no label was trained in all runs", place="RUNS", remedy="give runs that share one")
    # The bootstrap of a large test side takes seconds for each label and run.
    with Progress(len(labels) * len(config.runs), "comparing", unit="intervals") as progress:
        compared = {label: compare_label(rounds, label, advance=progress.advance) for label in labels}
    comparison = {
        "runs": [str(path) for path in config.runs],
        "seeds": seeds,
        "over": source_of_spread(rounds),
        "rows": [len(one.row_N) for one in rounds],
        "labels": compared,
        "warnings": [
            *_warnings(config.runs, rounds, seeds),
            *_names_only(runs, rounds),
            *_near_copies(config.runs, runs, rounds),
        ],
    }
    if config.out:
        keep_result(config.out, lambda path: write_json(path, comparison))
    return CompareResult(comparison=comparison)


def _rounds(runs: Sequence[RunFolder]) -> tuple[list[int], list[Round]]:
    """Return the split seeds that all runs have, with a round for each; without one, the first training of each run."""
    seeds_of = [list(run.metrics["split"]["seeds"]) for run in runs]
    common = [seed for seed in seeds_of[0] if all(seed in seeds for seeds in seeds_of[1:])]
    picks = [[seed] * len(runs) for seed in common] or [[seeds[0] for seeds in seeds_of]]
    return common, [read_round([run.predictions(seed) for run, seed in zip(runs, pick, strict=True)]) for pick in picks]


def _names_only(runs: Sequence[RunFolder], rounds: Sequence[Round]) -> list[str]:
    """Say where rows are taken for the same by their names, unless all runs are of one state of one data set."""
    same = len({run.config["cache"]["plan"] for run in runs}) == 1
    return (
        []
        if same or all(one.by_content for one in rounds)
        else ["rows are paired by name: not all runs recorded the content of their images"]
    )


def _near_copies(paths: Sequence[Path], runs: Sequence[RunFolder], rounds: Sequence[Round]) -> list[str]:
    """Say which runs learned from near copies of compared images; where rows have names alone that is said already."""
    found = []
    for number, (path, run) in enumerate(zip(paths, runs, strict=True)):
        if not all(one.by_content for one in rounds):
            continue
        try:
            pairs = near_pairs(run)
        except UserError as error:
            found.append(f"whether {path} has seen near copies of compared images is not known ({error.message})")
            continue
        if near := sum(int(with_near_trained(one.image_N, one.learned[number], pairs).sum()) for one in rounds):
            found.append(f"{path} has seen a near copy of the image of {near:,} compared rows in training: it flatters")
    return found


def _warnings(paths: Sequence[Path], rounds: Sequence[Round], seeds: Sequence[int]) -> list[str]:
    found = [] if seeds else ["the runs have no split seed in common: the first training of each is compared"]
    everything = {label for one in rounds for missing in one.missing for label in missing}
    learned = {label for label in everything if any(label not in m for one in rounds for m in one.missing)}
    for number, path in enumerate(paths):
        lacking = dict.fromkeys(label for one in rounds for label in one.missing[number] if label in learned)
        found += [f"{path} was not trained on {label}, which is not compared" for label in lacking]
        if trained := sum(one.trained[number] for one in rounds):
            found.append(
                f"{path} trained on {trained:,} rows that are test in another run: only rows that are test in all are "
                "compared"
            )
        if seen := sum(one.seen[number] for one in rounds):
            found.append(f"{path} has seen the prompt or the image of {seen:,} compared rows in training: it flatters")
    return found
