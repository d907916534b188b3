"""What a model's configuration says, leaves open or gets wrong, before a model is made of it.

open_clip takes defaults for what is not there, without a word, and leaves out what it does not know. Knows open_clip's
configurations. Must not know weights' names or how a model is loaded.
"""

from __future__ import annotations

import json
import math
import typing
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError, did_you_mean, nearest
from deltaclip.features.backbone.library import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from deltaclip.features.backbone.tensors import StoredTensors
    from deltaclip.features.backbone.weights import WeightsSource

OPENAI_WORDS = {
    "mean": "OpenAI's mean",
    "std": "OpenAI's std",
    "interpolation": "bicubic",
    "resize_mode": "the shorter side to size",
}
CHOICES = {
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
    "mode": ("RGB",),
}
# Beside both towers, as open_clip's models have them; a text is true in a condition, whatever it says.
ON_TOP: dict[str, Any] = {
    "embed_dim": int,
    "quick_gelu": bool,
    "custom_text": bool,
    "init_logit_scale": float,
    "init_logit_bias": float | None,
    "nonscalar_logit_scale": bool,
    "output_dict": bool,
    "pad_id": int,
    "multimodal_cfg": dict,
    "vision_cfg": dict,
    "text_cfg": dict,
}
LEVELS = 255
# Numbers a model may hold over those of its weights: image positions that are interpolated, what one file lacks.
SPARE = 8
LARGEST_SIDE = 4096  # pixels; tokens too, as their mask is a square
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
    tuple: "a list",
}


def model_config(source: WeightsSource) -> dict[str, Any]:
    """Return the model's configuration as `embed_dim`, `vision_cfg`, `text_cfg` and what else there is.

    Raises:
        UserError: a part is missing or no object.
    """
    if source.config is None:
        from open_clip.factory import get_model_config

        return dict(get_model_config(source.model.replace("/", "-")) or {})
    content: Any = read_json(source.config)
    cfg = content.get("model_cfg") if isinstance(content, dict) else None
    if not isinstance(cfg, dict):
        raise UserError("has no 'model_cfg'", place=source.config, remedy="see open_clip's local-dir: layout")
    for name in ("vision_cfg", "text_cfg"):
        if not isinstance(cfg.get(name), dict):
            what = "is no object" if name in cfg else "is missing"
            raise UserError(f"model_cfg.{name} {what}", place=source.config, remedy="see open_clip's local-dir: layout")
    return cfg


def check_sizes(cfg: dict[str, Any], weights: StoredTensors, source: WeightsSource) -> None:
    """Refuse a configuration of a folder for a model that is far larger than its weights, before memory is asked for.

    Raises:
        UserError: names both numbers.
    """
    if source.config is None:
        return
    tensors, there = len(weights.by_name), sum(tensor.numel() for tensor in weights.by_name.values())
    for path, value in _numbers(cfg, "model_cfg"):
        most = tensors if path.endswith("layers") else LARGEST_SIDE
        if not path.endswith(("layers", "image_size", "context_length")):
            most = max(most, there)
        if not math.isfinite(value) or value > most:
            raise UserError(
                f"{path} {value:,} is too large: the weights are {tensors:,} tensors of {there:,} numbers",
                place=source.config,
                remedy="correct it",
            )
    needed = sum(_size(cfg[name]) for name in ("vision_cfg", "text_cfg"))
    if needed > SPARE * (there + LARGEST_SIDE**2):
        message = f"model_cfg is of a model of {needed:,.0f} numbers or more, the weights have {there:,}"
        raise UserError(message, place=source.config, remedy="correct its widths and layers")


def _numbers(value: Any, path: str) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for name, part in value.items() for pair in _numbers(part, f"{path}.{name}")]
    if isinstance(value, list):
        return [pair for part in value for pair in _numbers(part, path)]
    return [(path, value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _size(tower: dict[str, Any]) -> float:
    """Return about how many numbers a tower of open_clip has, at least; 0 for one of timm or transformers."""
    if tower.get("timm_model_name") or tower.get("hf_model_name"):
        return 0
    layers, width = tower.get("layers", 1), tower.get("width", 512)
    if isinstance(layers, list):  # a ResNet, whose last maps and attention are of 32 times its width
        return float((32 * width) ** 2)
    return float(width * tower.get("vocab_size", 1) + layers * width * width * (1 + tower.get("mlp_ratio", 4)))


def check_preprocess(source: WeightsSource) -> list[str]:
    """Refuse a preprocessing that open_clip would replace by its own, and say what it fills in where there is none.

    Returns:
        what is assumed, one phrase each.

    Raises:
        UserError: an unknown key, a value that is none; names the nearest.
    """
    from open_clip.transform import PreprocessCfg

    if source.config is None:
        given: dict[str, Any] = {}
        if not source.is_bare_file:
            return []
    else:
        content: Any = read_json(source.config)
        given, known = content.get("preprocess_cfg"), list(PreprocessCfg().__dict__)
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise UserError("preprocess_cfg is no object", place=source.config, remedy="give mean and std in it")
        for name in given:
            if name not in known:
                message = f"preprocess_cfg has {name!r}, which nothing reads"
                raise UserError(message, place=source.config, remedy=did_you_mean(name.removeprefix("image_"), known))
        _check_values(given, source.config)
    assumed = [words for name, words in OPENAI_WORDS.items() if given.get(name) is None]
    if not assumed:
        return []
    whose = f"{source.config.name} names none" if source.config else "a bare file names none"
    return [f"preprocessing assumed: {', '.join(assumed)}, as {whose}"]


def _check_values(given: dict[str, Any], config: Path) -> None:
    for name in ("mean", "std"):
        values = given.get(name)
        if values is None:
            continue
        numbers = [v for v in values if _is_of(v, float) and math.isfinite(v)] if isinstance(values, list) else []
        if len(numbers) != 3 or len(values) != 3 or (name == "std" and min(numbers) <= 0):
            message = f"preprocess_cfg.{name} {values!r} is not three numbers{' above 0' if name == 'std' else ''}"
            raise UserError(message, place=config, remedy="give one for red, green and blue")
        if max(map(abs, numbers)) > 1:
            message = f"preprocess_cfg.{name} {values!r} is of pixels from 0 to {LEVELS}"
            raise UserError(message, place=config, remedy=f"divide by {LEVELS}: pixels go from 0 to 1")
    fill = given.get("fill_color")
    levels: list[Any] = fill if isinstance(fill, list) and len(fill) == 3 else [fill]
    if fill is not None and not all(_is_of(level, int) and 0 <= level <= LEVELS for level in levels):
        message = f"preprocess_cfg.fill_color {json.dumps(fill)} is no whole number from 0 to {LEVELS}, nor three"
        raise UserError(message, place=config, remedy="give the one that the weights were trained with")
    for name, choices in CHOICES.items():
        value = given.get(name)
        if value is not None and value not in choices:
            raise UserError(
                f"preprocess_cfg.{name} {value!r} is none of {', '.join(choices)}",
                place=config,
                remedy="give the one that the weights were trained with",
            )


def activation_note(cfg: dict[str, Any], source: WeightsSource, *, quick_gelu: bool, asked: bool | None) -> list[str]:
    """Say which activation was taken where a folder's configuration names none; `tiny` is our own."""
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    has_own = not (vision.get("timm_model_name") and text.get("hf_model_name"))
    is_said = cfg.get("quick_gelu") is not None
    if source.config is None or source.name == "tiny" or is_said or asked is not None or not has_own:
        return []
    name = "QuickGELU" if quick_gelu else "GELU"
    return [
        f"activation assumed: {name}, as {source.config.name} has no quick_gelu; give --quick-gelu if trained with it"
    ]


def check_activation(cfg: dict[str, Any], source: WeightsSource, *, asked: bool | None) -> None:
    """Refuse an activation that a transformers folder does not have.

    Raises:
        UserError: names the option.
    """
    if asked is not None and asked != cfg["quick_gelu"]:
        word = "QuickGELU" if cfg["quick_gelu"] else "no QuickGELU"
        message = f"{source.config} says {word} (hidden_act)"
        raise UserError(message, place="--quick-gelu", remedy="leave the option out")


def size_note(source: WeightsSource, cfg: dict[str, Any], size: Any) -> list[str]:
    """Say where a configuration names no size of images that its weights could tell, or asks for another one."""
    if source.config is None or source.layout != "open_clip":
        return []
    content: Any = read_json(source.config)
    given, vision = (content.get("preprocess_cfg") or {}).get("size"), cfg["vision_cfg"]
    sides, taken = (value if isinstance(value, list | tuple) else [value] * 2 for value in (given, size))
    words = " x ".join(str(side) for side in taken)
    if vision.get("image_size") is None and vision.get("timm_model_name"):
        return [f"image size assumed: {words}, as {source.config.name} names no image_size"]
    if given is None or list(sides) == list(taken):
        return []
    return [f"preprocess_cfg.size {given} is not used: the tower's image_size is {words}"]


def of_hub(source: WeightsSource) -> list[str]:
    """Return the names of what a configuration has made of parts of the hub: a tower of transformers or timm."""
    cfg = model_config(source)
    names = [cfg["text_cfg"].get("hf_model_name"), cfg["vision_cfg"].get("timm_model_name")]
    text, image = (name if isinstance(name, str) else "" for name in names)
    return [name for name in (text, image.removeprefix("hf-hub:") if image.startswith("hf-hub:") else "") if name]


def check_fields(cfg: dict[str, Any], source: WeightsSource) -> None:
    """Refuse what the towers of a folder's configuration cannot have: unknown names, values of another type.

    Raises:
        UserError: names the place and the value.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if source.config is None:
        return
    parts = {"vision_cfg": typing.get_type_hints(CLIPVisionCfg), "text_cfg": typing.get_type_hints(CLIPTextCfg)}
    found = [
        (f"model_cfg.{part}.{name}", hints.get(name), cfg[part][name])
        for part, hints in parts.items()
        for name in cfg[part]
    ]
    on_top = [(f"model_cfg.{name}", ON_TOP.get(name), value) for name, value in ({"embed_dim": None} | cfg).items()]
    for place, hint, value in [*on_top, *found]:
        part, name = place.split(".")[-2:]
        if hint is None:
            message = f"{place} is nothing that open_clip knows"
            raise UserError(message, place=source.config, remedy=_nearest_or(name, parts.get(part, ON_TOP)))
        if not _is_of(value, hint):
            words = " or ".join(NAMES[kind] for kind in _kinds(hint))
            raise UserError(f"{place} is {json.dumps(value)}, not {words}", place=source.config, remedy="correct it")
        is_below = not isinstance(value, dict) and any(number < 0 for _, number in _numbers(value, place))
        if is_below and not name.startswith("init_logit"):
            raise UserError(f"{place} {value} is below 0", place=source.config, remedy="correct it")


def _nearest_or(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else "leave it out"


def _kinds(hint: Any) -> list[type]:
    return [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]


def _is_of(value: Any, hint: Any) -> bool:
    kinds = _kinds(hint)
    if value is None:  # what other programs write for a text or an object that is not there
        return not {int, float} & set(kinds) or type(None) in typing.get_args(hint)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, list):
        return tuple in kinds and all(isinstance(part, int) and not isinstance(part, bool) for part in value)
    return isinstance(value, (*kinds, int) if float in kinds else tuple(kinds))
