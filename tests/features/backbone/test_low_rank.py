"""Low-rank additions: a tower without a step is untouched, gradients and merged weights are those of the formula."""

from __future__ import annotations

import pytest
import torch
from timm.models.eva import EvaBlock

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.low_rank import LowRank, attach, find_weights, weight_deltas
from deltaclip.features.backbone.towers import cut_towers, encode
from deltaclip.tests.features.backbone.small_models import MODELS, PUBLISHED, as_backbone, tokenizer
from deltaclip.tests.features.backbone.test_towers import operations

TEXTS = ["a cat", "two red circles"]
PLAN = LowRank(rank=2, alpha=3.0)
# Every way in which a layer is used: open_clip's attention, blocks of its own, timm's, rotary ones, maps of ConvNeXt.
FAMILIES = [
    *("vit", "coca", "siglip", "vit, blocks of its own"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("timm vit", "timm convnext", "eva")),
]
# fp32, of the largest value: the additions are summed in another order. From float64 a ViT here is 4e-6 off, EVA 5e-5.
FP32, FP32_OF_EVA = 5e-5, 3e-4


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(name):
    size = (MODELS | PUBLISHED)[name]["vision_cfg"]["image_size"]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return pixels, tokenizer()(TEXTS)


def frozen_blocks(name):
    return 10 if name == "eva" else 1  # its 12 blocks see 257 tokens


def cut(name, plan=PLAN, **more):
    backbone = as_backbone(name)
    blocks = {"freeze_layers": frozen_blocks(name), "freeze_text_layers": 1} | more
    towers = cut_towers(backbone, **blocks, low_rank=plan)
    for tower in towers:
        tower.draw_additions(7)
    return backbone, towers


def moved(towers):
    """Give all of B and A other values, as steps do."""
    generator = torch.Generator().manual_seed(3)
    for tower in towers:
        for parameter in tower.named_trainable().values():
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def through(towers, given):
    (image, text), (pixels, ids) = towers, given
    return image.from_boundary(image.to_boundary(pixels)), text.from_boundary(text.to_boundary(ids), ids)


def far(found, expected):
    with torch.no_grad():
        return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


@pytest.mark.parametrize("name", FAMILIES)
def test_before_the_first_step_the_tower_is_untouched(name):
    """Bit for bit: B is 0. A pool that is frozen multiplies in another order."""
    given = inputs(name)
    plain = cut_towers(as_backbone(name), freeze_layers=frozen_blocks(name), freeze_text_layers=1)
    for tower in plain:
        for parameter in tower.named_trainable().values():
            parameter.requires_grad = False  # attention pools take another path where nothing trains
    _, towers = cut(name)
    for found, expected in zip(through(towers, given), through(plain, given), strict=True):
        assert far(found, expected) <= (1e-6 if name == "coca" else 0)
        assert found.requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_scores_are_those_of_merged_weights(name):
    """Of W + s B A in place of W: dB = s dW A^T and dA = s B^T dW, of each projection in W by itself."""
    backbone, towers = cut(name)
    given = inputs(name)
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    moved(towers)
    found = through(towers, given)
    sum(part.square().sum() for part in found).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.model.parameters())
    reference = as_backbone(name).model
    weights = dict(reference.named_parameters())
    additions = {key: part for tower in towers for key, part in tower.named_trainable().items()}
    pairs = {key.removesuffix(".lora_a"): additions[key] for key in additions if key.endswith(".lora_a")}
    with torch.no_grad():
        for key, a in pairs.items():
            b = additions[f"{key}.lora_b"]
            parts = zip(b.split(len(b) * PLAN.rank // len(a)), a.split(PLAN.rank), strict=True)
            weights[key].add_(1.5 * torch.cat([rows @ columns for rows, columns in parts]))
    pixels, ids = given
    expected = encode(reference, "image", pixels), encode(reference, "text", ids)
    tolerance = FP32_OF_EVA if name == "eva" else FP32
    assert max(map(far, found, expected)) < tolerance
    sum(part.square().sum() for part in expected).backward()
    for key, a in pairs.items():
        b = additions[f"{key}.lora_b"]
        parts = zip(
            b.split(len(b) * PLAN.rank // len(a)),
            a.split(PLAN.rank),
            weights[key].grad.split(len(b) * PLAN.rank // len(a)),
            strict=True,
        )
        of_a, of_b = zip(*((1.5 * rows.T @ dw, 1.5 * dw @ columns.T) for rows, columns, dw in parts), strict=True)
        assert far(a.grad, torch.cat(of_a)) < 1e-3, key  # sums over all tokens of all images
        assert far(b.grad, torch.cat(of_b)) < 1e-3, key
    with torch.no_grad(), towers[0].merged(), towers[1].merged():
        merged = encode(backbone.model, "image", pixels), encode(backbone.model, "text", ids)
    assert max(map(far, found, merged)) < tolerance
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.model.state_dict().items())


ATTENTION, MLP = ("attn.in_proj_weight", "attn.out_proj.weight"), ("mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.mark.parametrize(("layers", "names"), [("attention", ATTENTION), ("mlp", MLP), ("all", (*ATTENTION, *MLP))])
def test_exactly_the_layers_that_were_asked_for_have_additions(layers, names):
    _, (image, text) = cut("vit", LowRank(rank=4, alpha=4.0, layers=layers), freeze_layers=2)
    for tower, root, blocks in ((image, "visual.", (2, 3)), (text, "", (1, 2))):
        wanted = {f"{root}transformer.resblocks.{block}.{name}" for block in blocks for name in names}
        trained = tower.named_trainable()
        assert trained.keys() == {name + suffix for name in wanted for suffix in (".lora_a", ".lora_b")}
        assert {tower.block_of(name) for name in trained} == {block + 1 for block in blocks}
        assert all(part.count_nonzero() == 0 for name, part in trained.items() if name.endswith("b"))
        assert all(part.count_nonzero() == part.numel() for name, part in trained.items() if name.endswith("a"))
    shapes = {name.rpartition("resblocks.2.")[2]: part.shape for name, part in image.named_trainable().items()}
    if layers != "mlp":  # q, k and v have an addition each
        assert (shapes["attn.in_proj_weight.lora_a"], shapes["attn.in_proj_weight.lora_b"]) == ((12, 64), (192, 4))
    words = image.count_parameters().words
    assert words.startswith("image tower: 2 of 4 blocks frozen, embeddings too, additions to the others; ")
    shown = ", ".join(name.removesuffix(".weight") for name in names)
    assert image.addition_words() == f"image tower, blocks 3 to 4: {shown}"


def test_a_seed_draws_the_same_and_another_seed_others():
    _, (image, text) = cut("vit")
    drawn = []
    for seed in (1, 1, 2):
        moved((image, text))
        image.draw_additions(seed)
        drawn.append({name: part.detach().clone() for name, part in image.named_trainable().items()})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0] if name.endswith("a"))


REFUSED = {
    "resnet": "low-rank additions have no place in the image tower of resnet: no linear layers in its blocks 2 to 4; "
    "leave out --lora-rank",
    "mobilenet": "low-rank additions have no place in the image tower of mobilenet: no linear layers in its blocks 2 "
    "to 7; leave out --lora-rank",
    "timm convnext": "low-rank additions have no place in the image tower of timm convnext: no attention layers in "
    "its blocks 2 to 4; give --lora-layers all",
    "vit": "33 is more than transformer.resblocks.1.attn.in_proj_weight of the text tower has, 32; give at most 32",
}


@pytest.mark.parametrize("name", REFUSED)
def test_towers_without_a_place_for_them_are_refused_by_name(name):
    plan = LowRank(rank=33, alpha=1.0) if name == "vit" else LowRank(rank=2, alpha=2.0, layers="attention")
    if name in {"resnet", "mobilenet"}:
        plan = PLAN
    with pytest.raises(UserError) as error:
        cut(name, plan)
    assert str(error.value) == f"--lora-rank: {REFUSED[name]}"


def test_a_tower_whose_blocks_are_all_frozen_is_refused():
    with pytest.raises(UserError) as error:
        cut("vit", freeze_layers=4)
    assert str(error.value) == (
        "--lora-rank: all 4 blocks of the image tower are frozen: nothing is left to add to; "
        "give --freeze-layers below 4"
    )


def test_a_weight_that_another_module_takes_is_added_to():
    """timm's rotary attention multiplies by the weight of its layer, which is never called."""
    torch.manual_seed(0)
    block = torch.nn.ModuleDict({"0": EvaBlock(dim=16, num_heads=2, qkv_fused=True, qkv_bias=True)}).eval()
    x = torch.randn(2, 5, 16)
    before = block["0"](x)
    places = [place for place in find_weights(block, ["0"], "attention") if place.full == "0.attn.qkv.weight"]
    additions = attach(places, PLAN, lambda: block["0"](x))
    torch.testing.assert_close(block["0"](x), before, rtol=0, atol=0)
    addition = additions["0.attn.qkv.weight"]
    with torch.no_grad():
        addition.a.normal_()
        addition.b.normal_()
    found = block["0"](x)
    assert not torch.allclose(found, before)
    plain = EvaBlock(dim=16, num_heads=2, qkv_fused=True, qkv_bias=True).eval()
    state = {
        key.replace("parametrizations.qkv.weight.original", "qkv.weight"): t
        for key, t in block["0"].state_dict().items()
    }
    state = {key.replace("qkv.parametrizations.weight.original", "qkv.weight"): t for key, t in state.items()}
    tensors = {"w.lora_a": addition.a.detach(), "w.lora_b": addition.b.detach()}
    state["attn.qkv.weight"] = state["attn.qkv.weight"] + weight_deltas(tensors, PLAN)["w"]
    plain.load_state_dict(state)
    torch.testing.assert_close(found, plain(x))


@pytest.mark.parametrize("layers", ["all", "mlp"])
@pytest.mark.parametrize(
    "name", ["vit", "coca", *(pytest.param(name, marks=pytest.mark.slow) for name in ("timm vit", "timm convnext"))]
)
def test_no_product_of_a_frozen_weight_is_made_in_batches(name, layers):
    """The frozen-backbone trap: all weights are frozen here."""
    _, towers = cut(name, LowRank(rank=2, alpha=2.0, layers=layers))
    given = inputs(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert "aten::bmm" not in operations(lambda: through(towers, given))


def test_checkpointing_changes_no_gradient():
    given, gradients = inputs("vit, blocks of its own"), []
    for checkpointing in (False, True):
        _, towers = cut("vit, blocks of its own")  # whose weights are sums, computed in the pass
        moved(towers)
        if checkpointing:
            for tower in towers:
                tower.use_checkpointing()
        sum(part.square().sum() for part in through(towers, given)).backward()
        gradients.append({key: part.grad for tower in towers for key, part in tower.named_trainable().items()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w.lora_a": (2, 4)}, "not pairs of A and B"),
        ({"w.lora_a": (2, 4), "w.lora_b": (4, 2), "w": (4, 4)}, "not pairs of A and B"),
        ({"w.lora_a": (3, 4), "w.lora_b": (4, 3)}, "w has not rank 2"),
    ],
)
def test_damaged_additions_are_refused(tensors, words):
    with pytest.raises(ValueError, match=words):
        weight_deltas({name: torch.zeros(shape) for name, shape in tensors.items()}, PLAN)
