"""Drawn scenes and captions for the bundled backbone: endless batches to learn from, and held-out ones to be judged by.

A batch is made of families: one scene and several edits of it, each wrong in one attribute and each with a
caption of its own. Every picture so meets captions, and every caption pictures, right but for one word.
How well a small CLIP knows scenes it was never trained on is told by recall@1 and zero-shot correlation.

Knows scenes, tokens and open_clip; must not know the recipe, caches or heads.
Letters: B batch, T tokens, N pictures or captions, D width of the embedding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from deltaclip.features.scenes.captions import write_caption
from deltaclip.features.scenes.damage import DAMAGES, Damage, damage_image
from deltaclip.features.scenes.draw import (
    BACKGROUNDS,
    COLOURS,
    MAX_COUNT,
    RELATIONS,
    SHAPES,
    STYLES,
    draw_scene,
    random_scene,
)
from deltaclip.features.scenes.mismatch import edit_scene, possible_mistakes
from deltaclip.features.scenes.render import draw_row, plan_demo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.scenes.draw import Scene


# ---- Batches to learn from


TRAIN_STREAM = 1_000_001
HELD_OUT_STREAM = 1_000_002
# Pictures are drawn at the demo's size and reduced as open_clip's preprocessing does it.
DRAWN_SIZE = 128
FAMILY = 4
DAMAGED_SHARE = 0.35
# In the second phase, which teaches the picture's embedding to tell damage; one or two kinds at once, as in the demo.
LATE_DAMAGED_SHARE = 0.7
SAID_SHARE = 0.3
SAID_FROM = 0.4
DAMAGE_WORDS: dict[str, str] = {
    "warp": "warped",
    "colours": "faded",
    "low_resolution": "low resolution",
    "blur": "blurry",
    "noise": "noisy",
    "jpeg": "compressed",
}
# What the auxiliary layer names, per shape: how many, which colour, where; then of the whole picture.
PLACES = ("alone", *RELATIONS)
PER_SHAPE: tuple[int, ...] = (1 + MAX_COUNT, 1 + len(COLOURS), 1 + len(PLACES))
WHOLE: tuple[int, ...] = (len(STYLES), len(BACKGROUNDS))

Item = tuple[np.ndarray[Any, Any], str, np.ndarray[Any, Any], np.ndarray[Any, Any]]


def scene_targets(scene: Scene) -> np.ndarray[Any, Any]:
    """Return int64 (12 * 3 + 2,): count, colour, place of every shape (0 = absent); style, background."""
    per_shape = np.zeros((len(SHAPES), 3), dtype=np.int64)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for index, group in enumerate(scene.groups):
        place = "alone" if len(scene.groups) == 1 else scene.relation if index == 0 else opposite[scene.relation]
        colour = 1 + list(COLOURS).index(group.colour)
        per_shape[SHAPES.index(group.shape)] = (group.count, colour, 1 + PLACES.index(place))
    whole = (STYLES.index(scene.style), list(BACKGROUNDS).index(scene.background))
    return np.concatenate([per_shape.ravel(), np.array(whole, dtype=np.int64)])


def _picture(scene: Scene, damages: list[Damage], seed: int, size: int) -> np.ndarray[Any, Any]:
    image = damage_image(draw_scene(scene, DRAWN_SIZE), damages, seed)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _damages(rng: np.random.Generator, *, late: bool) -> list[Damage]:
    """Draw the damages of one picture for the first or the second phase; often none."""
    if not late:
        if rng.random() >= DAMAGED_SHARE:
            return []
        kind = DAMAGES[int(rng.integers(len(DAMAGES)))]
        return [Damage(kind=kind, strength=float(rng.uniform(0.1, 1.0)))]
    damaged = rng.random() < LATE_DAMAGED_SHARE
    kinds = rng.permutation(DAMAGES)[: int(rng.integers(1, 3))].tolist() if damaged else []
    return [Damage(kind=str(kind), strength=float(rng.uniform(0.1, 1.0))) for kind in kinds]


def strengths_of(damages: list[Damage]) -> np.ndarray[Any, Any]:
    """Return float32 (6,): the strength of each kind in DAMAGES, 0 where it is absent."""
    strengths = np.zeros(len(DAMAGES), dtype=np.float32)
    for damage in damages:
        strengths[DAMAGES.index(damage.kind)] = damage.strength
    return strengths


def draw_family(seed: int, index: int, size: int, *, late: bool = False) -> list[Item]:
    """Return FAMILY items of a scene and its edits: picture uint8 (size, size, 3), caption, targets, strengths."""
    stream = [TRAIN_STREAM, seed, index]
    rng = np.random.default_rng(stream)
    scene = random_scene([*stream, 1])
    caption_seed = int(rng.integers(2**31))
    possible = possible_mistakes(scene, write_caption(scene, caption_seed))
    edits = rng.permutation(possible)[: FAMILY - 1]
    scenes = [scene] + [edit_scene(scene, [str(edit)], int(rng.integers(2**31))).scene for edit in edits]
    while len(scenes) < FAMILY:
        scenes.append(random_scene([*stream, 1 + len(scenes)]))
    items = []
    for member in scenes:
        text = write_caption(member, caption_seed).text
        damages = _damages(rng, late=late)
        if damages and damages[0].strength > SAID_FROM and rng.random() < SAID_SHARE:
            text = f"{DAMAGE_WORDS[damages[0].kind]}, {text}"
        picture = _picture(member, damages, int(rng.integers(2**31)), size)
        items.append((picture, text, scene_targets(member), strengths_of(damages)))
    return items


def draw_batch(
    seed: int, step: int, batch_size: int, size: int, *, late: bool = False
) -> tuple[Any, list[str], Any, Any]:
    """Return pictures uint8 (B, size, size, 3), B captions, targets int64 (B, 38), strengths (B, 6) of one step."""
    families = batch_size // FAMILY
    items = [item for i in range(families) for item in draw_family(seed, step * families + i, size, late=late)]
    pictures, texts, targets, strengths = zip(*items, strict=True)
    return np.stack(pictures), list(texts), np.stack(targets), np.stack(strengths)


class SceneBatches:
    """Dataset of training steps for torch's DataLoader: item k is batch k, whichever worker draws it."""

    def __init__(
        self, tokenize: Callable[[list[str]], Any], *, seed: int, steps: int, batch_size: int, size: int, late: bool
    ) -> None:
        self.tokenize, self.late = tokenize, late
        self.seed, self.steps, self.batch_size, self.size = seed, steps, batch_size, size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        """Return pictures uint8 (B, 3, size, size), tokens (B, T) cut to the longest, targets, strengths."""
        import torch

        if step >= self.steps:
            raise IndexError(step)
        drawn = draw_batch(self.seed, step, self.batch_size, self.size, late=self.late)
        pictures, texts, targets, strengths = drawn
        tokens = self.tokenize(texts)
        # Exact for a causal tower: nothing after the end token is read.
        length = int((tokens != 0).sum(dim=1).max())
        return (
            torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
            tokens[:, :length],
            torch.from_numpy(targets),
            torch.from_numpy(strengths),
        )


def batches(dataset: SceneBatches, num_workers: int) -> Iterator[tuple[Any, ...]]:
    """Yield the batches of `dataset` in order, drawn ahead by `num_workers` processes (0: by this one)."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(dataset, batch_size=None, shuffle=False, num_workers=num_workers)  # type: ignore[arg-type]
    yield from loader


# ---- How well a small CLIP knows scenes it was never trained on


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
