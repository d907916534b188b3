"""Pictures of several generators: read from what a user names, freed of what the run was trained on, and scored.

Knows tables and folders of pictures, run directories and the scorer. Must not know means or tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import Target, known_target
from deltaclip.features.data.adapters import open_data
from deltaclip.features.data.adapters.any_folder import open_folder
from deltaclip.features.data.adapters.finding import manifest_of
from deltaclip.features.data.images import hash_images, unprompted
from deltaclip.features.data.manifest import LabelRange, manifest_from_table, parse_label_ranges
from deltaclip.features.data.paths import explained_rows, understood
from deltaclip.features.data.prompts import prompt_group
from deltaclip.features.data.table import SUFFIXES, read_table
from deltaclip.features.data.targets import AskedTarget
from deltaclip.pipeline.api.scorer import pair
from deltaclip.pipeline.rows.cached_rows import FILE, FILES, image_key, read_keys
from deltaclip.pipeline.runs.run_split import SIDES, read_sides
from deltaclip.pipeline.settings import no_such_generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deltaclip.features.data.adapters.finding import DataTables
    from deltaclip.features.data.manifest import Manifest
    from deltaclip.pipeline.api.scorer import Scorer
    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.scoring.groups import KeyArray
    from deltaclip.pipeline.settings import RankConfig


@dataclass(frozen=True, kw_only=True)
class Generator:
    """The pictures of one generator; `learned` of them were left out, since the run was trained on them."""

    name: str
    rows: Manifest
    notes: list[str] = field(default_factory=list)
    learned: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def paths(self) -> list[Path]:
        """The files of the pictures."""
        return [self.rows.image_path(row) for row in range(len(self))]

    @property
    def units(self) -> list[str]:
        """What each row is compared by: its prompt, in any spelling; without one its group, or itself."""
        return [
            prompt_group(prompt) if prompt else f"group\0{group}" if group else f"row\0{self.name}\0{row}"
            for row, (prompt, group) in enumerate(zip(self.rows.prompts, self.rows.groups, strict=True))
        ]

    def labels(self, target: str) -> NDArray[np.float64]:
        """Return what people said, in [0, 1], (N,) with NaN where nobody did."""
        return self.rows.labels.get(target, np.full(len(self), np.nan))


@dataclass(frozen=True, kw_only=True)
class ScoredGenerator:
    """A generator with its scores by target, (N,) float64, NaN of the rows in `failed` (row to reason).

    `flags` has a word for each row that is unlike the training, None where nobody can tell; `excess` is more than 1
    where all together are.
    """

    generator: Generator
    scores: dict[str, NDArray[np.float64]]
    failed: dict[int, str]
    flags: list[str] | None
    excess: float | None
    truncated_prompts: int


# ---- Reading


def read_generators(config: RankConfig, run: RunFolder) -> list[Generator]:
    """Return the generators that a user named, in that order, or those of the column source by name.

    Raises:
        UserError: anything wrong in the data; fewer than two generators; no prompts for a run that sees them; a
            baseline that is none of them.
    """
    named = config.named
    found = [Generator(name=name, rows=_read(data, config, run)) for name, data in named]
    if not named[0][0]:
        found = _by_source(found[0].rows)
    if config.baseline is not None and config.baseline not in (names := [each.name for each in found]):
        raise no_such_generator(config.baseline, names)
    return [replace(each, notes=[*each.notes, *each.rows.notes]) for each in found]


def _by_source(rows: Manifest) -> list[Generator]:
    source_N = np.array(rows.sources, dtype=object)
    names = sorted(set(rows.sources) - {""})
    if len(names) < 2:
        what = f"names one generator, {names[0]!r}" if names else "has no column source with generators"
        raise UserError(what, place=rows.path, remedy="fill in the column, or give NAME=DATA of each generator")
    lacking = int((source_N == "").sum())
    said = [f"{lacking:,} rows name no source and are left out"] if lacking else []
    found = [Generator(name=name, rows=rows.selected(np.flatnonzero(source_N == name))) for name in names]
    quiet = [replace(each, rows=replace(each.rows, notes=())) for each in found[1:]]  # said once, of all
    return [replace(found[0], notes=said), *quiet]


def _read(data: str, config: RankConfig, run: RunFolder) -> Manifest:
    path = Path(understood(data, Path(), allow_outside=True)[0])
    if path.is_dir() and config.prompts:
        rows = manifest_from_table(
            read_table(config.prompts),
            name=path.name,
            image_root=path,
            label_ranges=_ranges(config, run),
            allow_outside=config.allow_outside,
            read_labels=config.labels,
        )
    else:
        tables = open_folder(path, any_names=True) if path.is_dir() else open_data(data, image_root=config.image_root)
        known = {} if tables.label_range and not config.label_range else _ranges(config, run)
        rows = manifest_of(
            replace(tables, targets=_asked(tables, run)),
            label_ranges=known,
            allow_outside=config.allow_outside,
            read_labels=config.labels,
        )
    paths, root = [rows.image_path(row) for row in range(len(rows))], None if config.allow_outside else rows.image_root
    if run.needs_prompts and (lacking := unprompted(paths, rows.prompts, root)):
        some = "has no prompts" if not any(rows.prompts) else f"has {len(lacking):,} rows without a prompt"
        remedy = f"give a table with a column prompt, for a folder --prompts TABLE ({'/'.join(SUFFIXES)})"
        raise UserError(f"{some} to be scored against", place=data, remedy=remedy)
    return rows


def _asked(tables: DataTables, run: RunFolder) -> tuple[AskedTarget, ...]:
    """Return the run's own targets that the tables have a column for by their names."""
    return tuple(asked for asked in _own_targets(run) if all(asked.column in table.columns for table in tables.tables))


def _own_targets(run: RunFolder) -> list[AskedTarget]:
    """Return the targets of a run that are not known by their names."""
    return [
        AskedTarget(Target(each.name, each.sees), each.name)
        for each in run.spec.targets
        if known_target(each.name) is None
    ]


def _ranges(config: RankConfig, run: RunFolder) -> dict[str, LabelRange]:
    """Return the scales of labels that were given, else those that the run was trained with: one for all data.

    Detected in each table by itself, the same rating could mean two things.
    """
    if config.label_range:
        return parse_label_ranges(config.label_range, _own_targets(run))
    recorded = run.config["cache"]["dataset"].get("label_ranges", {})
    return {label: _recorded(words) for label, words in recorded.items()}


def _recorded(words: str) -> LabelRange:
    """Return a scale from how a cache describes it: `1 to 5 (detected)`."""
    lo, _, rest = words.partition(" to ")
    return LabelRange(float(lo), float(rest.split()[0]), "as in the run")


# ---- What the run was trained on


def without_learned(generators: Sequence[Generator], run: RunFolder, *, allow_outside: bool) -> list[Generator]:
    """Return the generators without the pictures that the run was trained on, known by the content of their files.

    What it says of these is no prediction: they would count for a generator that the run has seen, and their labels
    would say that it errs less than it does. Pictures that two generators share are said.

    Raises:
        UserError: nothing is left of one.
    """
    keys = [_content_keys(each, allow_outside=allow_outside) for each in generators]
    learned, found = _learned_images(run), []
    for place, (each, key_N) in enumerate(zip(generators, keys, strict=True)):
        notes = list(each.notes)
        for other, other_key in zip(generators[:place], keys[:place], strict=True):
            if same := int((np.isin(key_N, other_key) & (key_N > 0)).sum()):
                notes.append(f"{same:,} pictures are the same files as pictures of {other.name}")
        is_new_N = np.ones(len(key_N), dtype=bool) if learned is None else ~np.isin(key_N, learned)
        if not is_new_N.any():
            message = f"the run was trained on every picture of {each.name}"
            raise UserError(message, place="DATA", remedy="give pictures that it has not seen")
        left = replace(each.rows.selected(np.flatnonzero(is_new_N)), notes=())
        found.append(replace(each, rows=left, notes=notes, learned=int((~is_new_N).sum())))
    if learned is None:
        words = "whether the run was trained on some of these pictures is not known: it did not record their content"
        found[0] = replace(found[0], notes=[*found[0].notes, words])
    return found


def _content_keys(each: Generator, *, allow_outside: bool) -> KeyArray:
    """Return the first 64 bits of the SHA-256 of each picture's file, (N,) uint64, as caches key them; 0 without."""
    contents = hash_images(each.paths, None if allow_outside else each.rows.image_root)
    keys = [0 if one.sha256 is None else image_key(one.sha256) for one in contents]
    return np.array(keys, dtype=np.uint64)


def _learned_images(run: RunFolder) -> KeyArray | None:
    """Return keys of the images that a run trained on or chose its epoch by; None where it did not record them."""
    if run.is_shared:
        return None
    side_R = read_sides(run.path / "predictions.csv")
    keys = read_keys(run.path / FILE, num_rows=len(side_R))
    if keys is None or keys.known_by != FILES:
        return None
    return np.asarray(keys.image_N[side_R < SIDES.index("test")])


# ---- Scoring


def score_generator(scorer: Scorer, each: Generator, *, needs_prompts: bool, config: RankConfig) -> ScoredGenerator:
    """Score the pictures of a generator.

    Raises:
        UserError: none can be read, or with `--on-error fail` one of them.
    """
    prompts = each.rows.prompts if needs_prompts else None
    root = None if config.allow_outside else each.rows.image_root
    found = scorer.score_pairs(
        replace(pair(each.paths, None), prompts=prompts), root=root, batch_size=config.batch_size
    )
    failed = explained_rows(found.failed, each.rows.images, each.rows.image_root)
    if failed and (config.on_error == "fail" or len(failed) == len(each)):
        row, reason = next(iter(failed.items()))
        raise UserError(reason, place=each.paths[row], remedy="give an image that can be read")
    columns, told = found.scores.trust, scorer.trust is not None and bool(scorer.trust.parts)
    excess = (
        None if scorer.trust is None or columns is None else scorer.trust.excess(columns, np.array(each.rows.images))
    )
    return ScoredGenerator(
        generator=each,
        scores={target: found.scores.of(target).astype(np.float64) for target in scorer.labels},
        failed=failed,
        flags=columns.flags if columns is not None and told else None,
        excess=excess,
        truncated_prompts=found.truncated_prompts,
    )
