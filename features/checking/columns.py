"""Checks of columns, prompts and labels: cells by themselves, and rows that stand twice."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import nearest
from deltaclip.features.data.labels import KNOWN_RANGES, LabelRange
from deltaclip.features.data.manifest import ALIASES, LABELS, rows_outside

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.checking.findings import Findings
    from deltaclip.features.data.table import Table

REQUIRED = ("image", "prompt")
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
    known = [alias for aliases in ALIASES.values() for alias in aliases]
    unused = list(dict.fromkeys(name for table in tables for name in table.columns if name.lower() not in known))
    for column in REQUIRED:
        if column not in findings.rows.columns:
            close = nearest(column, unused)
            remedy = f"rename {close!r} to {column!r}" if close else f"add it; found: {', '.join(tables[0].columns)}"
            findings.error("missing_column", f"there is no column {column!r}", remedy=remedy)
    if of_set:
        return []
    for name in unused:
        field = next((f for f, aliases in ALIASES.items() if nearest(name, aliases)), None)
        if field is not None and field not in findings.rows.columns and field not in REQUIRED:
            findings.warn(
                "unknown_column",
                f"column {name!r} is not used",
                remedy=f"if it is the {field}, call it {field!r}",
            )
    return unused


def check_cells(findings: Findings, root: Path | None) -> None:
    """Look for empty cells, paths that leave the root, prompts that are none, and rows that stand twice.

    Args:
        findings: of the rows.
        root: folder that image paths may not leave; None permits every place.
    """
    rows = findings.rows
    for column in REQUIRED:
        empty = [row for row, cell in enumerate(rows.cells[column]) if not cell]
        if column in rows.columns and empty:
            findings.error(
                f"empty_{column}", f"{len(empty):,} rows have no {column}", at=empty, column=column, remedy="fill it in"
            )
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
    _check_twice(findings)


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
    names = [row for row, text in enumerate(prompts) if FILE_NAME.search(text)]
    if names:
        findings.warn(
            "prompt_is_file_name",
            f"{len(names):,} prompts look like names of files",
            at=names,
            column="prompt",
            remedy="see whether columns were mixed up",
        )


def _least_tokens(text: str) -> int:
    return len(PIECES.findall(text)) + 2


def _check_twice(findings: Findings) -> None:
    rows = findings.rows
    seen: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, pair in enumerate(zip(rows.cells["image"], rows.cells["prompt"], strict=True)):
        if pair[0]:
            seen[pair].append(row)
    labels = list(zip(*(rows.cells[label] for label in LABELS), strict=True))
    same: list[int] = []
    differ: list[int] = []
    for group in seen.values():
        known = {labels[group[0]]}
        for row in group[1:]:
            (same if labels[row] in known else differ).append(row)
            known.add(labels[row])
    if same:
        findings.warn(
            "duplicate_row", f"{len(same):,} rows repeat an image and prompt", at=same, remedy="remove the copies"
        )
    if differ:
        findings.warn(
            "duplicate_label",
            f"{len(differ):,} rows give an image and prompt once more, with another label",
            at=differ,
            remedy="average the ratings of an image into one row",
        )


def check_labels(findings: Findings, given: LabelRange | None) -> dict[str, dict[str, object]]:
    """Look for labels that are no numbers, out of range or all the same; returns what is known of each label."""
    about: dict[str, dict[str, object]] = {}
    for label in LABELS:
        if label in findings.rows.columns:
            values = _numbers(findings, label)
            about[label] = _check_range(findings, label, values, given)
        if f"{label}_std" in findings.rows.columns:
            deviations = _numbers(findings, f"{label}_std")
            negative = np.flatnonzero(deviations < 0).tolist()
            if negative:
                findings.error(
                    "negative_std",
                    f"{len(negative):,} standard deviations are negative",
                    at=negative,
                    column=f"{label}_std",
                    remedy="correct them",
                )
    if not any(known["labels"] for known in about.values()):
        findings.warn("no_labels", "no row has a label", remedy="add quality or consistency to train on this data")
    return about


def _numbers(findings: Findings, column: str) -> NDArray[np.float64]:
    cells = findings.rows.cells[column]
    values = np.full(len(cells), np.nan)
    wrong = []
    for row, cell in enumerate(cells):
        try:
            values[row] = float(cell) if cell else np.nan
        except ValueError:
            wrong.append(row)
    wrong = sorted([*wrong, *np.flatnonzero(np.isinf(values)).tolist()])
    values[wrong] = np.nan
    if wrong:
        findings.error(
            "not_a_number",
            f"{len(wrong):,} cells of {column} are no finite number",
            at=wrong,
            column=column,
            remedy="leave a missing label empty",
        )
    return values


def _check_range(
    findings: Findings, label: str, values: NDArray[np.float64], given: LabelRange | None
) -> dict[str, object]:
    present = values[~np.isnan(values)]
    if not present.size:
        return {"labels": 0, "range": None, "lowest": None, "highest": None}
    low, high = float(present.min()), float(present.max())
    known = given or next((LabelRange(lo, hi, "detected") for lo, hi in KNOWN_RANGES if lo <= low and high <= hi), None)
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
            remedy="correct them or give --label-range LO,HI",
        )
    if present.size > 1 and low == high:
        findings.warn("constant_label", f"all labels of {label} are {low:g}", remedy="nothing can be learned from them")
    return about
