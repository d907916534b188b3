"""STAGE predict: scores of new images, one pair, a folder or a manifest.

What scores them is imported once it is known what is to be scored: torch takes seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.files import keep_result
from deltaclip.base.options import option_name
from deltaclip.base.places import check_outside, is_address
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.adapters.any_folder import open_folder
from deltaclip.features.data.adapters.finding import manifest_of
from deltaclip.features.data.addresses import RemotePath
from deltaclip.features.data.images import unprompted
from deltaclip.features.data.listing import count_words, is_image_name, kind_of, list_folder
from deltaclip.features.data.manifest import manifest_from_table
from deltaclip.features.data.paths import explained_rows, understood
from deltaclip.features.data.pillow import lacking
from deltaclip.features.data.remote import begin, require, tally
from deltaclip.features.data.sources import container_of, is_there
from deltaclip.features.data.table import SUFFIXES as TABLE_SUFFIXES
from deltaclip.features.data.table import read_table
from deltaclip.pipeline.settings.finished import asks_for_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltaclip.pipeline.api.scorer import ScoredPairs, Scorer
    from deltaclip.pipeline.settings import PredictConfig

ROWS_SHOWN = 20


@dataclass(frozen=True)
class _Pairs:
    names: list[str]
    paths: list[Path]
    prompts: list[str]
    root: Path | None
    note: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)  # that the names are relative to
    made_by: list[str] | None = None  # sources, where the table names them


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """Scores of N pairs; failed rows have NaN scores and a reason in `error`.

    `left_out` counts what else lies in a folder, by what it is. `coverage` is that of the intervals, None where the run
    has none; `trust` are lines about them, the last of which counts the `unlike`, None where nobody can tell.
    """

    out: Path | None
    columns: dict[str, Any]
    failed: int
    truncated_prompts: int
    note: str
    labels: tuple[str, ...]  # what the run scores
    left_out: dict[str, int]
    coverage: float | None
    unlike: int | None
    trust: list[str]
    rows_shown: int = ROWS_SHOWN  # on a terminal

    def to_json(self) -> dict[str, Any]:
        """Return one object a row, with counts."""
        names = list(self.columns)
        cells = zip(*(_plain(self.columns[name]) for name in names), strict=True)
        counts = {"failed": self.failed, "truncated_prompts": self.truncated_prompts, "note": self.note}
        return {
            "rows": [dict(zip(names, row, strict=True)) for row in cells],
            **counts,
            "left_out": self.left_out,
            "coverage": self.coverage,
            "unlike": self.unlike,
            "trust": self.trust,
            "out": str(self.out) if self.out else None,
        }

    def summary(self) -> str:
        """Return the scores, or where they were written, and what could not be scored."""
        images, errors = self.columns["image"], self.columns["error"]
        lines = []
        if self.out is None:
            shown = [_one_line(name) for name in images[: self.rows_shown]]
            width = max(len(name) for name in shown)
            cells = {label: self._cells(label, len(shown)) for label in self.labels}
            widths = {label: max(len(label), *map(len, cells[label])) for label in self.labels}
            lines.append(
                "  ".join([f"{'image':{width}}", *(f"{name:{widths[name]}}" for name in self.labels)]).rstrip()
            )
            flags = self.columns.get("flag", [""] * len(shown))
            for row, name in enumerate(shown):
                own = [f"{cells[label][row]:{widths[label]}}" for label in self.labels]
                lines.append("  ".join([f"{name:{width}}", *own, flags[row]]).rstrip())
            if len(images) > len(shown):
                lines.append(f"... {len(images) - len(shown):,} more: give --out FILE.csv for all")
        else:
            lines.append(f"{self.out}: {len(images):,} rows")
        if self.failed:
            first = next((row for row, error in enumerate(errors) if error), None)  # None: --top left them out
            named = "" if first is None else f", the first: {_one_line(images[first])}: {errors[first]}"
            lines.append(f"{self.failed:,} images could not be read{named}")
        if self.truncated_prompts:
            lines.append(f"{self.truncated_prompts:,} prompts were cut at the context length")
        if self.left_out:
            lines.append(f"left out: {count_words(self.left_out)}")
        return "\n".join([*lines, *([self.note] if self.note else []), *self.trust])

    def _cells(self, label: str, count: int) -> list[str]:
        """Return the first scores of a target, each with its interval where there is one."""
        names = (label, f"{label}_low", f"{label}_high")
        columns = [self.columns.get(name, np.full(count, np.nan))[:count] for name in names]
        return [
            f"{_shown(score)} ({_shown(low)} to {_shown(high)})" if np.isfinite(low) else _shown(score)
            for score, low, high in zip(*columns, strict=True)
        ]


def predict(config: PredictConfig) -> PredictResult:
    """Score images against prompts with a run, or with a backbone alone.

    Raises:
        UserError: nothing to score, a missing prompt, a backbone that is not the run's; with `--on-error fail` also
            an image that cannot be read.
    """
    if config.out:
        _refuse_overwriting_input(config)
    earlier = begin()
    found, pairs = _scored_zero_shot(config) if config.run is None else _scored(config, config.run)
    failed = explained_rows(found.failed, pairs.names, pairs.folder)
    _check_failures(failed, pairs, strict=config.on_error == "fail" or len(pairs.paths) == 1)
    sources = {"source": pairs.made_by} if pairs.made_by else {}
    columns: dict[str, Any] = {"image": pairs.names, "prompt": pairs.prompts, **sources, **found.columns}
    columns["error"] = [failed.get(row, "") for row in range(len(pairs.names))]
    columns, first = _sorted(columns, config)
    if config.out:
        from deltaclip.pipeline.runs.prediction_table import write_table

        keep_result(config.out, lambda path: write_table(path, columns))
    return PredictResult(
        out=config.out,
        columns=columns,
        failed=len(found.failed),
        truncated_prompts=found.truncated_prompts,
        note="; ".join(filter(None, [pairs.note, *tally().since(earlier), found.note, first])),
        labels=found.labels,
        left_out=pairs.left_out,
        coverage=found.coverage,
        unlike=found.unlike,
        trust=found.trust,
        rows_shown=config.top or ROWS_SHOWN,
    )


class _Found(NamedTuple):
    """What was found of pairs: columns of numbers and flags, and what is said of them."""

    columns: dict[str, Any]
    failed: dict[int, str]
    truncated_prompts: int
    labels: tuple[str, ...]
    note: str
    coverage: float | None
    unlike: int | None
    trust: list[str]


def _scored(config: PredictConfig, place: Path) -> tuple[_Found, _Pairs]:
    early = _pairs(config, needs_prompts=True) if asks_for_prompts(place) else None
    from deltaclip.pipeline.api.scorer import Scorer, pair
    from deltaclip.pipeline.runs.folder import open_run

    run = open_run(place)
    pairs = early or _pairs(config, needs_prompts=run.needs_prompts)
    prompts = pairs.prompts if run.needs_prompts else None
    wanted = replace(pair(pairs.paths, None), prompts=prompts, made_by=pairs.made_by)
    scorer = Scorer.load(place, device=config.device, backbone=config.backbone, pretrained=config.pretrained)
    _check_sort(config, scorer.nothing(0).columns())
    found = scorer.score_pairs(wanted, root=pairs.root, batch_size=config.batch_size, coverage=config.coverage)
    trust, note = found.scores.trust, ""
    if not run.needs_prompts and any(pairs.prompts):
        note = f"the prompts are not used: the run scores {' and '.join(run.labels)} alone"
    return _Found(
        columns=found.scores.columns(),
        failed=found.failed,
        truncated_prompts=found.truncated_prompts,
        labels=run.labels,
        note=note,
        coverage=config.coverage if scorer.trust else None,
        unlike=None if trust is None or not trust.parts else int((trust.flag_N >= 0).sum()),
        trust=_trust_lines(scorer, found, config, pairs=pairs, what="pairs" if run.needs_prompts else "images"),
    ), pairs


def _scored_zero_shot(config: PredictConfig) -> tuple[_Found, _Pairs]:
    pairs = _pairs(config, needs_prompts=False)
    from deltaclip.base.device import choose_device
    from deltaclip.features.backbone.decode_ahead import ImageFile, spread
    from deltaclip.features.backbone.precision import load_in_best_precision, probe_pixels
    from deltaclip.features.backbone.weights import find_weights
    from deltaclip.pipeline.api.scorer import pair
    from deltaclip.pipeline.api.zero_shot import COLUMNS, COSINE, FIRST, score_zero_shot, zero_shot_words

    _check_sort(config, dict.fromkeys(COLUMNS, np.zeros(0)))
    source = find_weights(config.backbone or "tiny", config.pretrained)
    wanted = replace(pair(pairs.paths, None), prompts=pairs.prompts)
    files = [source for source in wanted.sources if isinstance(source, ImageFile)]  # all are
    few = [files[place] for place in spread(len(files))]
    backbone, _ = load_in_best_precision(
        source,
        device=choose_device(config.device),
        precision="auto",
        quick_gelu=None,
        probe=lambda loaded: probe_pixels(loaded, few, pairs.root),
    )
    found = score_zero_shot(backbone, wanted, root=pairs.root, batch_size=config.batch_size)
    return _Found(
        columns=dict(found.columns),
        failed=found.failed,
        truncated_prompts=found.truncated_prompts,
        labels=(*([COSINE] if any(pairs.prompts) else []), FIRST),
        note="",
        coverage=None,
        unlike=None,
        trust=zero_shot_words(source.name),
    ), pairs


def _check_sort(config: PredictConfig, columns: Mapping[str, Any]) -> None:
    """Refuse a column to sort by that scores will not have, before anything is scored."""
    numbers = [name for name, column in columns.items() if isinstance(column, np.ndarray)]
    if config.sort is not None and config.sort not in numbers:
        remedy = did_you_mean(config.sort, numbers)
        raise UserError(f"{config.sort!r} is no column of scores", place="--sort", remedy=remedy)


def _sorted(columns: dict[str, Any], config: PredictConfig) -> tuple[dict[str, Any], str]:
    """Return the rows in the order that was asked for, and what is to be said of those that are left out."""
    if config.sort is None:
        return columns, ""
    key_N = columns[config.sort]
    order = np.argsort(np.where(np.isnan(key_N), np.inf, -key_N), kind="stable")  # what has no score goes last
    chosen = order[: config.top].tolist()
    found = {
        name: column[chosen] if isinstance(column, np.ndarray) else [column[row] for row in chosen]
        for name, column in columns.items()
    }
    return found, f"the {len(chosen):,} highest of {len(order):,} by {config.sort}" if len(chosen) < len(order) else ""


def _trust_lines(scorer: Scorer, found: ScoredPairs, config: PredictConfig, *, pairs: _Pairs, what: str) -> list[str]:
    """Say what is not known of intervals, whether all are unlike the training together, and last how many are alone."""
    from deltaclip.pipeline.runs.trust import together_words, unlike_words

    columns = found.scores.trust
    if scorer.trust is None or columns is None:
        return [f"no intervals: {config.run} is of an earlier release; train again for them"]
    lines = scorer.trust.notes(config.coverage)
    num_scored = len(found.scores) - len(found.failed)
    lines += together_words(scorer.trust.excess(columns, np.array(pairs.names)), what)
    return [*lines, unlike_words(columns, num_scored, what)] if scorer.trust.parts else lines


def _check_failures(failed: Mapping[int, str], pairs: _Pairs, *, strict: bool) -> None:
    if failed and (strict or len(failed) == len(pairs.paths)):
        row, reason = next(iter(failed.items()))
        raise UserError(reason, place=pairs.paths[row], remedy="give an image that can be read")


def _refuse_overwriting_input(config: PredictConfig) -> None:
    assert config.out is not None, "asked only where scores are written"
    inputs = [Path(config.data), *([config.prompts] if config.prompts else [])]
    if config.out.resolve() in [path.resolve() for path in inputs]:
        raise UserError("is an input", place=config.out, remedy="give another --out")
    check_outside(config.out, [config.run] if config.run else [])


def _refuse_unused(config: PredictConfig, what: str, *names: str) -> None:
    """Refuse options that would change nothing for this kind of target, rather than ignore them."""
    for name in names:
        if getattr(config, name) != getattr(type(config), name):
            raise UserError("would not be used", place=option_name(name), remedy=f"leave it out: the target is {what}")


def _pairs(config: PredictConfig, *, needs_prompts: bool) -> _Pairs:
    path = _target(config.data)
    if path.is_dir():
        _refuse_unused(config, "a folder", "image_root", *(["prompt"] if config.prompts else []))
        return _folder_pairs(config, path, needs_prompts=needs_prompts)
    is_inside = not path.exists() and container_of(path) is not None  # a picture in a table or an archive
    name = path.file_name if isinstance(path, RemotePath) else path.name
    kind = "image" if is_inside or is_image_name(name) else kind_of(path) if path.is_file() else ""
    if kind == "image":
        _refuse_unused(config, "one image", "prompts", "image_root", "allow_outside")
        if needs_prompts and not config.prompt:
            raise UserError("has no prompt to be scored against", place=path, remedy="give --prompt 'TEXT'")
        if not is_there(path):  # before the backbone is loaded
            raise UserError("no such file", place=path, remedy="give an image that can be read")
        return _Pairs([_written(name)], [path], [config.prompt or ""], None)
    if kind.endswith(" image"):
        remedy = f"{lacking(kind)}, or save it as PNG or JPEG" if lacking(kind) else "save it as PNG or JPEG"
        raise UserError(f"{kind}s are not read", place=path, remedy=remedy)
    _refuse_unused(config, "a manifest, which has its own prompts", "prompt", "prompts")
    manifest = read_manifest(
        config.data, image_root=config.image_root, allow_outside=config.allow_outside, read_labels=False
    )
    if needs_prompts and not any(manifest.prompts):
        remedy = "add a column prompt, or train a run on quality alone"
        raise UserError("has no prompts to be scored against", place=manifest.path, remedy=remedy)
    root = None if config.allow_outside else manifest.image_root
    paths = [manifest.image_path(row) for row in range(len(manifest))]
    made_by = manifest.sources if any(manifest.sources) else None
    notes = "; ".join(manifest.notes)
    return _Pairs(manifest.images, paths, manifest.prompts, root, notes, folder=manifest.image_root, made_by=made_by)


def _target(text: str) -> Path:
    """Return what is to be scored: a file or folder, or an address."""
    if is_address(text):
        path = RemotePath.of(text)
        require([path], place=path)
        return path
    return Path(understood(text, Path(), allow_outside=True)[0])


def _folder_pairs(config: PredictConfig, folder: Path, *, needs_prompts: bool) -> _Pairs:
    root = None if config.allow_outside else folder
    if config.prompts:
        try:
            found = list_folder(folder)
        except OSError as error:
            message = error.strerror or str(error)
            raise UserError(message, place=folder, remedy="give a folder that can be read") from error
        table = read_table(config.prompts)
        manifest = manifest_from_table(
            table, name=folder.name, image_root=folder, allow_outside=config.allow_outside, read_labels=False
        )
        paths = [manifest.image_path(row) for row in range(len(manifest))]
        left = len(set(found.images) - set(paths))
        note = f"{left:,} images of the folder have no row in {config.prompts} and were not scored" if left else ""
        note = "; ".join(filter(None, ["; ".join(manifest.notes), note]))
        others = found.counts({*paths, config.prompts})
        return _Pairs(manifest.images, paths, manifest.prompts, root, note, others, folder)
    # What people rated is of no matter here, and a picture of any name can be scored.
    data = open_folder(folder, any_names=True, prompts=needs_prompts and not config.prompt)
    manifest = manifest_of(
        replace(data, left_out={}), label_ranges={}, allow_outside=config.allow_outside, read_labels=False
    )
    prompts = [config.prompt] * len(manifest) if config.prompt else manifest.prompts
    paths = [manifest.image_path(row) for row in range(len(manifest))]
    if needs_prompts and (rows := unprompted(paths, prompts, root)):
        remedy = f"give --prompts TABLE ({'/'.join(TABLE_SUFFIXES)}) or --prompt 'TEXT'"
        image = paths[rows[0]]
        message = f"no prompt in {image.with_suffix('.txt').name}, nor in the picture"
        raise UserError(message, place=image, remedy=remedy)
    names = [_written(image) for image in manifest.images]
    note = "; ".join(manifest.notes) if needs_prompts and not config.prompt else ""
    return _Pairs(names, paths, prompts, root, note, dict(data.left_out), folder)


def _written(name: str) -> str:
    """Return a file's name as text that can be written: bytes of it that are no UTF-8 are spelled out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _one_line(name: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def _shown(score: float) -> str:
    return f"{score:.3f}" if np.isfinite(score) else "-"


def _plain(values: Any) -> list[Any]:
    if isinstance(values, np.ndarray):
        return [float(value) if np.isfinite(value) else None for value in values]
    return list(values)
