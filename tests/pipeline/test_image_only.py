"""Towers of images alone, of timm's: image targets go through every stage, pair targets say what they need."""

from __future__ import annotations

import copy
import csv
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.encode import encode_images
from deltaclip.features.backbone.load import load_backbone, save_model
from deltaclip.features.backbone.pixels import center_crops, normalise
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.finetune import finetune
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.task import loss_weights
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import FinetuneConfig, PredictConfig, TrainConfig
from deltaclip.pipeline.train import train

ROWS = 60
VIT, CONVNEXT = "test_vit", "test_convnext"


def write_weights(name, path, *, prefix="", more=None):
    """Write random weights of a model of timm's as it has them itself, classifier included; return the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    state = {f"{prefix}{key}": tensor.clone().contiguous() for key, tensor in model.state_dict().items()}
    save_file(state | (more or {}), path)
    return model


def load(name, path):
    return load_backbone(find_weights(f"timm:{name}", str(path)), device="cpu", precision="fp32")


def refused(name, path):
    with pytest.raises(UserError) as caught:
        load(name, path)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def made(tmp_path_factory, demo_folder):
    """Weights of a small tower, a table of the demo's images with prompts and both labels, one without, and caches."""
    folder = tmp_path_factory.mktemp("image_only")
    write_weights(VIT, folder / "vit.safetensors")
    with (demo_folder / "demo.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:ROWS]
    for name, columns in (("both", ["image", "prompt", "quality", "consistency"]), ("bare", ["image", "quality"])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        extracted = extract(config(folder, name, demo_folder))
        assert extracted.usable_rows == ROWS
        if name == "both":
            (folder / "summary.txt").write_text(extracted.summary(), encoding="utf-8")
    return folder


def config(folder, name, demo_folder, **changes):
    given = {
        "data": str(folder / f"{name}.csv"),
        "image_root": demo_folder,
        "label_range": ["quality=0,1", "consistency=0,1"],
        "backbone": f"timm:{VIT}",
        "pretrained": str(folder / "vit.safetensors"),
        "out": folder / f"{name}.h5",
    }
    return ExtractConfig(**(given | changes))


@pytest.mark.parametrize("name", [VIT, CONVNEXT])
def test_embeddings_and_pixels_are_those_of_timm(tmp_path, name):
    model = write_weights(name, tmp_path / "w.safetensors", prefix="module.")
    backbone = load(name, tmp_path / "w.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (20, 31, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((310, 200))
    cfg = timm.data.resolve_model_data_config(model)
    expected = timm.data.create_transform(**cfg, is_training=False)(image)[None]
    pixels = center_crops(backbone)(image)
    assert torch.equal(normalise(backbone, pixels), expected)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(expected), pre_logits=True)
    unit = torch.nn.functional.normalize(features, dim=-1).numpy()
    np.testing.assert_allclose(encode_images(backbone, pixels).unit_BD, unit, atol=1e-5)
    notes = " | ".join(backbone.facts["notes"])
    assert "prefix 'module.' taken away" in notes
    assert f"preprocessing chosen: that of timm's {name}" in notes
    assert "left out, as no part of the model: the classifier module.head" in notes
    assert not pickle.loads(pickle.dumps(copy.deepcopy(backbone))).has_text  # noqa: S301 - our own


def test_a_folder_of_timms_own_says_how_its_model_was_trained(tmp_path):
    """As timm writes it: other pixels, another size; what is saved of it says the same."""
    torch.manual_seed(0)
    pixels = {"input_size": [3, 96, 96], "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.3, 0.3], "interpolation": "bilinear"}
    content = {"architecture": VIT.partition(".")[0], "model_args": {"img_size": 96}, "pretrained_cfg": pixels}
    (tmp_path / "one").mkdir()
    save_file(timm.create_model(VIT, img_size=96).state_dict(), tmp_path / "one" / "model.safetensors")
    (tmp_path / "one" / "config.json").write_text(json.dumps(content))
    for place in (tmp_path / "one", tmp_path / "one" / "model.safetensors"):
        facts = load(VIT, place).facts
        assert facts["preprocessing"]["size"] == [96, 96]
        assert [facts["preprocessing"][name] for name in ("mean", "std", "interpolation")] == [*pixels.values()][1:]
        assert "preprocessing chosen: that of config.json beside it" in facts["notes"]
    save_model(load(VIT, tmp_path / "one"), tmp_path / "two")
    assert load(VIT, tmp_path / "two").facts["preprocessing"] == facts["preprocessing"]
    assert load(VIT, tmp_path / "two").facts["config_sha256"] is not None
    assert refused(CONVNEXT, tmp_path / "one") == (
        f"{tmp_path}/one/config.json: is of {content['architecture']}; give --backbone timm:{content['architecture']}"
    )
    with pytest.raises(
        UserError, match=rf"is a model of timm's; give --backbone timm:\w+ --pretrained {tmp_path}/one$"
    ):
        find_weights(f"local-dir:{tmp_path}/one", None)


def test_a_token_that_the_model_has_not_is_refused(tmp_path):
    """Registers of a DINOv2 given to the model of the same size without: the embeddings would be others."""
    torch.manual_seed(0)
    state = timm.create_model(VIT).state_dict()
    path = tmp_path / "w.safetensors"
    save_file(state | {"mask_token": torch.ones(1, 64)}, path)  # of training alone
    load(VIT, path)
    save_file(state | {"register_tokens": torch.ones(1, 4, 64)}, path)
    assert refused(VIT, path) == (
        f"{path}: does not fit timm:{VIT}, which has no register_tokens; "
        "give weights of this model of timm's, or the name of the model that they are of"
    )


def test_wrong_weights_are_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(VIT, path)
    assert refused(CONVNEXT, path).startswith(f"{path}: does not fit timm:{CONVNEXT}: ")
    assert refused(CONVNEXT, path).endswith(
        "; give weights of this model of timm's, or the name of the model that they are of"
    )
    assert refused("test_vitt", path) == "--backbone: timm knows no model 'test_vitt'; did you mean 'test_vit'?"
    with pytest.raises(UserError) as caught:
        find_weights(f"timm:{VIT}", None)
    assert str(caught.value) == (
        f"--pretrained: timm:{VIT} without weights would be random; "
        "give the file of its weights (model.safetensors of the model's repository)"
    )
    with pytest.raises(UserError) as caught:
        find_weights(f"timm:{VIT}", str(tmp_path / "none.pth"))
    assert str(caught.value) == f"{tmp_path}/none.pth: no such file; give the file of the weights of timm:{VIT}"
    assert find_weights(f"timm:{VIT}", str(tmp_path)).weights == path


def test_a_cache_keeps_prompts_for_groups_and_has_no_anchors(made):
    with FeatureStore.open(made / "both.h5") as store:
        assert store.anchors() is None
        assert {"stages", "statistics"} <= set(store.view_names())
        rows = store.rows()
        assert (rows.prompt >= 0).all()
        assert len(set(rows.text["group"])) == len(set(rows.text["prompt"])) < ROWS
        assert not np.any(store.embeddings("texts"))
        assert store.facts["text_tower"] is False
    summary = (made / "summary.txt").read_text(encoding="utf-8")
    assert "without anchors: the backbone has no text tower" in summary
    assert "image tower alone" in summary


@pytest.fixture(scope="module")
def run(made):
    return train(TrainConfig(cache=made / "both.h5", epochs=2, out=made / "run")).run


def test_image_targets_train_and_the_pair_target_says_what_it_needs(made, run, capsys):
    folder = open_run(run)
    assert (folder.labels, folder.needs_prompts) == (("quality",), False)
    assert folder.metrics["floors"]["cosine"] == {}
    train(TrainConfig(cache=made / "both.h5", epochs=1, base="calibrated", out=made / "again"))
    said = capsys.readouterr()
    assert (
        f"warning: consistency sees the prompt and timm:{VIT} has no text tower, so it is not trained: "
        f"extract the data with a CLIP too and give both, `deltaclip train CLIP.h5 {made}/both.h5`"
    ) in said.out + said.err
    with pytest.raises(UserError) as caught:
        train(TrainConfig(cache=made / "both.h5", weight="quality=0", out=made / "never"))
    assert str(caught.value) == "--weight: is 0 for every target that the cache has labels of; give one above 0"
    pairs_alone = replace(load_rows(made / "both.h5", "cpu"), targets=())
    with pytest.raises(UserError) as caught:
        loss_weights(TrainConfig(cache=made / "both.h5"), pairs_alone)
    assert str(caught.value) == (
        f"{made}/both.h5: has labels of image and prompt alone, and timm:{VIT} has no text tower; "
        "extract the data with a CLIP too: its cache first, this one beside it"
    )


def test_a_table_without_prompts_trains_too(made, tmp_path):
    assert open_run(train(TrainConfig(cache=made / "bare.h5", epochs=1, out=tmp_path / "run")).run).labels == (
        "quality",
    )


def test_predict_and_scorer(made, run, demo_folder):
    found = predict(PredictConfig(run=run, target=str(made / "both.csv"), image_root=demo_folder))
    assert np.isfinite(found.columns["quality"]).all()
    with (run / "predictions.csv").open(encoding="utf-8") as file:
        recorded = {row["image"]: float(row["quality"]) for row in csv.DictReader(file) if row["split"] == "test"}
    here = dict(zip(found.columns["image"], found.columns["quality"], strict=True))
    assert len(recorded) > 3
    for name, score in recorded.items():  # scores of training rows are of left-out bases
        assert here[name] == pytest.approx(score, abs=2e-3)
    scored = Scorer.load(run).score([demo_folder / name for name in found.columns["image"][:3]])
    np.testing.assert_allclose(scored.q, found.columns["quality"][:3], atol=1e-5)
    assert np.isnan(scored.c).all()


@pytest.mark.slow
def test_with_a_clip_first_both_targets_train(made, demo_folder, tmp_path):
    clip = extract(config(made, "both", demo_folder, backbone="tiny", pretrained=None, out=tmp_path / "clip.h5")).cache
    run = train(TrainConfig(cache=clip, beside=[made / "both.h5"], epochs=1, out=tmp_path / "run")).run
    assert open_run(run).labels == ("quality", "consistency")
    image = sorted((demo_folder / "images").iterdir())[0]
    scored = Scorer.load(run).score([image], ["a red circle"])
    assert np.isfinite(scored.q).all()
    assert np.isfinite(scored.c).all()


@pytest.mark.slow
def test_finetune(made, demo_folder, tmp_path):
    done = finetune(
        FinetuneConfig(
            cache=made / "both.h5",
            epochs=1,
            freeze_layers=0.75,
            precision="fp32",
            out=tmp_path / "tuned",
            save_full=True,
        )
    ).run
    assert open_run(done).labels == ("quality",)
    image = sorted((demo_folder / "images").iterdir())[0]
    assert np.isfinite(Scorer.load(done).score([image]).q).all()
    (saved,) = done.rglob("model.safetensors")
    assert load(VIT, saved.parent).dim == load(VIT, made / "vit.safetensors").dim
