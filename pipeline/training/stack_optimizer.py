"""AdamW and clipping for every head of a stack by itself.

Knows a stack's parameters and the tape of its wide layer. Must not know the training loop.

Shapes: K heads, P heads of a part, H and F outputs and inputs of the wide layer.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from deltaclip.pipeline.training.optimizer import Moments, adamw_step, decays

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from deltaclip.pipeline.model.stacked import HeadStack, WideTape

# Heads whose wide gradients are made and used before the next ones (1.6 MB each for consistency at D = 768): product,
# norm and update then find them in the processor's cache.
CHUNK = 4


class _Part(NamedTuple):
    """Neighbouring heads that move together."""

    heads: slice
    lr: float
    weight_decay: float


class StackAdamW:
    """AdamW by torch's fused kernel on slices of a stack, each head with its own rate, decay and clipping."""

    def __init__(
        self, stack: HeadStack, lr: Sequence[float], weight_decay: Sequence[float], *, max_grad_norm: float
    ) -> None:
        self.stack, self.max_grad_norm = stack, max_grad_norm
        self.parts = list(_parts(list(zip(lr, weight_decay, strict=True))))
        self._moments = {name: Moments.of(stacked.detach()) for name, stacked in stack.parameters.items()}
        self._num_steps = torch.zeros((), device=stack.parameters[stack.wide_weight].device)
        weight_KHF = stack.parameters[stack.wide_weight]
        most = max(part.heads.stop - part.heads.start for part in self.parts)
        self._grad = torch.empty_like(weight_KHF[:most])
        self._product = self._grad.bfloat16() if stack.half else self._grad

    def step(self, tape: WideTape, lr_factor: float) -> None:
        """Move all heads by one step at lr_factor times their own rates, and forget the gradients."""
        parameters = self.stack.parameters
        small = {name: stacked.grad for name, stacked in parameters.items() if stacked.grad is not None}
        squares = [grad.square().flatten(1).sum(dim=1) if grad.ndim > 1 else grad.square() for grad in small.values()]
        square_K = torch.stack(squares).sum(dim=0)
        for part in self.parts:
            grads = {name: grad[part.heads] for name, grad in small.items()}
            grads[self.stack.wide_weight] = self._wide_grad(tape, part.heads)
            if self.max_grad_norm:
                self._clip(grads, square_K[part.heads])
            self._move(grads, part, lr_factor)
            self.stack.refresh(part.heads)
        self._num_steps += 1
        for stacked in parameters.values():
            stacked.grad = None

    def _wide_grad(self, tape: WideTape, heads: slice) -> Tensor:
        """Return the gradient of some heads' wide weights, (P, H, F) float32, in memory that is used again."""
        assert tape.h_KHB.grad is not None
        rows_RB = tape.h_KHB.grad[heads].flatten(0, 1).to(tape.x_BF.dtype)
        count = heads.stop - heads.start
        product, grad = self._product[:count], self._grad[:count]
        torch.mm(rows_RB, tape.x_BF, out=product.flatten(0, 1))
        return grad.copy_(product) if self.stack.half else grad

    def _clip(self, grads: dict[str, Tensor], small_square_P: Tensor) -> None:
        wide = grads[self.stack.wide_weight]
        square_P = small_square_P + torch.linalg.vector_norm(wide, dim=(1, 2)).square()
        # The factor of torch.nn.utils.clip_grad_norm_, which scales even where it changes nothing.
        factor_P = (self.max_grad_norm / (square_P.sqrt() + 1e-6)).clamp(max=1.0)
        if factor_P.device.type == "cpu" and bool((factor_P == 1).all()):
            return
        for grad in grads.values():
            grad.mul_(factor_P.view(-1, *(1,) * (grad.ndim - 1)))

    def _move(self, grads: dict[str, Tensor], part: _Part, lr_factor: float) -> None:
        for decayed in (True, False):
            names = [name for name in grads if decays(name) is decayed]
            if not names:
                continue
            moments = [self._moments[name] for name in names]
            adamw_step(
                [self.stack.parameters[name].detach()[part.heads] for name in names],
                [grads[name] for name in names],
                # The kernel counts its own step, in a number that every part must see alike.
                [Moments(each.mean[part.heads], each.square[part.heads], self._num_steps.clone()) for each in moments],
                lr=part.lr * lr_factor,
                weight_decay=part.weight_decay if decayed else 0.0,
            )


def _parts(kinds: Sequence[tuple[float, float]]) -> Iterator[_Part]:
    """Cut heads into neighbours of one (lr, weight decay), at most CHUNK of them."""
    start = 0
    for (lr, weight_decay), same in groupby(kinds):
        end = start + sum(1 for _ in same)
        for first in range(start, end, CHUNK):
            yield _Part(slice(first, min(first + CHUNK, end)), lr, weight_decay)
        start = end
