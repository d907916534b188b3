"""Checks of groups, sources and a split column: what makes figures look better than they are."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from deltaclip.base.sides import side_of
from deltaclip.features.data.prompts import prompt_group

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaclip.features.checking.findings import Findings

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
