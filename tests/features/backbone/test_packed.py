"""Packed weights: no further from fp32 than the model in bfloat16 itself, for every family of towers."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import timm.layers
import torch

from deltaclip.base.device import cpu_has_bf16_units
from deltaclip.features.backbone.block_means import StageTower
from deltaclip.features.backbone.encode import encode_images, encode_texts, in_parts, to_unit_length, try_images
from deltaclip.features.backbone.packed import ATTENTION_BYTES, can_pack, packed_twin
from deltaclip.tests.features.backbone.small_models import MODELS, as_backbone, make_model, tokenizer

needs_packing = pytest.mark.skipif(not can_pack(), reason="this torch or processor has no packed 16-bit products")


def pixels_of(name, count=3):
    size = MODELS[name]["vision_cfg"]["image_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def unit(features):
    return torch.nn.functional.normalize(features.float(), dim=-1)


def test_processors_with_units_for_it_can_pack():
    assert can_pack() or not cpu_has_bf16_units()


@needs_packing
@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_as_exact_as_without(name):
    exact, plain = make_model(name), as_backbone(name, "bf16").model
    twin = packed_twin(plain)
    pixels, ids = pixels_of(name, 16), tokenizer()([f"{'a cat ' * (number % 6)}{number}" for number in range(16)])
    with torch.inference_mode():
        for method, given, half in (("encode_image", pixels, pixels.bfloat16()), ("encode_text", ids, ids)):
            reference = unit(getattr(exact, method)(given))
            without, found = (unit(getattr(model, method)(half)) for model in (plain, twin))
            error, allowed = ((each - reference).norm(dim=-1).mean() for each in (found, without))
            assert error <= 1.25 * allowed + 0.002, method


@needs_packing
@pytest.mark.parametrize("name", ["vit", "timm vit", "vit, quick gelu, no norm before", "coca"])
def test_linear_layers_run_packed_and_the_model_does_not(name):
    backbone = as_backbone(name, "bf16")
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    assert backbone.encoder is not backbone.model
    pixels = pixels_of(name).bfloat16()

    def products(model):
        with torch.inference_mode(), torch.profiler.profile() as profile:
            model.encode_image(pixels)
        return {event.key: event.count for event in profile.key_averages()}

    blocks = MODELS[name]["vision_cfg"].get("layers", 6)
    assert products(backbone.encoder)["mkldnn::_linear_pointwise"] >= 4 * blocks + 1  # and the patches
    assert "mkldnn::_linear_pointwise" not in products(backbone.model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.model.state_dict().items())


@needs_packing
def test_the_activation_goes_into_the_product():
    for name, activation in (("vit", "aten::gelu"), ("timm vit", "aten::gelu")):
        backbone = as_backbone(name, "bf16")
        with torch.inference_mode(), torch.profiler.profile() as profile:
            backbone.encoder.encode_image(pixels_of(name).bfloat16())
        assert activation not in {event.key for event in profile.key_averages()}


@needs_packing
def test_weights_that_change_are_seen():
    backbone, pixels = as_backbone("vit", "bf16"), pixels_of("vit")
    old = encode_images(backbone, pixels).unit_BD
    assert backbone.encoder is backbone.encoder
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.mul_(-1)
        new = to_unit_length(backbone.model.encode_image(pixels.bfloat16())).unit_BD
    found = encode_images(backbone, pixels).unit_BD
    assert np.linalg.norm(found - new, axis=1).max() < 0.1 < np.linalg.norm(found - old, axis=1).min()
    backbone.model.load_state_dict(as_backbone("vit", "bf16").model.state_dict())
    np.testing.assert_array_equal(encode_images(backbone, pixels).unit_BD, old)


@needs_packing
def test_a_backbone_in_use_can_be_pickled_and_copied():
    backbone, pixels = as_backbone("vit", "bf16"), pixels_of("vit")
    expected = encode_images(backbone, pixels).unit_BD
    pickled = pickle.loads(pickle.dumps(backbone))  # noqa: S301 - our own bytes
    for other in (pickled, copy.deepcopy(backbone)):
        np.testing.assert_array_equal(encode_images(other, pixels).unit_BD, expected)
        assert other.encoder is not backbone.encoder


class Odd(torch.nn.Module):
    """What a tower may do with its layers: one activation in two places, a convolution that pads by itself."""

    def __init__(self):
        super().__init__()
        activation = torch.nn.GELU()
        self.twice = torch.nn.Sequential(
            torch.nn.Linear(8, 8), activation, torch.nn.LayerNorm(8), activation, torch.nn.Linear(8, 8)
        )
        self.padded = timm.layers.Conv2dSame(3, 8, 4, 4)
        self.patches = torch.nn.Conv2d(3, 8, (4, 2), (4, 2))
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x_BSC, pixels_B3HW, hidden_SS):
        y = self.twice(x_BSC)
        z = self.attention(query=y, key=x_BSC, value=x_BSC, need_weights=False)[0]
        z = z + self.attention(y, y, y, need_weights=False, attn_mask=hidden_SS)[0]
        maps = [self.padded(pixels_B3HW), self.patches(pixels_B3HW), self.patches(pixels_B3HW[0])[None]]
        return torch.cat([z.flatten(), *(part.flatten() for part in maps)])


@needs_packing
def test_modules_in_unusual_use_give_what_they_gave():
    torch.manual_seed(0)
    module = Odd().bfloat16().eval()
    x, pixels = torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 3, 18, 19).bfloat16()
    with torch.inference_mode():
        given = (x, pixels, torch.ones(5, 5, dtype=torch.bool).triu(1))
        found, expected = packed_twin(module)(*given), module(*given)
        torch.testing.assert_close(found.float(), expected.float(), atol=0.03, rtol=0.03)
    with pytest.raises(RuntimeError, match="Kernel size"):
        packed_twin(module).patches(pixels[:, :, :3])


@needs_packing
def test_what_cannot_be_copied_stays_as_it_is():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4)).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(module[0])
    module(torch.zeros(1, 4).bfloat16())
    assert packed_twin(module) is module


@needs_packing
def test_a_copy_gives_the_same_and_fp32_is_never_packed():
    backbone = as_backbone("vit", "bf16")
    pixels = pixels_of("vit").bfloat16()
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(backbone.encoder).encode_image(pixels), backbone.encoder.encode_image(pixels))
    exact = as_backbone("vit")
    assert exact.encoder is exact.model


@needs_packing
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", True),
        ("vit, quick gelu, no norm before", True),
        ("custom text, no causal mask", True),
        ("vit, mean pool, layer scale", False),
        ("vit, attention pool, patch dropout", False),
        ("vit, blocks of its own", False),
        ("coca", False),
    ],
)
def test_the_last_block_computes_what_is_pooled(name, expected):
    backbone, pixels = as_backbone(name, "bf16"), pixels_of(name, 8).bfloat16()
    early = backbone.encoder
    block = early.visual.transformer.resblocks[-1]
    assert ("forward" in vars(block)) is expected
    whole = packed_twin(backbone.model)
    vars(whole.visual.transformer.resblocks[-1]).pop("forward", None)
    with torch.inference_mode():
        found, all_tokens = (unit(model.encode_image(pixels)) for model in (early, whole))
        assert (found - all_tokens).norm(dim=-1).max() <= (0.02 if expected else 0)
        hidden = torch.zeros(10, 10).bfloat16()
        x = torch.randn(2, 10, 64).bfloat16()
        assert block(x, attn_mask=hidden).shape == x.shape  # what it does not know, it does in full


@needs_packing
def test_stages_read_all_tokens_of_the_last_block():
    backbone, pixels = as_backbone("vit", "bf16"), pixels_of("vit")
    last = []
    model = as_backbone("vit", "bf16").model
    model.visual.transformer.resblocks[-1].register_forward_hook(lambda _module, _given, out: last.append(out))
    with torch.inference_mode():
        model.encode_image(pixels.bfloat16())
        tower = StageTower(backbone, other_size=(48, 49))
        found = tower(pixels)[:, -tower.widths[-1] :]
    expected = last[0].float().mean(dim=1)
    assert (found - expected).norm(dim=1).max() < 0.03 * expected.norm(dim=1).min()


@needs_packing
def test_attention_in_parts_of_a_batch_is_the_same():
    # 10 tokens, 2 heads: more images than weights of attention may be in memory at once.
    count = ATTENTION_BYTES // (2 * 10 * 10 * 2) + 5
    tower = packed_twin(as_backbone("vit", "bf16").model).visual.transformer.resblocks[0].attn
    x = torch.randn(count, 10, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.randn(count * 2, 10, 10, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        for added in (None, mask[0], mask):
            together = tower(x, x, x, need_weights=False, attn_mask=added)[0]
            few, of_few = x[-3:], added if added is not mask else mask[-6:]
            last = tower(few, few, few, need_weights=False, attn_mask=of_few)
            assert torch.equal(together[-3:], last[0])


@needs_packing
def test_threads_change_no_bit_and_stay_as_they_were():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        backbone = as_backbone("vit", "bf16")
        pixels = pixels_of("vit", 40)
        few = [try_images(backbone, part) for part in pixels.split(10)]
        whole = [np.concatenate([part[field] for part in few]) for field in (0, 1)]
        found = try_images(backbone, pixels)  # in two parts
        assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True))
        texts = [f"{'cat ' * (number % 5)}{number}" for number in range(70)]
        alone = np.concatenate([encode_texts(backbone, texts[n : n + 10]).unit_BD for n in range(0, 70, 10)])
        np.testing.assert_allclose(encode_texts(backbone, texts).unit_BD, alone, atol=0.01)
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), later) == (2, [2])
    finally:
        torch.set_num_threads(threads)


def test_parts_come_back_in_order_and_errors_come_through():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen, together = [], threading.Barrier(3)

        def encode(part):
            if len(part) < 13:
                together.wait(timeout=60)
            seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
            return part * 2

        batch = torch.arange(50.0).view(25, 2)
        assert torch.equal(in_parts(encode, batch, smallest=8), batch * 2)
        assert len({ident for ident, *_ in seen}) == 3
        assert {(count, gradients) for _, count, gradients in seen} == {(1, False)}
        seen.clear()
        assert torch.equal(in_parts(encode, batch, smallest=13), batch * 2)
        assert seen == [(threading.get_ident(), 3, False)]
        with pytest.raises(ZeroDivisionError):
            in_parts(lambda part: 1 // 0, batch, smallest=8)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("threads", "items", "expected"),
    [(4, 64, [(16, 1)] * 4), (6, 64, [(22, 2), (21, 2), (21, 2)]), (7, 64, [(64, 7)]), (4, 32, [(16, 2)] * 2)],
)
def test_no_processor_is_left_without_work(threads, items, expected):
    before, seen, lock = torch.get_num_threads(), [], threading.Lock()

    def encode(part):
        with lock:
            seen.append((len(part), torch.get_num_threads()))
        return part

    torch.set_num_threads(threads)
    try:
        in_parts(encode, torch.zeros(items, 1), smallest=16)
    finally:
        torch.set_num_threads(before)
    assert sorted(seen, reverse=True) == expected
