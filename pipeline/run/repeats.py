"""Repeated trainings: the settings of each, and their metrics as one.

Knows the shape of `metrics.json`, with and without repeats. Must not know heads, caches or files.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from deltaclip.pipeline.scoring.splits import repeat_seeds
from deltaclip.pipeline.settings import LearningSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

Config = TypeVar("Config", bound=LearningSettings)


def repeat_configs(config: Config) -> list[Config]:
    """Return the settings of each repeat: both seeds count up, so that any repeat can be trained alone.

    Raises:
        UserError: the last seed is out of range.
    """
    pairs = zip(repeat_seeds(config.seed, config.repeats), repeat_seeds(config.split_seed, config.repeats), strict=True)
    return [replace(config, seed=seed, data_seed=split_seed) for seed, split_seed in pairs]


def combine(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the metrics of several repeats as one: every figure is its mean, SD and values.

    One repeat stays as it is. A figure that a repeat does not have is None among the values and left out of mean and
    SD; the SD is that of a sample (ddof 1), None for fewer than two. Words are joined, each with the split seeds that
    it belongs to; an outcome stands where more than half of the repeats have it.
    """
    if len(metrics) == 1:
        return metrics[0]
    splits = [found["split"] for found in metrics]
    seeds = [seed for split in splits for seed in split["seeds"]]
    split = {
        "kind": splits[0]["kind"],
        "leaks_groups": any(split["leaks_groups"] for split in splits),
        "seeds": seeds,
        "rows": _merged([split["rows"] for split in splits], seeds),
        "note": _words([split["note"] for split in splits], seeds),
    }
    figures = {
        name: _merged([found[name] for found in metrics], seeds)
        for name in metrics[0]
        if name not in ("split", "diagnostics")
    }
    return {"split": split, **figures, "diagnostics": _diagnostics([found["diagnostics"] for found in metrics])}


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Return mean, sample SD and values of one figure over repeats."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


def _merged(found: Sequence[Any], seeds: Sequence[int]) -> Any:
    """Merge what stands in one place in every repeat; None where a repeat lacks it (a label, a source)."""
    known = [value for value in found if value is not None]
    if known and isinstance(known[0], dict):
        names = dict.fromkeys(name for value in known for name in value)
        return {name: _merged([(value or {}).get(name) for value in found], seeds) for name in names}
    if known and isinstance(known[0], list):
        missing = [None] * len(known[0])
        return [_merged(values, seeds) for values in zip(*(value or missing for value in found), strict=True)]
    if known and isinstance(known[0], str):
        return _words([value or "" for value in found], seeds)
    return spread(found)


def _words(found: Sequence[str], seeds: Sequence[int]) -> str:
    if len(set(found)) == 1:
        return found[0]
    return "; ".join(f"seed {seed}: {words}" for seed, words in zip(seeds, found, strict=True) if words)


def _diagnostics(found: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(entry["name"] for entries in found for entry in entries)
    by_name = [{entry["name"]: entry for entry in entries} for entries in found]
    merged = []
    for name in names:
        entries = [entries.get(name, {"value": None, "advice": "", "verdict": ""}) for entries in by_name]
        verdict, words = _one_outcome(entries)
        value = spread([entry["value"] for entry in entries])
        merged.append({"name": name, "value": value, "advice": words, "verdict": verdict})
    return merged


def _one_outcome(entries: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Return the verdict and the words of more than half of the repeats, or that they differ."""
    counts = Counter(entry["verdict"] for entry in entries)
    verdict, count = counts.most_common(1)[0]
    if 2 * count <= len(entries):
        kinds = ", ".join(f"{verdict or 'none'} {count}" for verdict, count in counts.most_common())
        return "mixed", f"The repeats differ ({kinds}): nothing to advise."
    words = next(entry["advice"] for entry in entries if entry["verdict"] == verdict)
    return verdict, f"{words} ({count} of {len(entries)} repeats; the figures are those of one)" if words else ""
