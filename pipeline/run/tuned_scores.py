"""Scores of a run that changed its backbone, on the rows of a cache whose embeddings its heads do not know.

The rows of its own cache keep the scores that it recorded where these are right, all others are scored from their image
files. Knows runs,
caches and the scorer. Must not know metrics.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.targets import LABELS
from deltaclip.features.backbone.batches import spread
from deltaclip.pipeline.run.pairing import pair
from deltaclip.pipeline.run.predictions import Scores, read_predictions
from deltaclip.pipeline.run.scorer import Scorer
from deltaclip.pipeline.run.tower_sides import image_files

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.pipeline.run.folder import RunFolder
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.run.tower_sides import ImageFiles

COLUMNS = tuple(Scores.__dataclass_fields__)
CLOSE = 2e-3  # how far a recorded score may be from what the run gives now
RECORDED, ANEW = "the scores that the run recorded", "scored from the images with the run's own tower"


SCORED_AT_ONCE = 64  # images


class TunedScores(NamedTuple):
    """Scores of the rows, and where they come from, in words."""

    scores: Scores
    origin: str


def tuned_scores(
    run: RunFolder, rows: CacheRows, *, image_root: Path | None, backbone: str | None, pretrained: str | None
) -> TunedScores:
    """Return the scores of all rows of a cache.

    Those that the run recorded are taken where a few of them, scored anew from their images, are the same; also where
    images or backbone are not there, which is said.

    Args:
        run: made by `finetune`.
        rows: of a cache of the backbone that the run started from.
        image_root: where the images lie; None takes the folder that the cache recorded.
        backbone: where the backbone lies now, if it has moved.
        pretrained: where its checkpoint lies now, if it has moved.

    Raises:
        UserError: an image that has to be scored is missing or cannot be read; the backbone is not the run's.
    """
    stored = _stored(run, rows)
    try:
        found = image_files(rows, image_root, allow_outside=False)
        scorer = Scorer.load(run.path, backbone=backbone, pretrained=pretrained)
    except UserError as error:
        if stored is None or image_root or backbone or pretrained:
            raise
        return TunedScores(stored, f"{RECORDED}, not checked ({error})")
    if stored is None:
        return TunedScores(score_images(scorer, rows, found, np.arange(len(rows.rows))), ANEW)
    few = np.array(spread(len(rows.rows)))
    apart = _apart(stored, score_images(scorer, rows, found, few), few)
    if apart < CLOSE:
        return TunedScores(stored, f"{RECORDED}; {len(few)} of them, scored anew, differ by at most {apart:.1g}")
    everything = np.arange(len(rows.rows))
    anew = score_images(scorer, rows, found, everything)
    apart = _apart(stored, anew, everything)
    return TunedScores(anew, f"{ANEW}; those that the run recorded differ by up to {apart:.2g}")


def score_images(scorer: Scorer, rows: CacheRows, found: ImageFiles, chosen: NDArray[np.int64]) -> Scores:
    """Score some rows from their image files.

    Raises:
        UserError: one of the files cannot be read.
    """
    paths = [found.files[entry].path for entry in rows.rows.image[chosen].tolist()]
    prompts = [str(prompt) for prompt in rows.rows.text["prompt"][chosen]]
    scored = scorer.score_pairs(replace(pair(paths, None), prompts=prompts), root=found.root, batch_size=SCORED_AT_ONCE)
    if scored.failed:
        row, reason = next(iter(scored.failed.items()))
        raise UserError(reason, place=paths[row], remedy="give the images as they were extracted")
    return scored.scores


def _apart(stored: Scores, anew: Scores, chosen: NDArray[np.int64]) -> float:
    """Return the largest difference of a score; heads that were not trained have none."""
    differences = [np.abs(stored.of(label)[chosen] - anew.of(label)) for label in LABELS]
    return float(np.nan_to_num(np.concatenate(differences)).max())


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
