"""A run as a reward: how far from its scorer, how right its gradient, and what pixels that follow it gain.

`python -m benchmarks.reward DATA RUN [RUN ...]` takes the first pictures of DATA, prints the largest difference from
`Scorer` in fp32 and in the precision of the run's cache, the slope along the gradient beside a finite difference, the
time of a step with frozen over one with trainable weights, and how far 20 steps of ascent move score, base and
correction.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deltaclip.features.data.adapters import read_manifest
from deltaclip.pipeline.api.reward import Reward
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.model.heads import ResidualHeads
from deltaclip.pipeline.model.scores import TargetScores

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 20
LEVEL = 1 / 255  # a step of a pixel: 20 of them are at most 20 of 255 levels


def main(arguments: list[str] | None = None) -> None:
    """Print the figures of each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="manifest, demo or ADAPTER:DIR")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--pictures", type=int, default=16)
    given = parser.parse_args(arguments)
    manifest = read_manifest(given.data, image_root=None, allow_outside=False, read_labels=False)
    # Spread over the set, of the size of the first: a batch has one.
    rows = range(0, len(manifest), max(1, len(manifest) // (4 * given.pictures)))
    images = [_opened(manifest.image_path(row)) for row in rows]
    chosen = [place for place, image in enumerate(images) if image.size == images[0].size][: given.pictures]
    prompts = [manifest.prompts[rows[place]] for place in chosen]
    for run in given.runs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing flows through statistics is printed below
            print(f"{run}:")
            _judge(run, [images[place] for place in chosen], prompts)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _judge(run: str, images: list[Image.Image], prompts: list[str]) -> None:
    reward = Reward(run, device="cpu")
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    found = reward(pixels, prompts)
    for words, precision in (("fp32", "fp32"), ("the cache's precision", None)):
        scored = Scorer.load(run, device="cpu", precision=precision).score(images, prompts).scores
        apart = {name: float(np.abs(score.detach().numpy() - scored.of(name)).max()) for name, score in found.items()}
        print(
            f"  from Scorer in {words}, at most: " + ", ".join(f"{name} {value:.1g}" for name, value in apart.items())
        )
    print(f"  no gradient flows through: {', '.join(reward.without_gradient) or 'nothing is left out'}")
    if not reward.without_gradient:
        smooth = Reward(run, device="cpu", round_pixels=False)
        for name in found:
            print(f"  {name}: {_slopes(smooth, 0.1 + 0.8 * pixels, prompts, name)}")
    print(f"  a step with frozen weights takes {_frozen_over_trainable(reward, pixels, prompts):.2f} times one without")
    for name in found:
        print(f"  {name}: {_ascent(reward, pixels, prompts, name)}")


def _slopes(reward: Reward, pixels: Tensor, prompts: list[str], name: str) -> str:
    pixels.requires_grad_()
    reward(pixels, prompts)[name].sum().backward()  # type: ignore[no-untyped-call]
    grad = pixels.grad
    assert grad is not None
    direction = grad / grad.norm().clamp(min=1e-12)
    with torch.no_grad():
        ahead, behind = (float(reward(pixels + step * direction, prompts)[name].sum()) for step in (0.05, -0.05))
    return f"slope {float(grad.norm()):.5g}, by finite differences {(ahead - behind) / 0.1:.5g}"


def _frozen_over_trainable(reward: Reward, pixels: Tensor, prompts: list[str]) -> float:
    """Time forward and backward to the pixels with weights as they are over with weights that could train."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(10):
        is_frozen = turn % 2 == 0
        reward.towers.requires_grad_(not is_frozen)
        leaf = pixels.clone().requires_grad_()
        started = time.perf_counter()
        score = sum(each.sum() for each in reward(leaf, prompts).values())
        torch.autograd.grad(score, leaf)
        seconds[is_frozen].append(time.perf_counter() - started)
    reward.towers.requires_grad_(requires_grad=False)
    return median(seconds[True]) / median(seconds[False])


def _ascent(reward: Reward, pixels: Tensor, prompts: list[str], name: str) -> str:
    """Follow the sign of the gradient by one level a step, and say how far the parts of the score have moved."""
    heads, parts = reward.heads, list[float]()

    def keep(_module: object, _given: object, output: TargetScores | tuple[TargetScores, object]) -> None:
        scores = output if isinstance(output, TargetScores) else output[0]
        assert scores.base_N is not None
        parts.append(float(scores.base_N.mean()))

    hook = heads.head(name).register_forward_hook(keep) if isinstance(heads, ResidualHeads) else None
    leaf, means = pixels.clone(), list[float]()
    for _ in range(STEPS + 1):
        leaf = leaf.detach().requires_grad_()
        score = reward(leaf, prompts)[name]
        means.append(float(score.mean()))
        (grad,) = torch.autograd.grad(score.sum(), leaf)
        leaf = (leaf + LEVEL * grad.sign()).clamp(0, 1)
    words = f"{STEPS} steps of ascent move it from {means[0]:.3f} to {means[-1]:.3f}"
    if hook is None:
        return f"{words}; direct heads have no bound"
    hook.remove()
    moved, scale = parts[-1] - parts[0], heads.scales()[name]
    own = means[-1] - means[0] - moved
    return f"{words}: base {moved:+.3f}, correction {own:+.3f} (bound {scale:g} to either side)"


if __name__ == "__main__":
    main()
