"""Caches of random vectors whose labels follow from them: what training costs does not depend on what is learned.

With labels of pure chance no epoch is better than another, and two trainings that agree to the sixth digit may keep
different ones; so quality is a function of the image, consistency of image and prompt, both with noise.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.vocabulary import CONSISTENCY, QUALITY
from deltaclip.features.data.images import ImageContent
from deltaclip.features.data.manifest import Manifest
from deltaclip.features.data.views import CENTER
from deltaclip.features.store.schema import make_plan
from deltaclip.features.store.writer import open_writer

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ROWS_PER_PROMPT = 8


def random_cache(path: Path, *, rows: int, dim: int, seed: int = 0) -> Path:
    """Write a cache of random unit vectors and labels, eight rows a prompt."""
    generator = np.random.default_rng(seed)
    prompts = [f"prompt {number // ROWS_PER_PROMPT}" for number in range(rows)]
    v_ID, norm_I = _unit(generator, rows, dim)
    t_TD, norm_T = _unit(generator, len(dict.fromkeys(prompts)), dim)
    ways = generator.standard_normal((2, dim)).astype(np.float32)
    noise = generator.standard_normal((2, rows))
    of_prompt = np.repeat(t_TD @ ways[1], ROWS_PER_PROMPT)[:rows]
    labels = {
        "quality": 1 / (1 + np.exp(-(v_ID @ ways[0] + 0.5 * noise[0]))),
        "consistency": 1 / (1 + np.exp(-(v_ID @ ways[0] + of_prompt + 0.5 * noise[1]))),
    }
    labels |= {f"{name}_std": np.full(rows, np.nan) for name in tuple(labels)}
    manifest = Manifest(
        name="random",
        path=path.with_suffix(".csv"),
        image_root=path.parent,
        images=[f"{number}.png" for number in range(rows)],
        prompts=prompts,
        targets=(QUALITY, CONSISTENCY),
        labels=labels,
        explanations=[""] * rows,
        groups=prompts,
        sources=[""] * rows,
        splits=[""] * rows,
        places=[""] * rows,
    )
    contents = [ImageContent(hashlib.sha256(str(number).encode()).digest(), "") for number in range(rows)]
    plan = make_plan(manifest, contents)
    facts = {"dim": dim, "precision": "fp16", "backbone": "random", "quick_gelu": False, "weights_sha256": "0" * 64}
    writer = open_writer(path, plan, request={"weights_sha256": "0" * 64, "precision": "fp16"}, facts=facts)
    writer.put_tokens(np.arange(len(t_TD)), np.zeros(len(t_TD), dtype=bool), np.zeros(len(t_TD), dtype=np.uint64))
    writer.put("texts", np.arange(len(t_TD)), t_TD, norm_T)
    writer.put_images({CENTER: (list(range(rows)), v_ID, norm_I)}, [])
    writer.finish(path)
    writer.close()
    return path


def _unit(generator: np.random.Generator, count: int, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    vector = generator.standard_normal((count, dim)).astype(np.float32)
    norm = np.linalg.norm(vector, axis=1)
    return vector / norm[:, None], norm
