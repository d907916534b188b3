"""Loading gives open_clip's own embeddings from every format people have, or one line that says why not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.encode import encode_images, encode_texts
from deltaclip.features.backbone.load import load_backbone, request_facts
from deltaclip.features.backbone.precision import load_in_best_precision
from deltaclip.features.backbone.tensors import is_torchscript
from deltaclip.features.backbone.weights import (
    WeightsSource,
    check_preprocessing,
    check_quick_gelu,
    find_weights,
    published_tags,
    quick_gelu_note,
)

# Small for a built-in model: 43 million parameters.
SMALL = "ViT-S-32-alt"
PROMPTS = ["a red circle", "two small blue squares left of a green star", "x", "größer, 猫!", "a " * 100]
# Same weights, same fp32 operations: only the order of a sum may differ.
FP32 = 1e-5


def pictures(count=4):
    rng = np.random.default_rng(0)
    sizes = [(50, 80), (224, 224), (300, 100), (96, 96)]
    return [Image.fromarray(rng.integers(0, 256, (*sizes[i % 4], 3), dtype=np.uint8)) for i in range(count)]


def judge(model, preprocess, tokenizer):
    """open_clip's own embeddings."""
    with torch.inference_mode():
        v = model.eval().encode_image(torch.stack([preprocess(image) for image in pictures()]), normalize=True)
        t = model.encode_text(tokenizer(PROMPTS), normalize=True)
    return v.numpy(), t.numpy()


def ours(source, precision="fp32", **options):
    backbone = load_backbone(source, device="cpu", precision=precision, **options)
    pixels = torch.stack([backbone.preprocess(image) for image in pictures()])
    return backbone, encode_images(backbone, pixels), encode_texts(backbone, PROMPTS)


def assert_same(source, expected, **options):
    backbone, images, texts = ours(source, **options)
    assert not backbone.model.training
    for found, wanted in ((images, expected[0]), (texts, expected[1])):
        assert found.unit_BD.dtype == np.float32
        assert np.abs(found.unit_BD - wanted).max() < FP32
        np.testing.assert_allclose(np.linalg.norm(found.unit_BD, axis=1), 1, atol=1e-6)
    return backbone


def refused(source, **options):
    with pytest.raises(UserError) as caught:
        load_backbone(source, device="cpu", precision="fp32", **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def small():
    """Random weights of a built-in model, rounded to fp16 so that the files below are half as large."""
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(SMALL)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)
    return state, judge(model, preprocess, open_clip.get_tokenizer(SMALL))


def tree(state):
    """A module without code whose state dict is `state`."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node._modules[part]
        node.register_buffer(leaf, tensor)
    return root


def save_torchscript(state, path):
    numbers = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces the end of TorchScript
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.script(tree(state | {name: torch.tensor(number) for name, number in numbers.items()}))
        torch.jit.save(script, str(path))


def save_training(state, path):
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)


FORMS = {
    "weights.safetensors": save_file,
    "weights.pt": torch.save,
    "epoch_3.pt": save_training,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_checkpoint_gives_the_same_embeddings(small, tmp_path, name):
    state, expected = small
    FORMS[name](state, tmp_path / name)
    backbone = assert_same(find_weights(SMALL, str(tmp_path / name)), expected)
    facts = backbone.facts
    assert (facts["backbone"], facts["pretrained"], facts["quick_gelu"]) == (SMALL, str(tmp_path / name), False)
    assert (backbone.dim, backbone.context_length, facts["normalised"]) == (256, 77, True)
    assert facts["preprocessing"]["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.slow
def test_an_openai_archive_is_loaded_with_quick_gelu(small, tmp_path, capfd, caplog):
    state, plain = small
    path = tmp_path / "ViT.pt"
    save_torchscript(state, path)
    assert is_torchscript(path)
    model, _, preprocess = open_clip.create_model_and_transforms(SMALL, force_quick_gelu=True)
    model.load_state_dict(state)
    expected = judge(model, preprocess, open_clip.get_tokenizer(SMALL))
    assert np.abs(expected[0] - plain[0]).max() > 100 * FP32  # the activation does matter
    caplog.clear()
    backbone = assert_same(find_weights(SMALL, str(path)), expected)
    assert backbone.facts["quick_gelu"] is True
    assert not caplog.records  # no word of random weights: they were replaced
    assert capfd.readouterr().err == ""
    assert_same(find_weights(SMALL, str(path)), plain, quick_gelu=False)


def test_local_dir_with_its_own_architecture_and_preprocessing(tmp_path, tiny_backbone):
    source = find_weights(tiny_backbone, None)
    model, _, preprocess = open_clip.create_model_and_transforms(source.model)
    expected = judge(model, preprocess, open_clip.get_tokenizer(source.model))
    backbone = assert_same(source, expected)
    config = json.loads(source.config.read_text())
    assert backbone.facts["preprocessing"]["mean"] == config["preprocess_cfg"]["mean"]
    assert backbone.dim == config["model_cfg"]["embed_dim"]
    assert backbone.facts["weights_sha256"] == source.identity()["weights_sha256"]
    # The same weights under another mean are another backbone, and it is not overlooked.
    config["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.6]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(source.weights, tmp_path)
    other = find_weights(f"local-dir:{tmp_path}", None)
    assert np.abs(ours(other)[1].unit_BD - expected[0]).max() > 100 * FP32
    assert request_facts(other, "fp32", quick_gelu=None) != request_facts(source, "fp32", quick_gelu=None)


def test_local_dir_with_torch_weights_and_quick_gelu(tmp_path, tiny_backbone):
    source = find_weights(tiny_backbone, None)
    config = json.loads(source.config.read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(load_file(source.weights), tmp_path / "open_clip_pytorch_model.bin")
    quick = find_weights(f"local-dir:{tmp_path}", None)
    expected = ours(source, quick_gelu=True)
    assert expected[0].facts["quick_gelu"] is True
    assert_same(quick, (expected[1].unit_BD, expected[2].unit_BD))
    line = (
        f"--quick-gelu: local-dir:{tmp_path} is defined with QuickGELU; leave the option out or give another model name"
    )
    assert refused(quick, quick_gelu=False) == line
    assert request_facts(source, "fp32", quick_gelu=True) != request_facts(source, "fp32", quick_gelu=None)


@pytest.mark.parametrize(
    ("model", "tag", "active", "line"),
    [
        (
            "ViT-B-32",
            "openai",
            False,
            "ViT-B-32: openai was trained with QuickGELU; give --backbone ViT-B-32-quickgelu",
        ),
        (
            "ViT-B-32-quickgelu",
            "laion2b_s34b_b79k",
            True,
            None,  # open_clip lists no such tag for that name: nothing to compare with
        ),
        ("ViT-B-32-quickgelu", "openai", True, None),
        ("ViT-B-32", "laion2b_s34b_b79k", False, None),
        (
            "ViT-B-32",
            "laion2b_s34b_b79k",
            True,
            "ViT-B-32: laion2b_s34b_b79k was trained without QuickGELU; give --backbone ViT-B-32",
        ),
    ],
)
def test_activation_that_a_tag_was_trained_with(model, tag, active, line):
    source = WeightsSource(name=model, model=model, pretrained=tag, weights=Path("w"), config=None)
    if line is None:
        check_quick_gelu(source, active=active, asked=None)
        return
    with pytest.raises(UserError) as caught:
        check_quick_gelu(source, active=active, asked=None)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("model", "there", "here"),
    [
        (
            "ViT-B-16-SigLIP",
            "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5), resize_mode squash",
            "mean (0.48145466, 0.4578275, 0.40821073), std (0.26862954, 0.26130258, 0.27577711), resize_mode shortest",
        ),
        ("ViT-H-14-378", "resize_mode squash", "resize_mode shortest"),
    ],
)
def test_a_bare_file_that_needs_another_preprocessing(tmp_path, model, there, here):
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "w.safetensors")
    assert refused(find_weights(model, str(tmp_path / "w.safetensors"))) == (
        f"{tmp_path}/w.safetensors: all published weights of {model} need {there}; a bare file would get {here}; "
        "put it beside an open_clip_config.json that says so and give --backbone local-dir:FOLDER"
    )
    # Tags of ViT-B-32 differ from one another: none of them can be required.
    bare = find_weights("ViT-B-32", str(tmp_path / "w.safetensors"))
    check_preprocessing(bare, published_tags(bare))


@pytest.mark.slow
def test_a_bare_file_whose_activation_is_open(small, tmp_path, monkeypatch):
    bare = {"pretrained": "w", "weights": Path("w"), "config": None}
    tags = published_tags(WeightsSource(name="ViT-B/16", model="ViT-B/16", **bare))
    assert {"openai", "laion2b_s34b_b88k"} <= tags.keys()
    note = quick_gelu_note({name: tags[name] for name in ("openai", "dfn2b", "metaclip_400m", "laion2b_s34b_b88k")})
    assert note == (
        "weights of this architecture exist with and without QuickGELU: openai, dfn2b and 1 more with, "
        "laion2b_s34b_b88k without; give --quick-gelu or --no-quick-gelu"
    )
    assert quick_gelu_note({"openai": tags["openai"]}) is None
    assert quick_gelu_note({}) is None
    # A model small enough to load has no tags of its own.
    monkeypatch.setattr("deltaclip.features.backbone.load.published_tags", lambda _source: tags)
    save_file(small[0], tmp_path / "w.safetensors")
    source = find_weights(SMALL, str(tmp_path / "w.safetensors"))
    assert quick_gelu_note(tags) in ours(source)[0].facts["notes"]
    assert quick_gelu_note(tags) not in ours(source, quick_gelu=False)[0].facts["notes"]


def test_another_architecture(small, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in small[0].items()}, tmp_path / "w.safetensors")
    assert refused(find_weights("ViT-B-32", str(tmp_path / "w.safetensors"))) == (
        f"{tmp_path}/w.safetensors: does not fit ViT-B-32: lacks transformer.resblocks.10.ln_1.weight and 23 more; "
        f"these look like weights of {SMALL}: give --backbone {SMALL}"
    )


NO_TENSORS = "holds no tensors; give a file of weights: safetensors or a state dict"
NO_NAMES = "holds a {}, no tensors by name; save a state dict, or safetensors"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({}, NO_TENSORS),
        ({"epoch": 3}, NO_TENSORS),
        ({"state_dict": {}}, NO_TENSORS),
        ([1, 2], NO_NAMES.format("list")),
        (
            {"w": torch.ones(2), "x": object()},
            "holds more than tensors (object); convert it to safetensors where it comes from: a pickle can run code",
        ),
        (torch.zeros(3), NO_NAMES.format("Tensor")),
        (
            torch.nn.Linear(2, 2),
            "holds a whole module (torch.nn.modules.linear.Linear), not its weights alone; "
            "save its state_dict() instead",
        ),
    ],
)
def test_a_file_without_tensors(tmp_path, content, line):
    torch.save(content, tmp_path / "w.pt")
    assert refused(find_weights(SMALL, str(tmp_path / "w.pt"))) == f"{tmp_path}/w.pt: {line}"


def test_a_file_of_other_tensors(tmp_path):
    torch.save({0: torch.zeros(3)}, tmp_path / "w.pt")
    assert refused(find_weights(SMALL, str(tmp_path / "w.pt"))) == (
        f"{tmp_path}/w.pt: does not fit {SMALL}: 0 of its 278 tensors are there; the file's first is '0'; "
        "check --backbone: the architecture must be the one the weights were saved from"
    )


def test_missing_weights_are_never_random(small, tmp_path):
    state = dict(small[0])
    del state["visual.proj"]
    save_file(state, tmp_path / "w.safetensors")
    assert refused(find_weights(SMALL, str(tmp_path / "w.safetensors"))) == (
        f"{tmp_path}/w.safetensors: does not fit {SMALL}: lacks visual.proj; fetch or save the weights again, whole"
    )


def test_the_layout_of_transformers_is_named(tmp_path):
    names = ("vision_model.embeddings.class_embedding", "text_model.final_layer_norm.weight", "logit_scale")
    save_file({name: torch.zeros(()) for name in names}, tmp_path / "model.safetensors")
    assert refused(find_weights(SMALL, str(tmp_path / "model.safetensors"))) == (
        f"{tmp_path}/model.safetensors: is in the layout of transformers; "
        "give --backbone local-dir:FOLDER of it, with its config.json and tokenizer.json"
    )


class Payload:
    """Runs `os.mkdir` when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def save_raw(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [torch.save, save_raw])
@pytest.mark.parametrize("name", ["weights.pt", "open_clip_pytorch_model.bin", "weights.safetensors"])
def test_a_pickle_is_refused_and_its_code_does_not_run(tmp_path, tiny_backbone, save, name):
    trap = tmp_path / "trap"
    path = tmp_path / name
    save({"state_dict": {"logit_scale": Payload(trap)}}, path)
    if path.suffix == ".bin":
        shutil.copy(find_weights(tiny_backbone, None).config, tmp_path)
        source = find_weights(f"local-dir:{tmp_path}", None)
    else:
        source = find_weights(SMALL, str(path))
    line = refused(source)
    assert not trap.exists()
    remedy = "convert it to safetensors where it comes from: a pickle can run code"
    # torch names it in its own format alone, and reads no other protocol than that one's.
    what = (
        "holds more than tensors (posix.mkdir)"
        if save is torch.save
        else "cannot be read safely (Unsupported operand 149)"
    )
    if path.suffix == ".safetensors":
        assert ", no safetensors file; " in line
    else:
        assert line == f"{path}: {what}; {remedy}"
    assert "\n" not in line


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 broken", pickle.dumps({}, protocol=4)])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_no_weights_at_all(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    line = refused(find_weights(SMALL, str(tmp_path / name)))
    assert line.startswith(f"{tmp_path}/{name}: ")
    assert "\n" not in line


def cosines(one, two):
    return (one.unit_BD * two.unit_BD).sum(axis=1)


def test_bf16_keeps_the_embeddings_of_tiny(tiny_backbone):
    source = find_weights(tiny_backbone, None)
    exact, close = ours(source), ours(source, "bf16")
    assert {parameter.dtype for parameter in close[0].model.parameters()} == {torch.bfloat16}
    assert close[1].unit_BD.dtype == np.float32
    assert min(cosines(exact[1], close[1]).min(), cosines(exact[2], close[2]).min()) >= 0.999


def probe_with(images):
    return lambda backbone: torch.stack([backbone.preprocess(image) for image in images])


def test_auto_falls_back_to_fp32_where_16_bits_lose_too_much(mobilenet_backbone, agiqa_folder, monkeypatch):
    # As on a processor with bf16 units, whatever this one has.
    monkeypatch.setattr("deltaclip.base.device.cpu_has_bf16_units", lambda: True)
    files = sorted((agiqa_folder / "images").iterdir())[::400]
    images = [Image.open(file).convert("RGB") for file in files]
    backbone, reason = load_in_best_precision(
        find_weights(mobilenet_backbone, None),
        device="cpu",
        precision="auto",
        quick_gelu=None,
        probe=probe_with(images),
    )
    assert backbone.precision == backbone.facts["precision"] == "fp32"
    assert reason.startswith("bf16 reaches a cosine of 0.9")
    assert reason.endswith(f" with fp32 on {len(images)} images")


def test_auto_on_tiny(monkeypatch, tiny_backbone):
    source = find_weights(tiny_backbone, None)
    arguments = {"device": "cpu", "precision": "auto", "quick_gelu": None}
    monkeypatch.setattr("deltaclip.base.device.cpu_has_bf16_units", lambda: True)
    backbone, reason = load_in_best_precision(source, **arguments, probe=probe_with(pictures()))
    assert backbone.precision == "bf16", reason
    backbone, reason = load_in_best_precision(source, **arguments, probe=lambda _backbone: None)
    assert (backbone.precision, reason) == ("fp32", "no image to measure on")
    monkeypatch.setattr("deltaclip.base.device.cpu_has_bf16_units", lambda: False)
    backbone, reason = load_in_best_precision(source, **arguments, probe=probe_with(pictures()))
    assert (backbone.precision, reason) == ("fp32", "no 16-bit units in this processor")


def test_a_precision_that_overflows_is_not_taken(monkeypatch, tiny_backbone):
    def load(source, *, precision, **options):
        backbone = load_backbone(source, precision=precision, **options)
        if precision == broken:
            backbone.model.visual.conv1.weight.data.fill_(float("nan"))
        return backbone

    monkeypatch.setattr("deltaclip.base.device.cpu_has_bf16_units", lambda: True)
    monkeypatch.setattr("deltaclip.features.backbone.precision.load_backbone", load)
    arguments = {"device": "cpu", "precision": "auto", "quick_gelu": None, "probe": probe_with(pictures())}
    broken = "bf16"
    backbone, reason = load_in_best_precision(find_weights(tiny_backbone, None), **arguments)
    assert (backbone.precision, reason) == ("fp32", "bf16 gives embeddings that are not finite")
    broken = "fp32"
    with pytest.raises(UserError, match="the backbone gives embeddings that are not finite"):
        load_in_best_precision(find_weights(tiny_backbone, None), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("quick", [False, True])
def test_vit_b_32(tmp_path, quick):
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", force_quick_gelu=quick)
    path = tmp_path / "ViT-B-32.pt"
    (save_torchscript if quick else torch.save)(dict(model.state_dict()), path)
    expected = judge(model, preprocess, open_clip.get_tokenizer("ViT-B-32"))
    assert assert_same(find_weights("ViT-B-32", str(path)), expected).facts["quick_gelu"] is quick
