"""What a backbone says of pictures when nobody has rated any: its cosine, and antonym prompts.

Antonym prompts: p = sigmoid(k (v . a - v . b)) of the better words a and the worse words b, k the model's own logit
scale (Wang et al. 2023, CLIP-IQA). Knows backbones and pairs of image and prompt. Must not know runs or labels.

Shapes: N pairs, T texts, A anchor prompts, D width.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.progress import Progress
from deltaclip.features.backbone.decode_ahead import default_workers, image_batches
from deltaclip.features.backbone.encode import encode_images, text_batches
from deltaclip.features.backbone.pixels import as_batch, center_crops
from deltaclip.features.backbone.view_vectors import file_opener
from deltaclip.features.data.anchors import ANCHOR_TEXTS, PAIR_NAMES, PAIRS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.backbone.load import Backbone
    from deltaclip.pipeline.api.scorer import Pairs

COSINE, PREFIX = "cosine", "antonym_"
COLUMNS = (COSINE, *(PREFIX + name for name in PAIR_NAMES))
FIRST = PREFIX + PAIR_NAMES[0]  # of "a good picture" and "a bad picture", CLIP-IQA's own


class ZeroShot(NamedTuple):
    """Columns (N,) float32: `cosine` in [-1, 1], NaN without a prompt, and `antonym_NAME` in [0, 1].

    `failed` maps rows whose image cannot be read to the reason; all their columns are NaN.
    """

    columns: dict[str, NDArray[np.float32]]
    failed: dict[int, str]
    truncated_prompts: int


LARGEST = 10.0  # of the logarithm: CLIP keeps its scale below 100, whose logarithm is 4.6


def _scale(backbone: Backbone) -> float:
    logarithm = float(backbone.model.logit_scale.detach().float())  # type: ignore[operator]
    if not -LARGEST < logarithm < LARGEST:  # not a number, too, or the scale itself
        message = f"its logit_scale {logarithm:.4g} is no logarithm of a scale"
        raise UserError(message, place=backbone.facts["backbone"], remedy="correct it in the weights: 4.6052 is usual")
    return float(np.exp(logarithm))


def score_zero_shot(backbone: Backbone, pairs: Pairs, *, root: Path | None, batch_size: int) -> ZeroShot:
    """Score pairs of image and prompt, some of which may have no prompt, by a backbone alone.

    Args:
        backbone: loaded, with a text tower.
        pairs: as `pair` makes them.
        root: folder that files may not leave; None permits every place.
        batch_size: images per forward pass.

    Raises:
        UserError: the backbone has no text tower, or one that cannot read the antonym prompts to their ends.
    """
    if not backbone.has_text:
        remedy = "give a CLIP: an image tower alone has nothing to compare a picture with"
        raise UserError("has no text tower", place=backbone.facts["backbone"], remedy=remedy)
    texts = list(dict.fromkeys(text for text in pairs.prompts or [] if text))
    t_TD, truncated_T = _texts(backbone, [*ANCHOR_TEXTS, *texts])
    if truncated_T[: len(ANCHOR_TEXTS)].any():
        message = f"reads {backbone.context_length} tokens, too few for the antonym prompts"
        raise UserError(message, place=backbone.facts["backbone"], remedy="give another CLIP")
    anchors_AD, entry_of = t_TD[: len(ANCHOR_TEXTS)], {text: len(ANCHOR_TEXTS) + n for n, text in enumerate(texts)}
    v_SD, failed_S = _images(backbone, pairs, root=root, batch_size=batch_size)
    scale = _scale(backbone)
    entry_N = np.array(pairs.image_N)
    v_ND = v_SD[entry_N]
    cosine_N = np.full(len(entry_N), np.nan, dtype=np.float32)
    has_prompt = [row for row, text in enumerate(pairs.prompts or []) if text]
    if has_prompt:
        assert pairs.prompts is not None
        t_RD = t_TD[[entry_of[pairs.prompts[row]] for row in has_prompt]]
        cosine_N[has_prompt] = (v_ND[has_prompt] * t_RD).sum(axis=1)
    said_NA = v_ND @ anchors_AD.T
    columns = {COSINE: cosine_N}
    for number, name in enumerate(PAIR_NAMES):
        difference_N = said_NA[:, 2 * number] - said_NA[:, 2 * number + 1]
        columns[PREFIX + name] = (1 / (1 + np.exp(-scale * difference_N.astype(np.float64)))).astype(np.float32)
    failed = {row: failed_S[entry] for row, entry in enumerate(pairs.image_N) if entry in failed_S}
    for column in columns.values():
        column[list(failed)] = np.nan
    return ZeroShot(columns, failed, int(truncated_T[len(ANCHOR_TEXTS) :].sum()))


def zero_shot_words(backbone: str) -> list[str]:
    """Say what these numbers are and what they are not."""
    better, worse = PAIRS[0]
    return [
        f"no human score was seen: cosine of image and prompt in {backbone}; {FIRST}: nearer {better!r} than {worse!r}",
        f"they rank images in one backbone, on no scale of people's; --out and --json have {len(PAIRS) - 1} more pairs",
    ]


def _texts(backbone: Backbone, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    t_TD, truncated_T = np.zeros((len(texts), backbone.dim), dtype=np.float32), np.zeros(len(texts), dtype=bool)
    for batch in text_batches(backbone, texts, range(len(texts))):
        t_TD[batch.entries], truncated_T[batch.entries] = batch.found.unit_BD, batch.truncated_B
    return t_TD, truncated_T


def _images(
    backbone: Backbone, pairs: Pairs, *, root: Path | None, batch_size: int
) -> tuple[NDArray[np.float32], dict[int, str]]:
    crops = center_crops(backbone)
    v_SD, failed = np.zeros((len(pairs.sources), backbone.dim), dtype=np.float32), dict[int, str]()
    batches = image_batches(
        pairs.sources,
        lambda _source, image: crops(image),
        root=root,
        batch_size=batch_size,
        workers=default_workers(),
        open_file=file_opener(backbone),
    )
    with contextlib.closing(batches), Progress(len(pairs.sources), "scoring", unit="images") as progress:
        for batch in batches:
            failed |= dict(batch.failed)
            if batch.entries:
                v_SD[batch.entries] = encode_images(backbone, as_batch(backbone, batch.prepared)).unit_BD
            progress.advance(len(batch.entries) + len(batch.failed))
    return v_SD, failed
