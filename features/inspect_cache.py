"""STAGE inspect: what is in a cache, from what, how complete; every problem of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.ratings import agreement_words
from deltaclip.features.data.views import ANCHORS, left_out_lines
from deltaclip.features.store.cache_export import export_cache
from deltaclip.features.store.schema import CODE_COLUMNS, DONE, FAILED, PENDING
from deltaclip.features.store.shards import find_set, merge, open_cache
from deltaclip.features.store.verify import find_problems

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaclip.features.settings import InspectConfig
    from deltaclip.features.store.reader import FeatureStore

FAILURES_SHOWN = 10
PROBLEMS_FOUND = 2  # the exit code of wrong input: a damaged cache is one


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """One file; counts are of distinct images and texts. `problems` is None where nobody asked for them.

    `views` has by name `width`, `recipe` and the number of images `done`, `failed`, `to_do`; `anchors` counts
    their prompts, `first_frames` images whose file has more frames than the one taken; `labels` has the number of
    usable rows with each label, `pairs` that of usable pairs that speak for each target, `names` the number of
    distinct groups, sources and splits.
    """

    cache: Path
    size_bytes: int
    schema_version: int
    complete: bool
    dataset: dict[str, Any]
    request: dict[str, Any]
    facts: dict[str, Any]
    rows: int
    usable_rows: int
    images: int
    texts: int
    texts_to_do: int
    truncated_texts: int
    first_frames: int
    views: dict[str, dict[str, Any]]
    anchors: int
    labels: dict[str, int]
    pairs: dict[str, int]
    names: dict[str, int]
    failed: list[tuple[str, str]]
    problems: list[str] | None

    def lines(self) -> list[str]:
        """Return the report for a person."""
        from deltaclip.features.backbone.load import loading_notes

        facts = self.facts
        state = "complete" if self.complete else "not complete: give the same `deltaclip extract` again"
        lines = [
            f"{self.cache}: {state}, schema version {self.schema_version}, {self.size_bytes / 1e6:,.1f} MB",
            f"  data: {self.dataset['name']}, {self.rows:,} rows, {self.usable_rows:,} of them usable",
            f"  backbone: {facts['backbone']}, D = {facts['dim']}, {facts['precision']}"
            + (", imported: nothing vouches for that" if self.request.get("imported") else "")
            + (f", weights {self.request['weights_sha256'][:12]}" if "weights_sha256" in self.request else ""),
        ]
        lines += [f"  loaded: {note}" for note in loading_notes(facts)]
        agreement = self.dataset.get("agreement", {})
        lines += [f"  {label}: {agreement_words(found)}" for label, found in agreement.items()]
        for name, view in self.views.items():
            rest = "".join(f", {view[key]:,} {words}" for key, words in _REST.items() if view[key])
            lines.append(f"  view {name}: {view['done']:,} of {self.images:,} images{rest}, W = {view['width']}")
        lines += [f"  anchors: {self.anchors:,} prompts"] if self.anchors else []
        lines += [f"  {line}" for line in left_out_lines(facts, [*self.views, *([ANCHORS] if self.anchors else [])])]
        to_do = f", {self.texts_to_do:,} to do" if self.texts_to_do else ""
        cut = f", {self.truncated_texts:,} cut at the context length" if self.truncated_texts else ""
        lines.append(f"  texts: {self.texts:,}{to_do}{cut}")
        if self.first_frames:
            lines.append(f"  {self.first_frames:,} images have several frames or pages; the first was taken")
        lines += [f"  {label}: {count:,} rows" for label, count in self.labels.items() if count]
        lines += [f"  {label}: {count:,} pairs" for label, count in self.pairs.items()]
        lines += [f"  {name}s: {count:,}" for name, count in self.names.items() if count]
        lines += [f"  {file}: {reason}" for file, reason in self.failed[:FAILURES_SHOWN]]
        if len(self.failed) > FAILURES_SHOWN:
            lines.append(f"  ... and {len(self.failed) - FAILURES_SHOWN:,} more images that could not be read")
        return lines + _verdict(self.problems)


_REST = {"failed": "could not be read", "to_do": "to do"}


def _verdict(problems: list[str] | None) -> list[str]:
    if problems is None:
        return []
    return [f"  PROBLEM: {problem}" for problem in problems] or ["  verified: every byte is what was written"]


@dataclass(frozen=True, kw_only=True)
class InspectResult:
    """What is in each cache; `damaged` has the problems of those that cannot even be opened."""

    reports: list[CacheReport]
    damaged: dict[str, list[str]]
    exported: str | None = None

    @property
    def exit_code(self) -> int:
        """2 where `--verify` found a problem."""
        return PROBLEMS_FOUND if self.damaged or any(report.problems for report in self.reports) else 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        reports = [asdict(report) | {"cache": str(report.cache)} for report in self.reports]
        return {"caches": reports, "damaged": self.damaged, "exported": self.exported}

    def summary(self) -> str:
        """Return what is in each cache, and what is wrong with it."""
        lines = [line for report in self.reports for line in report.lines()]
        for cache, problems in self.damaged.items():
            lines += [f"{cache}: cannot be used", *_verdict(problems)]
        if self.exported:
            lines.append(self.exported)
        return "\n".join(lines)


def inspect_cache(config: InspectConfig) -> InspectResult:
    """Describe caches and, if asked to, read every byte of them; with `--merge`, of the cache that they make together.

    With `--export` the one cache (of `--merge`: that) is written as files of another layout too.

    Raises:
        UserError: no such file, caches that do not fit together; without `--verify`, also a file that cannot be opened
            as a cache.
    """
    caches = config.caches
    if config.merge:
        merged = merge([file for path in caches for file in find_set(path) or [path]], config.merge)
        caches = [merged]
    exported = _export(config, caches) if config.export else None
    reports: list[CacheReport] = []
    damaged: dict[str, list[str]] = {}
    for path in caches:
        try:
            reports.append(_report(path, _problems(path) if config.verify else None))
        except UserError as error:
            if not config.verify or not (path.is_file() or find_set(path)):
                raise
            damaged[str(path)] = [error.message]
    return InspectResult(reports=reports, damaged=damaged, exported=exported)


def _export(config: InspectConfig, caches: Sequence[Path]) -> str:
    assert config.export is not None
    if len(caches) > 1:
        raise UserError(f"{len(caches)} caches are given", place="--export", remedy="give one, or --merge them first")
    layout, view = config.export_format, config.export_view
    count, folder = export_cache(caches[0], config.export, layout=layout, view=view)
    return f"{folder}: {count:,} rows, view {view}, as {layout}"


def _problems(path: Path) -> list[str]:
    shards = find_set(path)
    if shards is None:
        return find_problems(path)
    return [f"{shard.name}: {problem}" for shard in shards for problem in find_problems(shard)]


def _report(path: Path, problems: list[str] | None) -> CacheReport:
    with open_cache(path, unfinished=True) as store:
        rows, truncated = store.rows(), store.truncated()
        return CacheReport(
            cache=path,
            size_bytes=sum(file.stat().st_size for file in find_set(path) or [path]),
            schema_version=store.schema_version,
            complete=store.is_complete,
            dataset=store.dataset,
            request=store.header["request"],
            facts=store.facts,
            rows=store.num_rows,
            usable_rows=len(rows),
            images=len(store.status()),
            texts=len(truncated),
            texts_to_do=int((store.group("texts")["status"][:] == PENDING).sum()),
            truncated_texts=int(truncated.sum()),
            first_frames=int(store.more_frames()[store.status() == DONE].sum()),
            views={name: _view(store, name) for name in store.view_names()},
            anchors=int((store.group(ANCHORS)["status"][:] == DONE).sum()) if ANCHORS in store.view_layouts() else 0,
            labels={name: int(np.isfinite(column).sum()) for name, column in rows.numbers.items()},
            pairs=_pairs(store),
            names={name: len(np.unique(rows.text[name].codes[rows.text[name].codes >= 0])) for name in CODE_COLUMNS},
            failed=store.failed(),
            problems=problems,
        )


def _pairs(store: FeatureStore) -> dict[str, int]:
    found = store.preferences()
    counts = [] if found is None else np.bincount(found.target_P, minlength=len(store.targets)).tolist()
    return {target.name: count for target, count in zip(store.targets, counts, strict=False) if count}


def _view(store: FeatureStore, name: str) -> dict[str, Any]:
    layout, status = store.view_layouts()[name], store.status(name)
    values = {"done": DONE, "failed": FAILED, "to_do": PENDING}
    counts = {key: int((status == value).sum()) for key, value in values.items()}
    return {"width": layout.width, "recipe": dict(layout.recipe), **counts}
