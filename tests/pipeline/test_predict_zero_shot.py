"""Scores without any run: cosine and antonym prompts; and rows in the order of a column."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.anchors import PAIR_NAMES, PAIRS
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.settings import PredictConfig
from deltaclip.tests.pipeline.conftest import read_csv

# bf16 of a processor that has it, in a cosine; the logit scale of `tiny` is some 30
COSINE, SHARE = 5e-3, 0.05


@pytest.fixture
def table(tmp_path, demo_folder, demo_rows):
    """Five rows of the demo set, the last without a prompt, the fourth without a picture."""
    path = tmp_path / "some.csv"
    rows = [[demo_folder / row["image"], row["prompt"]] for row in demo_rows[:5]]
    rows[3][0], rows[4][1] = tmp_path / "missing.png", ""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "prompt"], *rows])
    return path, rows


def test_the_numbers_are_those_of_the_formula(table, tiny_backbone):
    path, rows = table
    found = predict(PredictConfig(zero_shot=str(path), backbone=tiny_backbone, allow_outside=True, device="cpu"))
    backbone = load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")
    model, there = backbone.model, [0, 1, 2, 4]
    with torch.no_grad():
        pixels = torch.stack([backbone.preprocess(Image.open(rows[row][0]).convert("RGB")) for row in there])
        v = model.encode_image(pixels, normalize=True).double()
        t = model.encode_text(backbone.tokenizer([rows[row][1] for row in there[:3]]), normalize=True).double()
        anchors = model.encode_text(backbone.tokenizer([text for pair in PAIRS for text in pair]), normalize=True)
        scale = float(model.logit_scale.exp())
    expected = (v[:3] * t).sum(dim=1).numpy()
    assert found.columns["cosine"][there[:3]] == pytest.approx(expected, abs=COSINE)
    assert np.isnan(found.columns["cosine"][3:]).all()  # no picture; no prompt
    logit = scale * (v @ anchors.double().T).numpy().reshape(len(there), len(PAIRS), 2)
    share = np.exp(logit[..., 0]) / np.exp(logit).sum(axis=2)  # CLIP-IQA: softmax over the two
    for number, name in enumerate(PAIR_NAMES):
        assert found.columns[f"antonym_{name}"][there] == pytest.approx(share[:, number], abs=SHARE)
    assert found.failed == 1
    assert found.columns["error"][3].startswith("no such file")
    assert found.labels == ("cosine", "antonym_quality")
    assert found.trust[0].startswith("no human score was seen: cosine of image and prompt in tiny")
    assert found.coverage is None


def test_a_scale_that_is_no_logarithm_is_refused(table, tmp_path, tiny_backbone):
    """Saved after exp() it would make every antonym score 0 or 1."""
    source = find_weights(tiny_backbone, None)
    shutil.copy(source.config, tmp_path)
    save_file(load_file(source.weights) | {"logit_scale": torch.tensor(100.0)}, tmp_path / source.weights.name)
    with pytest.raises(UserError, match=r"its logit_scale 100 is no logarithm of a scale; correct it in the weights"):
        predict(
            PredictConfig(zero_shot=str(table[0]), backbone=f"local-dir:{tmp_path}", allow_outside=True, device="cpu")
        )


def test_images_alone_have_no_cosine(demo_folder, tiny_backbone):
    found = predict(PredictConfig(zero_shot=str(demo_folder / "images"), backbone=tiny_backbone, sort="antonym_beauty"))
    assert found.labels == ("antonym_quality",)
    assert np.isnan(found.columns["cosine"]).all()
    assert (np.diff(found.columns["antonym_beauty"]) <= 0).all()


def test_rows_in_the_order_of_a_column(demo_run, table, tmp_path):
    out = tmp_path / "scores.csv"
    config = PredictConfig(run=demo_run, target=str(table[0]), allow_outside=True, device="cpu", sort="q", out=out)
    found = predict(config)
    scores = [float(row["quality"] or "nan") for row in read_csv(out)]
    assert scores[:4] == sorted(scores[:4], reverse=True)
    assert np.isnan(scores[4])  # what could not be read goes last
    assert found.columns["error"][4].startswith("no such file")
    first = predict(PredictConfig(run=demo_run, target=str(table[0]), allow_outside=True, sort="q", top=2))
    assert list(first.columns["image"]) == list(found.columns["image"][:2])
    assert "the 2 highest of 5 by q" in first.summary()
    assert "1 images could not be read\n" in first.summary()


def test_a_column_that_is_not_there_is_refused_before_anything_is_scored(demo_run, demo_folder, tiny_backbone):
    data = str(demo_folder / "demo.csv")
    for settings in ({"run": demo_run, "target": data}, {"zero_shot": data, "backbone": tiny_backbone}):
        with pytest.raises(UserError, match="--sort: 'prompt' is no column of scores; known: "):
            predict(PredictConfig(**settings, sort="prompt"))
