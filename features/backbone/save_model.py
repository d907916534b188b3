"""A whole model in a folder, as open_clip loads it by name and path or as `local-dir:`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from deltaclip.features.backbone.checkpoint import CONFIG_NAME, HF_HUB, LOCAL_DIR, find_weights
from deltaclip.features.backbone.library import read_json

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
    (folder / CONFIG_NAME).write_text(json.dumps(_configuration(backbone), indent=2) + "\n", encoding="utf-8")
    save_tokenizer = getattr(backbone.tokenizer, "save_pretrained", None)
    if save_tokenizer is not None:  # of transformers: looked for in the folder of the model
        save_tokenizer(str(folder))


def _configuration(backbone: Backbone) -> dict[str, Any]:
    """Return a configuration that leaves nothing open: with all that was chosen or mended when the model was loaded."""
    import open_clip

    name, facts = str(backbone.facts["backbone"]), backbone.facts
    content: Any = {}
    if name == "tiny" or name.startswith((LOCAL_DIR, HF_HUB)):
        config = find_weights(name, None).config
        assert config is not None, "a model of a folder has a configuration"
        content = read_json(config)
        model_cfg = content["model_cfg"]
    else:
        model_cfg = dict(open_clip.get_model_config(name.replace("/", "-")) or {})
    if facts["quick_gelu"] or model_cfg.get("quick_gelu"):
        model_cfg["quick_gelu"] = bool(facts["quick_gelu"])
    text: Any = getattr(backbone.model, "text", backbone.model)
    if hasattr(text, "positional_embedding") and text.context_length != model_cfg["text_cfg"].get("context_length", 77):
        model_cfg["text_cfg"]["context_length"] = int(text.context_length)
    return {**content, "model_cfg": model_cfg, "preprocess_cfg": facts["preprocessing"]}
