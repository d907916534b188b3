"""Configurations with everything that can be wrong in them: a model, or one line that names file, value and remedy."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest
from safetensors.torch import save_file

from deltaclip.base.errors import UserError
from tests.features.backbone.small_models import MODELS, make_model
from tests.features.backbone.test_loading import PREPROCESS, config, load, refused, state_of, write_config

FAMILIES = ("vit", "resnet", "timm convnext", "coca", "custom text")
VALUES = [None, True, "x", "", -1, 0, 1, 3, 64, 1000, 10**5, 10**9, 1.5, -0.5, float("nan"), float("inf")]
VALUES += [[], [1], [1, 2, 3, 4], [-1, 0], {}, {"a": 1}, [[]], "avg", "eos", "none", "sin_cos_2d", "no_such_model"]
FURTHER = ["timm_model_name", "pool_type", "pos_embed_type", "block_type", "attentional_pool", "tokenizer_kwargs"]
FURTHER += [
    "act_kwargs",
    "norm_kwargs",
    "proj_type",
    "eos_id",
    "embed_cls",
    "context_length",
    "custom_text",
    "nonsense",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a small model, and where its configuration goes."""
    path = tmp_path_factory.mktemp("model")
    save_file(state_of(make_model("vit")), path / "open_clip_model.safetensors")
    return path


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"vision__layers": -1}, "model_cfg.vision_cfg.layers -1 is below 0; correct it"),
        ({"vision__width": "64"}, 'model_cfg.vision_cfg.width is "64", not a whole number; correct it'),
        ({"embed_dim": None}, "model_cfg.embed_dim is null, not a whole number; correct it"),
        ({"quick_gelu": "false"}, 'model_cfg.quick_gelu is "false", not true or false; correct it'),
        ({"quickgelu": True}, "model_cfg.quickgelu is nothing that open_clip knows; did you mean 'quick_gelu'?"),
        ({"text__quick": 1}, "model_cfg.text_cfg.quick is nothing that open_clip knows; leave it out"),
        (
            {"vision__patchsize": 1},
            "model_cfg.vision_cfg.patchsize is nothing that open_clip knows; did you mean 'patch_size'?",
        ),
        (
            {"text__layers": 10**9},
            "model_cfg.text_cfg.layers 1,000,000,000 is too large: the weights are 98 tensors of 1,871,969 numbers; "
            "correct it",
        ),
        ({"text_cfg": None}, "model_cfg.text_cfg is no object; see open_clip's local-dir: layout"),
        (
            {"vision__timm_model_name": "no_such_model"},
            "{model} cannot be made (Unknown model (no_such_model)); correct its configuration",
        ),
        (
            {"text__tokenizer_kwargs": {"trust_remote_code": True}},
            "text_cfg.tokenizer_kwargs asks for code of the hub to be run; leave trust_remote_code out",
        ),
    ],
)
def test_a_wrong_configuration_is_one_line(folder, changes, line):
    write_config(folder, config("vit", **changes))
    found = refused(folder)
    assert found == f"{folder}/open_clip_config.json: {line.replace('{model}', f'local-dir:{folder}')}"


def test_a_tokenizer_of_the_hub_is_named(folder):
    write_config(folder, config("custom text", text__hf_tokenizer_name="org/words", custom_text=True))
    line = refused(folder)
    assert "its tokenizer 'org/words' " in line
    if importlib.util.find_spec("transformers") is None:
        assert line == (
            f"local-dir:{folder}: its tokenizer 'org/words' needs transformers, which is not installed; "
            "install it with: pip install 'deltaclip[hf]'"
        )
    else:
        assert line.endswith(f"put the tokenizer's files (tokenizer.json, tokenizer_config.json) into {folder}")


def mutated(cfg, rng):
    """Change, remove or add one value anywhere in a configuration."""
    places, tables = [], [cfg]
    while tables:
        table = tables.pop()
        places += [(table, key) for key in table]
        tables += [value for value in table.values() if isinstance(value, dict)]
    table, key = rng.choice(places)
    what = rng.random()
    if what < 0.15:
        del table[key]
    elif what < 0.75:
        table[key] = rng.choice(VALUES)
    else:
        table[rng.choice(FURTHER)] = rng.choice(VALUES)


@pytest.mark.parametrize(
    ("family", "seeds"),
    [("vit", range(12)), *(pytest.param(name, range(60), marks=pytest.mark.slow) for name in FAMILIES)],
)
def test_any_configuration_loads_or_is_one_line(tmp_path, family, seeds):
    assert family in MODELS
    save_file(state_of(make_model(family)), tmp_path / "open_clip_model.safetensors")
    errors = []
    for seed in seeds:
        rng = random.Random(f"{family} {seed}")
        content = {"model_cfg": config(family), "preprocess_cfg": dict(PREPROCESS)}
        for _ in range(rng.choice([1, 1, 2])):
            mutated(content, rng)
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        try:
            load(tmp_path)
        except UserError as error:
            errors.append(error)
    assert errors
    for error in errors:
        assert "\n" not in str(error)
        assert error.remedy, error
        assert error.place, error
