"""Cut towers: the parts give what the whole gives, and exactly what the spec says is frozen."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.low_rank import LowRank
from deltaclip.features.backbone.towers import cut_towers
from deltaclip.features.backbone.weights import find_weights
from deltaclip.tests.features.backbone.small_models import MODELS, TEXT, as_backbone, make_model, tokenizer

FAST = ("vit", "resnet", "siglip", "timm convnext")  # a family each; the others once, in CI
TEXTS = ["a cat", "two red circles", "x " * 30]
# The same weights and operations in fp32, of the largest value: only the order of sums may differ.
FP32 = 1e-5


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are faster without a second thread, and so are tests that run beside others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def depths(name):
    """Number of image and text blocks, by another way than the code's."""
    model = make_model(name)
    tower = getattr(model.visual, "trunk", model.visual)
    if hasattr(tower, "layer4"):
        return 4, TEXT["layers"]
    blocks = (
        tower.transformer.resblocks
        if hasattr(tower, "transformer")
        else tower.stages
        if hasattr(tower, "stages")
        else tower.blocks
    )
    return len(blocks), TEXT["layers"]


def inputs(name, count=3):
    size = MODELS[name]["vision_cfg"]["image_size"]
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return pixels, tokenizer()(TEXTS[:count])


def whole(name):
    """Features of a model that nobody cut."""
    model, (pixels, ids) = make_model(name), inputs(name)
    with torch.no_grad():
        return model.encode_image(pixels, normalize=False), model.encode_text(ids, normalize=False)


def assert_close(found, expected, tolerance=FP32):
    assert found.shape == expected.shape
    with torch.no_grad():
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_parts_give_what_the_whole_gives(name):
    pixels, ids = inputs(name)
    v, t = whole(name)
    depth, text_depth = depths(name)
    for freeze in sorted({0, 1, depth // 2, depth}):
        image, text = cut_towers(as_backbone(name), freeze_layers=freeze, freeze_text_layers=min(freeze, text_depth))
        assert (image.depth, image.frozen_blocks, image.kind, image.all_frozen) == (depth, freeze, "image", False)
        assert (text.depth, text.frozen_blocks, text.kind) == (text_depth, min(freeze, text_depth), "text")
        assert text.all_frozen == (freeze >= text_depth)
        at_boundary, text_at_boundary = image.to_boundary(pixels), text.to_boundary(ids)
        assert (at_boundary.shape[1:], text_at_boundary.shape[1:]) == (image.boundary_shape, text.boundary_shape)
        assert not at_boundary.requires_grad
        found, found_text = image.from_boundary(at_boundary), text.from_boundary(text_at_boundary, ids)
        assert_close(found, v)
        assert_close(found_text, t)
        assert found.requires_grad
        assert found_text.requires_grad == (not text.all_frozen)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_model_and_reach_all_that_trains(name):
    pixels, ids = inputs(name)
    image, text = cut_towers(as_backbone(name), freeze_layers=depths(name)[0] // 2, freeze_text_layers=1)
    loss = image.from_boundary(image.to_boundary(pixels)).square().sum()
    loss = loss + text.from_boundary(text.to_boundary(ids), ids).square().sum()
    loss.backward()
    model = make_model(name)
    (
        model.encode_image(pixels, normalize=False).square().sum()
        + model.encode_text(ids, normalize=False).square().sum()
    ).backward()
    expected = dict(model.named_parameters())
    for tower in (image, text):
        assert tower.named_trainable()
        for key, parameter in tower.named_trainable().items():
            assert parameter.grad is not None, key
            assert_close(parameter.grad, expected[key].grad, tolerance=1e-3)  # sums over all tokens of all images
        assert all(parameter.grad is None for parameter in tower.named_frozen().values())


BEFORE = ("conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight", "ln_pre.bias")
TEXT_BEFORE = ("positional_embedding", "token_embedding.weight")


def blocks_of(prefix, names, first, last):
    return {name for name in names if any(name.startswith(f"{prefix}{number}.") for number in range(first, last))}


def test_exactly_the_first_blocks_and_the_embeddings_are_frozen():
    backbone = as_backbone("vit")
    image, text = cut_towers(backbone, freeze_layers=3, freeze_text_layers=1)
    names = {name for name, _ in backbone.model.named_parameters()}
    frozen = {f"visual.{name}" for name in BEFORE} | blocks_of("visual.transformer.resblocks.", names, 0, 3)
    assert image.named_frozen().keys() == frozen
    assert image.named_trainable().keys() == {name for name in names if name.startswith("visual.")} - frozen
    text_frozen = set(TEXT_BEFORE) | blocks_of("transformer.resblocks.", names, 0, 1)
    assert text.named_frozen().keys() == text_frozen
    assert text.named_trainable().keys() == blocks_of("transformer.resblocks.", names, 1, 3) | {
        "ln_final.weight",
        "ln_final.bias",
        "text_projection",
    }
    trainable = image.named_trainable() | text.named_trainable()
    for name, parameter in backbone.model.named_parameters():  # the modules are the model's own
        assert parameter.requires_grad == (name in trainable)
        assert name not in trainable or trainable[name] is parameter


@pytest.mark.parametrize(
    ("freeze", "embeddings_train", "rest_trains"), [(0, True, True), (1, False, True), (4, False, True)]
)
def test_the_ends_of_the_range(freeze, embeddings_train, rest_trains):
    image, _ = cut_towers(as_backbone("vit"), freeze_layers=freeze, freeze_text_layers=0)
    trainable = image.named_trainable()
    assert all((f"visual.{name}" in trainable) == embeddings_train for name in BEFORE)
    assert all((name in trainable) == rest_trains for name in ("visual.proj", "visual.ln_post.weight"))


def test_the_text_tower_is_capped_at_its_depth_and_then_all_frozen():
    image, text = cut_towers(as_backbone("vit"), freeze_layers=4, freeze_text_layers=None)
    assert (image.frozen_blocks, text.frozen_blocks, text.all_frozen) == (4, 3, True)
    assert not text.named_trainable()
    assert text.boundary_shape == (24,)
    assert text.count_parameters().trainable == 0
    _, text = cut_towers(as_backbone("vit"), freeze_layers=2, freeze_text_layers=None)
    assert (text.frozen_blocks, text.all_frozen) == (2, False)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_numbered(name):
    image, text = cut_towers(as_backbone(name), freeze_layers=0, freeze_text_layers=0)
    for tower in (image, text):
        numbers = [tower.block_of(key) for key in tower.named_trainable()]
        assert set(numbers) == set(range(tower.depth + 2))
    with pytest.raises(ValueError, match=r"the image tower has no parameter 'visual\.nothing'"):
        image.block_of("visual.nothing")


def test_a_fixed_position_embedding_never_trains():
    image, _ = cut_towers(as_backbone("custom text, no causal mask"), freeze_layers=0, freeze_text_layers=0)
    assert list(image.named_frozen()) == ["visual.positional_embedding"]


def test_parameters_are_counted():
    backbone = as_backbone("vit")
    image, _ = cut_towers(backbone, freeze_layers=3, freeze_text_layers=0)
    state = {key: part.numel() for key, part in make_model("vit").visual.state_dict().items()}
    frozen = sum(
        size
        for key, size in state.items()
        if key in BEFORE or key.startswith(tuple(f"transformer.resblocks.{n}." for n in range(3)))
    )
    count = image.count_parameters()
    assert (count.frozen, count.trainable) == (frozen, sum(state.values()) - frozen)
    assert count.words == (
        "image tower: 3 of 4 blocks frozen, embeddings too; "
        f"{count.trainable:,} parameters train (21%), {frozen:,} do not"
    )


@pytest.mark.parametrize(
    ("name", "freeze", "text_freeze", "line"),
    [
        ("vit", 5, None, "--freeze-layers: the image tower of vit has 4 blocks, 5 cannot be frozen; give 0 to 4"),
        ("vit", -1, None, "--freeze-layers: the image tower of vit has 4 blocks, -1 cannot be frozen; give 0 to 4"),
        ("vit", 1, 4, "--freeze-text-layers: the text tower of vit has 3 blocks, 4 cannot be frozen; give 0 to 3"),
    ],
)
def test_numbers_out_of_range(name, freeze, text_freeze, line):
    with pytest.raises(UserError) as caught:
        cut_towers(as_backbone(name), freeze_layers=freeze, freeze_text_layers=text_freeze)
    assert str(caught.value) == line


def test_a_text_tower_needs_its_ids():
    _, text = cut_towers(as_backbone("vit"), freeze_layers=1, freeze_text_layers=1)
    with pytest.raises(ValueError, match="a text tower needs token_ids"):
        text.from_boundary(torch.zeros(1, *text.boundary_shape))


def operations(work):
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        work()
    return {event.key for event in trace.key_averages()}


@pytest.mark.parametrize("name", ["vit", "custom text", "timm vit", "vit, blocks of its own"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_product_of_a_frozen_weight_is_made_in_batches(name, *, autocast):
    """As `aten::bmm` such a product has been seen 2 to 30 times slower."""
    image, text = cut_towers(as_backbone(name), freeze_layers=2, freeze_text_layers=2)
    pixels, ids = inputs(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        at, text_at = image.to_boundary(pixels), text.to_boundary(ids)
        assert "aten::bmm" not in operations(lambda: (image.to_boundary(pixels), text.to_boundary(ids)))
        assert "aten::bmm" not in operations(lambda: (image.from_boundary(at), text.from_boundary(text_at, ids)))


def test_the_trap_is_there_without_the_cut():
    model, (pixels, _) = make_model("vit").requires_grad_(requires_grad=False), inputs("vit")
    with torch.autocast("cpu", torch.bfloat16):  # without it the attention's fast path hides the trap
        assert "aten::bmm" in operations(lambda: model.encode_image(pixels))


def test_checkpointing_changes_no_gradient():
    pixels, ids = inputs("vit")
    gradients = []
    for checkpointing in (False, True):
        image, text = cut_towers(as_backbone("vit"), freeze_layers=1, freeze_text_layers=1)
        if checkpointing:
            image.use_checkpointing()
            text.use_checkpointing()
        features = [image.from_boundary(image.to_boundary(pixels)), text.from_boundary(text.to_boundary(ids), ids)]
        sum(part.square().sum() for part in features).backward()
        gradients.append({key: part.grad for key, part in (image.named_trainable() | text.named_trainable()).items()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # of torch's compilers about themselves
@pytest.mark.parametrize(
    ("name", "backend", "lora"),
    [
        ("vit", "inductor", False),
        *((name, "aot_eager", False) for name in ("resnet", "timm convnext", "siglip")),
        *((name, "aot_eager", True) for name in ("vit", "coca", "timm vit")),
    ],
)
def test_compiled_blocks_give_features_and_gradients_of_plain_ones(name, backend, lora):
    """The real compiler once, as it takes its time; what torch sees of the blocks of each family."""
    torch._dynamo.reset()
    pixels, ids = inputs(name)
    given = []
    for compiled in (False, True):
        plan = LowRank(rank=2, alpha=2.0, layers="all") if lora else None
        towers = cut_towers(as_backbone(name), freeze_layers=2, freeze_text_layers=1, low_rank=plan)
        for tower in towers:
            if compiled:
                tower.use_compiling(backend=backend)
        for tower in towers if lora else ():
            tower.draw_additions(0)
            for part in tower.named_trainable().values():
                part.data.add_(0.01)
        found = []
        for count in (3, 2, 1):
            for tower, x in zip(towers, (pixels[:count], ids[:count]), strict=True):
                features = tower.from_boundary(tower.to_boundary(x), x if tower.kind == "text" else None)
                features.square().sum().backward()
                found.append(features.detach())
        parts = towers[0].named_trainable() | towers[1].named_trainable()
        given.append({key: part.grad for key, part in parts.items()} | dict(enumerate(found)))
    assert torch._dynamo.utils.counters["frames"]["total"] > 0
    assert not torch._dynamo.utils.counters["unimplemented"]
    for key, wanted in given[0].items():
        assert_close(given[1][key], wanted, tolerance=1e-4)


@pytest.mark.slow
def test_what_cannot_be_compiled_is_one_line():
    image, _ = cut_towers(as_backbone("vit"), freeze_layers=2, freeze_text_layers=1)
    with pytest.raises(UserError, match=r"cannot compile blocks here: RuntimeError: no compiler .*; leave it out"):
        image.use_compiling(backend=_broken)
    image, _ = cut_towers(as_backbone("vit"), freeze_layers=4, freeze_text_layers=1)
    with pytest.raises(UserError, match=r"no blocks to compile in the image tower .*: all 4 of them are frozen"):
        image.use_compiling()


def _broken(*_):
    raise RuntimeError("no compiler for C++ is installed")


def test_sixteen_bits_stay_sixteen_bits():
    image, text = cut_towers(as_backbone("vit", "bf16"), freeze_layers=2, freeze_text_layers=2)
    pixels, ids = inputs("vit")
    model = make_model("vit").to(torch.bfloat16)
    with torch.no_grad():
        rounded = model.encode_image(pixels.bfloat16()), model.encode_text(ids)
        found = image.from_boundary(image.to_boundary(pixels)), text.from_boundary(text.to_boundary(ids), ids)
    assert image.to_boundary(pixels).dtype == text.to_boundary(ids).dtype == torch.bfloat16
    for exact, by_whole, by_parts in zip(whole("vit"), rounded, found, strict=True):
        rounding = float((by_whole - exact).abs().max() / exact.abs().max())
        assert rounding < 0.1
        assert_close(by_parts.float(), exact, tolerance=2 * rounding)  # no worse than 16 bits are without a cut


def test_the_bundled_backbone(tiny_backbone):
    backbone = load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = backbone.tokenizer(TEXTS)
    with torch.no_grad():
        v, t = backbone.model.encode_image(pixels), backbone.model.encode_text(ids)
    image, text = cut_towers(backbone, freeze_layers=4, freeze_text_layers=3)
    assert (image.depth, text.depth, image.boundary_shape, text.boundary_shape) == (6, 4, (37, 128), (77, 96))
    assert_close(image.from_boundary(image.to_boundary(pixels)), v)
    assert_close(text.from_boundary(text.to_boundary(ids), ids), t)
