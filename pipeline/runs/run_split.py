"""What a run has seen of the rows of a cache: which it had, on which side, and of the others what they share with it.

Rows are the same where image and prompt are, by content. Knows run directories, caches and keys. Must not know heads.

Shapes: N rows of the cache, R rows of the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.store.near import near_copies
from deltaclip.features.store.schema import DONE
from deltaclip.features.store.shards import open_cache
from deltaclip.features.store.writer import check_request
from deltaclip.pipeline.rows.cached_rows import (
    FILE,
    NAMES,
    Codes,
    RowKeys,
    common_codes,
    image_keys,
    keys_of_names,
    read_keys,
)
from deltaclip.pipeline.runs.prediction_table import read_blocks
from deltaclip.pipeline.scoring.splits import Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.features.store.reader import FeatureStore
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.scoring.groups import KeyArray


SIDES = ("train", "val", "test")
NEW = len(SIDES)  # of a row that a run did not have
BY_NAME = "images are compared by name: the content of their files is not known of both sides"


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The R rows of a run and the N of a cache as `Codes` that mean the same.

    `side_R` indexes SIDES, `side_N` too, NEW of rows that the run did not have. `is_whole` where the rows of the cache
    are those of the run, in order. `note` says how images were compared where it was not by content.
    """

    of_run: Codes
    here: Codes
    side_R: NDArray[np.uint8]
    side_N: NDArray[np.uint8]
    is_whole: bool
    note: str

    @property
    def is_learned(self) -> NDArray[np.bool_]:
        """Whether a row of the run was learned from: epochs are chosen on validation rows."""
        return np.asarray(self.side_R < SIDES.index("test"))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What of M rows of a cache a run knows from training, each (M,) bool; `note` says what could not be looked at."""

    image_M: NDArray[np.bool_]
    prompt_M: NDArray[np.bool_]
    near_M: NDArray[np.bool_]
    note: str = ""

    def any(self) -> bool:
        """Tell whether anything was seen."""
        return bool((self.image_M | self.prompt_M | self.near_M).any())

    def words(self, what: str) -> str:
        """Say how many of the rows share what with the training, '' where none does and all was looked at."""
        image, prompt, both = (int(seen.sum()) for seen in (self.image_M, self.prompt_M, self.image_M & self.prompt_M))
        parts = []
        if image and prompt:
            parts.append(f"{image:,} {what} have an image that the run trained on, {prompt:,} a prompt, {both:,} both")
        elif image or prompt:
            parts.append(
                f"{image or prompt:,} {what} have {'an image' if image else 'a prompt'} that the run trained on"
            )
        if near := int(self.near_M.sum()):
            parts.append(f"{near:,} {what} have a near copy of an image that the run trained on")
        return "; ".join([*parts, *([self.note] if self.note else [])])


def read_run_rows(run: RunFolder, rows: CacheRows) -> RunRows:
    """Find the rows of a run in a cache.

    A run of an earlier release recorded no content. It is that of the cache where the cache still is what the run was
    trained on; elsewhere images are known by their names.

    Raises:
        UserError: the run's table of predictions cannot be read.
    """
    path = run.path / "predictions.csv"
    side_R = read_sides(path)
    stored, note = read_keys(run.path / FILE, num_rows=len(side_R)), ""
    if stored and stored.known_by == rows.keys.known_by:
        keys = [stored, rows.keys]
    elif stored is None and len(side_R) == len(rows.rows) and _is_cache_of(run, rows.header):
        keys = [rows.keys, rows.keys]
    else:
        keys, note = [read_named(path), rows.keys.named(rows.rows.text["file"].tolist())], BY_NAME
    of_run, here = common_codes(keys)
    # By place first: a pair of image and prompt may stand there twice, on two sides.
    is_whole = np.array_equal(of_run.pair, here.pair)
    side_N = side_R if is_whole else _sides_by_pair(of_run, here, side_R)
    return RunRows(of_run=of_run, here=here, side_R=side_R, side_N=side_N, is_whole=is_whole, note=note)


def _is_cache_of(run: RunFolder, header: dict[str, Any]) -> bool:
    return all(run.config["cache"][name] == header[name] for name in ("request", "plan"))


def _sides_by_pair(of_run: Codes, here: Codes, side_R: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the side of each row (N,), of a pair that the run had on several the one that was learned from most."""
    side_of = np.full(max(of_run.pair.max(initial=0), here.pair.max(initial=0)) + 1, NEW, dtype=np.uint8)
    np.minimum.at(side_of, of_run.pair, side_R)
    return np.asarray(side_of[here.pair])


def read_sides(path: Path) -> NDArray[np.uint8]:
    """Return the side of each row of a run's table, (R,) index into SIDES.

    Raises:
        UserError: it cannot be read, or there is another word.
    """
    found = [np.empty(0, dtype=np.uint8)]
    for (sides,) in read_blocks(path, ("split",)):
        wrong = set(sides) - set(SIDES)
        if wrong:
            raise UserError(f"has a row whose split is {min(wrong)!r}", place=path, remedy="train again")
        found.append(np.array([SIDES.index(side) for side in sides], dtype=np.uint8))
    return np.concatenate(found)


def run_keys(run: RunFolder) -> RowKeys | None:
    """Return the keys of the rows of a run's table; None of an earlier release, or of rows that were changed since.

    Raises:
        UserError: the table or the keys cannot be read.
    """
    return read_keys(run.path / FILE, num_rows=len(read_sides(run.path / "predictions.csv")))


def read_named(path: Path) -> RowKeys:
    """Return the keys of the rows of a run's table by the names of images and by prompts."""
    blocks = [keys_of_names(images, prompts) for images, prompts in read_blocks(path, ("image", "prompt"))]
    columns = {
        name: np.concatenate([np.empty(0, dtype=np.uint64), *(getattr(block, name) for block in blocks)])
        for name in ("image_N", "text_N", "tokens_N")
    }
    return RowKeys(**columns, known_by=NAMES)


def seen_rows(run: RunFolder, rows: CacheRows, found: RunRows, chosen: NDArray[np.int64]) -> Seen:
    """Return what a run knows from training of some rows of a cache, (M,) of them.

    Near copies are looked for where the cache of the run is still there: it has the embeddings.
    """
    seen = shared(found, chosen)
    near, note = np.zeros(len(chosen), dtype=bool), ""
    unseen = np.unique(rows.rows.image[chosen[~seen.image_M]])
    if len(unseen) and not found.note:
        trained = read_keys(run.path / FILE, num_rows=len(found.side_R)) or rows.keys
        try:
            with open_cache(Path(run.config["cache"]["path"])) as store:
                check_request(store, rows.header["request"])
                copies = _near_trained(store, rows, unseen, trained.image_N[found.is_learned])
            near = np.isin(rows.rows.image[chosen], copies) & ~seen.image_M
        except UserError as error:
            note = f"near copies of images that the run trained on were not looked for ({error.message})"
    return replace(seen, near_M=near, note=note)


def shared(found: RunRows, chosen: NDArray[np.int64]) -> Seen:
    """Return which of some rows of a cache (M,) have an image or a prompt of a row that the run trained on.

    One prompt for all rows is quality-only data: it tells nothing, so it counts as not seen.
    """
    trained = found.is_learned
    image_M = np.isin(found.here.image[chosen], found.of_run.image[trained])
    prompt_M = np.isin(found.here.prompt[chosen], found.of_run.prompt[trained])
    every = np.concatenate([found.of_run.prompt, found.here.prompt])
    return Seen(
        image_M=image_M,
        prompt_M=prompt_M & bool((every != every[:1]).any()),
        near_M=np.zeros(len(chosen), dtype=bool),
    )


def _near_trained(
    store: FeatureStore, rows: CacheRows, entries_K: NDArray[np.int64], trained_R: KeyArray
) -> NDArray[np.int64]:
    """Return those of the images `entries_K` of a cache that are near copies of images a run was trained on.

    Args:
        store: the cache of the run.
        rows: of the other cache, of the same backbone.
        entries_K: (K,) rising.
        trained_R: keys of the images that the run trained on.
    """
    trained_J = np.flatnonzero(np.isin(image_keys(store), trained_R) & (store.status() == DONE))
    num_here = len(entries_K)

    def read(places: NDArray[np.int64]) -> NDArray[np.floating]:
        here = rows.vectors(entries_K[places[places < num_here]])
        there = store.take("images", trained_J[places[places >= num_here] - num_here])
        return np.concatenate([here, there])

    pair_P2 = near_copies(read, np.arange(num_here + len(trained_J)))
    is_between = (pair_P2[:, 0] < num_here) & (pair_P2[:, 1] >= num_here)
    return np.asarray(entries_K[pair_P2[is_between, 0]])


def near_pairs(run: RunFolder) -> KeyArray:
    """Return the near copies among the images of a run's cache: keys of the content of both, (P, 2).

    Raises:
        UserError: the cache is not there any more, or is another one.
    """
    with open_cache(Path(run.config["cache"]["path"])) as store:
        check_request(store, run.config["request"])
        pair_P2 = near_copies(lambda entries: store.take("images", entries), np.flatnonzero(store.status() == DONE))
        return image_keys(store)[pair_P2]


def with_near_trained(image_M: KeyArray, learned_R: KeyArray, pair_P2: KeyArray) -> NDArray[np.bool_]:
    """Tell of images (M,), all by key, which have a near copy among those that were learned from, and are not there."""
    both_Q2 = np.concatenate([pair_P2, pair_P2[:, ::-1]])
    copies = both_Q2[np.isin(both_Q2[:, 1], learned_R), 0]
    return np.asarray(np.isin(image_M, copies) & ~np.isin(image_M, learned_R))


def split_of_run(run: RunFolder, rows: CacheRows) -> Split:
    """Return the sides that a run trained with; rows that it did not have are test.

    Rows are known by what they show and ask for, whatever files and groups are called. Of rows that are test, those
    whose image or prompt the run trained on count as a leak.
    """
    if run.is_shared:
        nothing = np.empty(0, dtype=np.int64)
        note = "whether the run was trained on rows of this cache is not known: it was shared without its own"
        test = np.arange(len(rows.rows))
        return Split(kind="all", train=nothing, val=nothing, test=test, leaks_groups=False, seeds=(), note=note)
    recorded = read_run_rows(run, rows)
    side_N = recorded.side_N
    num_new = int((side_N == len(SIDES)).sum())
    about, is_known = run.split, num_new < len(side_N)
    known = Split(
        kind=about["kind"] if is_known else "all",
        train=np.flatnonzero(side_N == SIDES.index("train")),
        val=np.flatnonzero(side_N == SIDES.index("val")),
        test=np.flatnonzero(side_N >= SIDES.index("test")),
        leaks_groups=False,
        seeds=tuple(about["seeds"]) if is_known else (),
    )
    if not num_new and recorded.is_whole:
        return replace(known, leaks_groups=about["leaks_groups"], note=about["note"])
    note = f"{num_new:,} rows are new since the training and count as test" if num_new and is_known else ""
    seen = seen_rows(run, rows, recorded, known.test)
    words = [part for part in (note, seen.words("test rows" if is_known else "rows"), recorded.note) if part]
    return replace(known, leaks_groups=seen.any(), note="; ".join(words))
