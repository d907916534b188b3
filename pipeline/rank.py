"""STAGE rank: which generator is better, whether the difference is real, and whether a build may ship."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.files import keep_result, whole_file
from deltaclip.base.places import check_outside
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.comparing.generators import read_generators, score_generator, without_learned
from deltaclip.pipeline.comparing.ranking import DROPPED, UNCLEAR, rank_generators
from deltaclip.pipeline.report_parts.rank_page import rank_page
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.trust import together_words
from deltaclip.pipeline.words.rank_words import rank_junit, rank_markdown, rank_summary

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.pipeline.comparing.generators import Generator, ScoredGenerator
    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.settings import RankConfig

LARGER = 3  # exit code where a drop is larger than allowed: apart from 1, the machine, and 2, the input


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """A ranking as plain values; its `exit_code` is 3 where the gate says that the build should not ship."""

    ranking: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """Return 0 or LARGER."""
        verdict = (self.ranking["gate"] or {}).get("verdict")
        return LARGER if verdict == DROPPED or (verdict == UNCLEAR and self.ranking["strict"]) else 0

    def to_json(self) -> dict[str, Any]:
        """Return generators, means and differences by target, the gate, and the rows that fell most."""
        return {**self.ranking, "exit_code": self.exit_code}

    def summary(self) -> str:
        """Return the ranking as text, the gate last."""
        return rank_summary(self.ranking)


def rank(config: RankConfig) -> RankResult:
    """Score the pictures of several generators, and say which is better and by how much.

    Raises:
        UserError: wrong data, a baseline that is none of the generators, or all pictures of one were trained on.
    """
    outputs = [config.markdown, config.junit, config.page]
    for out in outputs:
        check_outside(out, [config.run])
    run = open_run(config.run)
    generators = without_learned(read_generators(config, run), run, allow_outside=config.allow_outside)
    scorer = Scorer.load(config.run, device=config.device, backbone=config.backbone, pretrained=config.pretrained)
    scored = [score_generator(scorer, each, needs_prompts=run.needs_prompts, config=config) for each in generators]
    what = "pairs" if run.needs_prompts else "images"
    ranking = {
        "run": str(config.run),
        "confidence": config.confidence,
        "strict": config.strict,
        "generators": [_about(each, what) for each in scored],
        **rank_generators(
            scored,
            config.only or run.labels,
            confidence=config.confidence,
            baseline=config.baseline,
            max_drop=config.max_drop,
            most_fallen=config.fell,
        ),
        "notes": _notes(config, run, generators),
    }
    result = RankResult(ranking=ranking)
    _write(config, result, scored)
    return result


def _notes(config: RankConfig, run: RunFolder, generators: list[Generator]) -> list[str]:
    ranges = {
        f"{label}: human scores of {words}": None
        for each in generators
        for label, words in each.rows.label_ranges.items()
        if np.isfinite(each.labels(label)).any()
    }
    said = [] if run.trust else [f"{config.run} is of an earlier release: what is unlike its training is not told"]
    return [*ranges, *said]


def _about(each: ScoredGenerator, what: str) -> dict[str, Any]:
    """Return what is to be said of a generator beside its scores."""
    own, scored = each.generator, len(each.generator) - len(each.failed)
    unlike = None if each.flags is None else sum(map(bool, each.flags))
    first = next(iter(each.failed.items()), None)
    return {
        "name": own.name,
        "pictures": len(own),
        "learned": own.learned,
        "failed": len(each.failed),
        "failed_first": f"{own.rows.images[first[0]]}: {first[1]}" if first else "",
        "truncated_prompts": each.truncated_prompts,
        "unlike": unlike,
        "unlike_share": None if unlike is None else unlike / scored,
        "together": together_words(each.excess, what),
        "notes": own.notes,
    }


def _write(config: RankConfig, result: RankResult, scored: list[ScoredGenerator]) -> None:
    """Write what was asked for beside the table."""
    ranking = result.ranking
    if config.markdown:
        keep_result(config.markdown, partial(_write_text, text=rank_markdown(ranking)))
    if config.junit:
        keep_result(config.junit, partial(_write_text, text=rank_junit(ranking)))
    if config.page:
        made_by = f"Made by deltaclip {importlib.metadata.version('deltaclip')}"
        page = rank_page(ranking, scored, allow_outside=config.allow_outside, made_by=made_by)
        keep_result(config.page, partial(_write_text, text=page))


def _write_text(path: Path, *, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
