"""The sides of a run's rows: as it trained with them, or test where it did not. Spec section 5."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.manifest import prompt_group
from deltaclip.pipeline.run.predictions import read_predictions
from deltaclip.pipeline.scoring.splits import Split, leaks, split_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltaclip.pipeline.run.folder import RunFolder
    from deltaclip.pipeline.run.rows import CacheRows


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
    try:
        shares = tuple(float(part) for part in fractions.split(","))
    except ValueError:
        remedy = "give train,val,test such as 0.7,0.1,0.2"
        raise UserError(f"{fractions!r} are no numbers", place="--fractions", remedy=remedy) from None
    column = rows.rows.text["split"] if kind == "column" else None
    if column is not None and not any(column):
        remedy = "add one to the manifest and extract again, or give --split grouped"
        raise UserError("has no split column", place=rows.path, remedy=remedy)
    split = split_rows(kind, groups=joined_groups(rows), seed=seed, fractions=shares, column=column)
    return _with_leaks(split, rows)


def split_of_run(run: RunFolder, rows: CacheRows) -> Split:
    """Return the sides that a run trained with; rows that it did not have are test.

    Rows are known by image and prompt. In another cache every row is test, and those whose prompt the run trained
    on count as a leak. Prompts are compared, not groups: a group may be a number that means something else there.
    """
    recorded = read_predictions(run.path / "predictions.csv", ("image", "prompt", "split"))
    pairs = list(zip(rows.rows.text["file"], rows.rows.text["prompt"], strict=True))
    if pairs == [(row["image"], row["prompt"]) for row in recorded]:
        sides = [row["split"] for row in recorded]  # by place: a pair may stand there twice, on two sides
    else:
        side_of = {(row["image"], row["prompt"]): row["split"] for row in recorded}
        sides = [side_of.get(pair, "new") for pair in pairs]
    side = np.array(sides)
    num_new = int((side == "new").sum())
    if num_new == len(side):
        return _all_test(recorded, rows)
    about = run.split
    known = Split(
        kind=about["kind"],
        train=np.flatnonzero(side == "train"),
        val=np.flatnonzero(side == "val"),
        test=np.flatnonzero((side == "test") | (side == "new")),
        leaks_groups=False,
        seeds=tuple(about["seeds"]),
        note=f"{num_new:,} rows are new since the training and count as test" if num_new else about["note"],
    )
    return _with_leaks(known, rows) if num_new else replace(known, leaks_groups=about["leaks_groups"])


def _all_test(recorded: list[dict[str, str]], rows: CacheRows) -> Split:
    trained = {prompt_group(row["prompt"]) for row in recorded if row["split"] != "test"}
    seen = np.array([prompt_group(prompt) in trained for prompt in rows.rows.text["prompt"]])
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


def joined_groups(rows: CacheRows) -> NDArray[np.str_]:
    """Return the group of each row, (N,) str, where groups with an image in common are one."""
    names, group_N = np.unique(rows.rows.text["group"].astype(str), return_inverse=True)
    pairs = np.unique(np.stack([rows.rows.image, group_N], axis=1), axis=0)
    repeated = np.flatnonzero(np.diff(pairs[:, 0]) == 0)  # the same image in two groups
    if repeated.size == 0:
        return np.asarray(names[group_N])
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = (np.ones(len(repeated)), (pairs[repeated, 1], pairs[repeated + 1, 1]))
    _, component_G = connected_components(coo_array(edges, shape=(len(names), len(names))), directed=False)
    # Named after its first group, so that the split depends on names and not on the order of rows.
    _, first_G = np.unique(component_G, return_index=True)
    joined: NDArray[np.str_] = names[first_G[component_G]][group_N]
    return joined


def _with_leaks(split: Split, rows: CacheRows) -> Split:
    """Add what the rows themselves say: a prompt or an image on two sides is a leak, whatever the groups are."""
    side_N = np.zeros(len(rows.rows), dtype=np.int64)
    side_N[split.val], side_N[split.test] = 1, 2
    texts, text_N = np.unique(rows.rows.prompt, return_inverse=True)
    first_row = dict(zip(rows.rows.prompt.tolist(), range(len(rows.rows)), strict=True))
    prompts = [prompt_group(str(rows.rows.text["prompt"][first_row[text]])) for text in texts.tolist()]
    prompt_N = np.unique(prompts, return_inverse=True)[1][text_N]
    notes = [split.note] if split.note else []
    # One prompt for all rows is quality-only data: it tells nothing, so it cannot leak.
    found = {"prompt": len(set(prompts)) > 1 and leaks(side_N, prompt_N), "image": leaks(side_N, rows.rows.image)}
    for what, code_N in (("prompt", prompt_N), ("image", rows.rows.image)):
        if found[what]:
            trained = np.isin(code_N[split.test], code_N[np.concatenate([split.train, split.val])])
            article = "an" if what == "image" else "a"
            notes.append(f"{int(trained.sum()):,} test rows have {article} {what} of another side")
    leaky = split.leaks_groups or any(found.values())
    return replace(split, leaks_groups=leaky, note="; ".join(notes))
