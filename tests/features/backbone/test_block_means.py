"""The view `stages`: means of blocks, recomputed here by walking through the towers block by block in float64."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.block_means import StageTower, chunks_of_shape, find_blocks, spread
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.view_vectors import make_views
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.views import OF_TOWER, RECIPES
from deltaclip.tests.features.backbone.small_models import as_backbone

CUBIC = Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def tiny(tiny_backbone):
    return load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def mobilenet(mobilenet_backbone):
    return load_backbone(find_weights(mobilenet_backbone, None), device="cpu", precision="fp32")


def pictures(sizes):
    generator = np.random.default_rng(0)
    small = [generator.integers(0, 256, (9, 11, 3), dtype=np.uint8) for _ in sizes]
    return [Image.fromarray(part).resize(size, 3) for part, size in zip(small, sizes, strict=True)]


def encode(backbone, images, *, batch_size=64):
    (view,) = make_views(backbone, ["stages"], batch_size=batch_size)
    return view, view.encode([view.crops(image) for image in images])


def close(found, expected):
    # float32 layers against float64 ones: 1e-5 of the largest mean
    np.testing.assert_allclose(found.unit_BD, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found.norm_B, np.linalg.norm(expected, axis=1), rtol=1e-5)
    assert found.unit_BD.dtype == found.norm_B.dtype == np.float32


@pytest.mark.parametrize("batch_size", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_a_transformer(tiny, *, batch_size):
    images = pictures([(96, 96), (200, 120), (1, 1), (500, 5)])
    view, found = encode(tiny, images, batch_size=batch_size)
    tower, expected = tiny.model.visual.double(), []
    for image in images:
        with torch.inference_mode():
            patches = tower.conv1(tiny.preprocess(image)[None].double()).flatten(2).transpose(1, 2)
            tokens = torch.cat([tower.class_embedding[None, None], patches], dim=1) + tower.positional_embedding
            tokens, means = tower.ln_pre(tokens), []
            for block in tower.transformer.resblocks:
                tokens = block(tokens)
                means.append(tokens[0].mean(0))
        expected.append(torch.cat(means).numpy())
    tower.float()
    close(found, np.stack(expected))
    blocks = [f"transformer.resblocks.{number}" for number in range(6)]
    assert view.recipe == RECIPES["stages"] | {OF_TOWER: {"blocks": blocks, "widths": [128] * 6}}
    assert (view.width, view.source) == (768, "center")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_convolutional_tower(mobilenet, *, batch_size):
    sizes = {(512, 512): (384, 384), (384, 384): (384, 384), (300, 451): (384, 577), (1, 1): (384, 384)}
    sizes |= {(3000, 30): (768, 384), (40, 90): (384, 768), (64, 64): (384, 384)}
    images = pictures(sizes)
    view, found = encode(mobilenet, images, batch_size=batch_size)
    trunk, cfg, expected = mobilenet.model.visual.trunk.double(), mobilenet.facts["preprocessing"], []
    for image, size in zip(images, sizes.values(), strict=True):
        if image.height > 2 * image.width:
            image = image.resize((image.width, size[1]), CUBIC)  # noqa: PLW2901 - height first, as the view does
        pixels = to_tensor(image.resize(size, CUBIC))
        with torch.inference_mode():
            maps = trunk.bn1(trunk.conv_stem(normalize(pixels, cfg["mean"], cfg["std"])[None].double()))
            means = []
            for stage in trunk.blocks:
                maps = stage(maps)
                means.append(maps[0].mean((1, 2)))
        expected.append(torch.cat(means).numpy())
    trunk.float()
    close(found, np.stack(expected))
    tower = {"blocks": [f"trunk.blocks.{number}" for number in range(7)], "widths": [16, 24, 32, 64, 96, 160, 320]}
    assert view.recipe == RECIPES["stages"] | {OF_TOWER: tower | {"short_side": 384}}
    assert (view.width, view.source) == (712, "stages")


def bare(tower, size=64):
    """As much of a backbone as a tower needs."""
    return SimpleNamespace(
        encoder=SimpleNamespace(visual=tower), facts={"backbone": "bare", "preprocessing": {"size": size}}
    )


def test_a_resnet_stops_before_its_attention_pool():
    torch.manual_seed(0)
    tower = ModifiedResNet([1, 2, 1, 1], output_dim=32, heads=2, image_size=64, width=8).eval()
    stages = StageTower(bare(tower), other_size=(110, 111))
    assert (stages.takes_any_size, stages.blocks) == (True, ["layer1", "layer2", "layer3", "layer4"])
    assert stages.widths == [32, 64, 128, 256]
    pixels = torch.randn(3, 3, 96, 130)
    with torch.inference_mode():
        with pytest.raises((RuntimeError, AssertionError)):
            tower(pixels)
        x, means = tower.stem(pixels), []
        for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            x = layer(x)
            means.append(x.double().mean((2, 3)))
    torch.testing.assert_close(stages(pixels).double(), torch.cat(means, dim=1), rtol=1e-5, atol=1e-6)


def test_sums_of_16_bit_towers_are_of_32_bits(tiny_backbone, tiny):
    backbone = load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="bf16")
    images = pictures([(96, 96), (200, 120)])
    found, exact = (encode(model, images)[1].unit_BD for model in (backbone, tiny))
    # bf16 has 8 bits: 2 % of the vector's length after six blocks is what rounding of activations gives
    np.testing.assert_allclose(found, exact, atol=0.02 * np.linalg.norm(exact, axis=1).max())
    assert (found.astype(np.float16) != found).any()


def test_the_model_keeps_no_hook_and_shares_its_weights(tiny):
    before = {name: id(module) for name, module in tiny.model.named_modules()}
    view, _ = encode(tiny, pictures([(96, 96)]))
    assert {name: id(module) for name, module in tiny.model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.model.modules())
    twin = view.encode.args[1]._twin
    ours, theirs = (dict(tower.named_parameters()) for tower in (twin, tiny.model.visual))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)


def test_other_threads_may_use_the_model_meanwhile(tiny):
    images = pictures([(96, 96), (120, 130)])
    views = make_views(tiny, ["center", "stages"], batch_size=4)
    crops = [views[0].crops(image) for image in images]
    expected = [view.encode(crops).unit_BD for view in views]
    wrong = []

    def work(number):
        for _ in range(20):
            both = [found.unit_BD for found in views[1].with_center(crops)]
            alone = both[number % 2] if number < 2 else views[number % 2].encode(crops).unit_BD
            wrong.extend(found for found in both if not any(np.array_equal(found, one) for one in expected))
            wrong.extend([] if np.array_equal(alone, expected[number % 2]) else [alone])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


ONE_SIZE = [
    "vit",
    "vit, quick gelu, no norm before",
    "vit, attention pool, patch dropout",
    "vit, mean pool, layer scale",
    "vit, blocks of its own",
    "custom text, no causal mask",
    "coca",
    "siglip",
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ONE_SIZE)
def test_one_pass_gives_the_embeddings_and_the_means_bit_for_bit(name, precision):
    backbone = as_backbone(name, precision)
    size = backbone.facts["preprocessing"]["size"]
    pixels = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    tower = StageTower(backbone, other_size=(2 * size, 2 * size))
    assert not tower.takes_any_size
    both, means = tower.with_features(pixels), tower(pixels)
    with torch.inference_mode():
        features = backbone.encoder.encode_image(pixels.to(next(backbone.model.parameters()).dtype))
    assert torch.equal(both[:, : -sum(tower.widths)], features.float())
    assert torch.equal(both[:, -sum(tower.widths) :], means)
    assert both.dtype == torch.float32
    exact = StageTower(as_backbone(name), other_size=(2 * size, 2 * size))(pixels)
    # bf16 has 8 bits, and there are 3 or 4 blocks: a hundredth of the vector's length each
    room = {"fp32": 0.0, "bf16": 0.03}[precision]
    assert (means - exact).norm(dim=1).max() <= room * exact.norm(dim=1).min()


def test_the_last_block_gives_the_mean_of_all_tokens_though_one_is_pooled():
    backbone = as_backbone("vit", "bf16")
    pool = vars(backbone.encoder.visual.transformer.resblocks[-1]).get("forward")
    if pool is None:
        pytest.skip("no units of 16 bits, so no packed twin")
    x = torch.randn(300, 10, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    block = backbone.model.visual.transformer.resblocks[-1]
    with torch.inference_mode():
        first, mean = pool.with_mean(x)
        assert torch.equal(first, pool(x))
        exact = copy.deepcopy(block).float()(x.float()).mean(dim=1)
        hidden = torch.zeros(10, 10).bfloat16()
        all_tokens, mean_of_all = pool.with_mean(x, attn_mask=hidden)  # what it does not know, it does in full
    assert (mean - exact).norm(dim=1).max() < 0.01 * exact.norm(dim=1).min()
    assert (mean_of_all - exact).norm(dim=1).max() < 0.01 * exact.norm(dim=1).min()
    assert all_tokens.shape == x.shape


class Pairs(torch.nn.Module):
    """A stage with two results."""

    def forward(self, x):
        return x, x


def tower_with(stages):
    """A tower that has these stages where timm has them."""
    tower = torch.nn.Sequential()
    tower.add_module("trunk", torch.nn.Sequential())
    tower.trunk.add_module("stages", torch.nn.Sequential(*stages))
    return tower


NO_NAME = "its Sequential has none of transformer.resblocks, trunk.blocks, trunk.stages and layer1 to layer4"


@pytest.mark.parametrize(
    ("tower", "why"),
    [
        (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), NO_NAME),
        (tower_with([]), NO_NAME),
        (tower_with([torch.nn.Conv2d(3, 4, 3), Pairs()]), "its blocks give neither maps nor tokens"),
        (tower_with([torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()]), "its blocks give neither maps nor tokens"),
    ],
)
def test_a_tower_without_known_blocks_is_refused(tower, why):
    with pytest.raises(UserError) as caught:
        StageTower(bare(tower), other_size=(70, 71))
    assert str(caught.value) == f"bare: has no blocks that can be read: {why}; leave stages out of --views"


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [0]),
        (12, [*range(12)]),
        (13, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]),
        (24, [*range(1, 24, 2)]),
        (48, [*range(3, 48, 4)]),
    ],
)
def test_at_most_twelve_blocks_the_last_one_included(count, expected):
    assert spread([str(number) for number in range(count)]) == [str(number) for number in expected]


def test_blocks_come_in_the_order_of_the_tower():
    tower = torch.nn.Module()
    tower.transformer = torch.nn.Module()
    tower.transformer.resblocks = torch.nn.ModuleList([torch.nn.Identity() for _ in range(11)])
    assert find_blocks(tower) == [f"transformer.resblocks.{number}" for number in range(11)]


@pytest.mark.parametrize(
    ("shapes", "most", "chunks"),
    [
        ([], 10, []),
        ([(2, 2)] * 5, 8, [[0, 1], [2, 3], [4]]),
        ([(2, 2)] * 3, 1, [[0], [1], [2]]),
        ([(2, 3), (3, 2), (2, 3), (4, 4), (3, 2)], 18, [[0, 2], [1, 4], [3]]),
    ],
)
def test_images_of_one_shape_go_together(shapes, most, chunks):
    assert chunks_of_shape([(1, 3, *shape) for shape in shapes], most) == chunks
