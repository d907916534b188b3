"""Weights into a model: every tensor in its place and shape, and whatever is not exactly so said or refused.

Knows open_clip's models. Must not know files or options.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError, and_more
from deltaclip.features.backbone.naming import Naming, find_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from deltaclip.features.backbone.tensors import StoredTensors
    from deltaclip.features.backbone.weights import WeightsSource

IMAGE_POSITIONS = "visual.positional_embedding"
# What no embedding depends on, and what a model makes by itself: absent or left over, it says nothing.
NEUTRAL = (
    "logit_scale",
    "logit_bias",
    "num_batches_tracked",
    "position_ids",
    "attn_mask",
    "mask_token",
    "relative_position_index",
)
PARTS = {"visual": "image tower", "text": "text tower"}
OF_TRANSFORMERS = ("vision_model.", "text_model.")


def put_weights(model: torch.nn.Module, weights: StoredTensors, source: WeightsSource, *, resample: bool) -> list[str]:
    """Put the tensors of a checkpoint into a model.

    Args:
        model: made as its configuration says, with any weights.
        weights: all that the checkpoint holds.
        source: named in errors.
        resample: the image size was set by hand: image positions of another grid are interpolated, else refused.

    Returns:
        what was taken away, mended or left out, one phrase each.

    Raises:
        UserError: tensors are missing, have no place or another shape; names the numbers.
    """
    own = model.state_dict()
    if any(part in name for name in weights.by_name for part in OF_TRANSFORMERS):
        remedy = "give --backbone local-dir:FOLDER of it, with its config.json and tokenizer.json"
        raise UserError("is in the layout of transformers", place=source.weights, remedy=remedy)
    weights, converted = _converted(model, weights)
    naming = find_names(weights, own, place=source.weights)
    _require_all(naming, weights, own, source)
    notes = [*converted, *naming.words]
    tensors = {name: weights.by_name[raw] for name, raw in naming.stored.items()}
    for name in ("logit_scale", "logit_bias"):  # a number or a vector of one
        if name in tensors and tensors[name].numel() == own[name].numel():
            tensors[name] = tensors[name].reshape(own[name].shape)
    positions = tensors.get(IMAGE_POSITIONS)
    if resample and positions is not None and positions.shape != own[IMAGE_POSITIONS].shape:
        tensors[IMAGE_POSITIONS], words = _resampled(model, positions, source)
        notes.append(words)
    if "logit_scale" in own and "logit_scale" not in tensors:
        notes.append(
            f"logit_scale assumed: that of {float(own['logit_scale'].exp().mean()):.4g}, as the weights have none"
        )
    _require_shapes(tensors, own, source)
    notes += _left_out(naming, weights, own, source)
    notes += _stored_types(tensors, own, source)
    model.load_state_dict(tensors, strict=False)
    return notes


def moving_positions(model: Any, source: WeightsSource, *, resample: bool) -> list[str]:
    """Say where a tower of timm's makes the positions of another grid than its own as it runs, size for size.

    Args:
        model: with its weights.
        source: named in errors.
        resample: as in `put_weights`.

    Raises:
        UserError: nobody has set the image size, so it is no wish.
    """
    trunk = getattr(model.visual, "trunk", None)
    embed, positions = getattr(trunk, "patch_embed", None), getattr(trunk, "pos_embed", None)
    grid, patch = getattr(embed, "grid_size", None), getattr(embed, "patch_size", None)
    if getattr(positions, "ndim", 0) != 3 or grid is None or patch is None:
        return []
    size = model.visual.preprocess_cfg["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    asked = (height // patch[0], width // patch[1])
    if asked == tuple(grid):
        return []
    there, here = (f"{rows} x {columns}" for rows, columns in (grid, asked))
    if not resample:
        message = f"names no image_size: {height} x {width} would be taken, its tower has positions of {there} patches"
        remedy = f"give vision_cfg.image_size {grid[0] * patch[0]}"
        raise UserError(message, place=source.config or source.name, remedy=remedy)
    return [f"image positions interpolated from {there} to {here}, for the image_size that is set"]


def text_positions(weights: StoredTensors) -> int | None:
    """Return for how many tokens the weights have positions; None where that cannot be told."""
    found = {
        len(tensor)
        for name, tensor in weights.by_name.items()
        if name.endswith("positional_embedding")
        and tensor.ndim == 2
        and not {"visual", "attnpool"} & {*name.split(".")}
    }
    return found.pop() if len(found) == 1 else None


def _converted(model: Any, weights: StoredTensors) -> tuple[StoredTensors, list[str]]:
    """Rename the tensors of Apple's own MobileCLIP files, as open_clip does."""
    from open_clip.convert import convert_state_dict

    from deltaclip.features.backbone.tensors import StoredTensors

    first = next((name for name in weights.by_name if name.split(".", 1)[0] == "image_encoder"), None)
    if first is None:
        return weights, []
    by_name = convert_state_dict(model, dict(weights.by_name))
    if by_name.keys() == weights.by_name.keys():
        return weights, []
    return StoredTensors(by_name=by_name, keys=weights.keys, is_openai=False), ["converted from Apple's names"]


def _require_all(naming: Naming, weights: StoredTensors, own: Mapping[str, Any], source: WeightsSource) -> None:
    missing = [name for name in own if name not in naming.stored and not name.endswith(NEUTRAL)]
    if not missing:
        return
    place, count = source.weights, len(missing)
    of_part = collections.Counter(PARTS.get(name.split(".")[0], "text tower") for name in own)
    absent = collections.Counter(PARTS.get(name.split(".")[0], "text tower") for name in missing)
    found = len(naming.stored)
    for part, other in (("image tower", "text tower"), ("text tower", "image tower")):
        if source.layout != "timm" and part not in absent and absent[other] >= of_part[other] - 2:
            remedy = "give weights of both towers: one with random weights would say nothing"
            raise UserError(f"holds the {part} alone, of {source.model}'s {other} nothing", place=place, remedy=remedy)
    if found < len(own) / 2:
        first = next(iter(weights.by_name))
        message = (
            f"does not fit {source.model}: {found} of its {len(own)} tensors are there; the file's first is {first!r}"
        )
    else:
        message = f"does not fit {source.model}: lacks {and_more(missing, count)}"
    raise UserError(message, place=place, remedy=_remedy(weights, source))


def _require_shapes(tensors: Mapping[str, Any], own: Mapping[str, Any], source: WeightsSource) -> None:
    wrong = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
    if not wrong:
        return
    there, here = (_shape(side[wrong[0]]) for side in (tensors, own))
    more = f", and so are {len(wrong) - 1} more" if len(wrong) > 1 else ""
    message = f"does not fit {source.model}: {wrong[0]} is {there} in the weights and {here} in the model{more}"
    if wrong == [IMAGE_POSITIONS]:
        message = (
            f"has image positions of {_grid(tensors[IMAGE_POSITIONS])}, {source.model} of {_grid(own[IMAGE_POSITIONS])}"
        )
    weights = {name: tensors[name] for name in tensors}
    raise UserError(message, place=source.weights, remedy=_remedy_of(weights, source, wrong=wrong[0]))


def _left_out(naming: Naming, weights: StoredTensors, own: Mapping[str, Any], source: WeightsSource) -> list[str]:
    """Return what to say of tensors that the model has not; refuse those inside its parts, which compute with them."""
    unused = {name: raw for name, raw in naming.unused.items() if not name.endswith(NEUTRAL)}
    parts = {name.split(".")[0] for name in own} | {"visual", "text", "transformer"}
    # A model computes with what lies beside its parts and in none too: a second set of positions, registers, tokens.
    inside = [
        raw
        for name, raw in unused.items()
        if name.split(".")[0] in parts or ("." not in name and _is_computed_with(weights.by_name[raw]))
    ]
    if inside:
        message = f"does not fit {source.model}, which has no {and_more(inside)}"
        raise UserError(message, place=source.weights, remedy=_remedy(weights, source))
    return [f"left out, as no part of the model: {and_more([*unused.values()])}"] if unused else []


def _is_computed_with(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 1


def _stored_types(tensors: Mapping[str, Any], own: Mapping[str, Any], source: WeightsSource) -> list[str]:
    types = set()
    for name, tensor in tensors.items():
        if not own[name].is_floating_point():
            continue
        if not tensor.is_floating_point():
            message = f"holds {name} as {_type(tensor)}, where the model computes with floating point"
            raise UserError(message, place=source.weights, remedy="give weights that are not quantised")
        if tensor.is_meta or str(tensor.layout) != "torch.strided":
            what = "without its numbers (a tensor of the device 'meta')" if tensor.is_meta else "as a sparse tensor"
            raise UserError(f"holds {name} {what}", place=source.weights, remedy="save it again, dense and on the CPU")
        types.add(_type(tensor))
    return [] if types <= {"float32"} else [f"weights stored in {' and '.join(sorted(types))}"]


def _resampled(model: Any, positions: torch.Tensor, source: WeightsSource) -> tuple[torch.Tensor, str]:
    """Interpolate image positions to the model's grid, as open_clip does: bicubic, smoothed."""
    from open_clip.model import resize_pos_embed

    height, width = model.visual.grid_size
    side = round((len(positions) - 1) ** 0.5)
    if side * side + 1 != len(positions):
        message = f"has {len(positions)} image positions, {source.model} {height * width + 1}"
        raise UserError(message, place=source.weights, remedy="set image_size as these weights were trained")
    state = {IMAGE_POSITIONS: positions.float()}
    resize_pos_embed(state, model)
    return state[IMAGE_POSITIONS], (
        f"image positions interpolated from {side} x {side} to {height} x {width}, for the image_size that is set"
    )


def _remedy(weights: StoredTensors, source: WeightsSource) -> str:
    return _remedy_of(weights.by_name, source, wrong="")


def _remedy_of(by_name: Mapping[str, Any], source: WeightsSource, *, wrong: str) -> str:
    if source.layout == "timm":
        return "give weights of this model of timm's, or the name of the model that they are of"
    if source.layout == "transformers":
        which = "image_size" if wrong.startswith("visual.") else "max_position_embeddings"
        what = which if "pos" in wrong else "its numbers"
        return f"correct {what} in {source.config}: it must be the one that the weights were trained with"
    if source.config is not None:
        of_image = wrong.startswith("visual.") and "pos" in wrong
        what = "timm_model_name" if ".trunk." in wrong else "image_size" if of_image else "model_cfg"
        return f"correct {what} in {source.config}: it must be the one that the weights were trained with"
    named = architectures_of(by_name)
    if source.model in named:
        return "fetch or save the weights again, whole"
    if named:
        return f"these look like weights of {' or '.join(named[:3])}: give --backbone {named[0]}"
    return "check --backbone: the architecture must be the one the weights were saved from"


def architectures_of(by_name: Mapping[str, Any]) -> list[str]:
    """Return which architectures of open_clip, of those with its own vision transformer, have these shapes."""
    from open_clip.factory import get_model_config, list_models

    found = _numbers(by_name)
    if found is None:
        return []
    close = []
    for name in list_models():
        cfg: Any = get_model_config(name)
        vision, text = cfg["vision_cfg"], cfg["text_cfg"]
        if "timm_model_name" in vision or "hf_model_name" in text or isinstance(vision.get("layers"), list):
            continue
        patch, size = vision["patch_size"], vision.get("image_size", 224)
        numbers = (vision["width"], vision["layers"], patch, (size // patch) ** 2 + 1, text["width"], text["layers"])
        if numbers == found and not name.endswith("-quickgelu"):
            close.append(name)
    return close


def _numbers(by_name: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return width, layers, patch and positions of a vision transformer, width and layers of the text tower."""
    end = "visual.conv1.weight"
    conv = next((name for name in by_name if name.endswith(end)), None)
    if conv is None or by_name[conv].ndim != 4:
        return None
    head = conv.removesuffix(end)
    blocks: dict[str, set[str]] = {"visual.": set(), "": set()}
    width = 0
    for name, tensor in by_name.items():
        path = name.removeprefix(head)
        tower = "visual." if path.startswith("visual.") else ""
        parts = path.removeprefix(tower).removeprefix("text.").split(".")
        if parts[:2] == ["transformer", "resblocks"] and len(parts) > 2:
            blocks[tower].add(parts[2])
        if not tower and parts[0] == "token_embedding":
            width = tensor.shape[-1]
    positions = by_name.get(f"{head}{IMAGE_POSITIONS}")
    count = len(positions) if positions is not None else 0
    shape = by_name[conv].shape
    return (shape[0], len(blocks["visual."]), shape[-1], count, width, len(blocks[""]))


def _shape(tensor: Any) -> str:
    return " x ".join(str(side) for side in tensor.shape) or "a number"


def _type(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _grid(positions: Any) -> str:
    side = round((len(positions) - 1) ** 0.5)
    return f"{side} x {side}" if side * side + 1 == len(positions) else f"{len(positions)}"
