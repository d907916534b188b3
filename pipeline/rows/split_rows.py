"""The sides of a run's rows: as it trained with them, or test where it did not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.store.near import near_words
from deltaclip.pipeline.rows.cached_rows import name_keys
from deltaclip.pipeline.scoring.splits import Split, leaks, split_rows
from deltaclip.pipeline.settings import check_fractions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.scoring.groups import KeyArray


FEW = 0.1  # of the images: where more have near copies, the backbone says little of them, and no groups are joined


def split_cache(rows: CacheRows, kind: str, *, fractions: str, seed: int) -> Split:
    """Split the rows of a cache; groups that share an image, or near copies of one, or a prompt, stay together.

    A prompt joins those groups alone that are made of prompts: what a group column says stays as it is.

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
    split = split_rows(
        kind, groups=row_groups(rows), seed=seed, fractions=shares, column=None if column is None else column[:]
    )
    return _with_leaks(split, rows)


def row_groups(rows: CacheRows) -> KeyArray:
    """Return the key of each row's group, (N,) uint64, as `joined_groups` finds them.

    What is drawn, left out or averaged as a whole is this, or rows that depend on each other would count as more.
    """
    return np.asarray(name_keys(rows.rows.text["group"])[joined_groups(rows)])


def joined_groups(rows: CacheRows) -> NDArray[np.int64]:
    """Return the group of each row, (N,) int64 codes into the names of groups; those that belong together are one.

    Groups are joined by an image, by near copies where these are few, and, where they are made of prompts, by a prompt.
    Pairs that people chose between join the groups of their images where that leaves no group with over a tenth of the
    rows: else they are too many to stay together, and those across sides are left out. A joined group has the first of
    its names, so that nothing depends on the order of rows.
    """
    code_N = rows.rows.text["group"].codes.astype(np.int64)
    of_prompt = np.flatnonzero(_is_of_prompt(rows))
    shared = (
        _edges(_picture_codes(rows), code_N),
        _edges(rows.prompt_codes[of_prompt], code_N[of_prompt]),
    )
    num_names = len(rows.rows.text["group"].names) + 1
    joined_N = _components(np.concatenate(shared), code_N, num_names)
    if rows.pairs is None:
        return joined_N
    paired = np.stack([code_N[rows.pairs.a_P], code_N[rows.pairs.b_P]], axis=1) + 1
    paired_N = _components(np.concatenate([*shared, paired[paired[:, 0] != paired[:, 1]]]), code_N, num_names)
    largest = int(np.unique(paired_N, return_counts=True)[1].max(initial=0))
    return paired_N if largest <= max(FEW * len(code_N), 1) else joined_N


def _components(edge_E2: NDArray[np.int64], code_N: NDArray[np.int64], num_names: int) -> NDArray[np.int64]:
    """Return the groups of rows once those that an edge joins are one, each by the first of its names."""
    if not len(edge_E2):
        return code_N
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = (np.ones(len(edge_E2), dtype=np.int8), tuple(edge_E2.T))
    _, component_G = connected_components(coo_array(edges, shape=(num_names, num_names)), directed=False)
    _, first_G = np.unique(component_G, return_index=True)
    return np.asarray(first_G[component_G][code_N + 1] - 1, dtype=np.int64)


def _edges(what_N: NDArray[np.int64], group_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return pairs (E, 2) of different groups with something in common, as places of names: the empty one is 0."""
    pairs = np.unique(np.stack([what_N, group_N + 1], axis=1), axis=0)
    repeated = np.flatnonzero(np.diff(pairs[:, 0]) == 0)
    return np.stack([pairs[repeated, 1], pairs[repeated + 1, 1]], axis=1)


def _is_of_prompt(rows: CacheRows) -> NDArray[np.bool_]:
    """Tell of each row whether its group is that of its prompt, now or in an earlier release, (N,) bool."""
    groups, prompts = rows.rows.text["group"], rows.rows.text["prompt"]
    group_N = name_keys(groups)[groups.codes]
    earlier_N = name_keys(prompts, lambda text: " ".join(text.split()).casefold())[prompts.codes]
    return np.asarray((group_N == rows.keys.text_N) | (group_N == earlier_N) | (groups.codes < 0))


def _picture_codes(rows: CacheRows) -> NDArray[np.int64]:
    """Return a code of each row's image, (N,), one for near copies where few images have some."""
    image_N = rows.rows.image
    few = len(np.unique(rows.near_copies)) <= FEW * len(np.unique(image_N))
    return _near_codes(rows) if few else image_N


def _near_codes(rows: CacheRows) -> NDArray[np.int64]:
    """Return a code of each row's image, (N,), that is one for near copies, and for copies of these."""
    image_N, pair_P2 = rows.rows.image, rows.near_copies
    if not len(pair_P2):
        return image_N
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(image_N.max()) + 1
    edges = (np.ones(len(pair_P2), dtype=np.int8), tuple(pair_P2.T))
    return np.asarray(connected_components(coo_array(edges, shape=(size, size)), directed=False)[1][image_N], np.int64)


def _with_leaks(split: Split, rows: CacheRows) -> Split:
    """Add what the rows themselves say: a prompt or an image on two sides is a leak, whatever the groups are."""
    side_N = np.zeros(len(rows.rows), dtype=np.int64)
    side_N[split.val], side_N[split.test] = 1, 2
    notes, prompt_N, image_N = [split.note] if split.note else [], rows.prompt_codes, rows.rows.image
    # One prompt for all rows is quality-only data: it tells nothing, so it cannot leak.
    codes = {"a prompt": prompt_N if (prompt_N != prompt_N[:1]).any() else None, "an image": image_N}
    codes["a near copy of an image"] = _near_codes(rows) if len(rows.near_copies) else None
    seen_N, leaky = np.zeros(len(side_N), dtype=bool), split.leaks_groups
    for what, code_N in codes.items():
        if code_N is None or not leaks(side_N, code_N):
            continue
        leaky, is_trained = True, np.zeros(int(code_N.max()) + 1, dtype=bool)
        is_trained[code_N[side_N < 2]] = True
        count = int((is_trained[code_N] & (side_N == 2) & ~(seen_N & ("near" in what))).sum())
        if what == "an image":
            seen_N = is_trained[code_N]
        if count or "near" not in what:
            notes.append(f"{count:,} test rows have {what} of another side")
    return replace(split, leaks_groups=leaky, note="; ".join([*notes, *_near_words(rows)]))


def _near_words(rows: CacheRows) -> list[str]:
    pairs = rows.near_copies
    if not len(pairs):
        return []
    _, row_of = np.unique(rows.rows.image, return_index=True)
    place_P2 = np.searchsorted(np.unique(rows.rows.image), pairs)
    files = rows.rows.text["file"][row_of[place_P2].ravel()].reshape(-1, 2)
    return [near_words([(str(first), str(second)) for first, second in files])]
