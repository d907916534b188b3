"""Folders that transformers writes: the same embeddings and token ids as its own, and the line where that cannot be.

The judge is transformers itself, on random weights.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.encode import TextTower, _tokenise, encode_images, encode_texts
from deltaclip.features.backbone.load import load_backbone, save_model
from deltaclip.features.backbone.pixels import center_crops, normalise
from deltaclip.features.backbone.towers import cut_towers
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.finetune import finetune
from deltaclip.pipeline.settings import FinetuneConfig, TrainConfig
from deltaclip.pipeline.train import train
from tests.features.backbone.transformers_models import KINDS, SIDE, save_folder

transformers = pytest.importorskip("transformers", reason="the judge: pip install 'deltaclip[hf]'")

FP32 = 1e-5  # the same operations on the same weights, in another order
TEXTS = [
    "a photo of a Red cat",
    "An astronaut riding a horse, oil on canvas!  --v 5",
    "x",
    "two dogs " * 40,
    "naïve café 東京",
    "<|endoftext|> and more",
]
ids = {"ids": lambda kind: kind.replace(", ", "-").replace(" ", "-")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return what gives the folder of a kind, and transformers' own model; each is made once."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("models") / "model"
        return folder, save_folder(folder, kind)

    return make


@pytest.fixture
def folder(made, tmp_path):
    """Return a copy of the folder of a small CLIP, to be broken."""
    return shutil.copytree(made("clip, gelu")[0], tmp_path / "model")


def load(folder, **options):
    return load_backbone(find_weights(f"local-dir:{folder}", None), device="cpu", precision="fp32", **options)


def refused(folder, **options):
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(folder), "DIR")


def images():
    rng = np.random.default_rng(7)
    small = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in [(9, 13), (8, 8), (30, 11)]]
    return [Image.fromarray(pixels).resize((pixels.shape[1] * 7, pixels.shape[0] * 7), 3) for pixels in small]


def unit(features):
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1).numpy()


def judged_images(model, kind, pixels):
    """What transformers makes of pixels; those of SigLIP 2 are cut into patches, row by row."""
    if "flat" not in kind:
        return unit(model.get_image_features(pixel_values=pixels))
    grid, count = SIDE // 16, len(pixels)
    patches = pixels.reshape(count, 3, grid, 16, grid, 16).permute(0, 2, 4, 3, 5, 1).reshape(count, grid * grid, -1)
    shapes = {"spatial_shapes": torch.tensor([[grid, grid]] * count)}
    mask = torch.ones(count, grid * grid, dtype=torch.int32)
    return unit(model.get_image_features(pixel_values=patches, pixel_attention_mask=mask, **shapes))


def processor_of(folder):
    """transformers' processor that resizes with Pillow, as we do; its other one differs by a few of 255 levels."""
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


QUICK = ("clip, gelu", "siglip2")  # the others are made once, in CI


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS], **ids
)
def test_images_and_texts_are_those_of_transformers(made, kind):
    folder, model = made(kind)
    backbone = load(folder)
    expected = processor_of(folder)(images(), return_tensors="pt")["pixel_values"]
    crops = center_crops(backbone)
    pixels = torch.cat([crops(image) for image in images()])
    assert torch.equal(normalise(backbone, pixels), expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=backbone.context_length)
    own, cut = _tokenise(backbone, TEXTS)
    assert own.tolist() == tokens["input_ids"]
    assert cut.tolist() == [len(tokenizer(text)["input_ids"]) > backbone.context_length for text in TEXTS]
    with torch.no_grad():
        v, t = judged_images(model, kind, expected), unit(model.get_text_features(input_ids=own))
    np.testing.assert_allclose(encode_images(backbone, pixels).unit_BD, v, atol=FP32)
    np.testing.assert_allclose(encode_texts(backbone, TEXTS).unit_BD, t, atol=FP32)
    assert v.std(axis=0).mean() > 0.02  # random weights that tell pictures apart


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip, old eos", "siglip2, flat patches"], **ids)
def test_what_is_saved_is_what_transformers_reads(made, tmp_path, kind):
    folder, model = made(kind)
    save_model(load(folder), tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert load(tmp_path / "saved").facts["config_sha256"] == load(folder).facts["config_sha256"]


def test_fast_paths_stay(made):
    assert TextTower(load(made("clip, gelu")[0])).can_cut  # prompts run to their last token
    for kind in QUICK:
        image, text = cut_towers(load(made(kind)[0]), freeze_layers=2, freeze_text_layers=1)
        assert (image.depth, text.depth) == (3, 2)


WRAPPINGS = {
    "DDP": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "key": lambda state: {"model": state},
    "bare": lambda state: state,
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrapped_weights(made, folder, name):
    expected = load(made("clip, gelu")[0]).model.state_dict()
    torch.save(WRAPPINGS[name](load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load(folder).model.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_shards_of_transformers(made, tmp_path):
    folder = tmp_path / "model"
    save_folder(folder, "clip, gelu", max_shard_size="300KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert not (folder / "model.safetensors").exists()
    found, expected = (load(place).model.state_dict() for place in (folder, made("clip, gelu")[0]))
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    count = len(list(folder.glob("model-*.safetensors")))
    last.unlink()
    assert refused(folder) == (
        f"DIR: shard {last.name} is missing, one of {count}; fetch it from where the others come"
    )


def change(folder, file, **values):
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    for place, value in values.items():
        *parts, name = place.split("__")
        table = functools.reduce(lambda found, part: found[part], parts, content)
        table[name] = value
    path.write_text(json.dumps(content))


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
NAFLEX = "a tower of one input size cannot do that; give a SigLIP 2 model of fixed resolution"


@pytest.mark.parametrize(
    ("file", "values", "line"),
    [
        (
            CONFIG,
            {"model_type": "chinese_clip"},
            "DIR/config.json: model_type 'chinese_clip' is not read from a transformers folder; "
            "give a model of clip, siglip, siglip2, or the same weights for open_clip",
        ),
        (
            CONFIG,
            {"vision_config__hidden_act": "relu"},
            "DIR/config.json: vision_config.hidden_act 'relu' is none of gelu, gelu_fast, gelu_new, gelu_pytorch_tanh, "
            "quick_gelu; give a model with one of them",
        ),
        (
            CONFIG,
            {"text_config__hidden_size": "32"},
            'DIR/config.json: text_config.hidden_size is "32", not a whole number above 0; correct it',
        ),
        (
            CONFIG,
            {"text_config__hidden_act": "quick_gelu"},
            "DIR/config.json: hidden_act is quick_gelu of the text and gelu of the image tower; "
            "give a model with QuickGELU in both towers or in none",
        ),
        (
            CONFIG,
            {"vision_config__num_hidden_layers": 4},
            "DIR/model.safetensors: does not fit DIR/config.json: lacks "
            "vision_model.encoder.layers.3.self_attn.q_proj.weight and 15 more; "
            "correct config.json, or save the weights again, whole",
        ),
        (
            CONFIG,
            {"vision_config__num_hidden_layers": 2},
            "DIR/model.safetensors: does not fit DIR/config.json, which has no "
            "vision_model.encoder.layers.2.layer_norm1.bias and 15 more; "
            "correct config.json: num_hidden_layers and model_type",
        ),
        (
            CONFIG,
            {"text_config__eos_token_id": None},
            "DIR/config.json: text_config.eos_token_id is null, not one token; "
            "give the token that ends a text in its tokenizer",
        ),
        (
            PROCESSOR,
            {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.8},
            "DIR/preprocessor_config.json: is of ConvNextImageProcessor, which is not known here; "
            "give the file that was saved with a CLIP or SigLIP model",
        ),
        (
            "processor_config.json",
            {"image_processor": {"image_mean": [0, 0, 0]}},
            "DIR/processor_config.json: image_mean is [0, 0, 0], in preprocessor_config.json "
            "[0.48145466, 0.4578275, 0.40821073]; take one of the two files away",
        ),
        (
            "adapter_config.json",
            {"peft_type": "LORA"},
            "DIR/adapter_config.json: holds low-rank additions of peft, which would be left out; "
            "merge them (merge_and_unload) and save the whole model, or take the file away",
        ),
        (
            PROCESSOR,
            {"image_processor_type": "Siglip2ImageProcessor"},
            f"DIR/preprocessor_config.json: is of NaFlex, whose pictures keep their shape: {NAFLEX}",
        ),
        (
            PROCESSOR,
            {"crop_size": {"height": 64, "width": 64}},
            "DIR/preprocessor_config.json: gives 64 x 64 pixels, the image tower takes 48 x 48; "
            "give the one that was saved with these weights",
        ),
        (
            PROCESSOR,
            {"resample": 1},
            "DIR/preprocessor_config.json: resample 1 is none of 2, 3; "
            "give 3 (bicubic) or 2 (bilinear), as the model was trained",
        ),
        (
            PROCESSOR,
            {"rescale_factor": 1.0},
            "DIR/preprocessor_config.json: does not resize pictures and divide their pixels by 255; "
            "give do_resize, do_rescale and rescale_factor as they were saved",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith(".json") else None,
)
def test_what_cannot_be_computed_is_one_line(folder, file, values, line):
    change(folder, file, **values)
    assert refused(folder) == line


def test_other_positions_than_configured_are_refused(folder):
    change(folder, CONFIG, vision_config__image_size=64)
    (folder / PROCESSOR).unlink()
    assert refused(folder) == (
        "DIR/model.safetensors: has image positions of 3 x 3, local-dir:DIR of 4 x 4; "
        "correct image_size in DIR/config.json: it must be the one that the weights were trained with"
    )


def test_what_is_missing_is_named(folder, monkeypatch):
    assert refused(folder, quick_gelu=True) == (
        "--quick-gelu: DIR/config.json says no QuickGELU (hidden_act); leave the option out"
    )
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(folder) == (
        "DIR: its tokenizer needs tokenizers, which is not installed; install it with: pip install 'deltaclip[hf]'"
    )
    (folder / "tokenizer.json").unlink()
    assert refused(folder) == "DIR: has no tokenizer (tokenizer.json); put tokenizer.json of the same model into it"
    (folder / "model.safetensors").unlink()
    assert refused(folder) == "DIR: has no weights; put model.safetensors into it"
    (folder / "config.json").unlink()
    assert refused(folder) == (
        "DIR: has no open_clip_config.json, and no config.json of transformers; "
        "write one with model_cfg and preprocess_cfg"
    )


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text('{"model": 3}')
    assert refused(folder).startswith("DIR/tokenizer.json: cannot be read (")


def test_an_assumed_preprocessing_is_said_and_older_files_are_understood(made, folder):
    expected = load(folder).facts["preprocessing"]
    (folder / PROCESSOR).unlink()
    alone = load(folder).facts
    assert alone["preprocessing"] == expected
    assert (
        f"preprocessing assumed: bicubic, the shorter side to {SIDE}, OpenAI's mean and std, "
        "as there is no preprocessor_config.json"
    ) in alone["notes"]
    older = {"do_resize": True, "size": SIDE, "crop_size": SIDE, "feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / PROCESSOR).write_text(json.dumps(older))
    assert load(folder).facts["preprocessing"] == expected
    wider = older | {"size": {"shortest_edge": 64}, "resample": 2}
    (folder / PROCESSOR).write_text(json.dumps(wider))
    backbone = load(folder)
    judge = processor_of(made("clip, gelu")[0])
    found = judge(images(), return_tensors="pt", size={"shortest_edge": 64}, resample=2)["pixel_values"]
    crops = center_crops(backbone)
    assert torch.equal(torch.cat([normalise(backbone, crops(image)) for image in images()]), found)


def test_a_folder_of_the_hubs_cache_is_loaded_by_name(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    place = tmp_path / "hub" / "models--org--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    source = find_weights("hf-hub:org/small", None)
    assert source.name == "hf-hub:org/small"
    assert source.identity() == find_weights(f"local-dir:{folder}", None).identity()


def test_a_bare_file_and_a_plain_path_say_what_to_give(folder, tmp_path):
    (tmp_path / "only").mkdir()
    save_file(load_file(folder / "model.safetensors"), tmp_path / "only" / "w.safetensors")
    with pytest.raises(UserError, match=r"give --backbone local-dir:FOLDER of it, with its config\.json"):
        load_backbone(
            find_weights("ViT-B-32", str(tmp_path / "only" / "w.safetensors")), device="cpu", precision="fp32"
        )
    with pytest.raises(UserError, match=f"give a folder as local-dir:{folder}$"):
        find_weights(str(folder), None)
    with pytest.raises(UserError, match=r"is a folder; give --backbone local-dir:FOLDER$"):
        find_weights("ViT-B-32", str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip, quick gelu", "siglip2"], **ids)
def test_every_stage_runs(made, demo_folder, tmp_path, kind):
    folder, _ = made(kind)
    cache = extract(
        ExtractConfig(data=str(demo_folder / "demo.csv"), backbone=f"local-dir:{folder}", out=tmp_path / "c.h5")
    ).cache
    with FeatureStore.open(cache) as store:
        assert "stages" in store.view_names()
        assert "converted from the layout of transformers" in store.facts["notes"]
    run = train(TrainConfig(cache=cache, epochs=1, out=tmp_path / "run")).run
    tuned = finetune(
        FinetuneConfig(cache=cache, epochs=1, freeze_layers=2, out=tmp_path / "tuned", save_full=True, precision="fp32")
    ).run
    image = sorted((demo_folder / "images").iterdir())[0]
    for done in (run, tuned):
        scored = Scorer.load(done).score([image], ["a red circle"])
        assert np.isfinite(scored.q).all()
        assert np.isfinite(scored.c).all()
    (saved,) = tuned.rglob("model.safetensors")
    assert (saved.parent / "tokenizer_config.json").is_file()
    load(saved.parent)
