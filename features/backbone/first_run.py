"""The tokenizer that belongs to a model, and one image and one text through both towers before anything relies on them.

Knows open_clip's models and tokenizers. Must not know weights or caches.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.hf_tokens import folder_tokenizer
from deltaclip.features.backbone.library import library_call, read_json

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from deltaclip.features.backbone.weights import WeightsSource

# Tables of tokens are rounded up (32,000 of 30,522; open_clip's coca_base has 64,000 of 49,408), not by more.
LEAST_SHARE = 0.75
SAMPLES = ["a", "two small blue squares, left of a green star; 3"]


def require_transformers(source: WeightsSource, cfg: dict[str, Any]) -> None:
    """Refuse a model whose text tower or tokenizer needs a library that is not there.

    Raises:
        UserError: names the tokenizer or the tower, and the extra.
    """
    if source.layout == "transformers":  # asked for when the folder was found
        return
    name = _of_hub(source, cfg)
    if name and importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"its tokenizer {name!r} needs transformers, which is not installed",
            place=source.name,
            remedy="install it with: pip install 'deltaclip[hf]'",
        )


def _of_hub(source: WeightsSource, cfg: dict[str, Any]) -> str | None:
    """Return the name of a tokenizer of the hub, None where the model has OpenAI's."""
    text = cfg["text_cfg"]
    name = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if not name and source.config is None and "siglip" in source.model.lower():
        name = "sentencepiece"
    return str(name) if name else None


def load_tokenizer(source: WeightsSource, cfg: dict[str, Any], model: Any) -> Callable[..., torch.Tensor]:
    """Load the tokenizer that open_clip gives a model.

    Raises:
        UserError: it is not on this machine and cannot be had, or its configuration would run code.
    """
    import open_clip

    if source.layout == "transformers":
        assert source.config is not None, "a folder has a configuration"
        content: Any = read_json(source.config)
        return folder_tokenizer(
            source.config.parent,
            context_length=_native_length(model) or 77,
            text=content.get("text_config") or {},
            kind=content["model_type"],
        )
    name = _of_hub(source, cfg)
    options = cfg["text_cfg"].get("tokenizer_kwargs") or {}
    if isinstance(options, dict) and options.get("trust_remote_code"):
        message = "text_cfg.tokenizer_kwargs asks for code of the hub to be run"
        raise UserError(message, place=source.config or source.name, remedy="leave trust_remote_code out")
    if name is None:
        doing, remedy = "its tokenizer cannot be made", "correct text_cfg"
    elif source.config is not None and source.model.startswith("local-dir:"):
        doing = f"its tokenizer {name!r} cannot be read"
        remedy = f"put the tokenizer's files (tokenizer.json, tokenizer_config.json) into {source.config.parent}"
    else:
        doing = f"its tokenizer {name!r} is not on this machine and could not be downloaded, or cannot be read"
        remedy = f"fetch it on a machine with a network: hf download {name}"
    context_length = _native_length(model)
    with library_call(source.config or source.name, doing, remedy):
        return open_clip.get_tokenizer(source.model, context_length=context_length)  # type: ignore[no-any-return]


def _native_length(model: Any) -> int | None:
    """Return the tokens that a tower of open_clip takes; transformers' take more than their tokenizers give."""
    text = getattr(model, "text", model)
    return int(text.context_length) if hasattr(text, "positional_embedding") else None


def run_once(model: Any, tokenizer: Callable[..., torch.Tensor], source: WeightsSource) -> tuple[int, int]:
    """Run an image and texts through a new model.

    Returns:
        the number of tokens that a text may have, and the width D of both embeddings.

    Raises:
        UserError: a tower cannot be run, the tokenizer is another model's, or the widths differ.
    """
    import torch

    place: Any = source.config or source.name
    with library_call(place, "its tokenizer cannot be run", "give the tokenizer that the weights were trained with"):
        length = getattr(tokenizer, "context_length", None) or int(getattr(model, "text", model).context_length)
        tokens = tokenizer(SAMPLES, context_length=length)
    _check_tokens(model, tokens, tokenizer, source)
    parameter = next(model.parameters())
    with torch.inference_mode(), library_call(place, "its text tower cannot be run", "correct text_cfg"):
        text_dim = int(model.encode_text(tokens.to(parameter.device)).shape[-1])
    image_dim = run_image(model, source)
    if image_dim != text_dim:
        message = f"its image embeddings have {image_dim} numbers, its text embeddings {text_dim}"
        raise UserError(message, place=place, remedy="correct vision_cfg: timm_pool and timm_proj")
    return int(length), text_dim


def run_image(model: Any, source: WeightsSource) -> int:
    """Run an image through a new model and return the width D of its embedding.

    Raises:
        UserError: the tower cannot be run.
    """
    import torch

    place: Any = source.config or source.name
    parameter, size = next(model.parameters()), model.visual.preprocess_cfg["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    doing = f"its image tower cannot be run on {height} x {width} pixels"
    with torch.inference_mode(), library_call(place, doing, "correct vision_cfg"):
        pixels = torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)
        return int(model.encode_image(pixels).shape[-1])


def _is_openai(tokenizer: Any) -> bool:
    """Tell the tokenizer that open_clip gives a model that names none."""
    from open_clip.tokenizer import SimpleTokenizer

    return isinstance(tokenizer, SimpleTokenizer)


def tokens_note(model: Any, tokenizer: Any) -> list[str]:
    """Say where a tokenizer has far fewer tokens than the text tower: it may be another model's."""
    own, there = getattr(tokenizer, "vocab_size", None), getattr(getattr(model, "text", model), "vocab_size", None)
    if not isinstance(own, int) or not isinstance(there, int) or own >= LEAST_SHARE * there:
        return []
    return [f"its tokenizer has {own:,} tokens, its text tower {there:,}: was it saved with these weights?"]


def _check_tokens(model: Any, tokens: torch.Tensor, tokenizer: Any, source: WeightsSource) -> None:
    """Refuse a tokenizer whose tokens the text tower cannot be meant for."""
    text, place = getattr(model, "text", model), source.config or source.name
    remedy = "name the tokenizer that the weights were trained with in text_cfg.hf_tokenizer_name"
    if source.layout == "transformers":
        remedy = "put the tokenizer's files that were saved with these weights into the folder"
    own, there = getattr(tokenizer, "vocab_size", None), getattr(text, "vocab_size", None)
    if not isinstance(own, int):
        own = int(tokens.max()) + 1
    is_assumed = source.config is not None and source.layout == "open_clip" and _is_openai(tokenizer)
    if there and (own > there or (is_assumed and own < LEAST_SHARE * there)):
        raise UserError(f"its tokenizer has {own:,} tokens, its text tower {there:,}", place=place, remedy=remedy)
    # CLIP itself calls them text_pool_type and text_eos_id.
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    eos: Any = getattr(text, "text_eos_id", getattr(text, "eos_id", None))
    if pool == "eos" and not bool(tokens.eq(eos).any(dim=1).all()):
        message = f"its text tower looks for token {eos}, which its tokenizer does not put at the end"
        name = (
            "text_config.eos_token_id, or the tokenizer's files"
            if source.layout == "transformers"
            else "text_cfg.eos_id"
        )
        raise UserError(message, place=place, remedy=f"correct {name}")
