"""The bundled backbone is a real CLIP on scenes it was never trained on; its training runs and repeats itself."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors import safe_open

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.weights import TINY
from deltaclip.features.scenes.render import DEMO_STREAM
from tools.tiny import scenes as tiny_batches
from tools.tiny import train as train_tiny
from tools.tiny.scenes import TinyClip, evaluate_tiny, held_out_pairs, recall_at_1, zero_shot_srocc
from tools.tiny.train import (
    Readers,
    _encode_text,
    auxiliary_loss,
    contrastive_loss,
    learning_rate,
    parameter_groups,
)

if TYPE_CHECKING:
    from pathlib import Path

# Seeds of the test alone: neither training (its own stream) nor the figures in README.md use them.
FRESH_SEED = 977


@pytest.fixture(scope="module")
def clip() -> TinyClip:
    return TinyClip(TINY)


def test_recall_at_1_on_held_out_scenes(clip: TinyClip) -> None:
    assert recall_at_1(clip, num_captions=100, seed=FRESH_SEED) >= 0.6


def test_zero_shot_cosine_orders_consistency(clip: TinyClip) -> None:
    assert zero_shot_srocc(clip, num_prompts=50, seed=FRESH_SEED) >= 0.5


def test_streams_of_seeds_are_disjoint() -> None:
    assert len({tiny_batches.TRAIN_STREAM, tiny_batches.HELD_OUT_STREAM, DEMO_STREAM}) == 3


def test_files_are_small_fp16_and_finite() -> None:
    assert sum(p.stat().st_size for p in TINY.iterdir() if p.is_file()) < 20e6
    config = json.loads((TINY / "open_clip_config.json").read_text())
    assert config == train_tiny.MODEL_CONFIG
    with safe_open(TINY / "open_clip_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.float16
            assert torch.isfinite(tensor).all(), name


def test_words_never_trained_on_keep_different_vectors(clip: TinyClip) -> None:
    norms = clip.model.token_embedding.weight.detach().norm(dim=1)
    # open_clip draws them with SD 0.02: a norm of 0.02 * sqrt(96) = 0.196.
    assert float(norms.median()) == pytest.approx(0.196, abs=0.02)
    t_ND = clip.encode_texts(["a photograph of a walrus", "an oil rig at dawn", "the quick brown fox"])
    assert np.abs(t_ND @ t_ND.T - np.eye(3)).max() < 0.999


def test_cropped_tokens_give_the_same_embedding(clip: TinyClip) -> None:
    texts = held_out_pairs(8, FRESH_SEED)[1]
    tokens = clip.tokenizer(texts)
    length = int((tokens != 0).sum(dim=1).max())
    with torch.no_grad():
        cropped, full = _encode_text(clip.model, tokens[:, :length]), clip.model.encode_text(tokens)
    # fp32, another order of summation in attention over 77 or about 25 tokens.
    assert torch.allclose(cropped, full, atol=1e-5)


def test_contrastive_loss_by_hand() -> None:
    rng = np.random.default_rng(0)
    v, t = rng.normal(size=(2, 5, 7))
    logits = 3.0 * v @ t.T
    expected = 0.0
    for i in range(5):
        expected -= logits[i, i] - np.log(np.exp(logits[i]).sum())
        expected -= logits[i, i] - np.log(np.exp(logits[:, i]).sum())
    loss = contrastive_loss(torch.tensor(v), torch.tensor(t), torch.tensor(3.0))
    assert float(loss) == pytest.approx(expected / 10, rel=1e-9)


def test_auxiliary_loss_is_least_for_the_right_answer() -> None:
    targets = torch.from_numpy(tiny_batches.draw_batch(FRESH_SEED, 0, 8, 32)[2])
    right = torch.zeros(8, 12 * 21 + 11)
    for row in range(8):
        for slot in range(36):
            offset = slot // 3 * 21 + (0, 5, 15)[slot % 3]
            right[row, offset + targets[row, slot]] = 20.0
        right[row, 252 + targets[row, 36]] = right[row, 257 + targets[row, 37]] = 20.0
    assert float(auxiliary_loss(right, targets)) < 1e-6
    wrong = right.roll(1, dims=1)
    assert float(auxiliary_loss(wrong, targets)) > 1


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, 1000, 1.0, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[99] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[99:]))


def test_no_decay_on_embeddings_and_every_parameter_once() -> None:
    model = train_tiny.build_model(train_tiny.MODEL_CONFIG, 0)
    readers = Readers(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    groups = parameter_groups(model, readers, 0.1)
    identities = [id(p) for group in groups for p in group["params"]]
    assert sorted(identities) == sorted(
        id(p) for p in [*model.parameters(), *readers.scene.parameters(), *readers.damage.parameters()]
    )
    plain = {id(p) for p in groups[1]["params"]}
    assert id(model.token_embedding.weight) in plain
    assert groups[1]["weight_decay"] == 0


def test_batches_are_families_and_repeat() -> None:
    pictures, texts, targets, strengths = tiny_batches.draw_batch(FRESH_SEED, 3, 8, 48)
    again = tiny_batches.draw_batch(FRESH_SEED, 3, 8, 48)
    assert pictures.shape == (8, 48, 48, 3)
    assert (pictures == again[0]).all()
    assert texts == again[1]
    assert (targets == again[2]).all()
    assert (strengths == again[3]).all()
    assert (pictures != tiny_batches.draw_batch(FRESH_SEED, 4, 8, 48)[0]).any()


@pytest.mark.slow
def test_a_short_training_learns_repeats_and_writes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tiny, "evaluate_tiny", train_tiny_scores)
    small = json.loads(json.dumps(train_tiny.MODEL_CONFIG))
    small["model_cfg"]["vision_cfg"] |= {"layers": 1, "image_size": 32, "width": 64}
    small["model_cfg"]["text_cfg"] |= {"layers": 1, "vocab_size": 49408, "width": 32, "heads": 1}
    monkeypatch.setattr(train_tiny, "MODEL_CONFIG", small)
    lines: list[str] = []
    runs = [
        train_tiny.train_tiny(tmp_path / name, steps=3, late_steps=2, batch_size=16, seed=1, report=lines.append)
        for name in "ab"
    ]
    assert runs[0].loss == runs[1].loss
    assert lines[0].startswith("step 3/3  loss ")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "| recall@1, 4 held-out captions |" in (tmp_path / "a" / "README.md").read_text()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def train_tiny_scores(folder: Path) -> object:
    """Evaluate as the recipe does, on fewer captions."""
    return evaluate_tiny(folder, num_captions=4, num_prompts=2)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_tiny.train_tiny(tmp_path, steps=1, batch_size=6)
    assert str(caught.value) == "train_tiny: steps 1 and 1500, batch size 6; give at least one step and a multiple of 4"


@pytest.mark.slow
def test_the_command_of_make_backbone(tmp_path: Path) -> None:
    """As `make backbone` calls it, from the root of the project, but for the number of steps and the folder."""
    steps = ["--steps", "1", "--late-steps", "1", "--batch-size", "4"]
    command = [sys.executable, "-m", "tools.tiny.train", "--out", str(tmp_path), *steps]
    done = subprocess.run(command, cwd=TINY.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"README.md", "open_clip_config.json", "open_clip_model.safetensors"}
    bundled = (TINY / "README.md").read_text().splitlines()
    assert (tmp_path / "README.md").read_text().splitlines()[:9] == bundled[:9]
