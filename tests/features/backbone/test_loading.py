"""Checkpoints as people keep them: wrapped, in shards, of another size or configuration, in every family of towers.

The judge is open_clip's own model, made with the right configuration and the tensors themselves.
"""

from __future__ import annotations

import argparse
import collections
import copy
import datetime as dt
import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.encode import encode_images, encode_texts
from deltaclip.features.backbone.load import check_same, load_backbone, loading_notes, save_model
from deltaclip.features.backbone.naming import find_names
from deltaclip.features.backbone.tensors import read_tensors
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train
from tests.features.backbone.small_models import MODELS, WIDTH, make_model

PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
PROMPTS = ["a red circle", "two small blue squares left of a green star", "x"]
FP32 = 1e-5  # the same operations on the same weights


def config(name, **changes):
    """The configuration of a family, with other values at `vision.`, `text.` or on top."""
    found = copy.deepcopy({"embed_dim": WIDTH, "quick_gelu": False, **MODELS[name]})
    if "multimodal_cfg" in found:
        found["custom_text"] = True
    for place, value in changes.items():
        part, _, key = place.rpartition("__")
        (found[f"{part}_cfg"] if part else found)[key] = value
    return found


def write_config(folder, cfg, preprocess=PREPROCESS):
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
    return folder


def state_of(model):
    return {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}


def load(folder, **options):
    return load_backbone(find_weights(f"local-dir:{folder}", None), device="cpu", precision="fp32", **options)


def refused(folder):
    with pytest.raises(UserError) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line


def pixels(model, count=2):
    size = model.visual.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def assert_same(backbone, model):
    """The loaded model embeds as the judge."""
    given = pixels(model)
    tokens = open_clip.SimpleTokenizer()(PROMPTS, context_length=backbone.context_length)
    with torch.inference_mode():
        v, t = model.encode_image(given, normalize=True), model.encode_text(tokens, normalize=True)
    assert np.abs(encode_images(backbone, given).unit_BD - v.numpy()).max() < FP32
    assert np.abs(encode_texts(backbone, PROMPTS).unit_BD - t.numpy()).max() < FP32


FAMILIES = ("coca", "timm convnext", "resnet")


@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n not in FAMILIES)]
)
def test_every_family_loads_as_open_clip_loads_it(tmp_path, name):
    model = make_model(name)
    write_config(tmp_path, config(name))
    save_file(state_of(model), tmp_path / "open_clip_model.safetensors")
    backbone = load(tmp_path)
    assert backbone.facts["notes"] == []
    assert_same(backbone, model)
    judge, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    loaded = backbone.model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in judge.state_dict().items())


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def inside(words, state):
    """A name with `words` in its middle, as where a tower alone was wrapped."""
    return {name.replace("visual.", f"visual.{words}.", 1): tensor for name, tensor in state.items()}


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


class Settings:
    """As a training program has them, known to nobody else."""

    def __init__(self):
        self.lr, self.names = 1e-3, SettingsTable(a=torch.ones(2))


class SettingsTable(dict):
    pass


def towers_apart(state, image, text):
    """Each tower under a name of its own."""
    return {(image if name.startswith("visual.") else text) + name: tensor for name, tensor in state.items()}


READ = "read under key"
NO_SCALE = "logit_scale assumed: that of 14.29, as the weights have none"
WRAPPED = {
    "DataParallel": (lambda s: prefixed("module.", s), ["prefix 'module.' taken away"]),
    "compiled": (lambda s: prefixed("_orig_mod.", s), ["prefix '_orig_mod.' taken away"]),
    "compiled in DDP, twice": (
        lambda s: prefixed("module.module._orig_mod.", s),
        ["prefix 'module.module._orig_mod.' taken away"],
    ),
    "a tower compiled": (lambda s: inside("_orig_mod", s), ["'_orig_mod' taken out of names"]),
    "a tower in FSDP": (lambda s: inside("_fsdp_wrapped_module", s), ["'_fsdp_wrapped_module' taken out of names"]),
    "key model": (lambda s: {"model": s}, [f"{READ} 'model'"]),
    "training state": (
        lambda s: {"epoch": 3, "model_state_dict": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        [f"{READ} 'model_state_dict'"],
    ),
    "Lightning": (
        lambda s: {
            "state_dict": prefixed("model.", s) | {"loss.weight": torch.ones(1)},
            "pytorch-lightning_version": "2",
        },
        [f"{READ} 'state_dict', prefix 'model.' taken away"],
    ),
    "Lightning, a name of one's own": (
        lambda s: {"state_dict": prefixed("net.clip_model.", s)},
        [f"{READ} 'state_dict', prefix 'net.clip_model.' taken away"],
    ),
    "DeepSpeed": (
        lambda s: {"module": prefixed("_orig_mod.", s), "ds_config": {"a": 1}},
        [f"{READ} 'module', prefix '_orig_mod.' taken away"],
    ),
    "average beside": (
        lambda s: {"model": s, "model_ema": other(s)},
        [f"{READ} 'model'", "'model_ema' holds such weights once more and was left"],
    ),
    "average alone": (lambda s: {"ema": {"module": s}}, [f"{READ} 'ema.module'"]),
    "settings beside": (
        lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3), "best": np.float64(0.5)},
        [f"{READ} 'model'"],
    ),
    "numbers, times and classes beside": (
        lambda s: (
            {
                "model": s,
                "rng": np.random.default_rng(0).integers(9, size=3, dtype=np.uint32),
                "at": dt.datetime.now(dt.UTC),
                "args": Settings(),
            }
            | {"seen": collections.defaultdict(list, {"a": [1]}), "torch": torch.__version__}
        ),
        [f"left out, as no weights: objects of {__name__}.Settings and 1 more", f"{READ} 'model'"],
    ),
    "arrays": (lambda s: {n: t.numpy() for n, t in s.items()}, []),
    "towers apart": (
        lambda s: towers_apart(s, "image_encoder.module.", "text_encoder.module."),
        ["prefix 'image_encoder.module.' taken away", "prefix 'text_encoder.module.' taken away", NO_SCALE],
    ),
    "wrapped and not, alike": (lambda s: s | prefixed("module.", s), []),
    "registered twice": (lambda s: {"model": s, "clip": s}, [f"{READ} 'model'"]),
    "a classifier beside": (
        lambda s: s | {"classifier.weight": torch.ones(3, 3)},
        ["left out, as no part of the model: classifier.weight"],
    ),
    "no scale": (
        lambda s: {n: t for n, t in s.items() if n != "logit_scale"},
        [NO_SCALE],
    ),
    "a scale of one number in a row": (lambda s: s | {"logit_scale": s["logit_scale"].reshape(1)}, []),
    "nested deeply": (
        lambda s: {"a": {"b": {"c": prefixed("d.e.", s)}}},
        [f"{READ} 'a.b.c', prefix 'd.e.' taken away"],
    ),
    "half": (lambda s: {n: t.half() for n, t in s.items()}, ["weights stored in float16"]),
    "bfloat16": (lambda s: {n: t.bfloat16() for n, t in s.items()}, ["weights stored in bfloat16"]),
    "double": (lambda s: {n: t.double() for n, t in s.items()}, ["weights stored in float64"]),
    "text tower of its own": (
        lambda s: {n if n.startswith(("visual.", "logit_")) else f"text.{n}": t for n, t in s.items()},
        ["names with and without 'text.' taken for each other"],
    ),
}


@pytest.fixture(scope="module")
def vit():
    """A model, its weights rounded so that they are the same in every number format."""
    model = make_model("vit")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().half())
    return model


def without_large(state):
    """The same names, with tensors of one number, all of them different."""
    return {name: torch.full((1,), float(number)) for number, name in enumerate(state)}


@pytest.mark.parametrize("name", WRAPPED)
def test_names_are_found_in_every_wrapping(tmp_path, vit, name):
    wrap, words = WRAPPED[name]
    plain = without_large(state_of(vit))
    torch.save(wrap(plain), tmp_path / "w.pt")
    stored = read_tensors([tmp_path / "w.pt"])
    naming = find_names(stored, plain, place=tmp_path)
    found = {own: stored.by_name[raw].item() for own, raw in naming.stored.items()}
    wanted = {own: tensor.item() for own, tensor in plain.items()}
    assert found == {n: v for n, v in wanted.items() if n != "logit_scale" or NO_SCALE not in words}
    assert list(naming.words) == [word for word in words if not word.startswith(OF_FITTING)]


OF_FITTING = ("weights stored", "left out", "logit_scale")
LOADED = ("Lightning", "average beside", "a tower compiled", "a classifier beside", "half")


@pytest.mark.parametrize(
    "name", [*LOADED, *(pytest.param(n, marks=pytest.mark.slow) for n in WRAPPED if n not in LOADED)]
)
def test_wrapped_weights_embed_as_plain_ones(tmp_path, vit, name):
    wrap, notes = WRAPPED[name]
    write_config(tmp_path, config("vit"))
    torch.save(wrap(state_of(vit)), tmp_path / "open_clip_pytorch_model.bin")
    backbone = load(tmp_path)
    assert_same(backbone, vit)
    assert loading_notes(backbone.facts) == notes


def test_two_models_that_both_fit_are_not_chosen_from(tmp_path, vit):
    state = state_of(vit)
    write_config(tmp_path, config("vit"))
    torch.save({"one": state, "two": other(state)}, tmp_path / "open_clip_pytorch_model.bin")
    assert refused(tmp_path) == (
        f"{tmp_path}/open_clip_pytorch_model.bin: holds several models that fit: under 'one' and under 'two'; "
        "save the one that is meant alone"
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda s: s | {"module.visual.proj": s["visual.proj"] + 1},
            "holds 'visual.proj' and 'module.visual.proj', which differ and stand for one tensor; "
            "save the one that is meant alone",
        ),
        (
            lambda s: {"module": s, **other(s)},
            "holds 'module.positional_embedding' and 'positional_embedding', which differ and stand for one tensor; "
            "save the one that is meant alone",
        ),
        (
            lambda s: s | {"positional_embedding_res": s["positional_embedding"]},  # Long-CLIP
            "does not fit {model}, which has no positional_embedding_res; correct model_cfg in {config}: "
            "it must be the one that the weights were trained with",
        ),
        (
            lambda s: prefixed("model.", inside("_orig_mod", s | {"visual.adapter.weight": torch.ones(3)})),
            "does not fit {model}, which has no model.visual._orig_mod.adapter.weight; correct model_cfg in {config}: "
            "it must be the one that the weights were trained with",
        ),
        (
            lambda s: (
                prefixed("base_model.model.", s) | {"base_model.model.visual.proj.lora_A.weight": torch.ones(3, 3)}
            ),
            "holds low-rank additions that are not merged (base_model.model.visual.proj.lora_A.weight); "
            "merge them where they were trained (peft: merge_and_unload) and save the whole weights",
        ),
        (
            lambda s: s | {"visual.proj": s["visual.proj"].to_sparse()},
            "holds visual.proj as a sparse tensor; save it again, dense and on the CPU",
        ),
    ],
    ids=["a tensor twice", "a model twice", "Long-CLIP", "an adapter in a compiled tower", "peft", "sparse"],
)
def test_what_would_be_another_model_is_refused(tmp_path, vit, change, what):
    write_config(tmp_path, config("vit"))
    torch.save(change(state_of(vit)), tmp_path / "open_clip_pytorch_model.bin")
    wanted = what.format(model=f"local-dir:{tmp_path}", config=tmp_path / "open_clip_config.json")
    assert refused(tmp_path) == f"{tmp_path}/open_clip_pytorch_model.bin: {wanted}"


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("epoch=3.ckpt", torch.save),
        ("model_best.pth.tar", torch.save),
        ("pytorch_model.bin", save_file),
    ],
)
def test_weights_are_known_by_content(tmp_path, vit, name, save):
    write_config(tmp_path, config("vit"))
    save(state_of(vit), tmp_path / name)
    torch.save({"state": {}}, tmp_path / "optimizer.bin")  # of accelerate
    found, expected = load(tmp_path).model.state_dict(), state_of(vit)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def shards(state, folder, kind):
    """Write two shards and their index."""
    names, index = list(state), {}
    for part, some in enumerate((names[:20], names[20:]), 1):
        file = f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{part:05d}-of-00002.{kind}"
        (save_file if kind == "safetensors" else torch.save)({name: state[name] for name in some}, folder / file)
        index |= dict.fromkeys(some, file)
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder / f"{stem}.index.json"


@pytest.mark.parametrize(
    ("kind", "has_index"), [("safetensors", True), pytest.param("bin", False, marks=pytest.mark.slow)]
)
def test_shards_are_one_checkpoint(tmp_path, vit, kind, has_index):
    write_config(tmp_path, config("vit"))
    index = shards(prefixed("_orig_mod.", state_of(vit)), tmp_path, kind)
    if not has_index:
        index.unlink()
    source = find_weights(f"local-dir:{tmp_path}", None)
    assert len(source.files) == 2
    assert_same(load(tmp_path), vit)
    # Every shard counts in the fingerprint, and the one that is missing is named.
    first, second = source.files
    before = source.sha256
    other_state = {name: tensor + 1 for name, tensor in state_of(vit).items()}
    shards(prefixed("_orig_mod.", other_state), tmp_path, kind)
    if not has_index:
        index.unlink()
    assert find_weights(f"local-dir:{tmp_path}", None).sha256 != before
    second.unlink()
    assert refused(tmp_path) == (
        f"{tmp_path}: shard {second.name} is missing, one of 2; fetch it from where the others come"
    )
    assert first.is_file()


def test_a_broken_index(tmp_path, vit):
    write_config(tmp_path, config("vit"))
    index = tmp_path / "model.safetensors.index.json"
    for content, line in {
        "{}": f"{index}: has no 'weight_map'; give the index of shards, or one file",
        '{"weight_map": {"a": "../x.safetensors"}}': (
            f"{index}: names '../x.safetensors', which is not beside it; correct its weight_map"
        ),
    }.items():
        index.write_text(content)
        assert refused(tmp_path) == line


def test_which_of_several_files_was_read(tmp_path, vit):
    write_config(tmp_path, config("vit"))
    for name in ("epoch_1.pt", "epoch_2.pt", "epoch_3.pt"):
        torch.save(state_of(vit), tmp_path / name)
    assert load(tmp_path).facts["notes"] == ["weights read from epoch_1.pt, not from epoch_2.pt and 1 more beside it"]


@pytest.mark.parametrize(
    ("name", "positions"),
    [("vit", 30), ("coca", 20), *(pytest.param(n, 7, marks=pytest.mark.slow) for n in ("vit", "custom text"))],
)
def test_text_positions_are_those_of_the_weights(tmp_path, monkeypatch, name, positions):
    # The right model has another number of places than the configuration beside its weights says.
    right = config(name, text__context_length=positions)
    monkeypatch.setitem(MODELS, "right", {key: value for key, value in right.items() if key != "embed_dim"})
    if name == "coca":
        MODELS["right"].pop("custom_text")
    model = make_model("right")
    write_config(tmp_path, config(name))
    save_file(state_of(model), tmp_path / "open_clip_model.safetensors")
    backbone = load(tmp_path)
    assert backbone.context_length == positions
    assert backbone.facts["notes"] == [f"text positions: {positions} as trained, not the 12 of the configuration"]
    assert_same(backbone, model)


def test_a_model_that_was_mended_is_saved_mended(tmp_path, vit):
    # open_clip alone would interpolate the 12 positions to 20, and take the activation of the configuration.
    write_config(tmp_path / "one", config("vit", text__context_length=20), {})
    torch.save(prefixed("module.", state_of(vit)), tmp_path / "one" / "open_clip_pytorch_model.bin")
    backbone = load(tmp_path / "one", quick_gelu=True)
    save_model(backbone, tmp_path / "two")
    judge, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'two'}")
    assert_same(backbone, judge.eval())
    again = load(tmp_path / "two")
    assert again.facts["notes"] == []
    assert again.facts["preprocessing"] == backbone.facts["preprocessing"]


@pytest.mark.slow
def test_a_run_loads_its_wrapped_backbone_again(tmp_path, demo_folder):
    source = find_weights("tiny", None)
    model = tmp_path / "model"
    write_config(model, *(json.loads(source.config.read_text())[part] for part in ("model_cfg", "preprocess_cfg")))
    torch.save({"model": prefixed("_orig_mod.", load_file(source.weights))}, model / "open_clip_pytorch_model.bin")
    table = str(demo_folder / "demo.csv")
    caches = {}
    for name in ("tiny", f"local-dir:{model}"):
        out = tmp_path / f"{len(caches)}.h5"
        caches[name] = extract(ExtractConfig(data=table, out=out, backbone=name, precision="fp32", views="center"))
    result = caches[f"local-dir:{model}"]
    words = "loaded: read under key 'model', prefix '_orig_mod.' taken away"
    assert words in result.summary().splitlines()
    run = train(TrainConfig(cache=result.cache, out=tmp_path / "run", epochs=1)).run
    assert words.removeprefix("loaded: ") in json.loads((run / "config.json").read_text())["backbone"]["notes"]
    image = next((demo_folder / "images").iterdir())
    wrapped = Scorer.load(run).score([image], ["a red circle"]).q
    plain = train(TrainConfig(cache=caches["tiny"].cache, out=tmp_path / "plain", epochs=1)).run
    np.testing.assert_allclose(wrapped, Scorer.load(plain).score([image], ["a red circle"]).q, atol=1e-5)


def test_image_positions_of_another_grid(tmp_path, vit):
    write_config(tmp_path, config("vit", vision__image_size=64))
    save_file(state_of(vit), tmp_path / "open_clip_model.safetensors")
    backbone = load(tmp_path)
    words = "image positions interpolated from 3 x 3 to 4 x 4, for the image_size that is set"
    assert backbone.facts["notes"] == [words]
    judge, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert_same(backbone, judge.eval())
    # Nobody set a size: then it is no wish, and is refused.
    cfg = config("vit")
    del cfg["vision_cfg"]["image_size"]
    write_config(tmp_path, cfg)
    assert refused(tmp_path) == (
        f"{tmp_path}/open_clip_model.safetensors: has image positions of 3 x 3, local-dir:{tmp_path} of 14 x 14; "
        f"correct image_size in {tmp_path}/open_clip_config.json: it must be the one that the weights were trained with"
    )


MISFITS = {
    "a shape": (
        {"text__width": 48},
        lambda s: s,
        "does not fit {model}: positional_embedding is 12 x 32 in the weights and 12 x 48 in the model, "
        "and so are 40 more; correct model_cfg in {config}: it must be the one that the weights were trained with",
    ),
    "transposed": (
        {},
        lambda s: s | {"visual.proj": s["visual.proj"].T.contiguous()},
        "does not fit {model}: visual.proj is 24 x 64 in the weights and 64 x 24 in the model; "
        "correct model_cfg in {config}: it must be the one that the weights were trained with",
    ),
    "missing": (
        {},
        lambda s: {n: t for n, t in s.items() if n != "ln_final.weight"},
        "does not fit {model}: lacks ln_final.weight; correct model_cfg in {config}: "
        "it must be the one that the weights were trained with",
    ),
    "fewer layers than trained": (
        {"vision__layers": 3},
        lambda s: s,
        "does not fit {model}, which has no visual.transformer.resblocks.3.attn.in_proj_bias and 11 more; "
        "correct model_cfg in {config}: it must be the one that the weights were trained with",
    ),
    "image tower alone": (
        {},
        lambda s: {n: t for n, t in s.items() if n.startswith("visual.")},
        "holds the image tower alone, of {model}'s text tower nothing; "
        "give weights of both towers: one with random weights would say nothing",
    ),
    "quantised": (
        {},
        lambda s: s | {"visual.proj": s["visual.proj"].to(torch.int8)},
        "holds visual.proj as int8, where the model computes with floating point; give weights that are not quantised",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(tmp_path, vit, name):
    changes, change, line = MISFITS[name]
    write_config(tmp_path, config("vit", **changes))
    save_file(change(state_of(vit)), tmp_path / "open_clip_model.safetensors")
    found = refused(tmp_path)
    wanted = line.format(model=f"local-dir:{tmp_path}", config=tmp_path / "open_clip_config.json")
    assert found == f"{tmp_path}/open_clip_model.safetensors: {wanted}"


def test_what_a_configuration_leaves_open_is_said(tmp_path, vit):
    cfg = config("vit")
    del cfg["quick_gelu"]
    write_config(tmp_path, cfg, {"std": [0.5, 0.5, 0.5], "size": 32})
    save_file(state_of(vit), tmp_path / "open_clip_model.safetensors")
    backbone = load(tmp_path)
    assert backbone.facts["preprocessing"]["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert backbone.facts["notes"] == [
        "preprocessing assumed: OpenAI's mean, bicubic, the shorter side to size, as open_clip_config.json names none",
        "activation assumed: GELU, as open_clip_config.json has no quick_gelu; give --quick-gelu if trained with it",
        "preprocess_cfg.size 32 is not used: the tower's image_size is 48 x 48",
    ]
    asked = load(tmp_path, quick_gelu=True)
    assert not [note for note in asked.facts["notes"] if "activation" in note]
    assert asked.facts["quick_gelu"] is True


@pytest.mark.parametrize(
    ("preprocess", "line"),
    [
        ({"image_mean": [0, 0, 0]}, "preprocess_cfg has 'image_mean', which nothing reads; did you mean 'mean'?"),
        ({"mean": [0.5]}, "preprocess_cfg.mean [0.5] is not three numbers; give one for red, green and blue"),
        (
            {"std": [1, 0, 1]},
            "preprocess_cfg.std [1, 0, 1] is not three numbers above 0; give one for red, green and blue",
        ),
        (
            {"mean": [123.7, 116.8, 103.9]},
            "preprocess_cfg.mean [123.7, 116.8, 103.9] is of pixels from 0 to 255; "
            "divide by 255: pixels go from 0 to 1",
        ),
        (
            {"interpolation": "lanczos"},
            "preprocess_cfg.interpolation 'lanczos' is none of bicubic, bilinear, random; "
            "give the one that the weights were trained with",
        ),
        ([], "preprocess_cfg is no object; give mean and std in it"),
        (
            {"fill_color": "white"},
            'preprocess_cfg.fill_color "white" is no whole number from 0 to 255, nor three; '
            "give the one that the weights were trained with",
        ),
        ({"mode": "BGR"}, "preprocess_cfg.mode 'BGR' is none of RGB; give the one that the weights were trained with"),
    ],
)
def test_a_preprocessing_that_would_be_replaced_is_refused(tmp_path, vit, preprocess, line):
    write_config(tmp_path, config("vit"), preprocess)
    save_file(state_of(vit), tmp_path / "open_clip_model.safetensors")
    assert refused(tmp_path) == f"{tmp_path}/open_clip_config.json: {line}"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"text__vocab_size": 32000},
            "its tokenizer has 49,408 tokens, its text tower 32,000; "
            "name the tokenizer that the weights were trained with in text_cfg.hf_tokenizer_name",
        ),
        (
            {"text__vocab_size": 70000},
            "its tokenizer has 49,408 tokens, its text tower 70,000; "
            "name the tokenizer that the weights were trained with in text_cfg.hf_tokenizer_name",
        ),
        (
            {"text__pool_type": "eos"},
            "its text tower looks for token 2, which its tokenizer does not put at the end; correct text_cfg.eos_id",
        ),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, vit, changes, line):
    write_config(tmp_path, config("vit", **changes))
    state = state_of(vit)
    rows = torch.arange(changes.get("text__vocab_size", 49408)) % 49408
    save_file(state | {"token_embedding.weight": state["token_embedding.weight"][rows]}, tmp_path / "model.safetensors")
    assert refused(tmp_path) == f"{tmp_path}/open_clip_config.json: {line}"


def test_positions_that_a_tower_of_timm_makes_as_it_runs_are_said_or_refused(tmp_path):
    state = state_of(make_model("timm vit"))  # of 160 pixels in patches of 16
    save_file(state, tmp_path / "open_clip_model.safetensors")
    write_config(tmp_path, config("timm vit", vision__image_size=192))
    words = "image positions interpolated from 10 x 10 to 12 x 12, for the image_size that is set"
    assert load(tmp_path).facts["notes"] == [words]
    cfg = config("timm vit")
    del cfg["vision_cfg"]["image_size"]
    write_config(tmp_path, cfg)
    assert refused(tmp_path) == (
        f"{tmp_path}/open_clip_config.json: names no image_size: 224 x 224 would be taken, its tower has positions of "
        "10 x 10 patches; give vision_cfg.image_size 160"
    )


def test_a_tokenizer_in_a_folder_is_part_of_what_the_model_is(tmp_path, vit):
    # Words turned into other tokens are other embeddings: a cache of the one is none of the other.
    write_config(tmp_path, config("vit", text__hf_tokenizer_name="org/words"))
    save_file(state_of(vit), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = find_weights(f"local-dir:{tmp_path}", None).identity()
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    assert find_weights(f"local-dir:{tmp_path}", None).identity() != before


def test_a_backbone_that_another_version_loaded_otherwise_is_not_mixed(tmp_path, vit):
    write_config(tmp_path, config("vit"))
    save_file(state_of(vit), tmp_path / "open_clip_model.safetensors")
    backbone = load(tmp_path)
    check_same(backbone.facts, backbone, place="c.h5", remedy="give another --out")
    with pytest.raises(UserError) as caught:
        check_same(backbone.facts | {"context_length": 77}, backbone, place="c.h5", remedy="give another --out")
    assert str(caught.value) == (
        "c.h5: was made with context_length 77, the same weights are now loaded with 12; give another --out"
    )
