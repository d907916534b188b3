"""A run as a reward: the scores of `Scorer`, with gradients."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from deltaclip import Reward, Scorer
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train

# 8-bit levels of a resize that floats round the other way, through a base on all blocks
AS_SCORER = 1e-3


@pytest.fixture(scope="module")
def reward(demo_run):
    return Reward(demo_run, device="cpu")


@pytest.fixture(scope="module")
def pictures(demo_folder, demo_rows):
    return [Image.open(demo_folder / row["image"]).convert("RGB") for row in demo_rows[:6]]


@pytest.fixture(scope="module")
def prompts(demo_rows):
    return [row["prompt"] for row in demo_rows[:6]]


def as_floats(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def test_the_scores_are_those_of_the_scorer(reward, demo_run, pictures, prompts):
    found = reward(as_floats(pictures), prompts)
    scored = Scorer.load(demo_run, device="cpu", precision="fp32").score(pictures, prompts)
    assert list(found) == ["quality", "consistency"]
    for target, score in found.items():
        assert (score.shape, score.dtype) == ((6,), torch.float32)
        assert score.detach().numpy() == pytest.approx(scored.scores.of(target), abs=AS_SCORER)


def test_gradients_reach_the_pixels_and_nothing_else(reward, pictures, prompts):
    pixels = as_floats(pictures).requires_grad_()
    sum(score.sum() for score in reward(pixels, prompts).values()).backward()
    assert (pixels.grad.flatten(1).abs().sum(dim=1) > 0).all()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in reward.parameters())


def test_the_gradient_is_that_of_finite_differences(demo_run, pictures, prompts):
    reward = Reward(demo_run, device="cpu", round_pixels=False)
    pixels = (0.2 + 0.6 * as_floats(pictures)).requires_grad_()
    reward(pixels, prompts)["consistency"].sum().backward()
    direction = pixels.grad / pixels.grad.norm()
    with torch.no_grad():
        ahead, behind = (reward(pixels + step * direction, prompts)["consistency"].sum() for step in (0.02, -0.02))
    assert float(ahead - behind) / 0.04 == pytest.approx(float(pixels.grad.norm()), rel=0.02)


def test_half_precision_pictures_and_one_prompt_for_all(reward, pictures):
    pixels = as_floats(pictures[:2]).bfloat16().requires_grad_()
    found = reward(pixels, "a red circle")
    found["quality"].sum().backward()
    assert pixels.grad.dtype == torch.bfloat16
    assert found["consistency"].shape == (2,)


def test_without_prompts_what_sees_the_image_is_scored(reward, pictures, prompts):
    pixels = as_floats(pictures)
    assert list(reward(pixels)) == ["quality"]
    assert torch.equal(reward(pixels)["quality"], reward(pixels, prompts)["quality"])


def test_it_stays_in_evaluation_and_can_be_moved_and_copied(reward, pictures, prompts):
    pixels = as_floats(pictures)
    expected = reward(pixels, prompts)
    assert not reward.train().training
    assert not any(module.training for module in reward.modules())
    for other in (reward.to("cpu"), copy.deepcopy(reward)):
        assert all(torch.equal(score, expected[name]) for name, score in other(pixels, prompts).items())
    with pytest.raises(ValueError, match=r"heads are float32, not torch\.float16: give precision= to Reward instead"):
        reward.half()
    assert all(torch.equal(score, expected[name]) for name, score in reward(pixels, prompts).items())  # as it was


MOVED = """
import sys, torch
from deltaclip import Reward
from deltaclip.tests import pretended_gpu
pixels, prompts = torch.rand(2, 3, 64, 64), ["a red circle", "two cats"]
reward = Reward(sys.argv[1], device="cpu")
expected = reward(pixels, prompts)
pretended_gpu.install()
found = reward.to(pretended_gpu.DEVICE)(pixels.to(pretended_gpu.DEVICE), prompts)
for name, score in found.items():
    assert str(score.device) == pretended_gpu.DEVICE
    assert torch.equal(score.to("cpu"), expected[name]), name
"""


@pytest.mark.slow
def test_it_moves_whole_prompts_included(demo_run):
    done = subprocess.run([sys.executable, "-c", MOVED, str(demo_run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_scores_are_flat_at_the_ends_and_sums_are_not(demo_run, pictures):
    for clamp in (True, False):
        reward = Reward(demo_run, device="cpu", clamp=clamp)
        reward.heads.head("quality").base.bias.fill_(9)  # near 1
        reward.heads.head("quality").mlp[-1].bias.fill_(3)
        pixels = as_floats(pictures).requires_grad_()
        score = reward(pixels)["quality"]
        score.sum().backward()
        assert (score == 1).all() if clamp else (score > 1).all()
        assert bool((pixels.grad != 0).any()) is not clamp


@pytest.fixture(scope="module")
def run_with_statistics(tmp_path_factory, demo_folder, tiny_backbone):
    folder, data = tmp_path_factory.mktemp("statistics"), str(demo_folder / "demo.csv")
    views = "center,stages,statistics"
    cache = extract(ExtractConfig(data=data, out=folder / "demo.h5", backbone=tiny_backbone, views=views)).cache
    return train(TrainConfig(cache=cache, out=folder / "run", epochs=1)).run


@pytest.mark.slow
def test_statistics_count_but_nothing_flows_through_them(run_with_statistics, pictures, prompts):
    with pytest.warns(UserWarning, match="sees statistics, which no gradient flows through"):
        reward = Reward(run_with_statistics, device="cpu")
    assert reward.without_gradient == ("statistics",)
    scored = Scorer.load(run_with_statistics, device="cpu", precision="fp32").score(pictures, prompts)
    for target, score in reward(as_floats(pictures), prompts).items():
        assert score.detach().numpy() == pytest.approx(scored.scores.of(target), abs=AS_SCORER)


@pytest.mark.parametrize(
    ("given", "error", "line"),
    [
        ((torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None), TypeError, "an array of uint8 (2, 3, 8, 8)"),
        ((np.zeros((2, 3, 8, 8), dtype=np.float32), None), TypeError, "an array of float32 (2, 3, 8, 8)"),
        ((torch.zeros(3, 8, 8), None), ValueError, "an array of float32 (3, 8, 8)"),
        ((torch.zeros(2, 1, 8, 8), None), ValueError, "an array of float32 (2, 1, 8, 8)"),
        ((torch.zeros(2, 3, 8, 8) - 1, None), ValueError, "from -1 to -1, outside 0 to 1: give (x + 1) / 2"),
        ((torch.full((2, 3, 8, 8), 255.0), None), ValueError, "from 255 to 255, outside 0 to 1: give x / 255"),
        ((torch.full((2, 3, 8, 8), torch.nan), None), ValueError, "that are NaN: give finite ones"),
        ((torch.zeros(2, 3, 8, 8), ["one"]), ValueError, "2 images but 1 prompts"),
        ((torch.zeros(2, 3, 8, 8), ["one", ""]), ValueError, "prompts[1] is empty"),
        ((torch.zeros(2, 3, 8, 8), ["one", 2]), TypeError, "prompts[1] is of type int, not a text"),
        ((torch.zeros(2, 3, 8, 8), {"one": 1, "two": 2}), TypeError, "prompts is of type dict: give a text or a list"),
        ((torch.zeros(2, 3, 8, 8), {"one", "two"}), TypeError, "prompts is of type set: give a text or a list"),
        ((torch.zeros(2, 3, 8, 8), b"one"), TypeError, "prompts is of type bytes: give a text or a list"),
        ((torch.zeros(2, 3, 8, 8), 5), TypeError, "prompts is of type int: give a text or a list"),
    ],
)
def test_wrong_arguments(reward, given, error, line):
    with pytest.raises(error) as caught:
        reward(*given)
    assert line in str(caught.value)
