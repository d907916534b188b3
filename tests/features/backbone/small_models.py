"""Small models of every family of towers, with random weights, as `load_backbone` gives them."""

from __future__ import annotations

import functools
import json

import open_clip
import torch
from open_clip.coca_model import CoCa
from safetensors.torch import save_file

from deltaclip.features.backbone.load import Backbone

WIDTH = 24  # D
VIT = {"layers": 4, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 48}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}
RESNET = {"layers": [1, 2, 1, 1], "width": 8, "head_width": 32, "image_size": 64}


def timm(name, size, **more):
    return {"timm_model_name": name, "image_size": size, "timm_pool": "", "timm_proj": "linear"} | more


MODELS = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "vit, quick gelu, no norm before": {"vision_cfg": VIT | {"no_ln_pre": True}, "text_cfg": TEXT, "quick_gelu": True},
    "vit, attention pool, patch dropout": {
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_queries": 5, "patch_dropout": 0.5},
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 49407, "proj_bias": True},
    },
    "vit, mean pool, layer scale": {
        "vision_cfg": VIT | {"pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.5},
        "text_cfg": TEXT | {"ls_init_value": 0.5, "pool_type": "last"},
    },
    "vit, blocks of its own": {
        "vision_cfg": VIT | {"qk_norm": True, "scale_attn": True, "scale_fc": True},
        "text_cfg": TEXT | {"scale_heads": True, "block_type": "custom"},
    },
    "custom text": {"vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    "custom text, no causal mask": {
        "vision_cfg": VIT | {"pos_embed_type": "sin_cos_2d"},
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"},
        "custom_text": True,
    },
    "coca": {
        "custom_text": True,
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_queries": 5, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "resnet": {"vision_cfg": RESNET, "text_cfg": TEXT},
    "siglip": {
        "embed_dim": 96,
        "vision_cfg": timm("test_vit3", 160, timm_pool="map", timm_proj="none"),
        "text_cfg": TEXT | {"width": 96, "no_causal_mask": True, "pool_type": "last", "proj_type": "none"},
        "init_logit_bias": -10.0,
        "custom_text": True,
    },
    "timm vit": {"vision_cfg": timm("test_vit", 160), "text_cfg": TEXT},
    "timm convnext": {"vision_cfg": timm("test_convnext", 160, timm_pool="avg"), "text_cfg": TEXT},
    "timm efficientnet": {"vision_cfg": timm("test_efficientnet", 160, timm_pool="avg"), "text_cfg": TEXT},
    "timm resnet": {"vision_cfg": timm("test_resnet", 160, timm_pool="avg"), "text_cfg": TEXT},
}
# Architectures that people use, at a size of pictures that is none; bf16 harms the first.
PUBLISHED = {
    "mobilenet": {"vision_cfg": timm("mobilenetv2_050", 96, timm_pool="avg", timm_proj=None), "text_cfg": TEXT},
    "fastvit": {"vision_cfg": timm("fastvit_t8", 64, timm_pool="avg", timm_proj=None), "text_cfg": TEXT},
    "eva": {  # timm's class Eva, of those that take any size
        "vision_cfg": timm("vit_tiny_patch16_dinov3_qkvb", 48, timm_pool="token"),
        "text_cfg": TEXT,
    },
    "regnet": {"vision_cfg": timm("regnetx_002", 64, timm_pool="avg", timm_proj=None), "text_cfg": TEXT},
    "few words": {"vision_cfg": VIT, "text_cfg": TEXT | {"context_length": 7}},
}


def make_model(name, noise=None):
    """A model of open_clip with random weights, in evaluation mode; every part of it changes the result.

    `noise` is what is added to each of its numbers; by default so much that a ResNet gives one vector for all pictures.
    """
    torch.manual_seed(0)
    config = {"embed_dim": WIDTH, **(MODELS | PUBLISHED)[name]}
    is_custom = config.pop("custom_text", False)
    form = CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    model = form(**config)
    with torch.no_grad():
        if form is CoCa:  # open_clip leaves it as the memory was: NaN now and then, which equals nothing
            model.text_decoder.text_projection.normal_(std=0.1)
        for part in (*model.parameters(), *model.buffers()):
            if part.is_floating_point() and bool(part.isfinite().all()):  # not the causal mask
                part.add_(torch.rand_like(part) * 0.1 if noise is None else torch.randn_like(part) * noise)
    return model.eval()


def as_backbone(name, precision="fp32"):
    """Return a model as `load_backbone` gives it."""
    model, config = make_model(name), (MODELS | PUBLISHED)[name]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    facts = {
        "backbone": name,
        "weights_sha256": "00" * 32,
        "preprocessing": {"size": config["vision_cfg"]["image_size"]},
        "precision": precision,
        "dim": config.get("embed_dim", WIDTH),
        "context_length": TEXT["context_length"],
        "quick_gelu": bool(config.get("quick_gelu")),
    }
    return Backbone(
        model=model.to(dtype), preprocess=None, tokenizer=tokenizer(), device="cpu", precision=precision, facts=facts
    )


def as_folder(name, folder):
    """Write a model that tells pictures apart, as a user has it, and return its name for `--backbone`."""
    folder.mkdir(parents=True)
    config = {"model_cfg": {"embed_dim": WIDTH, **(MODELS | PUBLISHED)[name]}, "preprocess_cfg": {}}
    if "multimodal_cfg" in config["model_cfg"]:
        config["model_cfg"]["custom_text"] = True  # how open_clip knows a CoCa
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = make_model(name, noise=0.02)
    _settle(model, config["model_cfg"]["vision_cfg"]["image_size"])
    state = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def _settle(model, size):
    """Give batch norms the statistics of some pictures, as training would: features differ between pictures then."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
        norm.train()
    pixels = torch.nn.functional.interpolate(torch.rand(16, 3, 6, 6), size=(size, size), mode="bicubic")
    with torch.no_grad():
        model.encode_image(4 * pixels - 2 + 0.1 * torch.randn_like(pixels))
    model.eval()


@functools.cache
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
