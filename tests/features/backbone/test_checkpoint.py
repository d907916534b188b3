"""Names, tags and paths to weights: what is found, and the exact line where nothing is."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from deltaclip.base.errors import UserError
from deltaclip.base.files import sha256_file
from deltaclip.features.backbone import weights as checkpoint
from deltaclip.features.backbone.tensors import is_torchscript
from deltaclip.features.backbone.weights import find_weights, fingerprint

PREFERRED = [
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
]


def refused(backbone, pretrained=None):
    with pytest.raises(UserError) as caught:
        find_weights(backbone, pretrained)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    return tmp_path


def test_tiny_is_bundled():
    source = find_weights("tiny", None)
    assert source.name == "tiny"
    assert source.config.parent == Path(checkpoint.__file__).parent / "tiny"
    identity = source.identity()
    assert identity == {
        "model": None,
        "weights_sha256": sha256_file(source.weights),
        "config_sha256": sha256_file(source.config),
        "tag": None,
    }


def test_identity_is_content_not_place(folder, tmp_path_factory):
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (elsewhere / name).write_bytes((folder / name).read_bytes())
    one, two = (find_weights(f"local-dir:{place}", None) for place in (folder, elsewhere))
    assert one.identity() == two.identity()
    (elsewhere / "open_clip_config.json").write_text('{"model_cfg": {"quick_gelu": true}}')
    assert one.identity() != find_weights(f"local-dir:{elsewhere}", None).identity()


def test_file_for_a_model_name(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"weights")
    source = find_weights("ViT-S-32-alt", str(tmp_path / "weights.pt"))
    assert (source.model, source.weights, source.config) == ("ViT-S-32-alt", tmp_path / "weights.pt", None)
    assert source.identity() == {
        "model": "ViT-S-32-alt",
        "weights_sha256": hashlib.sha256(b"weights").hexdigest(),
        "config_sha256": None,
        "tag": None,
    }
    assert find_weights("ViT-B/32", str(tmp_path / "weights.pt")).model == "ViT-B/32"


def test_order_of_files_in_a_folder_is_open_clips(folder):
    from open_clip.factory import _find_checkpoint_in_dir

    for count in range(len(PREFERRED)):
        for name in PREFERRED[count:]:
            (folder / name).write_bytes(name.encode())
        found = find_weights(f"local-dir:{folder}", None).weights
        assert found.name == PREFERRED[count]
        assert str(found) == _find_checkpoint_in_dir(folder)
        (folder / PREFERRED[count]).unlink()
    for path in folder.glob("*model*"):
        if path.suffix != ".json":
            path.unlink()
    (folder / "step_2.bin").write_bytes(b"2")
    (folder / "step_1.bin").write_bytes(b"1")
    assert find_weights(f"local-dir:{folder}", None).weights.name in {"step_1.bin", "step_2.bin"}
    assert str(find_weights(f"local-dir:{folder}", None).weights) == _find_checkpoint_in_dir(folder)


def test_refusals_of_folders(folder):
    remedy = "put open_clip_model.safetensors into it"
    assert refused(f"local-dir:{folder}") == f"{folder}: has no weights; {remedy}"
    config = folder / "open_clip_config.json"
    config.write_text("{")
    line = "broken JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"
    assert refused(f"local-dir:{folder}") == f"{config}: {line}; correct it"
    config.write_text(json.dumps({"vision_cfg": {}}))
    assert refused(f"local-dir:{folder}") == f"{config}: has no 'model_cfg'; see open_clip's local-dir: layout"
    config.unlink()
    remedy = "write one with model_cfg and preprocess_cfg"
    assert (
        refused(f"local-dir:{folder}")
        == f"{folder}: has no open_clip_config.json, and no config.json of transformers; {remedy}"
    )
    remedy = "give local-dir:PATH of a folder with open_clip_config.json"
    assert refused(f"local-dir:{folder}/none") == f"{folder}/none: no such folder; {remedy}"
    ignored = "--pretrained: 'openai' would be ignored; leave --pretrained out: local-dir: names the weights already"
    assert refused(f"local-dir:{folder}", "openai") == ignored
    ignored = "--pretrained: 'openai' would be ignored; leave --pretrained out: tiny is bundled with its weights"
    assert refused("tiny", "openai") == ignored


@pytest.mark.parametrize(
    ("backbone", "pretrained", "line"),
    [
        ("ViT-B32", None, "--backbone: unknown model 'ViT-B32'; did you mean 'ViT-B-32'?"),
        ("vit-l-14", "openai", "--backbone: unknown model 'vit-l-14'; did you mean 'ViT-L-14'?"),
        ("tinny", None, "--backbone: unknown model 'tinny'; did you mean 'tiny'?"),
        ("@@@", None, "--backbone: unknown model '@@@'; see open_clip.list_models()"),
        (
            "ViT-L-14",
            "openia",
            "--pretrained: 'openia' is neither a file nor a tag of ViT-L-14; did you mean 'openai'?",
        ),
        (
            "ViT-S-32-alt",
            "openai",
            "--pretrained: 'openai' is neither a file nor a tag of ViT-S-32-alt; tags of ViT-S-32-alt: none",
        ),
        (
            "RN50",
            None,
            "--pretrained: RN50 without weights would be random; "
            "give a tag (openai, yfcc15m, cc12m) or a checkpoint file",
        ),
        (
            "ViT-S-32-alt",
            None,
            "--pretrained: ViT-S-32-alt without weights would be random; give a checkpoint file",
        ),
    ],
)
def test_refusals_of_names(backbone, pretrained, line):
    assert refused(backbone, pretrained) == line


def test_fingerprint_is_remembered_and_follows_the_content(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTACLIP_CACHE", str(tmp_path / "cache"))
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"one")
    assert fingerprint(weights) == hashlib.sha256(b"one").hexdigest()
    memo = tmp_path / "cache" / "fingerprints.json"
    remembered = dict.fromkeys(json.loads(memo.read_text()), "remembered")
    memo.write_text(json.dumps(remembered))
    assert fingerprint(weights) == "remembered"
    weights.write_bytes(b"two")
    assert fingerprint(weights) == hashlib.sha256(b"two").hexdigest()
    memo.write_text("{ broken")
    assert fingerprint(weights) == hashlib.sha256(b"two").hexdigest()


def test_a_cache_folder_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DELTACLIP_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "w.bin").write_bytes(b"one")
    assert fingerprint(tmp_path / "w.bin") == hashlib.sha256(b"one").hexdigest()


def test_torchscript_is_told_from_other_files(tmp_path):
    import torch

    torch.save({"a": torch.zeros(1)}, tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("no archive")
    for name in ("state.pt", "text.pt"):
        assert not is_torchscript(tmp_path / name)


UNREACHABLE = """
import json, sys, time
import open_clip, huggingface_hub
from deltaclip.base.errors import UserError
from deltaclip.features.backbone.weights import find_weights
for backbone, pretrained in (("hf-hub:some/model", None), ("ViT-B-32", "openai")):
    started = time.monotonic()
    try:
        find_weights(backbone, pretrained)
    except UserError as error:
        print(json.dumps([str(error), time.monotonic() - started]))
"""


# A name that cannot be resolved, and a machine that drops every packet (TEST-NET, RFC 5737).
@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["https://hub.invalid", "https://192.0.2.1"])
def test_an_unreachable_hub_is_one_sentence_at_once(tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", UNREACHABLE], capture_output=True, text=True, check=True)
    hub, tag = (json.loads(line) for line in done.stdout.splitlines())
    missing = "the weights are not on this machine and could not be downloaded; fetch"
    elsewhere = "on a machine with a network and pass"
    assert hub[0] == (
        f"hf-hub:some/model: {missing} open_clip_config.json and open_clip_model.safetensors of some/model "
        f"{elsewhere} --backbone local-dir:FOLDER"
    )
    assert (
        tag[0] == f"ViT-B-32 (openai): {missing} timm/vit_base_patch32_clip_224.openai/ {elsewhere} --pretrained FILE"
    )
    assert max(hub[1], tag[1]) < 2
    assert done.stderr == ""
