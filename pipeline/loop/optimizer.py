"""AdamW with parameter groups made by rules; gradients and moments lie in memory as their parameter does.

Knows which parameters decay, by their names. Must not know the training loop.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


# The first pattern found in a parameter's name decides whether it decays; a name that none knows is an error,
# so that a new head states its rule. Biases, norms, scale parameters and the base scalars a, b do not decay:
# pulling them to zero is no simpler model. By name rather than by shape: heads stacked for a sweep have one
# more dimension.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(^|\.)bias$", False),
    (r"(^|\.)norm\w*\.weight$", False),
    (r"(^|\.)theta$", False),
    (r"(^|[._])(slope|offset)$", False),
    (r"(^|\.)in_proj_bias$", False),
    (r"(^|\.)(in_proj_)?weight$", True),
)

# Fused: 0.31 ms a step for the default heads (0.5 million parameters, one core), foreach 0.90, a plain loop
# 1.05. The betas and epsilon are the paper's.
_KERNEL: dict[str, Any] = {
    "fused": True,
    "foreach": False,
    "capturable": False,
    "differentiable": False,
    "has_complex": False,
    "amsgrad": False,
    "maximize": False,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
}


class Group(NamedTuple):
    """Parameters that decay alike."""

    parameters: list[nn.Parameter]
    weight_decay: float


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[Group]:
    """Return groups that hold every trainable parameter exactly once."""
    decayed, plain = Group([], weight_decay), Group([], 0.0)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name) else plain).parameters.append(parameter)
    return [group for group in (decayed, plain) if group.parameters]


class AdamW:
    """AdamW over the groups of a module, by torch's own fused kernel (Loshchilov, Hutter, arXiv:1711.05101).

    torch.optim.AdamW calls the same kernel, but making one imports the compiler (4 to 6 s on two busy cores,
    as long as the whole training of a head) and each of its steps costs 0.2 ms of Python; the tests hold both
    to the same bits.
    """

    def __init__(self, module: nn.Module, *, weight_decay: float) -> None:
        self.groups = parameter_groups(module, weight_decay=weight_decay)
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        self._moments = {parameter: Moments.of(parameter) for parameter in self.parameters}

    def step(self, lr: float) -> None:
        """Move every parameter that has a gradient, and forget the gradients."""
        for group in self.groups:
            moved = [parameter for parameter in group.parameters if parameter.grad is not None]
            moments = [self._moments[parameter] for parameter in moved]
            adamw_step(
                moved,
                [parameter.grad for parameter in moved if parameter.grad is not None],
                moments,
                lr=lr,
                weight_decay=group.weight_decay,
            )
        for parameter in self.parameters:
            parameter.grad = None


class Moments(NamedTuple):
    """Running means of the gradient and of its square, and the number of steps, of one parameter."""

    mean: Tensor
    square: Tensor
    num_steps: Tensor

    @classmethod
    def of(cls, parameter: Tensor) -> Moments:
        """Return the moments of a parameter that has not moved yet."""
        # The fused kernel counts in float32, on the parameter's device.
        num_steps = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return cls(torch.zeros_like(parameter), torch.zeros_like(parameter), num_steps)


def adamw_step(
    parameters: Sequence[Tensor], grads: list[Tensor], moments: list[Moments], *, lr: float, weight_decay: float
) -> None:
    """Move parameters in place by one step of the fused kernel, with their moments and counts."""
    for parameter, grad, moment in zip(parameters, grads, moments, strict=True):
        check_layouts(parameter, grad, moment.mean, moment.square)
    with torch.no_grad():
        adamw(
            list(parameters),
            grads,
            [moment.mean for moment in moments],
            [moment.square for moment in moments],
            [],
            [moment.num_steps for moment in moments],
            **_KERNEL,
            lr=lr,
            weight_decay=weight_decay,
        )


def decays(name: str) -> bool:
    """Tell whether the parameter of this name decays; a name without a rule is a ValueError."""
    for pattern, does in DECAY_RULES:
        if re.search(pattern, name):
            return does
    raise ValueError(f"no decay rule for parameter {name!r}; add one to DECAY_RULES")


# ---- Memory layouts


# The weights of convolutional towers are channels-last, and the fused kernel goes through the memory of all that it is
# given from the first number to the last, without a look at strides: what lies otherwise than its parameter trains
# another model, whose losses agree to six digits for a while.


def check_layouts(parameter: Tensor, *others: Tensor) -> None:
    """Stop where gradient or moments do not lie in memory as their parameter: the kernel would mix up their numbers."""
    for other in others:
        assert same_layout(parameter, other), f"laid out as {other.stride()}, not {parameter.stride()}"


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
