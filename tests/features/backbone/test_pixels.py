"""Pixels: bit for bit those of open_clip's own transform, unless another way was asked for; then within its bound."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.load import Backbone
from deltaclip.features.backbone.pixels import as_batch, center_crops, normalise
from deltaclip.features.backbone.view_vectors import file_opener
from deltaclip.features.data.images import open_image

CONFIGS = {
    "openai": {},
    "tiny": {"size": 96, "mean": (0.5,) * 3, "std": (0.25,) * 3},
    "siglip": {"resize_mode": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3},
    "bilinear": {"interpolation": "bilinear"},
    "wide": {"size": (96, 160)},
    "longest": {"resize_mode": "longest", "fill_color": 7},
}
SIZES = [(224, 224), (512, 512), (37, 500), (300, 225), (224, 223), (640, 96)]


def make_backbone(name, decode="exact"):
    cfg = PreprocessCfg(**CONFIGS[name])
    preprocessing = {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.__dict__.items()}
    return Backbone(
        model=torch.nn.Identity(),
        preprocess=image_transform_v2(cfg, is_train=False),
        tokenizer=None,
        device="cpu",
        precision="fp32",
        facts={"preprocessing": preprocessing, "backbone": name},
        decode=decode,
    )


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def as_jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("decode", ["exact", "draft"])
def test_bits_are_those_of_open_clip(name, decode):
    backbone = make_backbone(name, decode)
    crops = center_crops(backbone)
    images = [picture(*size) for size in SIZES]
    found = [crops(image) for image in images]
    assert {part.dtype for part in found} == {torch.uint8}
    expected = torch.stack([backbone.preprocess(image) for image in images])
    assert torch.equal(normalise(backbone, as_batch(backbone, found)), expected)


def test_every_level_of_every_channel():
    backbone = make_backbone("openai")
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    as_image = Image.fromarray(levels[0].permute(1, 2, 0).numpy())
    expected = backbone.preprocess.transforms[-1](backbone.preprocess.transforms[-2](as_image))
    assert torch.equal(normalise(backbone, levels)[0], expected)


def test_an_unknown_transform_gives_what_it_gives():
    backbone = dataclasses.replace(make_backbone("openai"), preprocess=lambda image: torch.ones(3, 2, 2) / image.width)
    found = center_crops(backbone)(picture(10, 10))
    assert torch.equal(normalise(backbone, found), torch.full((1, 3, 2, 2), 0.1))
    with pytest.raises(UserError, match="cannot resize"):
        center_crops(dataclasses.replace(backbone, decode="fast"))


@pytest.mark.parametrize("name", ["openai", "tiny", "siglip", "bilinear"])
def test_fast_is_within_two_levels(name):
    exact, fast = make_backbone(name), make_backbone(name, "fast")
    apart = []
    for seed, size in enumerate(SIZES):
        content = as_jpeg(picture(*size, seed=seed))
        one = center_crops(exact)(file_opener(exact)(content)).int()
        other = center_crops(fast)(file_opener(fast)(content)).int()
        assert one.shape == other.shape
        apart.append((one - other).abs().max().item())
    assert max(apart) <= 2
    assert max(apart) > 0, "the fast way was not taken"


@pytest.mark.parametrize("name", ["wide", "longest"])
def test_fast_refuses_what_it_cannot_resize(name):
    with pytest.raises(UserError) as caught:
        center_crops(make_backbone(name, "fast"))
    mode = "longest" if name == "longest" else "shortest"
    assert str(caught.value) == f"--decode fast: cannot resize as {name} needs ({mode}); give --decode exact"


def test_draft_reads_less_and_keeps_enough():
    backbone = make_backbone("openai", "draft")
    opened = file_opener(backbone)
    image = picture(1000, 480)
    assert opened(as_jpeg(image)).size == (500, 240)
    assert opened(as_jpeg(picture(440, 440))).size == (440, 440)  # a half would be less than 224
    file = io.BytesIO()
    image.save(file, "PNG")
    assert opened(file.getvalue()).size == (1000, 480)
    whole = center_crops(backbone)(open_image(as_jpeg(image))).float()
    reduced = center_crops(backbone)(opened(as_jpeg(image))).float()
    assert 0 < (whole - reduced).abs().mean() < 10
