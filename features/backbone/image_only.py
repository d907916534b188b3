"""An image tower alone, as timm makes it: DINO, PE, ConvNeXt and whatever else timm has, without a text tower.

The model has the form of open_clip's, with a text tower that gives zeros: what sees no prompt works as with a CLIP.
Knows timm. Must not know files, caches or heads.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError, and_more, did_you_mean
from deltaclip.features.backbone.fitting import put_weights
from deltaclip.features.backbone.library import library_call, read_json
from deltaclip.features.backbone.tensors import StoredTensors

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from deltaclip.features.backbone.weights import WeightsSource

# What timm's conversions raise of tensors that are of another model: they take names for granted.
NOT_ITS_OWN = (LookupError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
OF_PIXELS = ("input_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
MODES = {"center": "shortest", "squash": "squash", "border": "longest"}


def make_image_model(
    source: WeightsSource, weights: StoredTensors, *, device: str, dtype: torch.dtype
) -> tuple[Any, list[str]]:
    """Return the model of a tower that timm knows by name, and what was done with its weights.

    Args:
        source: named in errors; `model` is `timm:NAME`.
        weights: all that the file holds.
        device: a torch device.
        dtype: of all weights.

    Raises:
        UserError: timm knows no such model, or the weights are not its own.
    """
    import timm

    name = source.model.partition(":")[2]
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise UserError(
            f"timm knows no model {name!r}", place="--backbone", remedy=did_you_mean(plain, timm.list_models())
        )
    content: Any = read_json(source.config) if source.config else None
    place, remedy = "--backbone", "give a model of images that timm has by this name"
    if source.config is not None:
        place, remedy = str(source.config), "correct it"
    with library_call(place, f"timm cannot make {name!r}", remedy):
        args, changes = _as_trained(content)
        trunk = timm.create_model(name, pretrained=False, num_classes=0, pretrained_cfg_overlay=changes, **args).eval()
    with library_call(source.weights, f"does not fit {source.name}", "give weights of this model"):
        tensors, notes = _converted(trunk, weights, source)
        tensors, left = _without_classifier(trunk, tensors)
        notes += [*put_weights(trunk, tensors, source, resample=False), *left]
    from deltaclip.features.backbone.image_model import ImageModel

    return ImageModel(trunk.to(device=device, dtype=dtype), content).eval(), notes


def _as_trained(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments of a model, and the preprocessing that it was trained with, of a folder as timm writes it."""
    if not isinstance(content, dict):
        return {}, {}
    given = content.get("pretrained_cfg") or content  # an older form is flat
    changes = {name: given[name] for name in OF_PIXELS if given.get(name) is not None}
    for name in ("mean", "std"):
        if name in changes and (len(changes[name]) != 3 or not all(0 <= value <= 1 for value in changes[name])):
            raise ValueError(f"{name} {changes[name]} is not three numbers from 0 to 1")
    return content.get("model_args") or {}, changes


def _converted(
    trunk: torch.nn.Module, weights: StoredTensors, source: WeightsSource
) -> tuple[StoredTensors, list[str]]:
    """Rename tensors that their authors published under other names, as timm does; it may not resize any."""
    own = trunk.state_dict()
    known = {name.rpartition(".")[2] for name in own}
    ends = {
        raw: next((name for name in own if raw == name or raw.endswith(f".{name}")), None) for raw in weights.by_name
    }
    if sum(name is not None for name in ends.values()) >= len(own) / 2:
        return weights, []
    change = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if change is None:
        return weights, []
    # Of a dictionary in a dictionary, the tensors: timm takes names without what was put before them.
    state = {raw.removeprefix(f"{weights.key_of(raw)}."): tensor for raw, tensor in weights.by_name.items()}
    try:
        everything = change(dict(state), trunk)
    except NOT_ITS_OWN:
        return weights, []
    for raw, tensor in state.items():
        end = raw.rpartition(".")[2]
        if end in known and "pos" in end and not any(tensor.shape == own[n].shape for n in own if n.endswith(end)):
            message = f"has {end} of {' x '.join(map(str, tensor.shape))}: another input size than {source.name} has"
            raise UserError(message, place=source.weights, remedy="give the timm model of that size")
    changed = {name: tensor for name, tensor in everything.items() if name in own}
    if not changed:
        return weights, []
    # A token that the model has no place for is computed with where it comes from: `put_weights` refuses it.
    tokens = {name: tensor for name, tensor in everything.items() if "." not in name and name.endswith("token")}
    found = StoredTensors(by_name=changed | tokens, keys=frozenset({""}), is_openai=False)
    left = [name for name in everything if name not in found.by_name]
    words = [f"left out in converting: {and_more(left)}"] if left else []
    return found, ["names converted by timm", *words]


def _without_classifier(trunk: Any, weights: StoredTensors) -> tuple[StoredTensors, list[str]]:
    """Return all but the tensors of the classifier that the tower was trained with, and words where there were some."""
    own, named = trunk.state_dict(), (getattr(trunk, "pretrained_cfg", {}) or {}).get("classifier") or ()
    ends = [f"{name}.{end}" for name in ([named] if isinstance(named, str) else named) for end in ("weight", "bias")]
    ends = [end for end in ends if end not in own]
    found = [raw for raw in weights.by_name if any(raw == end or raw.endswith(f".{end}") for end in ends)]
    if not found:
        return weights, []
    by_name = {raw: tensor for raw, tensor in weights.by_name.items() if raw not in found}
    rest = StoredTensors(by_name=by_name, keys=weights.keys, is_openai=False)
    return rest, [f"left out, as no part of the model: the classifier {found[0].rpartition('.')[0]}"]


def image_preprocessing(trunk: Any, source: WeightsSource) -> tuple[dict[str, Any], Callable[[Any], torch.Tensor], str]:
    """Return timm's own preprocessing of a tower: as facts have it, as a transform, and in words."""
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    cfg = resolve_model_data_config(trunk)
    (_, height, width), crop = cfg["input_size"], cfg["crop_pct"]
    mode = cfg.get("crop_mode") or "center"
    before = [math.floor(side / crop) for side in (height, width)]
    found = {
        "size": [height, width],
        "mode": "RGB",
        "mean": [float(value) for value in cfg["mean"]],
        "std": [float(value) for value in cfg["std"]],
        "interpolation": cfg["interpolation"],
        "resize_mode": MODES.get(mode, mode),
        "fill_color": 0,
    }
    if before != [height, width]:
        found["resize_to"] = before[0] if before[0] == before[1] else before
    known = getattr(trunk, "pretrained_cfg", {}) or {}
    whose = "timm's " + ".".join(str(part) for part in (known.get("architecture"), known.get("tag")) if part)
    words = f"preprocessing chosen: that of {f'{source.config.name} beside it' if source.config else whose}"
    return found, create_transform(**cfg, is_training=False), words


class NoTokens:
    """Stands for the tokenizer of a model that reads no prompts."""

    context_length = 1

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> torch.Tensor:
        """Return zeros (B, L) int64."""
        import torch

        count = 1 if isinstance(texts, str) else len(texts)
        return torch.zeros(count, context_length or self.context_length, dtype=torch.int64)
