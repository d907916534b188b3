"""Prompts run to their last token in use: what open_clip gives for all 77 places, for every kind of text tower."""

from __future__ import annotations

import random

import numpy as np
import open_clip
import pytest
import torch

from deltaclip.features.backbone import encode as module
from deltaclip.features.backbone.encode import TextTower, encode_texts, text_batches
from deltaclip.features.backbone.load import Backbone

VISION = {"layers": 1, "width": 32, "head_width": 32, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TOWERS = {
    "CLIP": (open_clip.CLIP, {}, True),
    "custom": (open_clip.CustomTextCLIP, {}, True),
    "eos": (open_clip.CustomTextCLIP, {"pool_type": "eos", "eos_id": 49407}, True),
    "CLIP, eos": (open_clip.CLIP, {"pool_type": "eos", "eos_id": 49407}, True),
    "last token": (open_clip.CustomTextCLIP, {"pool_type": "last"}, False),
    "both ways": (open_clip.CustomTextCLIP, {"no_causal_mask": True}, False),
    "own class token": (open_clip.CustomTextCLIP, {"embed_cls": True}, False),
}
PROMPTS = ["", "cat", "a red circle above a blue square", "cat " * 74, "cat " * 75, "cat " * 90, "dog " * 20]


def make_backbone(kind, **more):
    torch.manual_seed(0)
    tower, options, can_cut = TOWERS[kind]
    model = tower(16, VISION, TEXT | options | more).eval()
    for parameter in model.parameters():  # at its own scale a random tower hardly sees where its tokens stand
        parameter.data.mul_(3)
    facts = {"dim": 16, "context_length": 77, "backbone": kind}
    backbone = Backbone(
        model=model,
        preprocess=None,
        tokenizer=open_clip.tokenizer.SimpleTokenizer(),
        device="cpu",
        precision="fp32",
        facts=facts,
    )
    return backbone, can_cut


def whole(backbone, prompts):
    """open_clip's own encoding of all places."""
    with torch.inference_mode():
        return backbone.model.encode_text(backbone.tokenizer(prompts, context_length=77), normalize=True).numpy()


@pytest.mark.parametrize("kind", TOWERS)
def test_equals_the_whole_run(kind):
    backbone, can_cut = make_backbone(kind)
    tower = TextTower(backbone)
    assert tower.can_cut == can_cut
    lengths = tower.lengths(backbone.tokenizer(PROMPTS, context_length=77)).tolist()
    assert lengths == ([2, 3, 9, 76, 77, 77, 22] if can_cut else [77] * 7)
    expected = whole(backbone, PROMPTS)
    assert np.ptp(expected, axis=0).max() > 0.1  # prompts do differ
    np.testing.assert_allclose(encode_texts(backbone, PROMPTS).unit_BD, expected, atol=1e-6)
    for prompt, row in zip(PROMPTS, expected, strict=True):  # each to its own end
        np.testing.assert_allclose(encode_texts(backbone, [prompt]).unit_BD[0], row, atol=1e-6)


def test_bundled_backbone_and_bf16(tiny_backbone):
    from deltaclip.features.backbone.load import load_backbone
    from deltaclip.features.backbone.weights import find_weights

    source = find_weights(tiny_backbone, None)
    backbone = load_backbone(source, device="cpu", precision="fp32")
    assert TextTower(backbone).can_cut
    expected = whole(backbone, PROMPTS)
    np.testing.assert_allclose(encode_texts(backbone, PROMPTS).unit_BD, expected, atol=1e-6)
    close = encode_texts(load_backbone(source, device="cpu", precision="bf16"), PROMPTS)
    assert (close.unit_BD * expected).sum(axis=1).min() > 0.999


def test_the_model_stays_as_it_is():
    backbone, _ = make_backbone("CLIP")
    before = {name: (id(part), part.shape) for name, part in backbone.model.named_parameters()}
    encode_texts(backbone, ["cat"])
    assert before == {name: (id(part), part.shape) for name, part in backbone.model.named_parameters()}
    assert backbone.model.attn_mask.shape == (77, 77)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "TEXT_BATCH", 4)
    monkeypatch.setattr(module, "WINDOW", 16)


@pytest.mark.slow
def test_batches_hold_texts_of_one_length_and_every_text_once(small_batches):
    backbone, _ = make_backbone("CLIP")
    rng = random.Random(0)
    texts = ["cat " * rng.randrange(80) + str(number) for number in range(50)]
    entries = [entry for entry in range(50) if entry % 7]
    batches = list(text_batches(backbone, texts, entries))
    assert sorted(entry for batch in batches for entry in batch.entries) == entries
    expected = whole(backbone, texts)
    counts = [len(open_clip.tokenizer.SimpleTokenizer().encode(text)) + 2 for text in texts]
    for batch in batches:
        assert (np.diff(batch.entries) > 0).all()
        assert len(set(batch.entries // 16)) == 1
        np.testing.assert_allclose(batch.found.unit_BD, expected[batch.entries], atol=1e-6)
        assert batch.truncated_B.tolist() == [counts[entry] > 77 for entry in batch.entries]
    of_first = [[counts[entry] for entry in batch.entries] for batch in batches if batch.entries[0] < 16]
    longest = [max(min(count, 77) for count in batch) for batch in of_first]
    shortest = [min(min(count, 77) for count in batch) for batch in of_first]
    assert all(a <= b for a, b in zip(longest, shortest[1:], strict=False))


def test_a_run_that_resumes_goes_on_with_the_same_batches(small_batches):
    backbone, _ = make_backbone("CLIP")
    texts = ["cat " * (number * 29 % 70) for number in range(40)]
    entries = [entry for entry in range(40) if entry not in {3, 17, 30}]
    once = list(text_batches(backbone, texts, entries))
    for killed_after in range(len(once)):
        done = {entry for batch in once[:killed_after] for entry in batch.entries}
        rest = list(text_batches(backbone, texts, [entry for entry in entries if entry not in done]))
        assert len(rest) == len(once) - killed_after
        for a, b in zip(rest, once[killed_after:], strict=True):
            assert a.entries.tolist() == b.entries.tolist()
            assert a.found.unit_BD.tobytes() == b.found.unit_BD.tobytes()
