"""Several caches of the same rows, by other backbones: their views stand beside those of the first.

Knows caches. Must not know heads. Rows are found in another cache by what they show and ask for, never by name.

Shapes: N rows of the first cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.rows.cached_rows import Beside, common_codes, load_rows, views_there

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaclip.pipeline.rows.cached_rows import CacheRows


def with_caches_beside(rows: CacheRows, paths: Sequence[Path]) -> CacheRows:
    """Return the rows with what further caches have of them, all views of these included.

    Raises:
        UserError: a cache that lacks some of the rows, or is given twice, or is by the same backbone.
    """
    found = []
    seen = [rows.header["request"]]
    for path in paths:
        other = load_rows(path, str(rows.device), views=views_there(path))
        if other.header["request"] in seen:
            raise UserError(
                "is by the same backbone as another cache that was given",
                place=path,
                remedy="give caches of the same data by different backbones, each once",
            )
        seen.append(other.header["request"])
        here, there = common_codes([rows.keys, other.keys])
        pairs, first = np.unique(there.pair, return_index=True)
        place_N = np.minimum(np.searchsorted(pairs, here.pair), len(pairs) - 1)
        missing = int((pairs[place_N] != here.pair).sum())
        if missing:
            raise UserError(
                f"lacks {missing:,} of the {len(here.pair):,} rows of {rows.path}: the same image with the same prompt",
                place=path,
                remedy="extract the same data with both backbones",
            )
        found.append(Beside(other, torch.from_numpy(first[place_N])))
    return replace(rows, others=tuple(found))
