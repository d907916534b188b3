"""Which rows of a manifest a shard has: by the image's name, so that rows that come or go move no other.

Knows manifests and the variables that launchers set. Must not know caches or how anything is computed.

By the name and not by the content: to know the content every process would have to read every image. All rows of one
name are in one shard, so that an image with several prompts is computed once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import KNOWN_TARGETS
from deltaclip.features.data.manifest import TEXT_FIELDS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.data.manifest import Manifest

FORM = "give I/N from 1/N to N/N, or auto"
# Of a process and of how many processes there are, the launcher that is closest to the process first.
LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
BLOCK_ROWS = 65_536  # hashed at a time


@dataclass(frozen=True)
class Shard:
    """Shard `number`, from 1, of `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def path(self, whole: Path) -> Path:
        """Return where this shard of the cache `whole` lies: `x.shard-03-of-16.h5` of `x.h5`."""
        number = str(self.number).zfill(len(str(self.count)))
        return whole.with_name(f"{whole.stem}.shard-{number}-of-{self.count}{whole.suffix}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a shard has of a table: `position` (N,) int64 are the places of its rows among the table's `num_rows`.

    `table` is the SHA-256 of the whole table, labels included: shards of different states of it do not fit together.
    """

    shard: Shard
    table: str
    num_rows: int
    position: NDArray[np.int64]

    def to_json(self) -> dict[str, Any]:
        """Return all but the positions."""
        return {"number": self.shard.number, "count": self.shard.count, "table": self.table, "rows": self.num_rows}


def read_shard(text: str, environment: Mapping[str, str]) -> tuple[Shard, str]:
    """Read `--shard`: I/N, or `auto`, which asks torchrun's and SLURM's variables.

    Returns:
        the shard, and which variables named it ('' where it was given).

    Raises:
        UserError: it is neither, there is no such shard, or no variable says one.
    """
    if text == "auto":
        return _from_launcher(environment)
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"{text!r} is no shard", place="--shard", remedy=FORM)
    return Shard(int(found[1]), int(found[2])), ""


def _from_launcher(environment: Mapping[str, str]) -> tuple[Shard, str]:
    for rank, size in LAUNCHERS:
        number, count = environment.get(rank, ""), environment.get(size, "")
        if number.isdecimal() and count.isdecimal() and int(number) < int(count):
            if size == "SLURM_NTASKS" and "SLURM_ARRAY_TASK_ID" in environment:
                # Its size is no number of shards: an array of the few that failed is smaller.
                message = "auto does not know how many shards this job array stands for"
                raise UserError(message, place="--shard", remedy="give $SLURM_ARRAY_TASK_ID/N with --array=1-N")
            return Shard(int(number) + 1, int(count)), f"{rank}={number} and {size}={count}"
    names = "; ".join(f"{rank} and {size}" for rank, size in LAUNCHERS)
    raise UserError(f"auto finds no shard in the environment (looked for {names})", place="--shard", remedy="give I/N")


def local_rank(environment: Mapping[str, str]) -> int | None:
    """Return the number of this process among those that a launcher started on this machine, None without one."""
    found = [environment[name] for name in LOCAL_RANKS if environment.get(name, "").isdecimal()]
    return int(found[0]) if found else None


def shard_of(name: str, count: int) -> int:
    """Return the number, from 1 to `count`, of the shard that an image's name belongs to."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % count + 1


def part_of(manifest: Manifest, shard: Shard) -> tuple[Manifest, Part]:
    """Return the rows of a manifest that are the shard's, in their order; there may be none."""
    mine = [row for row, name in enumerate(manifest.images) if shard_of(name, shard.count) == shard.number]
    part = Part(shard=shard, table=_digest(manifest), num_rows=len(manifest), position=np.array(mine, dtype=np.int64))
    values: dict[str, Any] = {}
    for name in TEXT_FIELDS:
        column = getattr(manifest, name)
        values[name] = [column[row] for row in mine]
    values["labels"] = {name: column[part.position] for name, column in manifest.labels.items()}
    return dataclasses.replace(manifest, **values), part


def _digest(manifest: Manifest) -> str:
    """Return the SHA-256 of all that goes into a cache; where the files lie is not of it."""
    # What known targets see is said by their names: sets of shards of before there were others keep their digest.
    named = [target.to_json() for target in manifest.targets if target not in KNOWN_TARGETS]
    state = hashlib.sha256(json.dumps([manifest.name, len(manifest), *([named] if named else [])]).encode())
    for name in sorted({*TEXT_FIELDS} - {"places"}):
        column = getattr(manifest, name)
        for start in range(0, len(column), BLOCK_ROWS):
            state.update(json.dumps([name, column[start : start + BLOCK_ROWS]]).encode())
    for name, label in sorted(manifest.labels.items()):
        state.update(name.encode() + label.astype(np.float32).tobytes())
    return state.hexdigest()
