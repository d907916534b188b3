"""Checks of columns, prompts and labels, of rows that stand twice, and of groups, sources and a split column.

Knows cells and what makes figures look better than they are. Must not know image files.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import CONSISTENCY, KNOWN_TARGETS, QUALITY, side_of
from deltaclip.features.data.cells import spelled_out
from deltaclip.features.data.manifest import (
    NAMED,
    LabelRange,
    field_like,
    find_columns,
    missing_image,
    missing_words,
    misspelt_prompt,
    range_of,
    rater_column,
    rows_outside,
    sparse_words,
)
from deltaclip.features.data.numbers import Numbers, is_missing_word, read_numbers, without_missing
from deltaclip.features.data.prompts import prompt_group

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deltaclip.base.vocabulary import Sees
    from deltaclip.features.checking.findings import Findings, Rows
    from deltaclip.features.data.table import Table
    from deltaclip.features.data.targets import AskedTarget


# ---- Checks of columns, prompts and labels: cells by themselves, and rows that stand twice


REQUIRED = ("image", "prompt")
TEXTS = ("prompt", "explanation")  # fields that a number cannot be
CONTEXT = 77  # tokens that CLIP's text towers take, the start and the end among them
# How CLIP's tokenizer cuts a text before it looks for known pieces; each part is at least one token.
PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)
FILE_NAME = re.compile(r"(^|\s|/)[\w.-]+\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def check_columns(findings: Findings, tables: list[Table], *, of_set: bool) -> list[str]:
    """Look for missing and unknown columns; returns those that are not used.

    Args:
        findings: of the rows.
        tables: with the names of columns as they were written.
        of_set: of a public set, whose other columns are known and of no use.
    """
    unused = list(dict.fromkeys(name for table in tables for name in _unused(table, findings.rows.asked)))
    if "image" not in findings.rows.columns:
        message, remedy = missing_image(tables[0])
        findings.error("missing_column", message.replace("missing column", "there is no column"), remedy=remedy)
    if "prompt" not in findings.rows.columns and (close := misspelt_prompt(tables[0])):
        findings.error("missing_column", "there is no column 'prompt'", remedy=f"rename {close!r} to 'prompt'")
    for table in tables:
        _check_types(findings, table)
    if of_set:
        return []
    for name in unused:
        field = field_like(name, [cell for table in tables for cell in table.columns.get(name, [])])
        if field is not None and field not in findings.rows.columns and field not in REQUIRED:
            findings.warn("unknown_column", f"column {name!r} is not used", remedy=_call(name, field))
    return unused


def _unused(table: Table, asked: Sequence[AskedTarget]) -> list[str]:
    used = {*find_columns(table, asked).values(), rater_column(table)}
    return [name for name in table.columns if name not in used]


def _call(name: str, field: str) -> str:
    """Say what to call a column; one of numbers is called like one label, and may as well be another."""
    names = [target.name for target in KNOWN_TARGETS]
    if field in names:
        several = f"{', '.join(names[:-1])} or {names[-1]}"
        return f"if it has ratings, call it {several}, whichever people were asked for"
    return f"if it is the {field}, call it {field!r}"


def _check_types(findings: Findings, table: Table) -> None:
    """Report what `extract` would stop at: cells that are neither text nor number, and numbers in place of texts."""
    who = rater_column(table)
    for field, name in (find_columns(table, findings.rows.asked) | ({"rater": who} if who else {})).items():
        read = table.texts if field in TEXTS else table.images if field == "image" else table.values
        try:
            read(name)
        except UserError as error:
            count = table.odd[name].count if name in table.odd else _count_numbers(table.columns[name])
            words = f"{count:,} cells of {name}: {error.message}, the first at {error.place}"
            findings.error("no_text", words, remedy=str(error.remedy))


def _count_numbers(cells: Sequence[str]) -> int:
    values = read_numbers(cells).values
    return int((~np.isnan(values)).sum())


def check_cells(findings: Findings, root: Path | None) -> None:
    """Look for empty cells, paths that leave the root, prompts that are none, and rows that stand twice.

    Args:
        findings: of the rows.
        root: folder that image paths may not leave; None permits every place.
    """
    rows = findings.rows
    empty = {name: [row for row, cell in enumerate(rows.cells[name]) if not cell] for name in REQUIRED}
    if "image" in rows.columns and empty["image"]:
        message = f"{len(empty['image']):,} rows have no image"
        findings.error("empty_image", message, at=empty["image"], remedy="fill it in")
    if "prompt" in rows.columns and empty["prompt"]:
        message = f"{len(empty['prompt']):,} rows have no prompt: they serve {_seeing(rows, 'image')} alone"
        remedy = f"fill it in where there was one; labels of {_seeing(rows, 'pair')} are not used without"
        findings.warn("empty_prompt", message, at=empty["prompt"], column="prompt", remedy=remedy)
    if root is not None and "image" in rows.columns:
        outside = [row for row in rows_outside(rows.cells["image"], root) if rows.cells["image"][row]]
        if outside:
            findings.error(
                "outside_root",
                f"{len(outside):,} image paths leave {root}",
                at=outside,
                remedy="give --image-root, or --allow-outside to permit it",
            )
    _check_prompts(findings)
    _check_names(findings)
    _check_twice(findings)


def _seeing(rows: Rows, sees: Sees) -> str:
    """Name the targets that are of the image, or of the pair; without any, the known one."""
    names = [target.name for target in rows.targets if target.sees == sees]
    return " and ".join(names) or (QUALITY if sees == "image" else CONSISTENCY).name


def _check_prompts(findings: Findings) -> None:
    prompts = findings.rows.cells["prompt"]
    long = [row for row, text in enumerate(prompts) if len(text) >= CONTEXT - 2 and _least_tokens(text) > CONTEXT]
    if long:
        findings.warn(
            "long_prompt",
            f"at least {len(long):,} prompts have more than {CONTEXT} tokens and will be cut (extract counts exactly)",
            at=long,
            column="prompt",
            remedy="put what matters first, or shorten them",
        )
    words = [row for row, text in enumerate(prompts) if is_missing_word(text)]
    if words:
        named = ", ".join(sorted({prompts[row] for row in words}))
        findings.warn(
            "missing_word",
            f"{len(words):,} prompts are {named}, which programs write for an empty cell",
            at=words,
            column="prompt",
            remedy="write the prompts, or leave the cells empty: such rows then serve "
            f"{_seeing(findings.rows, 'image')} alone",
        )
    spelled = [row for row, text in enumerate(prompts) if spelled_out(text)]
    if spelled:
        what = spelled_out(prompts[spelled[0]])
        findings.warn(
            "spelled_value",
            f"{len(spelled):,} prompts are Python's spelling of another value, such as {what}",
            at=spelled,
            column="prompt",
            remedy="write the prompts as plain text",
        )
    names = [row for row, text in enumerate(prompts) if FILE_NAME.search(text)]
    if names:
        findings.warn(
            "prompt_is_file_name",
            f"{len(names):,} prompts look like names of files",
            at=names,
            column="prompt",
            remedy="see whether columns were mixed up",
        )


def _check_names(findings: Findings) -> None:
    """Report words in place of names that are not there, and go on without them."""
    for field in NAMED:
        cells = findings.rows.cells[field]
        said = without_missing(cells)
        if said.missing:
            findings.warn(
                "missing_word",
                missing_words(field, said.missing),
                at=[row for row, cell in enumerate(cells) if cell in said.missing],
                column=field,
                remedy="nothing needs to be done if there is none; else write the names",
            )
            cells[:] = said.cells


def _least_tokens(text: str) -> int:
    return len(PIECES.findall(text)) + 2


def _check_twice(findings: Findings) -> None:
    rows = findings.rows
    seen: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, pair in enumerate(zip(rows.cells["image"], rows.cells["prompt"], strict=True)):
        if pair[0]:
            seen[pair].append(row)
    names = [target.name for target in rows.targets]
    labels = [tuple(rows.cells[name][row] for name in names) for row in range(len(rows))]
    several = [group for group in seen.values() if len(group) > 1]
    more = [row for group in several for row in group[1:]]
    if not more:
        return
    # Equal rows are copies only where nothing speaks for ratings: a rater of each, or other ratings of the same pair.
    rated = bool(rows.raters) or any(len({labels[row] for row in group}) > 1 for group in several)
    if rated:
        whose = f", by column {rows.raters[0]!r}" if rows.raters else ""
        findings.warn(
            "several_ratings",
            f"{len(more):,} rows are further ratings of an image and prompt{whose}: extract takes the mean of each",
            at=more,
            remedy="nothing needs to be done; do not leave out equal ratings, which would change the mean; "
            "`extract --raters zscore` makes people comparable who did not rate the same images",
        )
        return
    findings.warn(
        "duplicate_row",
        f"{len(more):,} rows repeat an image and prompt with the same labels",
        at=more,
        remedy="nothing needs to be done if they are ratings of several people; if rows were copied, keep one of each",
    )


def check_labels(
    findings: Findings, known: Mapping[str, LabelRange], *, needed: bool = True
) -> dict[str, dict[str, object]]:
    """Look for labels that are no numbers, out of range or all the same; returns what is known of each label.

    `known` are the ranges that were given or are the set's; `needed` says whether rows without any are of no use.
    """
    about: dict[str, dict[str, object]] = {}
    there = [target.name for target in findings.rows.targets]
    for label in (name for name in known if name and name not in there):
        findings.warn("unused_range", f"there is no column of {label} for its range", remedy="leave it out")
    for label in there:
        about[label] = _check_range(findings, label, _numbers(findings, label), known.get(label, known.get("")))
        if f"{label}_std" in findings.rows.columns:
            deviations = _numbers(findings, f"{label}_std").values
            negative = np.flatnonzero(deviations < 0).tolist()
            if negative:
                findings.error(
                    "negative_std",
                    f"{len(negative):,} standard deviations are negative",
                    at=negative,
                    column=f"{label}_std",
                    remedy="correct them",
                )
    if needed and not any(found["labels"] for found in about.values()):
        findings.warn("no_labels", "no row has a label", remedy="add quality or consistency to train on this data")
    return about


def _numbers(findings: Findings, column: str) -> Numbers:
    numbers = read_numbers(findings.rows.cells[column])
    if numbers.wrong:
        findings.error(
            "not_a_number",
            f"{len(numbers.wrong):,} cells of {column} are no finite number",
            at=list(numbers.wrong),
            column=column,
            remedy="leave a missing label empty",
        )
    if numbers.missing:
        at = [row for row, cell in enumerate(findings.rows.cells[column]) if cell in numbers.missing]
        findings.warn(
            "missing_word",
            missing_words(column, numbers.missing),
            at=at,
            column=column,
            remedy="nothing needs to be done if they have no value",
        )
    return numbers


def _check_range(findings: Findings, label: str, numbers: Numbers, given: LabelRange | None) -> dict[str, object]:
    values = numbers.values
    present = values[~np.isnan(values)]
    if not present.size:
        if not numbers.wrong:
            findings.warn(
                "empty_label",
                f"the column of {label} is there, and none of its cells has a value",
                remedy="formulas of a workbook have none until a program has computed and saved it; else leave it out",
            )
        return {"labels": 0, "range": None, "lowest": None, "highest": None}
    low, high = float(present.min()), float(present.max())
    known = range_of(numbers, given)
    about: dict[str, object] = {
        "labels": int(present.size),
        "range": str(known) if known else None,
        "lowest": low,
        "highest": high,
    }
    if known is None:
        findings.error(
            "label_range",
            f"{label} from {low:g} to {high:g} fits none of the usual ranges",
            at=[int(np.nanargmin(values)), int(np.nanargmax(values))],
            column=label,
            remedy="give --label-range LO,HI",
        )
        return about
    outside = np.flatnonzero((values < known.lo) | (values > known.hi)).tolist()
    if outside:
        findings.error(
            "label_out_of_range",
            f"{len(outside):,} labels of {label} are outside {known}",
            at=outside,
            column=label,
            remedy=f"correct them or give --label-range {label}=LO,HI",
        )
    elif sparse := sparse_words(label, present, known):
        findings.warn("range_half_empty", sparse.partition(":")[0], remedy=sparse.partition(": ")[2])
    if present.size > 1 and low == high:
        findings.warn("constant_label", f"all labels of {label} are {low:g}", remedy="nothing can be learned from them")
    return about


# ---- Checks of groups, sources and a split column: what makes figures look better than they are


FEW_GROUPS = 10  # with fewer, a test side of 20 % has one or two: a figure of them says little
SIDES = ("train", "val", "test")


def check_groups(findings: Findings) -> int:
    """Look for groups that cannot be divided; returns how many there are."""
    groups = _groups(findings)
    counts = Counter(groups)
    largest, size = counts.most_common(1)[0] if counts else ("", 0)
    members = [row for row, group in enumerate(groups) if group == largest]
    if 0 < len(counts) < len(SIDES):
        findings.warn(
            "few_groups",
            f"there are {len(counts)} groups (prompts): the three sides of a grouped split need one each",
            remedy="add prompts, a group column, or give --split random, which leaks",
        )
    elif len(counts) < FEW_GROUPS:
        findings.warn(
            "few_groups",
            f"there are {len(counts)} groups (prompts): figures of a few test prompts say little",
            remedy="add prompts, or look at the mean of --repeats",
        )
    if len(counts) > 1 and 2 * size > len(groups):
        findings.warn(
            "dominant_group",
            f"one group has {size:,} of {len(groups):,} rows",
            at=members,
            column="prompt",
            remedy="a split cannot balance its sides: give a finer group column",
        )
    return len(counts)


def _groups(findings: Findings) -> list[str]:
    cells = findings.rows.cells
    rows = zip(cells["group"], cells["prompt"], cells["image"], strict=True)
    return [group or prompt_group(prompt) or f"image {image}" for group, prompt, image in rows]


def check_sources(findings: Findings) -> int:
    """Look for generators with one row; returns how many generators there are."""
    cells = findings.rows.cells["source"]
    counts = Counter(cell for cell in cells if cell)
    single = [row for row, cell in enumerate(cells) if counts[cell] == 1]
    if single:
        findings.warn(
            "single_source",
            f"{len(single):,} of {len(counts):,} sources have one row",
            at=single,
            column="source",
            remedy="if these are spellings of one generator, write them alike",
        )
    return len(counts)


def check_split(findings: Findings, images: Sequence[object]) -> dict[str, int] | None:
    """Look for unknown sides, missing sides and leaks in a split column.

    Args:
        findings: of the rows.
        images: what tells whether two rows show the same image.

    Returns:
        rows of each side; None without such a column.
    """
    cells = findings.rows.cells["split"]
    if not any(cells):
        return None
    sides = [side_of(cell) for cell in cells]
    unknown = [row for row, side in enumerate(sides) if side is None]
    if unknown:
        findings.warn(
            "unknown_split",
            f"{len(unknown):,} rows are on no known side",
            at=unknown,
            column="split",
            remedy="write train, val or test if you want to use --split column",
        )
    counts = Counter(side for side in sides if side)
    missing = [side for side in ("train", "test") if not counts[side]]
    if missing:
        findings.warn(
            "missing_side", f"no row is marked {' or '.join(missing)}", remedy="--split column needs train and test"
        )
    for what, keys in (("group (prompt)", _groups(findings)), ("image", images)):
        leaked = _on_two_sides(sides, keys)
        if leaked:
            findings.warn(
                f"leaking_{what.partition(' ')[0]}",
                f"{len(leaked):,} rows of the split column have {_article(what)} {what} that is on another side too",
                at=leaked,
                column="prompt" if what.startswith("group") else "image",
                remedy="give --split grouped, or move whole groups",
            )
    return {side: counts[side] for side in SIDES}


def _article(word: str) -> str:
    return "an" if word == "image" else "a"


def _on_two_sides(sides: Sequence[str | None], keys: Sequence[object]) -> list[int]:
    seen: dict[object, set[str]] = defaultdict(set)
    for side, key in zip(sides, keys, strict=True):
        if side and key:
            seen[key].add(side)
    # One key for all rows is that of data without prompts: it tells nothing.
    return [row for row, key in enumerate(keys) if sides[row] and len(seen) > 1 and len(seen.get(key, ())) > 1]
