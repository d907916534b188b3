"""Heads of a finished run to start a fine-tuning from, refused where they do not belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import sha256_file
from deltaclip.base.settings import option_name
from deltaclip.features.store.takeover import differences
from deltaclip.pipeline.run.folder import open_run
from deltaclip.pipeline.run.keys import row_keys, text_keys
from deltaclip.pipeline.run.learning import head_spec
from deltaclip.pipeline.run.predictions import read_blocks
from deltaclip.pipeline.run.seen import SIDES, read_run_rows, shared
from deltaclip.pipeline.run.tuning import heads_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from deltaclip.pipeline.model.spec import HeadSpec
    from deltaclip.pipeline.run.folder import RunFolder
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.run.seen import RunRows
    from deltaclip.pipeline.run.targets import LossWeights
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import FinetuneConfig

PLACE = "--init-heads"
# What shapes heads, by the option that asks for it; the rest of a spec is either fixed or does not outlive training.
OPTIONS = {
    "kind": "residual_learning",
    "scale_q": "residual_scale_q",
    "scale_c": "residual_scale_c",
    "scale_mode": "scale_mode",
    "two_branch": "two_branch",
    "refinement": "refinement",
    "rationale": "use_explanations",
}


@dataclass(frozen=True, kw_only=True)
class InitHeads:
    """Heads with what they are built from, and the SHA-256 of their checkpoint."""

    spec: HeadSpec
    heads: nn.Module
    fingerprint: str


def heads_of_run(config: FinetuneConfig, rows: CacheRows, splits: Sequence[Split], weights: LossWeights) -> InitHeads:
    """Return the heads of `config.init_heads`.

    Raises:
        UserError: they were trained on another backbone, or on test rows of a split; they are others than the settings
            ask for; their base is a kernel, which stands on embeddings that will change.
    """
    assert config.init_heads is not None
    run = open_run(config.init_heads)
    if run.is_tuned:
        remedy = "give a run of `deltaclip train`"
        raise UserError("its heads belong to the tower that it changed", place=run.path, remedy=remedy)
    if wrong := differences(run.config["request"], rows.header["request"]):
        remedy = "train heads on this cache first"
        raise UserError(f"was trained on another backbone: {'; '.join(wrong)}", place=run.path, remedy=remedy)
    if run.spec.kernels:
        remedy = "give a run of --base-init calibrated"
        raise UserError("its base is a kernel on embeddings that will change", place=run.path, remedy=remedy)
    wanted = head_spec(heads_config(config), rows, weights)
    for name, option in OPTIONS.items():
        there, here = getattr(run.spec, name), getattr(wanted, name)
        if there != here:
            remedy = f"give {option_name(option)} as that run had it, or train heads anew"
            raise UserError(
                f"its heads have {name} {there}, the settings ask for {here}", place=run.path, remedy=remedy
            )
    _check_rows(run, rows, splits, config.init_heads)
    return InitHeads(spec=run.spec, heads=run.heads, fingerprint=sha256_file(run.checkpoint))


def _check_rows(run: RunFolder, rows: CacheRows, splits: Sequence[Split], place: Path) -> None:
    """Refuse heads that have learned from test rows.

    In a split that leaks, these are the very rows; in one that does not, also others of the same image, prompt or
    group: it must not get a leak from the heads either.
    """
    found = read_run_rows(run, rows)
    learned = found.side_N < SIDES.index("test")
    for split in splits:
        seen, of_group = shared(found, split.test), _of_learned_groups(run, rows, found, split.test)
        leaks = learned[split.test] if split.leaks_groups else seen.image_M | seen.prompt_M | of_group
        if known := int(leaks.sum()):
            what = "test rows" if split.leaks_groups else "test rows, or others of their images, prompts or groups,"
            message = f"has seen {known:,} {what} of split seed {split.seeds[0]} in training"
            remedy = "give the --split, --fractions and seeds of that run"
            raise UserError(message, place=place, remedy=remedy)


def _of_learned_groups(run: RunFolder, rows: CacheRows, found: RunRows, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell of some rows whether the run learned from others of their group, (M,) bool.

    A group's name may mean something else there: it counts where every row that both have is of the same group in both.
    """
    blocks = read_blocks(run.path / "predictions.csv", ("group",))
    group_R = np.concatenate([np.empty(0, dtype=np.uint64), *(text_keys(groups) for (groups,) in blocks)])
    group_N = row_keys(rows.rows.text["group"])
    pair_R, first_R = np.unique(found.of_run.pair, return_index=True)
    both = np.flatnonzero(np.isin(found.here.pair, pair_R))
    same = group_R[first_R[np.searchsorted(pair_R, found.here.pair[both])]] == group_N[both]
    means_the_same = bool(both.size and same.all())
    return np.isin(group_N[chosen], group_R[found.is_learned]) & means_the_same
