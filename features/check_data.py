"""STAGE check_data: every problem of a manifest or a set, before anything is computed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.features.checking.columns import (
    check_cells,
    check_columns,
    check_groups,
    check_labels,
    check_sources,
    check_split,
)
from deltaclip.features.checking.findings import Finding, Findings, Rows
from deltaclip.features.checking.images import check_images, check_pairs
from deltaclip.features.data.adapters import open_data
from deltaclip.features.data.addresses import shown
from deltaclip.features.data.manifest import parse_label_ranges
from deltaclip.features.data.paths import understood_all
from deltaclip.features.data.preferences import holds_pairs, read_pair_table
from deltaclip.features.data.remote import announced, begin, tally
from deltaclip.features.data.targets import parse_targets

if TYPE_CHECKING:
    from deltaclip.features.data.preferences import PairTable
    from deltaclip.features.data.table import Table
    from deltaclip.features.settings import CheckConfig

PROBLEMS_FOUND = 2


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What is in the data, and every problem of it; `images` is None where no file was looked at.

    `pairs` counts those that people chose between, None of a table of single images.
    """

    data: str
    rows: int
    groups: int
    sources: int
    labels: dict[str, dict[str, object]]
    split: dict[str, int] | None
    images: dict[str, Any] | None
    unused_columns: list[str]
    notes: list[str]
    findings: list[Finding]
    pairs: int | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 where there is no error, warnings or not."""
        return PROBLEMS_FOUND if self._of("error") else 0

    def _of(self, level: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        plain = {name: value for name, value in vars(self).items() if name != "findings"}
        lists = {f"{level}s": [finding.to_json() for finding in self._of(level)] for level in ("error", "warning")}
        return plain | lists

    def summary(self) -> str:
        """Return what is there, then errors, then warnings."""
        errors, warnings = self._of("error"), self._of("warning")
        lines = [f"{self.data}: {self.rows:,} rows, {self.groups:,} groups (prompts), {self.sources:,} sources"]
        for label, known in self.labels.items():
            if known["labels"]:
                spread = f"{known['lowest']:g} to {known['highest']:g}"
                lines.append(f"{label}: {known['labels']:,} labels from {spread}, range {known['range'] or 'unknown'}")
        if self.split:
            lines.append(f"split column: {', '.join(f'{side} {n:,}' for side, n in self.split.items())}")
        if self.images:
            lines.append(self._image_line(self.images))
        if self.unused_columns:
            lines.append(f"columns not used: {', '.join(self.unused_columns)}")
        lines += self.notes
        for finding in (*errors, *warnings):
            lines += ["", *finding.lines()]
        return "\n".join([*lines, "", f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}"])

    def _image_line(self, images: dict[str, Any]) -> str:
        ends = dict.fromkeys([images["smallest"], images["largest"]])
        sizes = f", {' to '.join(ends)} pixels" if images["readable"] else ""
        depth = "decoded" if images["depth"] == "full" else "by their headers"
        return f"images: {images['readable']:,} of {images['files']:,} readable ({depth}){sizes}"


def _counted(findings: list[Finding], word: str) -> str:
    return f"{len(findings) or 'no'} {word}{'' if len(findings) == 1 else 's'}"


def _pairs(table: Table) -> tuple[PairTable, UserError | None]:
    """Return the pairs of a table; where a preference is not understood its images alone, and what is wrong."""
    try:
        return read_pair_table(table), None
    except UserError as error:
        return read_pair_table(table, need_labels=False), error


def check_data(config: CheckConfig) -> CheckResult:
    """Look for every problem of what `extract` would be given.

    Raises:
        UserError: there is nothing to look at: no such file, a table that cannot be read at all.
    """
    started, earlier = time.monotonic(), begin()
    asked = parse_targets(config.target)
    given = parse_label_ranges(config.label_range, asked)
    data = open_data(config.data, image_root=config.image_root, targets=asked)
    pairs, wrong = _pairs(data.tables[0]) if holds_pairs(data.tables[0]) else (None, None)
    data = replace(data, tables=[pairs.rows]) if pairs else data
    root = None if config.allow_outside else data.image_root
    findings = Findings(Rows(data))
    if wrong is not None:
        findings.error("preference", f"{wrong.place}: {wrong.message}", remedy=str(wrong.remedy))
    cells = findings.rows.cells
    cells["image"], read_so = understood_all(cells["image"], data.image_root, allow_outside=config.allow_outside)
    read_so += announced(cells["image"], data.image_root, place=data.tables[0].path)
    unused = check_columns(findings, data.tables, of_set=data.label_range is not None)
    check_cells(findings, root)
    labels = check_labels(findings, data.ranges(given), needed=pairs is None)
    keys: list[object] = list(findings.rows.cells["image"])
    images = None
    if config.images != "none" and "image" in findings.rows.columns:
        looks = check_images(findings, data.image_root, root, full=config.images == "full", copies=not pairs)
        keys = looks.keys
        if pairs:
            check_pairs(findings, pairs, looks)
        by_area = sorted(looks.sizes, key=lambda size: size[0] * size[1]) or [(0, 0)]
        images = {
            "files": looks.checked,
            "readable": looks.readable,
            "depth": config.images,
            "smallest": "{} x {}".format(*by_area[0]),
            "largest": "{} x {}".format(*by_area[-1]),
        }
    left = findings.rows.left_out
    return CheckResult(
        data=shown(config.data),
        rows=len(findings.rows),
        groups=check_groups(findings),
        sources=check_sources(findings),
        labels=labels,
        split=check_split(findings, keys),
        images=images,
        unused_columns=unused,
        notes=[
            *data.said,
            *read_so,
            *(pairs.said() if pairs else ()),
            *(note for table in data.tables for note in table.notes),
            *tally().since(earlier),
            *([f"{left:,} rows have no score and are left out"] if left else []),
        ],
        findings=findings.found,
        pairs=len(pairs.a_P) if pairs else None,
        seconds=round(time.monotonic() - started, 3),
    )
