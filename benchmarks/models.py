"""ViT-B-32 with random weights, saved as a user's checkpoint: speed does not depend on what it has learned."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from deltaclip.features.backbone.checkpoint import WeightsSource, find_weights


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
