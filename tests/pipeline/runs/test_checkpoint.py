"""Heads on disk: the header rebuilds them exactly, and other files are refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.heads import HeadSpec, TargetSpec, build_heads
from deltaclip.pipeline.runs.folder import load_heads, save_heads

SPECS = [
    HeadSpec(dim=8),
    HeadSpec(dim=8, scale_mode="learned", dropout=0.0).with_scales({"quality": 0.0, "consistency": 0.3}),
    HeadSpec(dim=8, scale_mode="curriculum", hidden_image=4, hidden_pair=(6, 3)),
    HeadSpec(dim=8, targets=(TargetSpec("lighting", "image", 0.1), TargetSpec("relevance", "pair", 0.4))),
    HeadSpec(dim=8, kind="direct"),
    HeadSpec(dim=8, kind="direct", two_branch=True),
    HeadSpec(dim=8, kind="direct", two_branch=True, refinement=True, refine_bound=0.3),
    HeadSpec(dim=8, rationale=True),
]


def scrambled(spec):
    heads = build_heads(spec)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return heads.eval()


@pytest.mark.parametrize("spec", SPECS)
def test_heads_survive_exactly(spec, tmp_path):
    heads = scrambled(spec)
    save_heads(tmp_path / "x.safetensors", heads, spec, {"mode": "m"})
    loaded, header = load_heads(tmp_path / "x.safetensors")
    assert HeadSpec.from_json(header["spec"]) == spec
    assert header["mode"] == "m"
    assert not loaded.training
    ours, theirs = heads.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    v, t = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    with torch.no_grad():
        for target in spec.names:
            assert torch.equal(heads(v, t).of(target), loaded(v, t).of(target))


def test_a_curriculum_checkpoint_keeps_the_scale_of_its_epoch(tmp_path):
    heads = scrambled(SPECS[2])
    heads.set_scale_fraction(0.5)
    save_heads(tmp_path / "x.safetensors", heads, SPECS[2], {})
    assert load_heads(tmp_path / "x.safetensors")[0].scales() == pytest.approx({"quality": 0.1, "consistency": 0.1})


def test_the_header_is_json_that_others_can_read(demo_run):
    with safe_open(demo_run / "residual_frozen_best.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["deltaclip"])
    assert header["spec"]["kind"] == "residual"
    assert header["mode"] == "residual_frozen"
    assert header["backbone"]["dim"] == header["spec"]["dim"]
    assert len(header["request"]["weights_sha256"]) == 64


def refused(path):
    with pytest.raises(UserError) as error:
        load_heads(path)
    line = str(error.value)
    assert "\n" not in line
    found = re.fullmatch(r"(.*): is no checkpoint of deltaclip heads \((.*)\); train again", line)
    assert found[1] == str(path)
    return found[2]


def test_safetensors_of_others_are_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert refused(tmp_path / "x.safetensors") == "'deltaclip'"


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(UserError) as error:
        load_heads(path)
    words = "is a checkpoint as torch.save writes it, no file of heads; give the file that belongs here"
    assert str(error.value) == f"{path}: {words}"


def test_heads_of_another_shape_are_refused(tmp_path):
    save_heads(tmp_path / "x.safetensors", build_heads(HeadSpec(dim=8)), HeadSpec(dim=9), {})
    assert "Error(s) in loading state_dict" in refused(tmp_path / "x.safetensors")


def test_an_unknown_head_setting_is_refused(tmp_path):
    metadata = {"deltaclip": json.dumps({"spec": {"dim": 8, "drop_out": 0.1}})}
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors", metadata=metadata)
    assert refused(tmp_path / "x.safetensors") == "unknown head setting 'drop_out'; did you mean 'dropout'?"


def test_a_missing_checkpoint_is_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "gone.safetensors")
