"""A trained run as a differentiable reward: float pictures and prompts in, scores with gradients out.

For those who train or steer a generator. Knows the scorer and float pictures. Must not know files or metrics.

Shapes: B pictures, H and W their pixels, D width.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from deltaclip.base.device import own_modes
from deltaclip.base.errors import UserError
from deltaclip.features.backbone.differentiable import DifferentiableViews
from deltaclip.features.data.views import CENTER
from deltaclip.pipeline.api.pictures import ROUNDING, named, remedy_for_range
from deltaclip.pipeline.api.scorer import Scorer, texts_of, with_prompts
from deltaclip.pipeline.model.scores import Batch, TargetScores, run_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MOST_PROMPTS = 4096  # whose embeddings are kept: 16 MB at D = 1,024


class Reward(nn.Module):
    """Scores of a run as a function of pixels.

    Weights never change and get no gradients, and it stays in evaluation mode; `to` moves it. The gradient is that of
    what embeddings say of the pixels, through the backbone's own resizing. Where the base of a run also sees
    `statistics`, these count in the scores, but nothing flows back through them, which `without_gradient` names.

    Args:
        run: run directory, as for `Scorer.load`; or a scorer in fp32, whose weights it then shares.
        clamp: scores in [0, 1] and within the bound of their base, as everywhere, flat at the ends of the range; False
            gives the sums that training sees, whose base has a gradient beyond the ends too.
        round_pixels: resized pixels are rounded to 8 bits as those of files are, and scores are those of `Scorer` in
            the same precision; the gradient goes straight through. False leaves them: smooth, up to 2e-3 away.
        device: auto, cpu, cuda or cuda:N, or a device of torch.
        precision: of the backbone. fp32 is what gradients are right in; bf16 and fp16 need a GPU.
    """

    __call__: Callable[..., dict[str, Tensor]]  # which nn.Module leaves open

    @own_modes(learns=True)
    def __init__(
        self,
        run: Scorer | Path | str,
        *,
        clamp: bool = True,
        round_pixels: bool = True,
        device: str | torch.device = "auto",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        super().__init__()
        scorer = run if isinstance(run, Scorer) else Scorer.load(run, device=device, precision=precision)
        self._backbones = (scorer.backbone, *scorer.others)
        for backbone in self._backbones:
            if backbone.precision != "fp32" and backbone.device == "cpu":
                message = f"runs in {backbone.precision}, which has no gradients on a CPU"
                raise UserError(message, place=backbone.facts["backbone"], remedy="give precision='fp32'")
        self._rounds = round_pixels
        self.clamp, self.labels, self.of_image, self._scorer = clamp, scorer.labels, scorer.of_image, scorer
        self.heads = scorer.heads
        self.towers = nn.ModuleList(backbone.model for backbone in self._backbones)
        self.requires_grad_(requires_grad=False).eval()
        self._said: dict[str, Tensor] = {}
        self._views = self._made_views()
        self.without_gradient = tuple(name for views in self._views for name in views.without_gradient)
        if self.without_gradient:
            what = " and ".join(self.without_gradient)
            message = f"the base of this run sees {what}, which no gradient flows through"
            remedy = "for a gradient of all that counts, extract with --views that leave it out"
            warnings.warn(f"{message}: {remedy}", stacklevel=2)

    @own_modes()
    def forward(self, images: Tensor, prompts: str | Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the scores of B pictures by target, each (B,) float32 on the device of the pictures.

        Args:
            images: (B, 3, H, W) RGB, floats in [0, 1] of any precision; they may need gradients.
            prompts: B texts, or one for all; None scores the targets that see the image alone.

        Raises:
            ValueError: another shape or range, pixels that are not finite, another number of prompts, an empty one, or
                none for a run all of whose targets see it.
            TypeError: no float tensor, or a prompt that is no text.
        """
        _check_pictures(images)
        texts = _texts(prompts, len(images))
        labels = self.of_image if texts is None else self.labels
        if not labels:
            raise ValueError(f"this run has learned {' and '.join(self.labels)} alone, which needs prompts: give them")
        vectors: dict[str, Tensor] = {}
        for number, views in enumerate(self._views, start=1):
            vectors |= {
                f"{number}:{name}" if number > 1 else name: found for name, found in views(images.float()).items()
            }
        v_BD = vectors[CENTER]
        t_BD = with_prompts(vectors, self._prompts(texts, len(images)).to(v_BD.device), self._backbones)
        terms = self.heads.base_terms(vectors, v_BD, t_BD)
        found = run_heads(self.heads, Batch(v_BD, t_BD, {}, fitted_B=terms)).targets
        return {
            label: (_reported(found[label]) if self.clamp else found[label].sum_N).to(images.device) for label in labels
        }

    def train(self, mode: bool = True) -> Reward:  # noqa: FBT001, FBT002 - as nn.Module has it
        """Stay in evaluation mode: a generator that trains around it must not turn its dropout on."""
        del mode
        return super().train(mode=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again: views, which are functions around the backbone, and embeddings of prompts."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_views", "_said")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._said, self._views = {}, self._made_views()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reward:  # noqa: FBT001, FBT002
        head = next(self.heads.parameters())
        other = fn(torch.empty(0, device=head.device)).dtype  # before any weight has lost what it was
        if other != torch.float32:
            raise ValueError(f"heads are float32, not {other}: give precision= to Reward instead")
        super()._apply(fn, recurse)
        head = next(self.heads.parameters())
        device = str(head.device)
        self._backbones = tuple(replace(backbone, device=device) for backbone in self._backbones)
        # Prompts go through the scorer's backbones, which have to say the new device too.
        first, *others = self._backbones
        self._scorer = Scorer(self.heads, first, self.labels, others=others)
        self._said = {}
        self._views = self._made_views()
        return self

    def _made_views(self) -> list[DifferentiableViews]:
        names = self._scorer.seen_views
        pairs = zip(self._backbones, names, strict=True)
        return [DifferentiableViews(backbone, own, rounds=self._rounds) for backbone, own in pairs]

    def _prompts(self, texts: list[str] | None, count: int) -> Tensor:
        if texts is None:
            return torch.zeros(count, sum(backbone.dim for backbone in self._backbones))
        if new := [text for text in dict.fromkeys(texts) if text not in self._said]:
            if len(self._said) + len(new) > MOST_PROMPTS:
                self._said = {}
                new = list(dict.fromkeys(texts))
            self._said |= dict(zip(new, self._scorer.embed_prompts(new)[0], strict=True))
        return torch.stack([self._said[text] for text in texts])


def _reported(found: TargetScores) -> Tensor:
    """Return the reported scores with their own gradient: training lets that of a base through its clamp."""
    if found.base_N is None or found.delta_N is None or found.scale is None:
        return found.reported
    is_inside_N = (found.base_N > 0) & (found.base_N < 1)
    base_N = torch.where(is_inside_N, found.base_N, found.base_N.detach())
    return TargetScores(base_N + found.scale * found.delta_N, base_N, found.delta_N, found.scale).reported


def _check_pictures(images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images is {named(images)}: give a float tensor (B, 3, H, W) in [0, 1]")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images is {named(images)}: give pixels (B, 3, H, W), RGB")
    low, high = (float(end) for end in images.detach().aminmax())
    if not low >= -ROUNDING or not high <= 1 + ROUNDING:  # also where one is NaN
        if math.isnan(low):
            raise ValueError("images has float pixels that are NaN: give finite ones")
        message = f"images has float pixels from {low:.4g} to {high:.4g}, outside 0 to 1"
        raise ValueError(f"{message}: {remedy_for_range(low, high)}")


def _texts(prompts: Any, count: int) -> list[str] | None:
    texts, is_lone = texts_of(prompts)
    if texts is None:
        return None
    texts = texts * count if is_lone else texts
    if len(texts) != count:
        raise ValueError(
            f"{count:,} images but {len(texts):,} prompts: give one prompt an image, or a single text for all"
        )
    return texts
