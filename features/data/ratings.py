"""Ratings of single people: several rows of one image and prompt become one row, with mean, SD and how well they agree.

Agreement is what two halves of the raters have in common, stepped up to all of them (Spearman 1910, Brown 1910); its
square root bounds the correlation of any scorer with their means. Knows manifests. Must not know tables or files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deltaclip.features.data.manifest import Manifest

Raters = Literal["mean", "zscore"]
SPLITS = 50  # into halves, drawn anew each time; the mean of so many moves by less than .005
FEWEST_IMAGES = 10  # with two ratings or more: of fewer, agreement is chance
FEWEST_RATINGS = 3  # of a person, for a mean and SD of their own
SHARED = 0.8  # of all raters rated an image: then halves are of people, and what is peculiar to one is in all means
SCALE_RATINGS = 5  # of a person, to tell which scale they used


def average_ratings(manifest: Manifest, raters: Sequence[str] | None, *, how: Raters = "mean") -> Manifest:
    """Return a manifest with one row for each image and prompt, its labels the means of all ratings.

    Args:
        manifest: N rows, each a rating where an image and prompt have several.
        raters: who gave each, N names, '' where unknown; None where nobody says.
        how: "zscore" first brings the ratings of each person to the mean and SD of all (as ITU-R BT.500 does), so that
            it does not matter who rated what.

    Raises:
        UserError: "zscore" without names, or people who rated on different scales in one column.
    """
    if how == "zscore" and (raters is None or not any(raters)):
        raise UserError("zscore needs to know who rated", place="--raters", remedy="add a column rater, or take mean")
    names = [target.name for target in manifest.targets]
    if raters is not None and any(raters):
        _refuse_two_scales(manifest, raters)
    item_N, first_rows = _items(manifest)
    several = len(first_rows) < len(manifest)
    if not names or not (several or how == "zscore"):
        return manifest
    if raters is None and any(~np.isnan(manifest.labels[f"{name}_std"]).all() for name in names):
        return manifest  # means already, each with its SD
    rater_N = _codes(raters) if raters is not None else None
    notes, labels, agreement = list[str](), dict(manifest.labels), dict[str, dict[str, Any]]()
    is_copied = rater_N is None and _all_equal(manifest, item_N, len(first_rows))
    for name in names:
        value_N = manifest.labels[name]
        if how == "zscore" and rater_N is not None:
            value_N, said = _on_one_scale(value_N, rater_N)
            notes += [f"{name}: {words}" for words in said]
        labels[name], labels[f"{name}_std"] = _moments(value_N, item_N, len(first_rows), with_sd=not is_copied)
        found = None if is_copied else agreement_of(value_N, item_N, rater_N)
        if found is not None:
            agreement[name] = found
            notes.append(f"{name}: {agreement_words(found)}")
    explanations = _first_said(manifest.explanations, item_N, len(first_rows))
    kept = replace(manifest.selected(np.array(first_rows, dtype=np.int64)), labels=labels, explanations=explanations)
    said = _count_words(item_N, rater_N, is_copied=is_copied)
    return replace(kept, notes=(*kept.notes, *said, *notes), agreement=agreement)


def agreement_words(found: dict[str, Any]) -> str:
    """Say how well raters agree, and what follows for scorers."""
    return (
        f"halves of the raters agree {found['split_half']:.3f}, all of them {found['reliability']:.3f} "
        f"(split-half, Spearman-Brown); no scorer can correlate with their means by more than {found['ceiling']:.3f}"
    )


def _items(manifest: Manifest) -> tuple[NDArray[np.int64], list[int]]:
    """Return the number of the image and prompt of each row, in order of appearance, and the first row of each."""
    columns = (manifest.images, manifest.prompts, manifest.groups, manifest.sources, manifest.splits)
    numbers: dict[tuple[str, ...], int] = {}
    item_N, first_rows = np.empty(len(manifest), dtype=np.int64), list[int]()
    for row, key in enumerate(zip(*columns, strict=True)):
        item_N[row] = number = numbers.setdefault(key, len(numbers))
        if number == len(first_rows):
            first_rows.append(row)
    return item_N, first_rows


def _codes(raters: Sequence[str]) -> NDArray[np.int64]:
    """Return a number for each rater; every row without a name is of somebody else."""
    known: dict[str, int] = {}
    codes = [known.setdefault(name or f"\0{row}", len(known)) for row, name in enumerate(raters)]
    return np.array(codes, dtype=np.int64)


def _all_equal(manifest: Manifest, item_N: NDArray[np.int64], num_items: int) -> bool:
    """Tell whether rows of one image and prompt are mere repetitions, with the same labels."""
    for target in manifest.targets:
        value_N = np.nan_to_num(manifest.labels[target.name], nan=-1.0)
        low, high = np.full(num_items, np.inf), np.full(num_items, -np.inf)
        np.minimum.at(low, item_N, value_N)
        np.maximum.at(high, item_N, value_N)
        if (low != high).any():
            return False
    return True


def _moments(
    value_N: NDArray[np.float64], item_N: NDArray[np.int64], num_items: int, *, with_sd: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and sample SD (n - 1) of the ratings of each item, (M,) each; NaN without ratings, SD of one."""
    known = ~np.isnan(value_N)
    items, values = item_N[known], value_N[known]
    count = np.bincount(items, minlength=num_items)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(items, values, num_items) / count
        squares = np.bincount(items, (values - mean[items]) ** 2, num_items)
        sd = np.sqrt(squares / (count - 1))
    sd[count < 2] = np.nan
    return mean, sd if with_sd else np.full(num_items, np.nan)


def _first_said(texts: Sequence[str], item_N: NDArray[np.int64], num_items: int) -> list[str]:
    found = [""] * num_items
    for text, item in zip(texts, item_N.tolist(), strict=True):
        found[item] = found[item] or text
    return found


def _count_words(item_N: NDArray[np.int64], rater_N: NDArray[np.int64] | None, *, is_copied: bool) -> list[str]:
    counts = np.bincount(item_N)
    if is_copied:
        return [f"{len(item_N) - len(counts):,} rows repeat an image and prompt with the same labels: each counts once"]
    who = "" if rater_N is None else f" by {len(np.unique(rater_N)):,} raters"
    span = f"{counts.min():,} to {counts.max():,}" if counts.min() < counts.max() else f"{counts.min():,}"
    words = [
        f"{len(item_N):,} ratings of {len(counts):,} images with their prompts{who}, {span} each: "
        "labels are their means, with the SDs of those that have several"
    ]
    if rater_N is not None:
        again = len(item_N) - len(np.unique(np.stack([item_N, rater_N]), axis=1).T)
        words += [f"{again:,} ratings are of somebody who had rated the same image: all count"] if again else []
    return words


# ---- One scale for all raters


def _refuse_two_scales(manifest: Manifest, raters: Sequence[str]) -> None:
    """Refuse a column in which some people used 1 to 5 and others 0 to 100, where no range was given."""
    code_N = _codes(raters)
    for name, known in manifest.label_ranges.items():
        if known.how != "detected" or known.hi < 10:
            continue
        raw_N = manifest.labels[name] * (known.hi - known.lo) + known.lo
        spans: list[tuple[float, float, str]] = []
        for code in np.unique(code_N):
            of_one = raw_N[(code_N == code) & ~np.isnan(raw_N)]
            if len(of_one) >= SCALE_RATINGS:
                first = raters[int(np.flatnonzero(code_N == code)[0])]
                spans.append((float(of_one.max()), float(np.median(of_one)), first))
        if not spans:
            continue
        small, large = min(spans), max(spans, key=lambda span: span[1])
        if small[0] <= 5 and large[1] > 10:
            message = (
                f"{small[2]!r} rated {name} up to {small[0]:g}, {large[2]!r} around {large[1]:g}: two scales in one"
            )
            remedy = f"bring the column to one scale, or give --label-range {name}=LO,HI if all used that"
            raise UserError(message, place=manifest.path, remedy=remedy)


def _on_one_scale(value_N: NDArray[np.float64], rater_N: NDArray[np.int64]) -> tuple[NDArray[np.float64], list[str]]:
    """Bring the ratings of each rater to the mean and SD of all, in [0, 1].

    z = (x - mean of the rater) / SD of the rater; then back to x = mean + z * SD, of all ratings. Of somebody with few
    ratings, or all the same, nothing is known but that: they stay as they are.
    """
    known = ~np.isnan(value_N)
    count = np.bincount(rater_N[known], minlength=rater_N.max() + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(rater_N[known], value_N[known], len(count)) / count
        squares = np.bincount(rater_N[known], (value_N[known] - mean[rater_N[known]]) ** 2, len(count))
        sd = np.sqrt(squares / (count - 1))
    usable = (count >= FEWEST_RATINGS) & (sd > 0)
    scaled = known & usable[rater_N]
    found = value_N.copy()
    if scaled.any():
        total_mean, total_sd = float(value_N[scaled].mean()), float(value_N[scaled].std(ddof=1))
        found[scaled] = total_mean + (value_N[scaled] - mean[rater_N[scaled]]) / sd[rater_N[scaled]] * total_sd
    clipped = int(((found < 0) | (found > 1)).sum())
    notes = [f"ratings of {int(usable.sum()):,} raters brought to one mean and SD"]
    if left := int(((count > 0) & ~usable).sum()):
        notes.append(f"{left:,} raters with under {FEWEST_RATINGS} ratings, or the same always, are left as they are")
    if clipped:
        notes.append(f"{clipped:,} ratings would lie outside the range and are put at its end")
    return np.clip(found, 0, 1), notes


# ---- How well raters agree


def agreement_of(
    value_N: NDArray[np.float64], item_N: NDArray[np.int64], rater_N: NDArray[np.int64] | None
) -> dict[str, Any] | None:
    """Return how well two halves of the ratings agree, None where images with several are too few.

    Halves are of people where nearly all rated every image: what is peculiar to one of them then is in every mean and
    disturbs no ranking. Else each image's ratings are halved by themselves, and it counts as noise, which it is.

    Args:
        value_N: ratings, (N,), NaN where there is none.
        item_N: of which image and prompt each is, (N,).
        rater_N: who gave it, (N,); None where nobody says.

    Returns:
        `ratings` per image on average, `split_half`: Pearson's r of the means of two halves, mean of random splits,
        `reliability` 2r / (1 + r) of the mean of all, and `ceiling`, its square root.
    """
    known = ~np.isnan(value_N)
    items, counts = np.unique(item_N[known], return_counts=True)
    items = items[counts >= 2]
    if len(items) < FEWEST_IMAGES:
        return None
    chosen = known & np.isin(item_N, items)
    item, value = np.searchsorted(items, item_N[chosen]), value_N[chosen]
    rater = None if rater_N is None else np.unique(rater_N[chosen], return_inverse=True)[1]
    by_people = rater is not None and len(value) >= SHARED * len(items) * (rater.max() + 1)
    random, found = np.random.default_rng(0), list[float]()
    for _ in range(SPLITS):
        half = _people_halved(rater, random) if by_people and rater is not None else _items_halved(item, random)
        r = _correlation(item, value, half, num_items=len(items))
        if r is not None:
            found.append(r)
    if not found:
        return None
    r = float(np.mean(found))
    reliability = max(0.0, 2 * r / (1 + r)) if r > -1 else 0.0
    return {
        "ratings": round(float(len(value) / len(items)), 3),
        "raters": None if rater is None else int(rater.max() + 1),
        "split_half": round(r, 4),
        "reliability": round(reliability, 4),
        "ceiling": round(float(np.sqrt(reliability)), 4),
    }


def _people_halved(rater: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    order = random.permutation(rater.max() + 1)
    return np.asarray(order[rater] % 2)


def _items_halved(item: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    """Return 0 or 1 for each rating, so that each image has as many of either, or one more at random."""
    order = np.lexsort([random.random(len(item)), item])
    starts = np.searchsorted(item[order], np.arange(item.max() + 1))
    place = np.empty(len(item), dtype=np.int64)
    place[order] = np.arange(len(item)) - starts[item[order]]
    return np.asarray((place + random.integers(0, 2, item.max() + 1)[item]) % 2)


def _correlation(
    item: NDArray[np.int64], value: NDArray[np.float64], half: NDArray[np.int64], *, num_items: int
) -> float | None:
    sums = [np.bincount(item[half == side], value[half == side], num_items) for side in (0, 1)]
    counts = [np.bincount(item[half == side], minlength=num_items) for side in (0, 1)]
    both = (counts[0] > 0) & (counts[1] > 0)
    means = [total[both] / count[both] for total, count in zip(sums, counts, strict=True)]
    if both.sum() < 3 or min(mean.std() for mean in means) == 0:
        return None
    return float(np.corrcoef(means[0], means[1])[0, 1])
