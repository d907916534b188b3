"""The sides of a run's rows: as it trained with them, or test where it did not."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.manifest import prompt_group
from deltaclip.pipeline.run.keys import name_keys, text_keys
from deltaclip.pipeline.run.predictions import BLOCK, read_blocks
from deltaclip.pipeline.scoring.splits import Split, leaks, split_rows
from deltaclip.pipeline.settings.learning import check_fractions

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.pipeline.run.folder import RunFolder
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.scoring.groups import KeyArray

SIDES = ("train", "val", "test")
NEW = len(SIDES)  # of a row that a run did not have


def split_cache(rows: CacheRows, kind: str, *, fractions: str, seed: int) -> Split:
    """Split the rows of a cache; groups that share an image, byte for byte, stay together.

    Args:
        rows: the cache.
        kind: grouped, random or column.
        fractions: `train,val,test` as text.
        seed: of the split.

    Raises:
        UserError: the fractions are no numbers, the cache has no split column, or the split is not possible.
    """
    shares = check_fractions(fractions)
    column = rows.rows.text["split"] if kind == "column" else None
    if column is not None and not column.some():
        remedy = "add one to the manifest and extract again, or give --split grouped"
        raise UserError("has no split column", place=rows.path, remedy=remedy)
    groups = name_keys(rows.rows.text["group"])[joined_groups(rows)]
    split = split_rows(kind, groups=groups, seed=seed, fractions=shares, column=None if column is None else column[:])
    return _with_leaks(split, rows)


def split_of_run(run: RunFolder, rows: CacheRows) -> Split:
    """Return the sides that a run trained with; rows that it did not have are test.

    Rows are known by image and prompt. In another cache every row is test, and those whose prompt the run trained
    on count as a leak. Prompts are compared, not groups: a group may be a number that means something else there.
    """
    path = run.path / "predictions.csv"
    side_N = _sides_by_place(path, rows)
    if side_N is None:
        side_N = _sides_by_pair(path, rows)
    num_new = int((side_N == NEW).sum())
    if num_new == len(side_N):
        return _all_test(path, rows)
    about = run.split
    known = Split(
        kind=about["kind"],
        train=np.flatnonzero(side_N == SIDES.index("train")),
        val=np.flatnonzero(side_N == SIDES.index("val")),
        test=np.flatnonzero((side_N == SIDES.index("test")) | (side_N == NEW)),
        leaks_groups=False,
        seeds=tuple(about["seeds"]),
        note=f"{num_new:,} rows are new since the training and count as test" if num_new else about["note"],
    )
    return _with_leaks(known, rows) if num_new else replace(known, leaks_groups=about["leaks_groups"])


def _sides_by_place(path: Path, rows: CacheRows) -> NDArray[np.uint8] | None:
    """Return the side of each row, (N,) index into SIDES, where the run recorded these rows in this order, else None.

    By place first: a pair of image and prompt may stand there twice, on two sides.
    """
    files, prompts, done = rows.rows.text["file"], rows.rows.text["prompt"], 0
    side_N = np.empty(len(rows.rows), dtype=np.uint8)
    for images, texts, sides in read_blocks(path, ("image", "prompt", "split")):
        block = slice(done, done + len(images))
        if files[block].tolist() != images or prompts[block].tolist() != texts:
            return None
        side_N[block] = _side_codes(sides, path)
        done = block.stop
    return side_N if done == len(side_N) else None


def _sides_by_pair(path: Path, rows: CacheRows) -> NDArray[np.uint8]:
    """Return the side of each row by its image and prompt, NEW where the run did not have that pair."""
    keys, sides = [_pair_keys([], [])], [np.empty(0, dtype=np.uint8)]
    for images, texts, found in read_blocks(path, ("image", "prompt", "split")):
        keys.append(_pair_keys(images, texts))
        sides.append(_side_codes(found, path))
    key_R, side_R = np.concatenate(keys), np.concatenate(sides)
    order = np.argsort(key_R, kind="stable")
    key_R, side_R = key_R[order], side_R[order]
    files, prompts = rows.rows.text["file"], rows.rows.text["prompt"]
    side_N = np.full(len(rows.rows), NEW, dtype=np.uint8)
    for start in range(0, len(side_N) if len(key_R) else 0, BLOCK):
        block = slice(start, start + BLOCK)
        key_B = _pair_keys(files[block].tolist(), prompts[block].tolist())
        place_B = np.maximum(np.searchsorted(key_R, key_B, side="right") - 1, 0)  # of a pair twice, the later one
        side_N[block] = np.where(key_R[place_B] == key_B, side_R[place_B], NEW)
    return side_N


def _side_codes(sides: list[str], path: Path) -> NDArray[np.uint8]:
    wrong = set(sides) - set(SIDES)
    if wrong:
        raise UserError(f"has a row whose split is {min(wrong)!r}", place=path, remedy="train again")
    return np.array([SIDES.index(side) for side in sides], dtype=np.uint8)


def _pair_keys(images: list[str], prompts: list[str]) -> KeyArray:
    """Return 64 bits of each pair, (B,) uint64: by chance, two of 10 million pairs are one in one of 300,000 runs."""
    digests = [
        hashlib.blake2b(f"{len(image)}:{image}{prompt}".encode(), digest_size=8).digest()
        for image, prompt in zip(images, prompts, strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _all_test(path: Path, rows: CacheRows) -> Split:
    trained = [np.empty(0, dtype=np.uint64)]
    for texts, sides in read_blocks(path, ("prompt", "split")):
        used = {prompt_group(text) for text, side in zip(texts, sides, strict=True) if side != "test"}
        trained.append(text_keys(sorted(used)) if used else trained[0])
    prompts = rows.rows.text["prompt"]
    is_seen_K = np.isin(name_keys(prompts, prompt_group), np.unique(np.concatenate(trained)))
    seen = is_seen_K[prompts.codes]
    none = np.empty(0, dtype=np.int64)
    return Split(
        kind="all",
        train=none,
        val=none,
        test=np.arange(len(seen), dtype=np.int64),
        leaks_groups=bool(seen.any()),
        seeds=(),
        note=f"{int(seen.sum()):,} rows have a prompt that the run trained on" if seen.any() else "",
    )


def joined_groups(rows: CacheRows) -> NDArray[np.int64]:
    """Return the group of each row, (N,) int64 codes into the names of groups, where those that share an image are one.

    A joined group has the first of its names, so that nothing depends on the order of rows.
    """
    column, image_N = rows.rows.text["group"], rows.rows.image
    code_N = column.codes.astype(np.int64)
    shared_N = np.flatnonzero((np.bincount(image_N) > 1)[image_N])
    pairs = np.unique(np.stack([image_N[shared_N], code_N[shared_N] + 1], axis=1), axis=0)  # the empty name is 0 here
    repeated = np.flatnonzero(np.diff(pairs[:, 0]) == 0)  # the same image in two groups
    if repeated.size == 0:
        return code_N
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_names = len(column.names) + 1
    edges = (np.ones(len(repeated)), (pairs[repeated, 1], pairs[repeated + 1, 1]))
    _, component_G = connected_components(coo_array(edges, shape=(num_names, num_names)), directed=False)
    _, first_G = np.unique(component_G, return_index=True)
    return np.asarray(first_G[component_G][code_N + 1] - 1, dtype=np.int64)


def _with_leaks(split: Split, rows: CacheRows) -> Split:
    """Add what the rows themselves say: a prompt or an image on two sides is a leak, whatever the groups are."""
    side_N = np.zeros(len(rows.rows), dtype=np.int64)
    side_N[split.val], side_N[split.test] = 1, 2
    prompts = rows.rows.text["prompt"]
    prompt_N = np.unique(name_keys(prompts, prompt_group), return_inverse=True)[1][prompts.codes]
    notes = [split.note] if split.note else []
    # One prompt for all rows is quality-only data: it tells nothing, so it cannot leak.
    is_one = bool((prompt_N == prompt_N[:1]).all())
    found = {"prompt": not is_one and leaks(side_N, prompt_N), "image": leaks(side_N, rows.rows.image)}
    for what, code_N in (("prompt", prompt_N), ("image", rows.rows.image)):
        if found[what]:
            is_trained = np.zeros(int(code_N.max()) + 1, dtype=bool)
            is_trained[code_N[side_N < 2]] = True
            count, article = int(is_trained[code_N[split.test]].sum()), "an" if what == "image" else "a"
            notes.append(f"{count:,} test rows have {article} {what} of another side")
    leaky = split.leaks_groups or any(found.values())
    return replace(split, leaks_groups=leaky, note="; ".join(notes))
