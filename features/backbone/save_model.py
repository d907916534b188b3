"""A whole model in a folder, as open_clip loads it by name and path or as `local-dir:`."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from deltaclip.features.backbone.checkpoint import CONFIG_NAME, HF_HUB, LOCAL_DIR, find_weights

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.features.backbone.load import Backbone

WEIGHTS_NAME = "open_clip_model.safetensors"


def save_model(backbone: Backbone, folder: Path) -> None:
    """Write weights and configuration of a loaded model into a new folder.

    `open_clip.create_model("local-dir:FOLDER")` loads it with its activation and preprocessing, and for a built-in
    architecture `open_clip.create_model(NAME, pretrained="FOLDER/open_clip_model.safetensors")` too.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    # Clones: two names may share their memory, which safetensors refuses to write.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in backbone.model.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME)
    name = str(backbone.facts["backbone"])
    if name == "tiny" or name.startswith((LOCAL_DIR, HF_HUB)):
        config = find_weights(name, None).config
        assert config is not None, "a model of a folder has a configuration"
        shutil.copyfile(config, folder / CONFIG_NAME)
        return
    (folder / CONFIG_NAME).write_text(json.dumps(_built_in(backbone, name), indent=2) + "\n", encoding="utf-8")


def _built_in(backbone: Backbone, name: str) -> dict[str, Any]:
    import open_clip

    model_cfg = dict(open_clip.get_model_config(name) or {})
    if backbone.facts["quick_gelu"]:
        model_cfg["quick_gelu"] = True
    return {"model_cfg": model_cfg, "preprocess_cfg": backbone.facts["preprocessing"]}
