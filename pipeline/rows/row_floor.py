"""The no-image floor of rows of a cache: what their sources and prompts say without a look at an image.

Knows where a cache has labels, sources and prompts. Must not know heads or run directories.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaclip.pipeline.rows.split_rows import row_groups
from deltaclip.pipeline.scoring.floors import Floor, Prompts, no_image_floor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deltaclip.pipeline.rows.cached_rows import CacheRows


def floor_of(rows: CacheRows, label: str, *, train: NDArray[np.int64], test: NDArray[np.int64]) -> Floor:
    """Return the floor of a target, fitted on some rows of a cache and judged on others."""
    source, prompt = rows.rows.text["source"], rows.rows.text["prompt"]
    return no_image_floor(
        rows.label(label),
        groups=row_groups(rows),
        train=train,
        test=test,
        sources=source.codes if source.some() else None,
        prompts=Prompts(prompt.codes, prompt.names.take) if prompt.some() else None,
    )
