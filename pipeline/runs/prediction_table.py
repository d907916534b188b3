"""Scores with their parts, row by row, and tables of them on disk."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_file
from deltaclip.base.kinds import refuse_other
from deltaclip.base.places import check_suffix
from deltaclip.base.progress import Progress
from deltaclip.pipeline.model.scores import score_rows
from deltaclip.pipeline.settings import TABLES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.model.scores import Batch, TargetScores
    from deltaclip.pipeline.rows.cached_rows import CacheRows


CSV_FIELD_BYTES = 2**31 - 1  # a prompt may be longer than the csv module's 128 kB
BLOCK = 65_536  # rows of a table that are Python objects at a time
FLAGGED = "unlike: "  # before the part that a row is flagged by
SCORE_BATCH = 4096  # rows scored at a time: 50 MB of activations at D = 768


class ScoreColumns(NamedTuple):
    """Scores of N rows for one target, each (N,) float32: in [0, 1]; base and correction NaN for direct heads.

    The base of a refined score is the coarse one.
    """

    score: NDArray[np.float32]
    base: NDArray[np.float32]
    delta: NDArray[np.float32]


class TrustColumns(NamedTuple):
    """How far to trust N scores: ends of intervals by target, (N,) float32, NaN where there are none; and the flag.

    `flag_N` int8 is -1 of a row that is like those of the training, else which of the `parts` is most unlike them.
    `rank_N` float32 in [0, 1] is how strange a row is among those of sources that the training had, NaN where nobody
    can tell; it says little of a row and much of a set.
    """

    low: Mapping[str, NDArray[np.float32]]
    high: Mapping[str, NDArray[np.float32]]
    flag_N: NDArray[np.int8]
    parts: tuple[str, ...]
    rank_N: NDArray[np.float32]

    @property
    def flags(self) -> list[str]:
        """The flag of each row in words, '' of one that is like those of the training."""
        return [f"{FLAGGED}{self.parts[flag]}" if flag >= 0 else "" for flag in self.flag_N.tolist()]

    @classmethod
    def nothing(cls, num_rows: int, targets: Sequence[str], parts: tuple[str, ...]) -> TrustColumns:
        """Return columns that say nothing, to be filled."""
        low, high = ({each: np.full(num_rows, np.nan, np.float32) for each in targets} for _ in range(2))
        return cls(low, high, np.full(num_rows, -1, np.int8), parts, np.full(num_rows, np.nan, np.float32))

    @classmethod
    def joined(cls, blocks: Sequence[TrustColumns]) -> TrustColumns:
        """Return the rows of several blocks as one."""
        low, high = (
            {name: np.concatenate([getattr(block, end)[name] for block in blocks]) for name in blocks[0].low}
            for end in ("low", "high")
        )
        flag_N, rank_N = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("flag_N", "rank_N"))
        return cls(low, high, flag_N, blocks[0].parts, rank_N)


# Under these names, those of the formulas, tables had the scores before targets had columns of their own.
SHORT_NAMES = {"quality": "q", "consistency": "c"}


@dataclass(frozen=True)
class Scores:
    """Scores of N rows by target, and how far to trust them, None where nothing says so."""

    targets: Mapping[str, ScoreColumns]
    trust: TrustColumns | None = None

    def __len__(self) -> int:
        return len(next(iter(self.targets.values())).score)

    @classmethod
    def nothing(cls, num_rows: int, targets: Sequence[str], *, parts: tuple[str, ...] | None = None) -> Scores:
        """Return scores that are NaN, to be filled by `put`; with how far to trust them where `parts` are given."""
        fields = range(len(ScoreColumns._fields))
        found = {each: ScoreColumns(*(np.full(num_rows, np.nan, np.float32) for _ in fields)) for each in targets}
        return cls(found, None if parts is None else TrustColumns.nothing(num_rows, targets, parts))

    def put(self, rows: Sequence[int], found: Scores) -> None:
        """Set the scores of some rows."""
        for target, columns in self.targets.items():
            for column_N, value_B in zip(columns, found.targets[target], strict=True):
                column_N[rows] = value_B
        if self.trust is not None and found.trust is not None:
            self.trust.flag_N[rows], self.trust.rank_N[rows] = found.trust.flag_N, found.trust.rank_N
            for ends, own in ((self.trust.low, found.trust.low), (self.trust.high, found.trust.high)):
                for target, column_N in ends.items():
                    column_N[rows] = own[target]

    def of(self, target: str) -> NDArray[np.float32]:
        """Return the scores that predict a target, (N,) float32; NaN where there is no such target."""
        known = self.targets.get(target)
        return np.full(len(self), np.nan, dtype=np.float32) if known is None else known.score

    def columns(self) -> dict[str, Any]:
        """Return the columns of a table by name: TARGET, TARGET_base, TARGET_delta, and q, c for who asks by these.

        Where it is known how far to trust them also TARGET_low and TARGET_high, and last `flag`, a list of words.
        """
        found = dict[str, Any]()
        for target, (score_N, base_N, delta_N) in self.targets.items():
            found |= {target: score_N, f"{target}_base": base_N, f"{target}_delta": delta_N}
            if self.trust is not None:
                found |= {f"{target}_low": self.trust.low[target], f"{target}_high": self.trust.high[target]}
        found |= {short: self.of(name) for name, short in SHORT_NAMES.items() if name in self.targets}
        return found if self.trust is None else found | {"flag": self.trust.flags}


def base_terms(heads: Heads, rows: CacheRows) -> dict[str, Tensor]:
    """Return what fitted bases say of all rows of a cache, by target, (N,) float32; heads without say nothing."""
    bases, inputs, found = heads.bases, rows.inputs(), list[dict[str, "Tensor"]]()
    if bases is None:
        return {}
    for block in torch.arange(len(rows.rows)).split(SCORE_BATCH):
        views = {name: inputs[name][block] for name in bases.views}
        found.append(heads.base_terms(views, inputs["center"][block], inputs["prompt"][block]))
    return {target.name: torch.cat([each[target.name] for each in found]) for target in heads.targets}


def score(heads: Heads, batches: Iterable[Batch], *, total: int = 0) -> Scores:
    """Score batches in order; beside the scores, 24 bytes a row, one batch is in memory.

    Of a row without a prompt, whose t is 0, every score that sees one is NaN.
    `total` is the number of rows that a bar on a terminal counts to; 0 shows none.
    """
    # One growing buffer a column: thousands of small arrays between the activations of their batches would keep the
    # memory of these from being used again (measured: 400 bytes a row instead of 24).
    buffers: dict[str, tuple[bytearray, ...]] = {}
    with Progress(total, "scoring", unit="rows", shown=total > 0) as progress:
        for batch in batches:
            pairs = {target.name for target in heads.targets if target.sees == "pair"}
            blind_B = ~batch.t_BD.any(dim=1).cpu().numpy()
            for target, found in score_rows(heads, [batch]).targets.items():
                grown = buffers.setdefault(target, tuple(bytearray() for _ in ScoreColumns._fields))
                for buffer, values in zip(grown, score_columns(found), strict=True):
                    seen = np.where(blind_B, np.float32(np.nan), values) if target in pairs else values
                    buffer.extend(seen.tobytes())
            progress.advance(batch.num_rows)
    return Scores(
        {
            target: ScoreColumns(*(np.frombuffer(buffer, dtype=np.float32) for buffer in grown))
            for target, grown in buffers.items()
        }
    )


def score_columns(found: TargetScores) -> ScoreColumns:
    """Return the scores of a target as columns."""

    def column(value: Tensor | None, scale: Tensor | None = None) -> NDArray[np.float32]:
        if value is None:
            return np.full(len(found.sum_N), np.nan, dtype=np.float32)
        return np.asarray((value if scale is None else scale * value).cpu().numpy(), dtype=np.float32)

    with torch.no_grad():
        return ScoreColumns(column(found.reported), column(found.base_N), column(found.delta_N, found.scale))


def blank_untrained(scores: Scores, labels: Collection[str]) -> Scores:
    """Return the scores with NaN for every head that had no labels to learn from: it says nothing."""
    nothing = np.full(len(scores), np.nan, dtype=np.float32)
    blank = ScoreColumns(nothing, nothing, nothing)
    found = {target: own if target in labels else blank for target, own in scores.targets.items()}
    if scores.trust is None:
        return Scores(found)
    low, high = (
        {target: own_N if target in labels else nothing for target, own_N in ends.items()}
        for ends in (scores.trust.low, scores.trust.high)
    )
    return Scores(found, scores.trust._replace(low=low, high=high))


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write columns of equal length as CSV, JSONL or Parquet, by suffix; whole or not at all. NaN is an empty cell."""
    check_suffix(path, TABLES)
    with whole_file(path) as temporary:
        if path.suffix.lower() == ".parquet":
            _write_parquet(temporary, columns)
            return
        with temporary.open("w", newline="", encoding="utf-8") as file:
            if path.suffix.lower() == ".csv":
                writer = csv.writer(_LineFeeds(file))
                writer.writerow(columns)
                for rows in _row_blocks(columns):
                    writer.writerows(rows)
            else:
                for rows in _row_blocks(columns):
                    file.writelines(
                        json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows
                    )


class _LineFeeds:
    """Ends the rows of a csv writer in LF; ended so by the writer itself, it would leave a CR in a cell unquoted."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def recorded_targets(path: Path) -> list[str]:
    """Return the targets that the predictions of a run have, in their order.

    Raises:
        UserError: cannot be read, or has no labels.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header = today_names(next(csv.reader(file), []))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot be read ({reason})", place=path, remedy="train again") from error
    found = [name.removesuffix("_label") for name in header if name.endswith("_label")]
    if not found:
        refuse_other(path, {"text"}, what="table of predictions")
        raise UserError("has no column of labels, such as 'quality_label'", place=path, remedy="train again")
    return found


def today_names(header: list[str]) -> list[str]:
    """Return the columns as they are called today: in earlier tables a label had the plain name, its score a short one.

    The score of `quality` was `q`, with `q_base` and `q_delta`, and `quality` was its label.
    """
    if any(name.endswith("_label") for name in header):
        return header
    names = dict[str, str]()
    for target, short in SHORT_NAMES.items():
        names |= {short: target, target: f"{target}_label"}
        names |= {f"{short}_{part}": f"{target}_{part}" for part in ("base", "delta")}
    return [names.get(name, name) for name in header]


def read_predictions(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read some columns of the predictions of a run as rows of text.

    Raises:
        UserError: cannot be read, or lacks one of the columns.
    """
    blocks = read_blocks(path, columns)
    return [dict(zip(columns, row, strict=True)) for block in blocks for row in zip(*block, strict=True)]


def read_blocks(path: Path, columns: Sequence[str]) -> Iterator[list[list[str]]]:
    """Yield some columns of the predictions of a run, BLOCK rows at a time, each a list of text.

    Raises:
        UserError: cannot be read, or lacks one of the columns.
    """
    csv.field_size_limit(CSV_FIELD_BYTES)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = today_names(next(reader, []))
            missing = [name for name in columns if name not in header]
            if missing:
                refuse_other(path, {"text"}, what="table of predictions")
                raise UserError(f"has no column {missing[0]!r}", place=path, remedy="train again")
            places = [header.index(name) for name in columns]
            while rows := list(islice(reader, BLOCK)):
                if any(len(row) != len(header) for row in rows):
                    raise UserError("has a row of another length than its header", place=path, remedy="train again")
                yield [[row[place] for row in rows] for place in places]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot be read ({reason})", place=path, remedy="train again") from error


def _row_blocks(columns: dict[str, Any]) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Yield the rows of columns of equal length, BLOCK rows at a time."""
    for start in range(0, max((len(values) for values in columns.values()), default=0), BLOCK):
        yield zip(*(_cells(values[start : start + BLOCK]) for values in columns.values()), strict=True)


def _write_parquet(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array(values, from_pandas=True)
        if isinstance(values, np.ndarray) and values.dtype.kind == "f"
        else pa.array(list(values))
        for name, values in columns.items()
    }
    pq.write_table(pa.table(arrays), path)


def _cells(values: Any) -> list[Any]:
    # Six significant digits: below the noise of float32 scores, and a diff of two tables stays readable. Decimals
    # would cut a learning rate of 1e-6 to nothing.
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return [None if math.isnan(value) else float(f"{value:.6g}") for value in values.tolist()]
    return list(values)
