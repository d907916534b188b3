"""Which rows train, choose and test: grouped by default, and honest about leaks.

Whole groups are dealt so that each side gets its share of the rows. How large a group is must not decide its side:
prompts with few images are other prompts than those with many. Filling a side to the last row with whatever fits gave
groups of up to two rows to the test side with a chance of .52, others with .18. So sizes are gone through from the
largest, and of each as many groups are taken as rows are wanted among those that are left; which ones, their shuffled
order says. Must not know labels, files or heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.vocabulary import side_of
from deltaclip.pipeline.scoring.groups import group_keys, mix

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deltaclip.pipeline.scoring.agreement import FloatArray, IntArray
    from deltaclip.pipeline.scoring.groups import KeyArray


# ---- Deals whole groups to train, validation and test, so that each gets its share of the rows


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


# ---- Which rows train, choose and test: grouped by default, and honest about leaks


SplitKind = Literal["grouped", "random", "column"]

# Train, validation, test. Train and validation together are 80 %: published results on AGIQA-3K test on 20 %,
# and 10 % is enough to choose an epoch.
FRACTIONS = (0.7, 0.1, 0.2)
NUMBERS = {"train": TRAIN, "val": VAL, "test": TEST}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Sorted row indices (int64) of the three sides; every row is on exactly one.

    `leaks_groups` is found in the rows themselves: some group has rows on two sides. `note` tells what was
    done beyond what was asked.
    """

    kind: str
    train: IntArray
    val: IntArray
    test: IntArray
    leaks_groups: bool
    seeds: tuple[int, ...]
    note: str = ""

    def to_json(self) -> dict[str, object]:
        """Return kind, leak, seeds and row counts, the shape of `split` in metrics.json."""
        rows = {"train": self.train.size, "val": self.val.size, "test": self.test.size}
        return {
            "kind": self.kind,
            "leaks_groups": self.leaks_groups,
            "seeds": list(self.seeds),
            "rows": rows,
            "note": self.note,
        }


def split_rows(
    kind: str,
    *,
    groups: npt.ArrayLike,
    seed: int,
    fractions: Sequence[float] = FRACTIONS,
    column: npt.ArrayLike | None = None,
) -> Split:
    """Split rows into train, validation and test.

    `grouped` orders groups by a hash of value and seed and deals whole groups until each side has its share
    of the rows, so that neither labels nor the order of rows matter; `random` shuffles rows, so their order
    does; `column` takes the sides from `column` and cuts a missing validation side from train by groups.

    Args:
        kind: grouped, random or column.
        groups: (N,) strings or integers, the group (prompt) of each row.
        seed: any integer of at least 0.
        fractions: shares of train, val, test in [0, 1] that sum to 1; val and test may be 0, train not.
        column: (N,) strings train/val/test in any case, or validation, valid, dev, training, testing.

    Raises:
        UserError: unknown kind or column value, fractions that do not fit, too few rows or groups.
    """
    shares = _checked_fractions(fractions)
    keys_G, code_N, sizes_G = np.unique(group_keys(groups), return_inverse=True, return_counts=True)
    note = ""
    if kind == "grouped":
        side_N = deal(keys_G, sizes_G, shares, seed=seed)[code_N]
    elif kind == "random":
        side_N = _shuffle(code_N.size, shares, seed=seed)
    elif kind == "column":
        side_N = _read_column(column, num_rows=code_N.size)
        if shares[VAL] and not (side_N == VAL).any():
            side_N, note = _cut_val(side_N, (keys_G, code_N), shares, seed=seed)
    else:
        raise UserError(f"unknown split {kind!r}", place="--split", remedy=did_you_mean(kind, get_args(SplitKind)))
    train, val, test = (np.flatnonzero(side_N == side).astype(np.int64) for side in (TRAIN, VAL, TEST))
    leaky = leaks(side_N, code_N)
    return Split(kind=kind, train=train, val=val, test=test, leaks_groups=leaky, seeds=(seed,), note=note)


def leaks(side_N: IntArray, code_N: IntArray) -> bool:
    """Tell whether any group code has rows on more than one side (sides 0, 1, 2)."""
    seen = np.zeros((3, int(code_N.max(initial=-1)) + 1), dtype=bool)
    seen[side_N, code_N] = True
    return bool((seen.sum(axis=0) > 1).any())


def repeat_seeds(seed: int, k: int) -> tuple[int, ...]:
    """Return the k split seeds of `--repeats k`: seed, seed + 1, ..., so that any one can be run alone."""
    if k < 1:
        raise UserError(f"{k} repeats", place="--repeats", remedy="give 1 or more")
    return tuple(range(seed, seed + k))


def _checked_fractions(fractions: Sequence[float]) -> FloatArray:
    shares = np.asarray(fractions, dtype=np.float64)
    fits = shares.shape == (3,) and bool(((shares >= 0) & (shares <= 1)).all())
    if not fits or abs(float(shares.sum()) - 1) > 1e-6 or shares[TRAIN] == 0:
        shown = ",".join(f"{share:g}" for share in shares.ravel())
        raise UserError(
            f"fractions {shown} do not fit",
            place="--fractions",
            remedy="give train,val,test that sum to 1, train above 0, for example 0.7,0.1,0.2",
        )
    return shares


def _shuffle(num_rows: int, shares: FloatArray, *, seed: int) -> IntArray:
    needed = int((shares > 0).sum())
    if num_rows < needed:
        raise UserError(f"{num_rows} rows cannot fill {needed} sides", place="--split random", remedy="add rows")
    counts = [0, 0, 0]
    for side in (TEST, VAL):
        if shares[side]:
            needed -= 1  # the sides still to come keep a row each
            most = num_rows - sum(counts) - needed
            counts[side] = min(max(1, round(float(shares[side]) * num_rows)), most)
    counts[TRAIN] = num_rows - sum(counts)
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(3), counts))


def _read_column(column: npt.ArrayLike | None, *, num_rows: int) -> IntArray:
    """Return each row's side, as the column says."""
    if column is None:
        raise UserError(
            "the data has no split column", place="--split column", remedy="add one, or use --split grouped"
        )
    value_N = np.asarray(column)
    _, first, inverse = np.unique(group_keys(value_N, name="split"), return_index=True, return_inverse=True)
    if inverse.size != num_rows:
        message = f"{inverse.size} split values for {num_rows} rows"
        raise ValueError(message)
    side_of_value = np.empty(first.size, dtype=np.int64)
    for place in np.argsort(first):
        value = str(value_N[first[place]])
        side = side_of(value)
        if side is None:
            raise UserError(
                f"unknown split {value!r} in row {first[place] + 1}",
                place="--split column",
                remedy=did_you_mean(value, ("train", "val", "test")),
            )
        side_of_value[place] = NUMBERS[side]
    for name in ("train", "test"):
        if NUMBERS[name] not in side_of_value:
            raise UserError(
                f"no row is marked {name}", place="--split column", remedy="mark some, or use --split grouped"
            )
    return side_of_value[inverse]


def _cut_val(
    side_N: IntArray, groups: tuple[KeyArray, IntArray], shares: FloatArray, *, seed: int
) -> tuple[IntArray, str]:
    """Move whole groups from train to validation; `groups` is (unique keys (G,), code of each row (N,))."""
    keys_G, code_N = groups
    is_train = side_N == TRAIN
    sizes_G = np.bincount(code_N[is_train], minlength=keys_G.size)
    present = np.flatnonzero(sizes_G)
    kept = np.array([shares[TRAIN], shares[VAL], 0.0]) / (shares[TRAIN] + shares[VAL])
    side_G = np.full(keys_G.size, TRAIN, dtype=np.int64)
    side_G[present] = deal(keys_G[present], sizes_G[present], kept, seed=seed, place="--split column")
    cut_N = np.where(is_train, side_G[code_N], side_N)
    moved = int((cut_N == VAL).sum())
    note = (
        f"no row is marked val: {moved} of {int(is_train.sum())} train rows, in whole groups, "
        f"became validation with seed {seed}"
    )
    return cut_N, note
