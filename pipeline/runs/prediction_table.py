"""Scores with their parts, row by row, and tables of them on disk."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_file
from deltaclip.base.places import check_suffix
from deltaclip.base.progress import Progress
from deltaclip.base.vocabulary import LABELS, need_prompts
from deltaclip.pipeline.model.scores import score_rows
from deltaclip.pipeline.settings import TABLES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from deltaclip.pipeline.model.scores import Batch, HeadScores


CSV_FIELD_BYTES = 2**31 - 1  # a prompt may be longer than the csv module's 128 kB
BLOCK = 65_536  # rows of a table that are Python objects at a time
SCORE_BATCH = 4096  # rows scored at a time: 50 MB of activations at D = 768


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of N rows, each (N,) float32: `q`, `c` in [0, 1]; bases and corrections NaN for direct heads.

    The base of a refined consistency is the coarse one.
    """

    q: NDArray[np.float32]
    c: NDArray[np.float32]
    q_base: NDArray[np.float32]
    c_base: NDArray[np.float32]
    q_delta: NDArray[np.float32]
    c_delta: NDArray[np.float32]

    def of(self, label: str) -> NDArray[np.float32]:
        """Return the scores that predict a label, 'quality' or 'consistency'."""
        return self.q if label == "quality" else self.c

    def columns(self) -> dict[str, NDArray[np.float32]]:
        """Return the columns of a table by name."""
        return dict(self.__dict__)


def score(heads: nn.Module, batches: Iterable[Batch], *, total: int = 0) -> Scores:
    """Score batches in order; beside the scores, 24 bytes a row, one batch is in memory.

    Of a row without a prompt, whose t is 0, every score that sees one is NaN.
    `total` is the number of rows that a bar on a terminal counts to; 0 shows none.
    """
    # One growing buffer a column: thousands of small arrays between the activations of their batches would keep the
    # memory of these from being used again (measured: 400 bytes a row instead of 24).
    columns: dict[str, bytearray] = {}
    with Progress(total, "scoring", unit="rows", shown=total > 0) as progress:
        for batch in batches:
            for name, values in _seen(_columns(score_rows(heads, [batch])), batch).items():
                columns.setdefault(name, bytearray()).extend(values.tobytes())
            progress.advance(len(batch.v_BD))
    return Scores(**{name: np.frombuffer(content, dtype=np.float32) for name, content in columns.items()})


def _columns(found: HeadScores) -> dict[str, NDArray[np.float32]]:
    def column(value: Tensor | None, scale: Tensor | None = None) -> NDArray[np.float32]:
        if value is None:
            return np.full(len(found.q_sum_N), np.nan, dtype=np.float32)
        return np.asarray((value if scale is None else scale * value).cpu().numpy(), dtype=np.float32)

    with torch.no_grad():
        return {
            "q": column(found.q),
            "c": column(found.c),
            "q_base": column(found.q_base_N),
            "c_base": column(found.c_base_N),
            "q_delta": column(found.dq_N, found.scale_q),
            "c_delta": column(found.dc_N, found.scale_c),
        }


def _seen(columns: dict[str, NDArray[np.float32]], batch: Batch) -> dict[str, NDArray[np.float32]]:
    blind_B = ~batch.t_BD.any(dim=1).cpu().numpy()
    if blind_B.any():
        for name in (name for label in LABELS if need_prompts([label]) for name in score_names(label)):
            columns[name] = np.where(blind_B, np.float32(np.nan), columns[name])
    return columns


def score_names(label: str) -> tuple[str, str, str]:
    """Return the columns of `Scores` that belong to a label: score, base, correction."""
    letter = label[0]
    return letter, f"{letter}_base", f"{letter}_delta"


def blank_untrained(scores: Scores, labels: Collection[str]) -> Scores:
    """Return the scores with NaN for every head that had no labels to learn from: it says nothing."""
    nothing = np.full(len(scores.q), np.nan, dtype=np.float32)
    blank = [name for label in LABELS if label not in labels for name in score_names(label)]
    return replace(scores, **dict.fromkeys(blank, nothing))


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
            header = next(reader, [])
            missing = [name for name in columns if name not in header]
            if missing:
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
