"""Deals whole groups to train, validation and test, so that each gets its share of the rows.

Knows group keys, group sizes and shares. Must not know rows, columns or labels.

How large a group is must not decide its side: prompts with few images are other prompts than those with many. Filling a
side to the last row with whatever fits gave groups of up to two rows to the test side with a chance of .52, others with
.18. So sizes are gone through from the largest, and of each as many groups are taken as rows are wanted among those
that are left; which ones, their shuffled order says.
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
# How far a side may go beyond its rows, in shares of all rows and of its own: with less it is again the small groups
# that fill it up.
OVER, OVER_OWN = 0.02, 0.25


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
            rng = np.random.default_rng((seed, side))
            over = min(OVER * num_rows, OVER_OWN * float(target[side]))
            chosen = _fill(sizes[free], float(target[side]), over=over, most=free.size - needed, rng=rng)
            side_G[free[chosen]] = side
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


def _fill(sizes_G: IntArray, target: float, *, over: float, most: int, rng: np.random.Generator) -> IntArray:
    """Choose 1 to `most` groups, the first of each size, whose rows come close to the target.

    Of m groups of a size m * share are taken, share the wanted part of the rows that are left, rounded up or down at
    random so that this is the mean: then every group has the same chance, whatever its size, as share is a martingale.
    Only what is larger than the target is never taken, nor what would go beyond it by more than `over` rows. Where all
    groups are equal the number is the nearest one.
    """
    order = np.argsort(-sizes_G, kind="stable")
    order = order[sizes_G[order] <= target]
    kinds = np.split(order, 1 + np.flatnonzero(np.diff(sizes_G[order])))
    gap, left, chosen = target, float(sizes_G[order].sum()), order[:0]
    for kind in kinds if order.size else ():
        size = int(sizes_G[kind[0]])
        if len(kinds) == 1:
            count = round(gap / size - 1e-9)
        else:
            wanted = int(kind.size * min(max(gap / left, 0.0), 1.0) + rng.random())
            count = min(wanted, max(0, int((gap + over) / size)))
        count = min(count, kind.size, most - chosen.size)
        chosen = np.concatenate([chosen, kind[:count]])
        gap, left = gap - count * size, left - kind.size * size
    return chosen if chosen.size else np.array([np.argmin(sizes_G)])
