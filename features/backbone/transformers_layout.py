"""A folder as `transformers` saves CLIP and SigLIP: its configuration and weights as those of open_clip's own modules.

Both libraries compute the same with other names: tensors are joined, cut and turned, no number changes, and a model can
be written back as it came. Knows both layouts. Must not know caches or how a model is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltaclip.base.errors import UserError, and_more
from deltaclip.features.backbone.library import read_json
from deltaclip.features.backbone.naming import find_names
from deltaclip.features.backbone.tensors import StoredTensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from deltaclip.features.backbone.weights import WeightsSource


# ---- config.json: which model it is, with the defaults that transformers leaves out of files


TYPES = ("clip", "siglip", "siglip2")
PREPROCESSOR = "preprocessor_config.json"
OF_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
BESIDE = (PREPROCESSOR, "processor_config.json", *OF_TOKENIZER)  # what changes an embedding beside the weights
_TOWER = {"num_hidden_layers": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
_SIGLIP_TEXT = _TOWER | {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_SIGLIP_IMAGE = _TOWER | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 16,
}
_CLIP = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "text_config": _SIGLIP_TEXT
        | _CLIP
        | {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "eos_token_id": 49407,
        },
        "vision_config": _SIGLIP_IMAGE | _CLIP | {"patch_size": 32, "image_size": 224},
    },
    "siglip": {"text_config": _SIGLIP_TEXT, "vision_config": _SIGLIP_IMAGE | {"image_size": 224}},
    "siglip2": {"text_config": _SIGLIP_TEXT, "vision_config": _SIGLIP_IMAGE | {"num_patches": 256}},
}
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
TANH = {"gelu_pytorch_tanh", "gelu_new", "gelu_fast"}  # one formula
ACTIVATIONS = {"quick_gelu", "gelu", *TANH}
# "The `eos_token_id` was incorrect before": with 2 the last token is the one of the highest number, as OpenAI has it.
OLD_EOS = 2


def is_transformers_folder(folder: Path) -> bool:
    """Tell a folder whose `config.json` is that of a model of transformers; a broken one counts, to be named."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    content = read_json(path)
    return not isinstance(content, dict) or "architecture" not in content  # which is timm's


def _towers(config: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the type of a model, and what its text and its image tower are.

    Raises:
        UserError: the model is none that open_clip can compute, or a value makes no sense.
    """
    content = read_json(config)
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UserError("has no 'model_type'", place=config, remedy="give the config.json that transformers wrote")
    kind = content["model_type"]
    if kind not in TYPES:
        remedy = f"give a model of {', '.join(TYPES)}, or the same weights for open_clip"
        raise UserError(f"model_type {kind!r} is not read from a transformers folder", place=config, remedy=remedy)
    found = []
    for part, defaults in DEFAULTS[kind].items():
        given = content.get(part)
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise UserError(f"{part} is no object", place=config, remedy="give the config.json that transformers wrote")
        tower = {**defaults, **given, **(content.get(f"{part}_dict") or {})}
        _check_tower(tower, part, config)
        found.append(tower)
    text, image = found
    text.setdefault("projection_size", text["hidden_size"])
    if text["projection_size"] is None:
        text["projection_size"] = text["hidden_size"]
    text["embed_dim"] = content.get("projection_dim", 512) if kind == "clip" else image["hidden_size"]
    return kind, text, image


def _check_tower(tower: Mapping[str, Any], part: str, config: Path) -> None:
    more: tuple[str, ...] = ("vocab_size", "max_position_embeddings") if part == "text_config" else ("patch_size",)
    more += tuple(name for name in ("image_size", "num_patches") if name in tower and part == "vision_config")
    for name in (*SIZES, *more):
        value = tower[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            message = f"{part}.{name} is {json.dumps(value)}, not a whole number above 0"
            raise UserError(message, place=config, remedy="correct it")
    if tower["hidden_size"] % tower["num_attention_heads"]:
        message = f"{part}: {tower['hidden_size']} numbers do not go into {tower['num_attention_heads']} heads"
        raise UserError(message, place=config, remedy="correct hidden_size or num_attention_heads")
    if not isinstance(tower.get("eos_token_id", 0), int):
        message = f"{part}.eos_token_id is {json.dumps(tower['eos_token_id'])}, not one token"
        raise UserError(message, place=config, remedy="give the token that ends a text in its tokenizer")
    if tower["hidden_act"] not in ACTIVATIONS:
        message = f"{part}.hidden_act {tower['hidden_act']!r} is none of {', '.join(sorted(ACTIVATIONS))}"
        raise UserError(message, place=config, remedy="give a model with one of them")
    if not isinstance(tower["layer_norm_eps"], float) or not 0 < tower["layer_norm_eps"] < 1:
        message = f"{part}.layer_norm_eps is {json.dumps(tower['layer_norm_eps'])}"
        raise UserError(message, place=config, remedy="give a small number above 0, such as 1e-5")
    if part == "vision_config" and (tower["num_channels"] != 3 or not tower.get("vision_use_head", True)):
        what = "an image tower without its head" if tower["num_channels"] == 3 else "images of other than 3 channels"
        raise UserError(f"vision_config is of {what}", place=config, remedy="give a model of RGB images with its head")


# ---- The same model as open_clip makes it


Form = Literal["plain", "turned", "batch of one", "patches", "number"]


@dataclass(frozen=True)
class Same:
    """Tensors of `ours` hold, joined along their first axis, the numbers of `theirs`, in this form."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = "plain"


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """What a folder says, as open_clip is told: `model_cfg`, with `trunk` the arguments of a tower of timm's or None.

    `preprocessing` is as in `facts`; `same` says where each tensor goes; `eps` is of the image tower's norms; `notes`
    are what was assumed.
    """

    model_cfg: dict[str, Any]
    trunk: dict[str, Any] | None
    preprocessing: dict[str, Any]
    same: tuple[Same, ...]
    eps: float
    notes: tuple[str, ...]


def read_foreign(config: Path) -> ForeignModel:
    """Read the configuration and the preprocessing of a folder, whose `config.json` is given.

    Raises:
        UserError: it is of a model, or of a preprocessing, that cannot be had here; names the value.
    """
    kind, text, image = _towers(config)
    side = image["image_size"] if "image_size" in image else _square_side(image, config)
    preprocessing, notes = _preprocessing(config.parent, kind, side)
    make = _clip if kind == "clip" else _siglip
    model_cfg, trunk = make(text, image, side, config)
    return ForeignModel(
        model_cfg=model_cfg,
        trunk=trunk,
        preprocessing=preprocessing,
        same=tuple(_same(kind, text, image)),
        eps=image["layer_norm_eps"],
        notes=tuple(notes),
    )


def _square_side(image: Mapping[str, Any], config: Path) -> int:
    grid = math.isqrt(image["num_patches"])
    if grid * grid != image["num_patches"]:
        message = f"vision_config.num_patches {image['num_patches']} is no square"
        raise UserError(message, place=config, remedy="give the number that the weights were trained with")
    return int(grid * image["patch_size"])


def _ratio(tower: Mapping[str, Any]) -> float:
    """Return what a width is multiplied with to give, cut to a whole number, that of the hidden layer."""
    width, wanted = tower["hidden_size"], tower["intermediate_size"]
    ratio: float = wanted / width
    return ratio if int(width * ratio) == wanted else math.nextafter(ratio, math.inf)


def _tower_cfg(tower: Mapping[str, Any]) -> dict[str, Any]:
    cfg = {"width": tower["hidden_size"], "layers": tower["num_hidden_layers"], "mlp_ratio": _ratio(tower)}
    if tower["layer_norm_eps"] != 1e-5:
        cfg["norm_kwargs"] = {"eps": tower["layer_norm_eps"]}
    if tower["hidden_act"] in TANH:
        cfg["act_kwargs"] = {"approximate": "tanh"}
    return cfg


def _text_cfg(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_tower_cfg(text),
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "heads": text["num_attention_heads"],
    }


def _clip(
    text: Mapping[str, Any], image: Mapping[str, Any], side: int, config: Path
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if (text["hidden_act"] == "quick_gelu") != (image["hidden_act"] == "quick_gelu"):
        message = f"hidden_act is {text['hidden_act']} of the text and {image['hidden_act']} of the image tower"
        raise UserError(message, place=config, remedy="give a model with QuickGELU in both towers or in none")
    eos = text["eos_token_id"]
    pool = {"pool_type": "argmax"} if eos == OLD_EOS else {"pool_type": "eos", "eos_id": eos}
    vision = {
        **_tower_cfg(image),
        "head_width": image["hidden_size"] // image["num_attention_heads"],
        "patch_size": image["patch_size"],
        "image_size": side,
    }
    is_quick = text["hidden_act"] == "quick_gelu"
    cfg = {"embed_dim": text["embed_dim"], "quick_gelu": is_quick, "vision_cfg": vision}
    return cfg | {"text_cfg": _text_cfg(text) | pool}, None


def _siglip(
    text: Mapping[str, Any], image: Mapping[str, Any], side: int, config: Path
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if "quick_gelu" in {text["hidden_act"], image["hidden_act"]}:
        raise UserError("hidden_act 'quick_gelu' is not of SigLIP", place=config, remedy="correct it")
    if text["projection_size"] != image["hidden_size"]:
        message = f"text embeddings have {text['projection_size']} numbers, image embeddings {image['hidden_size']}"
        raise UserError(message, place=config, remedy="correct projection_size: both must be of one width")
    trunk = {
        "embed_dim": image["hidden_size"],
        "depth": image["num_hidden_layers"],
        "num_heads": image["num_attention_heads"],
        "mlp_ratio": _ratio(image),
        "img_size": side,
        "patch_size": image["patch_size"],
        "act_layer": "gelu_tanh" if image["hidden_act"] in TANH else "gelu",
    }
    # The folder of the trunk is put in where the model is made; `timm_pool` and the rest are open_clip's own.
    vision = {"timm_model_name": TRUNK, "timm_pool": "map", "timm_proj": "none", "image_size": side}
    own = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    cfg = {"embed_dim": image["hidden_size"], "quick_gelu": False, "custom_text": True, "init_logit_bias": -10.0}
    return cfg | {"vision_cfg": vision, "text_cfg": _text_cfg(text) | own}, trunk


TRUNK = "vit_base_patch16_siglip_224"  # timm's, of whatever width and depth


@contextlib.contextmanager
def open_clip_folder(foreign: ForeignModel) -> Iterator[str]:
    """Yield the name by which open_clip makes the model, without weights, while the block runs."""
    with tempfile.TemporaryDirectory(prefix="deltaclip-") as name:
        folder, cfg = Path(name), copy.deepcopy(foreign.model_cfg)
        if foreign.trunk is not None:
            trunk = folder / "trunk"
            trunk.mkdir()
            content = {"architecture": TRUNK, "model_args": foreign.trunk, "pretrained_cfg": {}}
            (trunk / "config.json").write_text(json.dumps(content), encoding="utf-8")
            cfg["vision_cfg"]["timm_model_name"] = f"local-dir:{trunk}"
        content = {"model_cfg": cfg, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
        yield f"local-dir:{folder}"


# ---- preprocessor_config.json


INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # of Pillow
HALF = [0.5, 0.5, 0.5]
# What the processors of these models do where their file leaves it open.
PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {
        "size": {"shortest_edge": 224},
        "crop_size": 224,
        "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {"do_center_crop": False, "image_mean": HALF, "image_std": HALF},
}
STEPS = {name for known in PROCESSORS.values() for name in known} | {"resample", "do_normalize", "rescale_factor"}
# Processors that do with the same numbers what those two do; others have steps of their own behind the same names.
KNOWN = re.compile(r"(CLIP|Siglip|ViT|Bit|DeiT)(ImageProcessor|FeatureExtractor)(Fast|Pil)?")
NAFLEX = ("Siglip2ImageProcessor", "max_num_patches")


def _preprocessing(folder: Path, kind: str, side: int) -> tuple[dict[str, Any], list[str]]:
    """Return the preprocessing as facts have it, and what was assumed.

    Raises:
        UserError: it does something that is not done here, or gives another size than the tower takes.
    """
    place, given = _processor(folder)
    known = PROCESSORS["clip" if kind == "clip" else "siglip"]
    notes = []
    if place is None:
        place = folder / PREPROCESSOR
        what = "OpenAI's mean and std" if kind == "clip" else "mean and std of .5"
        how = "the shorter side" if kind == "clip" else "both sides"
        notes = [f"preprocessing assumed: bicubic, {how} to {side}, {what}, as there is no {PREPROCESSOR}"]
        given = {"size": {"shortest_edge": side} if kind == "clip" else side, "crop_size": side}
    if any(word in (given.get("image_processor_type"), *given) for word in NAFLEX):
        message = "is of NaFlex, whose pictures keep their shape: a tower of one input size cannot do that"
        raise UserError(message, place=place, remedy="give a SigLIP 2 model of fixed resolution")
    kind_of_it = given.get("image_processor_type", given.get("feature_extractor_type"))
    if kind_of_it is not None and not KNOWN.fullmatch(str(kind_of_it)):
        message = f"is of {kind_of_it}, which is not known here"
        raise UserError(message, place=place, remedy="give the file that was saved with a CLIP or SigLIP model")
    given = {**known, **{name: value for name, value in given.items() if value is not None}}
    _check_steps(given, place)
    mode, height, width = _resize(given, place, side)
    crop = _sides(given["crop_size"], "crop_size", place) if given["do_center_crop"] else (height, width)
    if mode == "shortest" and not given["do_center_crop"]:
        raise UserError("keeps the shape of pictures (no do_center_crop)", place=place, remedy="correct it")
    if tuple(crop) != (side, side) or min(height, width) < side:
        message = f"gives {crop[0]} x {crop[1]} pixels, the image tower takes {side} x {side}"
        raise UserError(message, place=place, remedy="give the one that was saved with these weights")
    normalises = given.get("do_normalize", True)
    found = {
        "size": [side, side],
        "mode": "RGB",
        "mean": list(given["image_mean"]) if normalises else [0.0] * 3,
        "std": list(given["image_std"]) if normalises else [1.0] * 3,
        "interpolation": INTERPOLATIONS[given.get("resample", 3)],
        "resize_mode": mode,
        "fill_color": 0,
    }
    if given["do_center_crop"]:
        found |= {"crop_corner": "down"} | ({"resize_to": height} if height != side else {})
    return found, notes


def _processor(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the file that says how images are prepared, None where there is none, and what it says."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for name in (PREPROCESSOR, "processor_config.json"):
        path = folder / name
        if path.is_file():
            content: Any = read_json(path)
            if name != PREPROCESSOR:
                content = content.get("image_processor") if isinstance(content, dict) else content
                if content is None:
                    continue
            if not isinstance(content, dict):
                raise UserError("is no object", place=path, remedy="give the file that transformers wrote")
            found.append((path, content))
    if len(found) == 2:  # versions of transformers differ in which they read
        (first, one), (second, two) = found
        for name in sorted(STEPS & one.keys() & two.keys()):
            if one[name] != two[name]:
                message = f"{name} is {json.dumps(two[name])}, in {first.name} {json.dumps(one[name])}"
                raise UserError(message, place=second, remedy="take one of the two files away")
    return found[0] if found else (None, {})


def _check_steps(given: Mapping[str, Any], place: Path) -> None:
    factor = given.get("rescale_factor", 1 / 255)
    if not given.get("do_resize", True) or not given.get("do_rescale", True) or not math.isclose(factor, 1 / 255):
        message = "does not resize pictures and divide their pixels by 255"
        raise UserError(message, place=place, remedy="give do_resize, do_rescale and rescale_factor as they were saved")
    if given.get("resample", 3) not in INTERPOLATIONS:
        message = f"resample {given['resample']!r} is none of {', '.join(map(str, INTERPOLATIONS))}"
        raise UserError(message, place=place, remedy="give 3 (bicubic) or 2 (bilinear), as the model was trained")
    for name in ("image_mean", "image_std"):
        value = given[name]
        is_three = isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)
        if not is_three or not all(map(math.isfinite, value)) or (name == "image_std" and min(value) <= 0):
            raise UserError(f"{name} {value!r} is not three numbers", place=place, remedy="correct it")
        if max(map(abs, value)) > 1:
            message = f"{name} {value!r} is of pixels from 0 to 255"
            raise UserError(message, place=place, remedy="divide by 255: pixels go from 0 to 1")


def _resize(given: Mapping[str, Any], place: Path, side: int) -> tuple[str, int, int]:
    """Return how pictures are resized, and to which height and width; of `shortest` both are the shorter side."""
    size = given.get("size", side)
    if isinstance(size, dict) and "shortest_edge" in size and "longest_edge" not in size:
        size = size["shortest_edge"]
        return "shortest", *_sides(size, "size", place)
    # A number stands for the shorter side where a square is cut out behind it.
    mode = "shortest" if isinstance(size, int) and given["do_center_crop"] else "squash"
    return mode, *_sides(size, "size", place)


def _sides(size: Any, name: str, place: Path) -> tuple[int, int]:
    pair: Any = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if not all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in pair):
        remedy = "give shortest_edge, or height and width"
        raise UserError(f"{name} {json.dumps(size)} is no size of pictures", place=place, remedy=remedy)
    return int(pair[0]), int(pair[1])


# ---- Tensors from one layout into the other


NORMS_OF_CLIP = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
BLOCK = {  # of open_clip's transformer
    "attn.in_proj_": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "attn.out_proj.": ("self_attn.out_proj.",),
    "ln_1.": ("layer_norm1.",),
    "ln_2.": ("layer_norm2.",),
    "mlp.c_fc.": ("mlp.fc1.",),
    "mlp.c_proj.": ("mlp.fc2.",),
}
TIMM_BLOCK = {
    "attn.qkv.": BLOCK["attn.in_proj_"],
    "attn.proj.": ("self_attn.out_proj.",),
    "norm1.": ("layer_norm1.",),
    "norm2.": ("layer_norm2.",),
    "mlp.fc1.": ("mlp.fc1.",),
    "mlp.fc2.": ("mlp.fc2.",),
}


def _same(kind: str, text: Mapping[str, Any], image: Mapping[str, Any]) -> Iterator[Same]:
    own = "" if kind == "clip" else "text."
    yield Same((f"{own}token_embedding.weight",), ("text_model.embeddings.token_embedding.weight",))
    yield Same((f"{own}positional_embedding",), ("text_model.embeddings.position_embedding.weight",))
    yield from _blocks(f"{own}transformer.resblocks", "text_model", BLOCK, text["num_hidden_layers"])
    yield from _pair(f"{own}ln_final", "text_model.final_layer_norm")
    yield Same(("logit_scale",), ("logit_scale",), "plain" if kind == "clip" else "number")
    if kind == "clip":
        yield Same(("text_projection",), ("text_projection.weight",), "turned")
        yield from _clip_image(image)
    else:
        yield Same(("logit_bias",), ("logit_bias",), "number")
        yield from _pair("text.text_projection", "text_model.head")
        yield from _siglip_image(image, is_flat=kind == "siglip2")


def _clip_image(image: Mapping[str, Any]) -> Iterator[Same]:
    there = "vision_model.embeddings"
    yield Same(("visual.class_embedding",), (f"{there}.class_embedding",))
    yield Same(("visual.conv1.weight",), (f"{there}.patch_embedding.weight",))
    yield Same(("visual.positional_embedding",), (f"{there}.position_embedding.weight",))
    for norm, theirs in NORMS_OF_CLIP.items():
        yield from _pair(norm, theirs)
    yield from _blocks("visual.transformer.resblocks", "vision_model", BLOCK, image["num_hidden_layers"])
    yield Same(("visual.proj",), ("visual_projection.weight",), "turned")


def _siglip_image(image: Mapping[str, Any], *, is_flat: bool) -> Iterator[Same]:
    there, head, pool = "vision_model.embeddings", "vision_model.head", "visual.trunk.attn_pool"
    patches: Form = "patches" if is_flat else "plain"
    yield Same(("visual.trunk.patch_embed.proj.weight",), (f"{there}.patch_embedding.weight",), patches)
    yield Same(("visual.trunk.patch_embed.proj.bias",), (f"{there}.patch_embedding.bias",))
    yield Same(("visual.trunk.pos_embed",), (f"{there}.position_embedding.weight",), "batch of one")
    yield from _blocks("visual.trunk.blocks", "vision_model", TIMM_BLOCK, image["num_hidden_layers"])
    yield from _pair("visual.trunk.norm", "vision_model.post_layernorm")
    yield Same((f"{pool}.latent",), (f"{head}.probe",))
    for end in ("weight", "bias"):
        yield Same((f"{pool}.q.{end}", f"{pool}.kv.{end}"), (f"{head}.attention.in_proj_{end}",))
    for ours, theirs in {"proj": "attention.out_proj", "norm": "layernorm"}.items():
        yield from _pair(f"{pool}.{ours}", f"{head}.{theirs}")
    for layer in ("mlp.fc1", "mlp.fc2"):
        yield from _pair(f"{pool}.{layer}", f"{head}.{layer}")


def _pair(ours: str, theirs: str) -> Iterator[Same]:
    for end in ("weight", "bias"):
        yield Same((f"{ours}.{end}",), (f"{theirs}.{end}",))


def _blocks(ours: str, theirs: str, names: Mapping[str, Sequence[str]], count: int) -> Iterator[Same]:
    for number in range(count):
        for own, others in names.items():
            for end in ("weight", "bias"):
                found = tuple(f"{theirs}.encoder.layers.{number}.{other}{end}" for other in others)
                yield Same((f"{ours}.{number}.{own}{end}",), found)


def to_open_clip(
    weights: StoredTensors, foreign: ForeignModel, own: Mapping[str, torch.Tensor], source: WeightsSource
) -> tuple[StoredTensors, list[str]]:
    """Return the tensors under open_clip's names, and what was taken away of their own.

    Args:
        weights: all that the files hold, under whatever prefix.
        foreign: where each goes.
        own: the state of the model that they are to fill.
        source: named in errors.

    Raises:
        UserError: tensors are missing, or those of another model; names the first.
    """
    wanted = [name for same in foreign.same for name in same.theirs]
    naming = find_names(weights, wanted, place=source.weights)
    missing = [name for name in wanted if name not in naming.stored and not name.startswith("logit_")]
    if missing:
        if len(missing) > len(wanted) / 2:
            first = next(iter(weights.by_name))
            message = f"{len(wanted) - len(missing)} of {len(wanted)} tensors are there; the file's first is {first!r}"
            remedy = "give the weights that were saved with config.json"
        else:
            message, remedy = f"lacks {and_more(missing)}", "correct config.json, or save the weights again, whole"
        raise UserError(f"does not fit {source.config}: {message}", place=source.weights, remedy=remedy)
    unused = {name: raw for name, raw in naming.unused.items() if not name.endswith("position_ids")}
    parts = {name.split(".")[0] for name in wanted}
    inside = [raw for name, raw in unused.items() if name.split(".")[0] in parts]
    if inside:
        message = f"does not fit {source.config}, which has no {and_more(inside)}"
        raise UserError(message, place=source.weights, remedy="correct config.json: num_hidden_layers and model_type")
    by_name: dict[str, torch.Tensor] = {}
    for same in foreign.same:
        if all(name in naming.stored for name in same.theirs):
            by_name |= _ours(same, [weights.by_name[naming.stored[name]] for name in same.theirs], own)
    notes = [*naming.words, "converted from the layout of transformers"]
    if unused:
        notes.append(f"left out, as no part of the model: {and_more([*unused.values()])}")
    return StoredTensors(by_name=by_name, keys=frozenset({""}), is_openai=False), notes


def _ours(same: Same, theirs: Sequence[torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    joined = torch.cat(list(theirs)) if len(theirs) > 1 else theirs[0]
    if same.form == "turned":
        joined = joined.T
    elif same.form == "batch of one":
        joined = joined[None]
    elif same.form == "patches":  # flat, the colours of a pixel side by side
        out, colours, height, width = own[same.ours[0]].shape
        joined = joined.reshape(out, height, width, colours).permute(0, 3, 1, 2)
    if len(same.ours) == 1:
        return {same.ours[0]: joined}
    parts = joined.split([len(own[name]) for name in same.ours])
    return dict(zip(same.ours, parts, strict=True))


def save_foreign(state: Mapping[str, torch.Tensor], source: WeightsSource, folder: Path) -> None:
    """Write the tensors of a model of open_clip's as transformers has them, with all that lies beside the weights.

    Args:
        state: of the model.
        source: the folder that it came from.
        folder: to write into.
    """
    from safetensors.torch import save_file

    assert source.config is not None, "a folder has a configuration"
    theirs: dict[str, torch.Tensor] = {}
    for same in read_foreign(source.config).same:
        theirs |= _theirs(same, [state[name].detach().cpu() for name in same.ours])
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", *BESIDE):
        if (source.config.parent / name).is_file():
            shutil.copyfile(source.config.parent / name, folder / name)


def _theirs(same: Same, ours: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    joined = torch.cat(list(ours)) if len(ours) > 1 else ours[0]
    if same.form == "turned":
        joined = joined.T
    elif same.form == "batch of one":
        joined = joined[0]
    elif same.form == "patches":
        joined = joined.permute(0, 2, 3, 1).flatten(1)
    elif same.form == "number":  # a vector of one there
        joined = joined.reshape(1)
    parts = joined.chunk(len(same.theirs)) if len(same.theirs) > 1 else [joined]
    return {name: part.clone().contiguous() for name, part in zip(same.theirs, parts, strict=True)}
