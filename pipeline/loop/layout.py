"""Memory layouts: gradients and moments lie in memory as their parameter does.

The weights of convolutional towers are channels-last, and torch's fused AdamW goes through the memory of all of them
from the first number to the last, without a look at strides: one that lies otherwise trains another model, whose losses
agree to six digits for a while. Knows tensors. Must not know training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def laid_out_like(parameter: Tensor, values: Tensor) -> Tensor:
    """Return a copy of `values`, of the parameter's shape, with its type, device and layout."""
    return torch.empty_like(parameter, requires_grad=False).copy_(values.view_as(parameter))


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Tell whether equal places of two tensors are equally far from their beginnings in memory."""
    if first.stride() == second.stride():
        return first.shape == second.shape
    # The stride along an axis of length 1 is never walked: (C, 1, 7, 7) is contiguous and channels-last at once.
    first_strides, second_strides = (
        [stride for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1]
        for tensor in (first, second)
    )
    return first.shape == second.shape and first_strides == second_strides
