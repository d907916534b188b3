"""How well a small CLIP knows drawn scenes it was never trained on: recall@1 and zero-shot correlation.

Knows open_clip and scenes; must not know the recipe, caches or heads.
Letters: N pictures or captions, D width of the embedding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.features.backbone.tiny_batches import DRAWN_SIZE, HELD_OUT_STREAM
from deltaclip.features.scenes.captions import write_caption
from deltaclip.features.scenes.draw import draw_scene, random_scene
from deltaclip.features.scenes.render import draw_row, plan_demo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class TinyScores:
    """Share of captions that find their picture first, Spearman's rho with the label, and of how many."""

    recall_at_1: float
    num_captions: int
    zero_shot_srocc: float
    num_demo_images: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


class TinyClip:
    """A CLIP in open_clip's `local-dir:` layout, read for evaluation in fp32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        import open_clip

        name = f"local-dir:{folder}"
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(name)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return L2-normalised embeddings (N, D) of RGB pictures of any size."""
        import torch

        parts = []
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                pixels = torch.stack([self.preprocess(image) for image in images[start : start + BATCH]])
                parts.append(self.model.encode_image(pixels, normalize=True))
        return torch.cat(parts).numpy()

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return L2-normalised embeddings (N, D) of prompts."""
        import torch

        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), BATCH):
                tokens = self.tokenizer(list(texts[start : start + BATCH]))
                parts.append(self.model.encode_text(tokens, normalize=True))
        return torch.cat(parts).numpy()


def held_out_pairs(num_pairs: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Return clean pictures and captions, all different, from seeds that training never draws."""
    images: dict[str, Image.Image] = {}
    index = 0
    while len(images) < num_pairs:
        scene = random_scene([HELD_OUT_STREAM, seed, index, 1])
        text = write_caption(scene, [HELD_OUT_STREAM, seed, index, 2]).text
        if text not in images:
            images[text] = draw_scene(scene, DRAWN_SIZE)
        index += 1
    return list(images.values()), list(images)


def recall_at_1(clip: TinyClip, *, num_captions: int = 100, seed: int = 0) -> float:
    """Return the share of different captions whose own picture has the highest cosine of all."""
    images, texts = held_out_pairs(num_captions, seed)
    cosines = clip.encode_texts(texts) @ clip.encode_images(images).T
    return float((cosines.argmax(axis=1) == np.arange(num_captions)).mean())


def zero_shot_srocc(clip: TinyClip, *, num_prompts: int = 200, images_per_prompt: int = 6, seed: int = 0) -> float:
    """Return Spearman's rho of cosine and consistency label over a demo set, drawn in memory."""
    from scipy.stats import spearmanr

    rows = plan_demo(seed, num_prompts, images_per_prompt)
    v_ND = clip.encode_images([draw_row(row, DRAWN_SIZE) for row in rows])
    texts = sorted({row.caption.text for row in rows})
    place = {text: index for index, text in enumerate(texts)}
    t_ND = clip.encode_texts(texts)[[place[row.caption.text] for row in rows]]
    return float(spearmanr((v_ND * t_ND).sum(axis=1), [row.shown.consistency for row in rows]).statistic)


def evaluate_tiny(folder: Path, *, num_captions: int = 100, num_prompts: int = 200, seed: int = 0) -> TinyScores:
    """Return both figures for the weights in `folder`, in open_clip's `local-dir:` layout."""
    clip = TinyClip(folder)
    return TinyScores(
        recall_at_1=recall_at_1(clip, num_captions=num_captions, seed=seed),
        num_captions=num_captions,
        zero_shot_srocc=zero_shot_srocc(clip, num_prompts=num_prompts, seed=seed),
        num_demo_images=num_prompts * 6,
    )
