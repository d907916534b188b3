"""Caches of random vectors: what training costs does not depend on what is learned."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.features.data.content import ImageContent
from deltaclip.features.data.manifest import Manifest
from deltaclip.features.data.views import CENTER
from deltaclip.features.store.plan import make_plan
from deltaclip.features.store.takeover import open_writer

if TYPE_CHECKING:
    from pathlib import Path

ROWS_PER_PROMPT = 8


def random_cache(path: Path, *, rows: int, dim: int, seed: int = 0) -> Path:
    """Write a cache of random unit vectors and labels, eight rows a prompt."""
    generator = np.random.default_rng(seed)
    prompts = [f"prompt {number // ROWS_PER_PROMPT}" for number in range(rows)]
    labels = {name: generator.random(rows) for name in ("quality", "consistency")}
    labels |= {f"{name}_std": np.full(rows, np.nan) for name in tuple(labels)}
    manifest = Manifest(
        name="random",
        path=path.with_suffix(".csv"),
        image_root=path.parent,
        images=[f"{number}.png" for number in range(rows)],
        prompts=prompts,
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
    for kind, count in (("texts", len(plan.texts)), ("images", rows)):
        vector = generator.standard_normal((count, dim)).astype(np.float32)
        norm = np.linalg.norm(vector, axis=1)
        entries = np.arange(count)
        if kind == "texts":
            writer.put_truncated(entries, np.zeros(count, dtype=bool))
            writer.put("texts", entries, vector / norm[:, None], norm)
        else:
            writer.put_images({CENTER: (entries.tolist(), vector / norm[:, None], norm)}, [])
    writer.finish(path)
    writer.close()
    return path
