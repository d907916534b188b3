"""Which shards make a table, and whether all are there: missing and foreign ones are refused by name.

Knows headers of caches and how shards are named. Must not know embeddings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaclip.base.errors import UserError
from deltaclip.features.data.sharding import Shard
from deltaclip.features.store.store import FeatureStore
from deltaclip.features.store.writer import part_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_NAME = re.compile(r"(?P<stem>.+)\.shard-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.[^.]*)?")


@dataclass(frozen=True)
class Mark:
    """What a shard says of itself: which it is, of which state of which table."""

    shard: Shard
    table: str

    @property
    def of(self) -> tuple[int, str]:
        """What all shards of one set have in common."""
        return self.shard.count, self.table


def read_mark(store: FeatureStore) -> Mark | None:
    """Return what a cache says of itself as a shard, None where it is none."""
    found = store.header.get("shard")
    return Mark(Shard(found["number"], found["count"]), found["table"]) if found else None


def check_sets(stores: Sequence[FeatureStore]) -> list[int]:
    """Refuse shards whose set is not complete.

    Returns:
        for each cache the number of the set that it belongs to; a cache that is no shard is a set by itself.

    Raises:
        UserError: names the shard that is missing, or one of another table or state, and the command that makes it.
    """
    marks = [read_mark(store) for store in stores]
    sets: dict[object, list[int]] = {}
    for number, mark in enumerate(marks):
        sets.setdefault(mark.of if mark else number, []).append(number)
    lacking = {members[0]: _missing([mark for n in members if (mark := marks[n])]) for members in sets.values()}
    if any(lacking.values()):
        _refuse_foreign(stores, marks)
    for first, missing in lacking.items():
        if missing:
            path = missing[0].path(whole_path(stores[first].path))
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            remedy = f"make it by the same `deltaclip extract` with --shard {missing[0]}"
            raise UserError(f"shard {missing[0]}{more} is missing", place=path, remedy=remedy)
    numbers = {member: number for number, members in enumerate(sets.values()) for member in members}
    return [numbers[number] for number in range(len(stores))]


def _missing(marks: Sequence[Mark]) -> list[Shard]:
    there = {mark.shard.number for mark in marks}
    return (
        [Shard(number, marks[0].shard.count) for number in range(1, marks[0].shard.count + 1) if number not in there]
        if marks
        else []
    )


def _refuse_foreign(stores: Sequence[FeatureStore], marks: Sequence[Mark | None]) -> None:
    """Refuse a shard that has the count of others and another table, as after rows were added and not all made anew."""
    found = [(store, mark) for store, mark in zip(stores, marks, strict=True) if mark]
    by_count: dict[int, dict[str, list[FeatureStore]]] = {}
    for store, mark in found:
        by_count.setdefault(mark.shard.count, {}).setdefault(mark.table, []).append(store)
    for count, tables in by_count.items():
        if len(tables) > 1:
            # The few are the strangers; of as many, the later ones.
            groups = sorted(tables.values(), key=len, reverse=True)
            stranger = groups[-1][0]
            message = f"is a shard of another table, or of another state of it, than {groups[0][0].path.name}"
            remedy = f"give the same `deltaclip extract` with each --shard from 1/{count}: only what is new is computed"
            raise UserError(message, place=stranger.path, remedy=remedy)


def whole_path(path: Path) -> Path:
    """Return the name of the cache that a shard of this name is of; the name itself where it is none of a shard."""
    found = _NAME.fullmatch(path.name)
    return path.with_name(found["stem"] + (found["suffix"] or "")) if found else path


def find_shards(whole: Path) -> dict[int, list[Path]]:
    """Return by their count the files named as finished shards of the cache `whole`, in order of their numbers."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(whole.parent.glob("*.shard-*-of-*")) if whole.parent.is_dir() else []:
        name = _NAME.fullmatch(path.name)
        if name and whole_path(path) == whole:
            found.setdefault(int(name["count"]), {})[int(name["number"])] = path
    return {count: [shards[number] for number in sorted(shards)] for count, shards in sorted(found.items())}


def find_set(path: Path) -> list[Path] | None:
    """Return the shards that `path` stands for: a pattern (`x.shard-*-of-4.h5`), or a cache that lies there in shards.

    Returns:
        None where `path` is a file, or nothing of that name is there.

    Raises:
        UserError: there are sets of several sizes.
    """
    if path.exists():
        return None
    sets = find_shards(whole_path(path.with_name(path.name.replace("*", "0"))))
    if "*" in path.name:
        sets = {count: kept for count, paths in sets.items() if (kept := [p for p in paths if p.match(path.name)])}
        if not sets:
            raise UserError("no such shards", place=path, remedy="make them with `deltaclip extract --shard I/N`")
    if len(sets) > 1:
        found = " and ".join(f"1/{count}" for count in sets)
        remedy = f"name one set: {next(iter(sets.values()))[0].name.partition('.shard-')[0]}.shard-*-of-N{path.suffix}"
        raise UserError(f"there are shards of several sets ({found})", place=path, remedy=remedy)
    return next(iter(sets.values()), None)


def set_size(whole: Path) -> int | None:
    """Return of how many shards those that lie there, finished or begun, are; None where there is none.

    Raises:
        UserError: they are of several sets.
    """
    begun = {path.with_name(path.name.removesuffix(".part")) for path in whole.parent.glob("*.shard-*-of-*")}
    names = [name for path in begun if (name := _NAME.fullmatch(path.name)) and whole_path(path) == whole]
    counts = sorted({int(name["count"]) for name in names})
    if len(counts) > 1:
        found = " and ".join(f"1/{count}" for count in counts)
        raise UserError(f"there are shards of several sets ({found})", place=whole, remedy="give --ray-shards")
    return counts[0] if counts else None


def find_sibling(whole: Path, shard: Shard) -> FeatureStore | None:
    """Open another shard of the same set, finished or not; None where there is none yet."""
    for number in range(1, shard.count + 1):
        path = Shard(number, shard.count).path(whole)
        for there in (path, part_path(path), path):  # the last one if it was finished meanwhile
            if number != shard.number and there.exists():
                try:
                    return FeatureStore.open(there, unfinished=True)
                except (UserError, FileNotFoundError):
                    if there.exists():
                        raise
    return None
