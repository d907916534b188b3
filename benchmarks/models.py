"""What benchmarks work on: ViT-B-32 with random weights as a user's checkpoint, JPEG files, prompts.

Speed does not depend on what a model has learned.
"""

from __future__ import annotations

import functools
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from deltaclip.features.backbone.weights import WeightsSource, find_weights

WORDS = """
a an the of in on with red blue golden dark bright old new tiny giant cat dog castle forest river mountain
robot astronaut portrait landscape painting photo digital art oil watercolor highly detailed cinematic
lighting realistic abstract minimalist surreal baroque style by night morning autumn winter city street market
garden ocean sky
"""


@functools.cache
def vit_b_32() -> WeightsSource:
    """Return ViT-B-32 from a safetensors checkpoint that open_clip saved."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = Path(tempfile.mkdtemp(prefix="deltaclip-bench-")) / "vit-b-32.safetensors"
    model = open_clip.create_model("ViT-B-32")
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, path)
    return find_weights("ViT-B-32", str(path))


def drawn_jpegs(count: int, *, side: int = 512, seed: int = 0) -> list[bytes]:
    """Return distinct smooth pictures with some noise as JPEG files of quality 90."""
    rng = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (max(4, side // 16),) * 2 + (3,), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def drawn_prompts(count: int) -> list[str]:
    """Return distinct prompts of 4 to 20 words, as people write them: AGIQA-3K's have 5 to 28 tokens."""
    rng = np.random.default_rng(0)
    return [f"{' '.join(rng.choice(WORDS.split(), rng.integers(3, 20)))} {number}" for number in range(count)]
