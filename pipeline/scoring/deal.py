"""Deals whole groups to train, validation and test, so that each gets its share of the rows.

Knows group keys, group sizes and shares. Must not know rows, columns or labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.pipeline.scoring.groups import mix

if TYPE_CHECKING:
    from deltaclip.pipeline.scoring.groups import KeyArray
    from deltaclip.pipeline.scoring.ranks import FloatArray, IntArray

TRAIN, VAL, TEST = 0, 1, 2


def deal(
    keys_G: KeyArray, sizes_G: IntArray, shares: FloatArray, *, seed: int, place: str = "--split grouped"
) -> IntArray:
    """Return each group's side (G,): shuffled by key and seed, dealt to test, to val, the rest to train.

    Args:
        keys_G: (G,) uint64, unique; order and membership depend on them, not on where they stand.
        sizes_G: (G,) rows of each group, at least 1.
        shares: (3,) of the rows for train, val, test; sum 1.
        seed: any integer of at least 0.
        place: the option an error names.

    Raises:
        UserError: fewer groups than sides that were asked for.
    """
    needed, num_rows = int((shares > 0).sum()), int(sizes_G.sum())
    _check_groups(sizes_G.size, num_rows, needed, place=place)
    order = np.argsort(mix(keys_G, seed=seed))
    sizes = sizes_G[order]
    target = shares * num_rows
    # Groups too big for either held-out side can only train; when the others cannot fill both sides,
    # both get less in proportion, rather than the one that is dealt first getting all.
    small = sizes[sizes <= max(target[VAL], target[TEST])].sum()
    target *= min(1.0, float(small) / max(float(target[VAL] + target[TEST]), 1e-9))
    side_G = np.full(sizes.size, TRAIN, dtype=np.int64)
    for side in (TEST, VAL):
        if shares[side]:
            needed -= 1  # the sides still to come keep a group each
            free = np.flatnonzero(side_G == TRAIN)
            side_G[free[_fill(sizes[free], float(target[side]), most=free.size - needed)]] = side
    in_key_order = np.empty_like(side_G)
    in_key_order[order] = side_G
    return in_key_order


def _check_groups(num_groups: int, num_rows: int, needed: int, *, place: str) -> None:
    if num_rows == 0 and needed:
        raise UserError(f"0 rows cannot fill {needed} sides", place=place, remedy="add rows")
    if num_groups < needed:
        many = "only one group" if num_groups == 1 else f"only {num_groups} groups"
        raise UserError(
            f"{many} in {num_rows} rows, {needed} are needed",
            place=place,
            remedy="use --split random, or name a column with more groups",
        )


def _fill(sizes_G: IntArray, target: float, *, most: int) -> IntArray:
    """Choose 1 to `most` groups, in their order, whose rows come close to the target.

    Takes groups from the front while they fit, then the next ones that fit into the gap; last the smallest
    one left, where it lands nearer to the target than the gap is. A round leaves a gap below a group's size,
    so a handful of rounds do; 100 bounds the work for sizes made to be awkward.
    """
    chosen = np.empty(0, dtype=np.int64)
    gap, fits = target, np.arange(sizes_G.size)
    for _ in range(100):
        fits = fits[sizes_G[fits] <= gap]
        take = min(int(np.searchsorted(np.cumsum(sizes_G[fits]), gap, side="right")), most - chosen.size)
        if take == 0:
            break
        chosen = np.concatenate([chosen, fits[:take]])
        gap = target - float(sizes_G[chosen].sum())
        fits = fits[take:]
    left = np.setdiff1d(np.arange(sizes_G.size), chosen)
    smallest = left[np.argmin(sizes_G[left])] if left.size and chosen.size < most else None
    if smallest is not None and (chosen.size == 0 or sizes_G[smallest] < 2 * gap):
        chosen = np.append(chosen, smallest)
    return chosen
