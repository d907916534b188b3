"""Encoding: batches do not matter, lengths are kept, and every prompt that is cut is counted."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.encode import (
    encode_images,
    encode_texts,
    is_usable,
    require_usable,
    text_batches,
    to_unit_length,
)
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.weights import find_weights


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def pixels(backbone):
    size = backbone.model.visual.image_size[0]
    return torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_length_is_that_of_open_clips_output(backbone, pixels):
    with torch.inference_mode():
        raw = backbone.model.encode_image(pixels).numpy()
    found = encode_images(backbone, pixels)
    assert found.unit_BD.shape == (7, backbone.dim)
    assert found.norm_B.dtype == np.float32
    np.testing.assert_allclose(found.norm_B, np.linalg.norm(raw.astype(np.float64), axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.unit_BD * found.norm_B[:, None], raw, atol=1e-6 * np.abs(raw).max())


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_batches_do_not_matter(backbone, pixels, batch_size):
    whole = encode_images(backbone, pixels).unit_BD
    parts = [encode_images(backbone, pixels[i : i + batch_size]).unit_BD for i in range(0, 7, batch_size)]
    # The order of sums inside a matrix product may change with its height.
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    prompts = [f"{number} circles " + "and a square " * number for number in range(7)]
    whole = encode_texts(backbone, prompts).unit_BD
    parts = [encode_texts(backbone, prompts[i : i + batch_size]).unit_BD for i in range(0, 7, batch_size)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_normalisation_is_in_float32():
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16)
    found = to_unit_length(features)
    assert found.unit_BD.dtype == np.float32
    np.testing.assert_allclose(found.unit_BD, [[0.6, 0.8], [0, 0]], rtol=1e-7)  # bf16 would give 0.6016
    np.testing.assert_allclose(found.norm_B, [5, 0])


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "that are not finite"), (np.inf, "that are not finite"), (0, "of length zero")]
)
def test_what_has_no_direction_is_refused(backbone, value, what):
    found = to_unit_length(torch.tensor([[3.0, 4.0], [value, 0.0]]))
    assert not is_usable(found)
    with pytest.raises(UserError) as caught:
        require_usable(found, backbone)
    remedy = "check the weights, or give --precision fp32"
    assert str(caught.value) == f"tiny: the backbone gives embeddings {what}; {remedy}"
    assert is_usable(to_unit_length(torch.tensor([[3.0, 4.0]])))


# "cat" is one token of CLIP's vocabulary; a begin and an end mark take two of the 77 places.
@pytest.mark.parametrize(
    ("words", "cut"),
    [(0, False), (1, False), (74, False), (75, False), (76, True), (77, True), (78, True), (500, True)],
)
def test_truncation_is_counted_at_the_boundary(backbone, words, cut):
    text = "cat " * words
    assert len(open_clip.tokenizer.SimpleTokenizer().encode(text)) == words
    (batch,) = text_batches(backbone, [text], [0])
    assert batch.truncated_B.tolist() == [cut]


def test_truncation_of_a_batch(backbone):
    texts = ["a", "cat " * 76, "cat " * 75, "", "cat " * 74 + "extraordinariness", "cat! " * 38]
    tokens = [len(open_clip.tokenizer.SimpleTokenizer().encode(text)) + 2 for text in texts]
    assert max(tokens) > backbone.context_length > min(tokens)
    (batch,) = text_batches(backbone, texts, range(len(texts)))
    assert batch.truncated_B.tolist() == [count > backbone.context_length for count in tokens]


def test_a_cut_prompt_is_what_its_beginning_is(backbone):
    long, begin = encode_texts(backbone, ["cat " * 80, "cat " * 75]).unit_BD
    np.testing.assert_allclose(long, begin, atol=1e-6)
