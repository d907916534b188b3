"""A manifest: which images, with which prompts, labels, groups and sources.

Labels become numbers in [0, 1]: their range is given, known by the adapter, or detected and said. Knows columns and
their aliases, and which paths an image may have. Must not know CLIP, caches or scores.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError, did_you_mean, nearest
from deltaclip.base.places import is_address
from deltaclip.base.vocabulary import KNOWN_TARGETS
from deltaclip.features.data.addresses import address
from deltaclip.features.data.cells import SHARED_TEXTS, spelled_out
from deltaclip.features.data.numbers import (
    LONGEST_WORD,
    PROBED,
    is_missing_word,
    is_numeric,
    read_numbers,
    without_missing,
)
from deltaclip.features.data.paths import understood_all
from deltaclip.features.data.prompts import prompt_group
from deltaclip.features.data.ratings import average_ratings
from deltaclip.features.data.remote import announced
from deltaclip.features.data.targets import targets_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.base.vocabulary import Target
    from deltaclip.features.data.numbers import Numbers
    from deltaclip.features.data.preferences import Preferences
    from deltaclip.features.data.ratings import Raters
    from deltaclip.features.data.table import Table
    from deltaclip.features.data.targets import AskedTarget


# ---- A manifest: which images, with which prompts, labels, groups and sources


# Field -> spellings seen in public copies, best first; compared without case, spaces, `_`, `-` and `.`.
ALIASES = {
    "image": (
        *("image", "img", "image_path", "img_path", "image_name", "img_name", "name", "filename", "file_name"),
        *("filepath", "file_path", "file", "path", "image_file", "image_filename", "image_file_name"),
        *("picture", "jpg", "jpeg", "png", "webp", "image_bytes", "image_url", "url"),
    ),
    "prompt": ("prompt", "caption", "text", "description", "prompt_text", "text_prompt"),
    "quality": (
        *("quality", "mos_quality", "mos", "quality_mos", "quality_score", "quality_rating", "score", "rating"),
        *("mean_opinion_score", "mos_score", "rating_mean", "mean_rating", "score_mean", "mean_score"),
    ),
    "consistency": (
        *("consistency", "mos_align", "alignment", "mos_alignment", "correspondence", "mos_consistency"),
        *("consistency_score", "alignment_score", "align", "correspondence_score"),
    ),
    "quality_std": (
        *("quality_std", "std_quality", "mos_quality_std", "sd", "std", "mos_std", "std_mos", "rating_std"),
        *("score_std", "quality_sd"),
    ),
    "consistency_std": (
        *("consistency_std", "std_align", "std_alignment", "mos_align_std", "std_consistency", "alignment_std"),
        "consistency_sd",
    ),
    "authenticity": ("authenticity", "mos_authenticity", "mos_auth", "authenticity_score"),
    "authenticity_std": ("authenticity_std", "std_authenticity", "std_auth"),
    "explanation": ("explanation", "rationale", "reason"),
    "group": ("group", "prompt_id"),
    "source": ("source", "generator", "model"),
    "split": ("split", "subset", "partition", "set"),
}
# Names that may be those of another label: how they were read is said.
UNCLEAR = frozenset({"score", "rating", "ratingmean", "meanrating", "scoremean", "meanscore", "meanopinionscore"})
SHORTEST_GUESS = 5  # letters of a name that a misspelt one may be taken for
NUMERIC = tuple(
    name for target in KNOWN_TARGETS for name in (target.name, target.std)
)  # fields that numbers alone can be
# Names of columns that say who rated: then a row is one rating, and an image has several rows.
RATERS = ("rater", "rater_id", "worker", "worker_id", "annotator", "annotator_id", "user_id", "subject", "observer")
OF_MTURK = re.compile(r"(?:Input|Answer)\.(.+)", re.IGNORECASE)
FILE_NAME = re.compile(r".*\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic|jxl)", re.IGNORECASE)
NAMED = ("source", "group", "split", "explanation")
TEXT_FIELDS = ("images", "prompts", "explanations", "groups", "sources", "splits", "places")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """N rows; text columns are '' and numbers NaN where a cell is empty."""

    name: str
    path: Path
    image_root: Path
    images: list[str]  # relative to image_root or addresses, as `paths.understood` gives them
    prompts: list[str]
    targets: tuple[Target, ...]  # those with a column of labels
    labels: dict[str, NDArray[np.float64]]  # of each target (mapped to [0, 1]) and its _std, each (N,)
    explanations: list[str]
    groups: list[str]
    sources: list[str]
    splits: list[str]
    places: Sequence[str]  # 'file, line' of each row, for messages
    label_ranges: dict[str, LabelRange] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was left out or put in, and why
    agreement: dict[str, dict[str, Any]] = field(default_factory=dict)  # of raters, by label, where rows were ratings
    preferences: Preferences | None = None  # pairs of these rows that people chose between

    def __len__(self) -> int:
        return len(self.images)

    def image_path(self, row: int) -> Path:
        """Return the file of a row's image."""
        return address(self.image_root, self.images[row])

    def selected(self, rows: NDArray[np.int64]) -> Manifest:
        """Return the manifest of some rows, in their order."""
        taken: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in TEXT_FIELDS}
        return replace(self, labels={name: values[rows] for name, values in self.labels.items()}, **taken)


def joined(parts: Sequence[Manifest]) -> Manifest:
    """Return the rows of several manifests of one set as one; what is not a row is the first one's."""
    if len(parts) == 1:
        return parts[0]
    texts: dict[str, Any] = {name: [value for part in parts for value in getattr(part, name)] for name in TEXT_FIELDS}
    targets = tuple(dict.fromkeys(target for part in parts for target in part.targets))
    names = [name for target in targets for name in (target.name, target.std)]
    labels = {name: np.concatenate([_labels_or_none(part, name) for part in parts]) for name in names}
    ranges = {name: known for part in parts for name, known in part.label_ranges.items()}
    notes = tuple(note for part in parts for note in part.notes)
    return replace(parts[0], targets=targets, labels=labels, label_ranges=ranges, notes=notes, **texts)


def _labels_or_none(part: Manifest, name: str) -> NDArray[np.float64]:
    return part.labels[name] if name in part.labels else np.full(len(part), np.nan)


def manifest_from_table(  # noqa: PLR0913 - what a user may say of a table
    table: Table,
    *,
    name: str,
    image_root: Path,
    targets: Sequence[AskedTarget] = (),
    label_ranges: Mapping[str, LabelRange] = MappingProxyType({}),
    source_of: Callable[[str], str] | None = None,
    allow_outside: bool = False,
    read_labels: bool = True,
    raters: Raters | None = "mean",
) -> Manifest:
    """Turn a table into a manifest, with one row of means where an image and prompt have several ratings.

    Args:
        table: columns as read.
        name: short name of the data set, for tables and default file names.
        image_root: folder that image paths are relative to and may not leave.
        targets: those that were asked for beside the known ones.
        label_ranges: scales of labels; one that is not among them is detected.
        source_of: gives the generator from an image name where no column does.
        allow_outside: permit image paths that leave `image_root`.
        read_labels: False leaves the label columns alone, whatever is in them.
        raters: how the ratings of several people become one label; None leaves every row where it is.

    Raises:
        UserError: missing column, empty prompt or image, label not a number or out of range, path outside the root.
    """
    found = find_columns(table, targets)
    labelled = targets_of(found, targets) if read_labels else ()
    written = _images(table, found)
    images, read_so = understood_all(written, image_root, allow_outside=allow_outside)
    read_so += announced(images, image_root, place=table.path)
    prompts = _prompts(table, found)
    if not allow_outside:
        _refuse_outside(table, found["image"], images, image_root)
    labels, ranges, notes = _read_labels(table, found, labelled, label_ranges)
    unprompted = _mask_unprompted(table, prompts, labelled, labels)
    notes = [*table.notes, *_picture_notes(table, found["image"]), *notes, *_missing_prompts(prompts), *unprompted]
    empty = [""] * len(images)
    said = {field: without_missing(_named(table, field, found[field])) for field in NAMED if field in found}
    notes += [missing_words(found[field], cells.missing) for field, cells in said.items() if cells.missing]
    sources, groups, splits, explanations = (said[f].cells if f in said else empty for f in NAMED)
    if source_of and "source" not in found:
        sources = [source_of(image) for image in images]
    group_of = lru_cache(SHARED_TEXTS)(prompt_group)  # and one object for the rows of a prompt
    whole = Manifest(
        name=name,
        path=table.path,
        image_root=image_root,
        images=images,
        prompts=prompts,
        targets=labelled,
        labels=labels,
        explanations=explanations,
        groups=[group or (prompt and group_of(prompt)) for group, prompt in zip(groups, prompts, strict=True)],
        sources=sources,
        splits=splits,
        places=table.places(),
        label_ranges=ranges,
        notes=(*read_so, *notes),
    )
    if not labelled or raters is None:
        return whole
    if (who := rater_column(table)) is None:
        return average_ratings(whole, None, how=raters)
    people = without_missing(table.names(who))
    if people.missing:
        whole = replace(whole, notes=(*whole.notes, missing_words(who, people.missing)))
    return average_ratings(whole, people.cells, how=raters)


def _named(table: Table, field: str, column: str) -> list[str]:
    return table.texts(column) if field == "explanation" else table.names(column)


def rater_column(table: Table) -> str | None:
    """Return the column that says who rated, None without."""
    by_name = _by_plain_name(table)
    return next((by_name[name] for name in map(plain_name, RATERS) if name in by_name), None)


def _by_plain_name(table: Table) -> dict[str, str]:
    """Return the columns by their plain names; of MTurk's `Input.prompt` and `Answer.quality` also by what follows."""
    inner = {plain_name(found[1]): name for name in table.columns if (found := OF_MTURK.fullmatch(name))}
    return inner | {plain_name(name): name for name in reversed(table.columns)}


def find_columns(table: Table, targets: Sequence[AskedTarget] = ()) -> dict[str, str]:
    """Return the column of the table for each field that it has one for, the best alias of each.

    A column that was asked for is that target's alone, whatever else its name may mean.

    Raises:
        UserError: the table lacks the column of a target that was asked for.
    """
    by_name = _by_plain_name(table)
    aliases = {field: [by_name[alias] for alias in _plain_aliases(field) if alias in by_name] for field in ALIASES}
    wanted = [plain_name(asked.column) for asked in targets]
    own = {by_name.get(name) for column in wanted for name in (column, f"{column}std", f"std{column}")}
    free = {field: [name for name in columns if name not in own] for field, columns in aliases.items()}
    free["image"] = _pictures_first(table, free["image"])
    found = {field: columns[0] for field, columns in free.items() if columns}
    for asked, column in zip(targets, wanted, strict=True):
        name = asked.target.name
        if column not in by_name:
            remedy = did_you_mean(asked.column, table.columns)
            raise UserError(f"has no column {asked.column!r} for {name}", place=table.path, remedy=remedy)
        found[name] = asked.column if asked.column in table.columns else by_name[column]
        stds = [std for std in (f"{column}std", f"std{column}", plain_name(asked.target.std)) if std in by_name]
        if stds:
            found[asked.target.std] = by_name[stds[0]]
    return found


def _pictures_first(table: Table, columns: list[str]) -> list[str]:
    """Put a column that holds pictures before those of paths; the only one may have any name that means nothing."""
    holding = [name for name in columns if name in table.pictures]
    if not holding and len(table.pictures) == 1:
        known = {alias for field in ALIASES for alias in _plain_aliases(field)}
        holding = [name for name in table.pictures if plain_name(name) not in known]
    return [*holding, *(name for name in columns if name not in holding)]


@cache
def _plain_aliases(field: str) -> tuple[str, ...]:
    return tuple(plain_name(alias) for alias in ALIASES[field])


def plain_name(name: str) -> str:
    """Return the name of a column without what people write differently: `Image Path`, `image-path`, `imagePath`."""
    return re.sub(r"[\W_]+", "", name).casefold()


def field_like(name: str, cells: Sequence[str]) -> str | None:
    """Return the field that a column is probably meant for, by its name and by what it holds; None for none.

    A column of numbers can be a label or its SD alone, one of other texts never: what the name is closest to must fit
    the values, and no other field is proposed in its place. Short names are near to everything and are left out.
    """
    plain = plain_name(name)
    known = {
        alias: field
        for field in ALIASES
        for alias in _plain_aliases(field)
        if len(alias) >= SHORTEST_GUESS
        and alias[0] == plain[:1]  # `resource` is no source, `negative_prompt` no prompt
    }
    close = nearest(plain, known) if any(cells) else None  # of lists and pictures nothing is known
    if close is None or (known[close] in NUMERIC) != is_numeric(cells):
        return None
    return known[close]


def _images(table: Table, found: dict[str, str]) -> list[str]:
    if "image" not in found:
        message, remedy = missing_image(table)
        raise UserError(message, place=table.path, remedy=remedy)
    cells = table.images(found["image"])
    row = next((row for row, cell in enumerate(cells) if not cell), None)
    if row is not None:
        what = "has neither bytes nor a path" if found["image"] in table.pictures else "empty image"
        raise UserError(what, place=table.place(row, found["image"]), remedy="fill it in or remove the row")
    return cells


def _picture_notes(table: Table, column: str) -> list[str]:
    """Say which of several columns of pictures is taken, and of how many the table has paths alone."""
    notes, others = [], [name for name in table.pictures if name != column]
    if others or (column in table.pictures and plain_name(column) not in _plain_aliases("image")):
        notes.append(f"the pictures of column {column!r} are taken" + (f", not {', '.join(others)}" if others else ""))
    if column in table.pictures and (outside := int((~table.pictures[column]).sum())):
        notes.append(f"{outside:,} rows have the path of their picture and no bytes: it is looked for as a file")
    return notes


def missing_image(table: Table) -> tuple[str, str]:
    """Say that no column has images, and what to do: probably a misspelt name, or no header at all."""
    names = list(table.columns)
    if any(FILE_NAME.fullmatch(name) or is_numeric([name]) for name in names):
        return f"has no header: its first line is {', '.join(names)[:60]!r}", "put one above it: image,prompt,quality"
    holds = next((name for name in names if _are_files(table.columns[name])), None)
    close = holds or next((name for name in names if field_like(name, table.columns[name]) == "image"), None)
    other_sheets = [note for note in table.notes if ": the sheet " in note]
    return (
        "missing column 'image'",
        f"rename {close!r} to 'image'" if close else f"found: {', '.join([*names, *other_sheets])}",
    )


def _are_files(cells: Sequence[str]) -> bool:
    said = [cell for cell in cells[:PROBED] if cell]
    return bool(said) and all(FILE_NAME.fullmatch(cell) for cell in said)


def _prompts(table: Table, found: dict[str, str]) -> list[str]:
    """Return the prompts, '' where a row has none; a column that is probably misspelt is not passed over."""
    if "prompt" in found:
        return table.texts(found["prompt"])
    if close := misspelt_prompt(table):
        raise UserError("missing column 'prompt'", place=table.path, remedy=f"rename {close!r} to 'prompt'")
    return [""] * len(table.lines)


def misspelt_prompt(table: Table) -> str | None:
    """Return a column of texts that is called almost like the prompt, None without."""
    used = find_columns(table).values()
    free = [name for name in table.columns if name not in used]
    return next((name for name in free if field_like(name, table.columns[name]) == "prompt"), None)


def _missing_prompts(prompts: list[str]) -> list[str]:
    """Say which prompts are what an empty cell, or a value of another type, becomes when a program makes text of it."""
    shows, found = "; `deltaclip data check` shows the rows", list[str]()
    words = Counter(prompt for prompt in prompts if len(prompt) <= LONGEST_WORD and is_missing_word(prompt))
    if words:
        named = ", ".join(sorted(words))
        found.append(f"{sum(words.values()):,} prompts are {named}, as of an empty cell{shows}")
    if spelled := [prompt for prompt in prompts if spelled_out(prompt)]:
        what, first = spelled_out(spelled[0]), spelled[0][:40]
        found.append(
            f"{len(spelled):,} prompts are Python's spelling of another value, as of {what} in {first!r}{shows}"
        )
    return found


def _mask_unprompted(
    table: Table, prompts: list[str], targets: Sequence[Target], labels: dict[str, NDArray[np.float64]]
) -> list[str]:
    """Take the labels that see a prompt from the rows that have none, and say what such rows are good for.

    Raises:
        UserError: no label is left.
    """
    none_N = np.array([not prompt for prompt in prompts], dtype=bool)
    if not none_N.any():
        return []
    blind = [target.name for target in targets if target.sees == "pair"]
    of_image = [target.name for target in targets if target.sees == "image"]
    lost = {label: int((~np.isnan(labels[label][none_N])).sum()) for label in blind}
    for label in blind:
        labels[label][none_N] = labels[f"{label}_std"][none_N] = np.nan
    words = " and ".join(f"{count:,} labels of {label}" for label, count in lost.items() if count)
    if words and all(np.isnan(labels[target.name]).all() for target in targets):
        raise UserError(f"has {words} and no prompts to go with them", place=table.path, remedy="add a column prompt")
    who = "no row has a prompt" if none_N.all() else f"{none_N.sum():,} rows have no prompt"
    note = f"{who}: of use for {' and '.join(of_image) or 'scores of the image'} alone"
    return [f"{note}; {words} are left out" if words else note]


def _read_labels(
    table: Table, found: dict[str, str], targets: Sequence[Target], given: Mapping[str, LabelRange]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, LabelRange], list[str]]:
    num_rows, notes = len(table.lines), list[str]()
    labels = {name: np.full(num_rows, np.nan) for target in targets for name in (target.name, target.std)}
    ranges = {}
    for label in (target.name for target in targets):
        table.values(found[label])
        own = given.get(label, given.get(""))
        labels[label], ranges[label], said = read_label(table, found[label], label, own)
        notes += [f"column {found[label]!r} is read as {label}"] if plain_name(found[label]) in UNCLEAR else []
        notes += said
        if f"{label}_std" in found:
            table.values(found[f"{label}_std"])
            labels[f"{label}_std"] = read_label_std(table, found[f"{label}_std"], ranges[label])
    return labels, ranges, notes


def _refuse_outside(table: Table, column: str, images: list[str], root: Path) -> None:
    for row in rows_outside(images, root):
        raise UserError(
            f"image {images[row]!r} lies outside {root}",
            place=table.place(row, column),
            remedy="give --image-root, or --allow-outside to permit it",
        )


def rows_outside(images: Sequence[str], root: Path) -> Iterator[int]:
    """Yield the rows whose image path leaves the root.

    By the text alone (cheap, every row), so that a manifest from elsewhere cannot name /etc through `..`; symbolic
    links that leave the root are caught when the file is opened (images.py).
    """
    base = os.path.join(os.path.normpath(root.absolute()), "")  # noqa: PTH118 - ends in one separator, also for /
    for row, image in enumerate(images):
        if is_address(image):
            continue
        joined = os.path.join(base, image)  # noqa: PTH118 - Path objects cost five times as much, on every row
        if not os.path.normpath(joined).startswith(base):
            yield row


# ---- Labels as numbers in [0, 1]: the range is given, known by the adapter, or detected and said


# The scales the field uses, narrowest first; detection takes the first that holds every label.
KNOWN_RANGES = ((0.0, 1.0), (1.0, 5.0), (0.0, 5.0), (0.0, 10.0), (0.0, 100.0))
OPTION = "--label-range"
GIVEN = re.compile(r"(?:([^=,;\s]+)\s*=\s*)?([^=,;\s]+)\s*,\s*([^=,;\s]+)")  # `1,5` or `quality=1,5`
FEW_LABELS = 3  # of fewer, their spread says nothing of the scale


@dataclass(frozen=True)
class LabelRange:
    """The scale of a label column: `lo` maps to 0, `hi` to 1; `how` is 'given', 'adapter' or 'detected'."""

    lo: float
    hi: float
    how: str

    def __str__(self) -> str:
        return f"{self.lo:g} to {self.hi:g} ({self.how})"

    def filled_by(self, values_N: NDArray[np.float64]) -> float:
        """Return the share of the scale that lies between the lowest and the highest of some labels."""
        return float((np.nanmax(values_N) - np.nanmin(values_N)) / (self.hi - self.lo))


def parse_label_ranges(given: str | Sequence[str] | None, targets: Sequence[AskedTarget] = ()) -> dict[str, LabelRange]:
    """Read `LO,HI` of all labels, which is that of "", or `LABEL=LO,HI` of one; a text may hold several, with commas.

    Raises:
        UserError: not two numbers in rising order, no such label, or one that is given twice.
    """
    labels = [target.name for target in (*KNOWN_TARGETS, *(asked.target for asked in targets))]
    ranges: dict[str, LabelRange] = {}
    for text in [given] if isinstance(given, str) else given or ():
        for name, found in _parsed(text):
            if name and name not in labels:
                raise UserError(f"{name!r} is no label", place=OPTION, remedy=did_you_mean(name, labels))
            if name in ranges:
                message = f"{text!r} gives {name or 'all labels'} a second range"
                raise UserError(message, place=OPTION, remedy="give one range a label")
            ranges[name] = found
    return ranges


def _parsed(text: str) -> list[tuple[str, LabelRange]]:
    found, end = [], 0
    for match in GIVEN.finditer(text):
        if text[end : match.start()].strip(" ,;"):
            break
        end = match.end()
        try:
            lo, hi = float(match[2]), float(match[3])
        except ValueError:
            lo, hi = 0.0, 0.0
        if not (np.isfinite([lo, hi]).all() and lo < hi):
            break
        found.append((match[1] or "", LabelRange(lo, hi, "given")))
    else:
        if found and not text[end:].strip(" ,;"):
            return found
    remedy = "give two rising numbers such as 1,5, or quality=1,10 for one label"
    raise UserError(f"{text!r} is no range", place=OPTION, remedy=remedy)


def range_of(numbers: Numbers, given: LabelRange | None) -> LabelRange | None:
    """Return the range of labels: the given one, else the narrowest of the usual ones that holds all; None without."""
    if given:
        return given
    present = numbers.values[~np.isnan(numbers.values)]
    low, high = (present.min(), present.max()) if present.size else (0.0, 0.0)
    usual = [(lo, hi) for lo, hi in KNOWN_RANGES if numbers.full in (None, hi)]
    if numbers.full is not None:  # `4/7`
        usual.append((0.0, numbers.full))
    return next((LabelRange(lo, hi, "detected") for lo, hi in usual if lo <= low and high <= hi), None)


def read_label(
    table: Table, column: str, label: str, given: LabelRange | None
) -> tuple[NDArray[np.float64], LabelRange, list[str]]:
    """Map a label column to [0, 1].

    Returns:
        labels (N,) float64 in [0, 1], NaN where the cell is empty, the range that was used, and what to say of it.

    Raises:
        UserError: a cell is no number or lies outside the range; names file, line and column.
    """
    numbers = _numbers(table, column)
    raw_N = numbers.values
    known = range_of(numbers, given)
    if known is None:
        row = int(np.nanargmin(raw_N) if np.nanmin(raw_N) < 0 else np.nanargmax(raw_N))
        message = f"label {raw_N[row]:g} fits none of the usual ranges"
        raise UserError(message, place=table.place(row, column), remedy="give --label-range LO,HI")
    outside_N = (raw_N < known.lo) | (raw_N > known.hi)
    if outside_N.any():
        row = int(np.flatnonzero(outside_N)[0])
        raise UserError(
            f"label {raw_N[row]:g} is outside {known}",
            place=table.place(row, column),
            remedy=f"correct the label or give --label-range {label}=LO,HI",
        )
    return (raw_N - known.lo) / (known.hi - known.lo), known, _notes(label, column, numbers, known)


def _notes(label: str, column: str, numbers: Numbers, known: LabelRange) -> list[str]:
    present = numbers.values[~np.isnan(numbers.values)]
    notes = [missing_words(column, numbers.missing)] if numbers.missing else []
    if not present.size:
        notes.append(f"column {column!r} gives no labels of {label}: all of its cells are empty")
    elif sparse := sparse_words(label, present, known):
        notes.append(sparse)
    return notes


def missing_words(column: str, missing: Mapping[str, int]) -> str:
    """Say which words of a column count as missing."""
    words = ", ".join(sorted(missing))
    return f"{sum(missing.values()):,} cells of {column} count as missing ({words})"


def sparse_words(label: str, present_M: NDArray[np.float64], known: LabelRange) -> str:
    """Return a line where labels fill less than half of a range that was given, '' elsewhere: it is another scale's."""
    if known.how != "given" or present_M.size < FEW_LABELS or known.filled_by(present_M) >= 0.5:
        return ""
    spread = f"{present_M.min():g} to {present_M.max():g}"
    share = f"{known.filled_by(present_M):.0%}"
    return f"{label} lies from {spread}, {share} of the given range: give {OPTION} {label}=LO,HI if it has its own"


def read_label_std(table: Table, column: str, label_range: LabelRange) -> NDArray[np.float64]:
    """Map a column of label standard deviations to the unit of the mapped labels, (N,) float64, NaN where empty."""
    raw_N = _numbers(table, column).values
    negative_N = raw_N < 0
    if negative_N.any():
        row = int(np.flatnonzero(negative_N)[0])
        raise UserError(
            f"standard deviation {raw_N[row]:g} is negative",
            place=table.place(row, column),
            remedy="correct it",
        )
    return raw_N / (label_range.hi - label_range.lo)


def _numbers(table: Table, column: str) -> Numbers:
    numbers = read_numbers(table.columns[column])
    for row, why in numbers.wrong.items():
        remedy = "write all of them on one scale" if " scale " in why else "leave a missing label empty"
        raise UserError(why, place=table.place(row, column), remedy=remedy)
    return numbers
