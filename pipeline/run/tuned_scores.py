"""Scores of a run that changed its backbone, on the rows of a cache whose embeddings its heads do not know.

The rows of its own cache keep the scores that it recorded, all others are scored from their image files. Knows runs,
caches and the scorer. Must not know metrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.pipeline.run.predictions import Scores, read_predictions
from deltaclip.pipeline.run.scorer import Scorer
from deltaclip.pipeline.run.tower_sides import image_files

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.pipeline.run.folder import RunFolder
    from deltaclip.pipeline.run.rows import CacheRows

COLUMNS = tuple(Scores.__dataclass_fields__)


class TunedScores(NamedTuple):
    """Scores of the rows, and where they come from, in words."""

    scores: Scores
    origin: str


def tuned_scores(
    run: RunFolder, rows: CacheRows, *, image_root: Path | None, backbone: str | None, pretrained: str | None
) -> TunedScores:
    """Return the scores of all rows of a cache.

    Args:
        run: made by `finetune`.
        rows: of a cache of the backbone that the run started from.
        image_root: where the images lie; None takes the folder that the cache recorded.
        backbone: where the backbone lies now, if it has moved.
        pretrained: where its checkpoint lies now, if it has moved.

    Raises:
        UserError: an image that has to be scored is missing or cannot be read; the backbone is not the run's.
    """
    if (stored := _stored(run, rows)) is not None:
        return TunedScores(stored, "the scores that the run recorded")
    found = image_files(rows, image_root, allow_outside=False)
    scorer = Scorer.load(run.path, backbone=backbone, pretrained=pretrained)
    paths = [found.files[entry].path for entry in rows.rows.image.tolist()]
    scored = scorer.score(paths, [str(prompt) for prompt in rows.rows.text["prompt"]], root=found.root)
    if scored.failed:
        row, reason = next(iter(scored.failed.items()))
        raise UserError(reason, place=paths[row], remedy="give the images as they were extracted")
    return TunedScores(scored.scores, "scored from the images with the run's own tower")


def _stored(run: RunFolder, rows: CacheRows) -> Scores | None:
    """Return what the run recorded, if the cache has the very rows and images that it trained on."""
    if any(run.config["cache"][name] != rows.header[name] for name in ("request", "plan")):
        return None
    recorded = read_predictions(run.path / "predictions.csv", ("image", "prompt", *COLUMNS))
    pairs = list(zip(rows.rows.text["file"], rows.rows.text["prompt"], strict=True))
    if [(row["image"], row["prompt"]) for row in recorded] != pairs:
        return None  # the same plan, but images that could not be read at the time can be read now
    return Scores(
        **{name: np.array([float(row[name] or "nan") for row in recorded], dtype=np.float32) for name in COLUMNS}
    )
