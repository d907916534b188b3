"""AdamW with parameter groups made by rules.

Knows which parameters decay, by their names. Must not know the training loop. Spec section 3.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

# The first pattern found in a parameter's name decides whether it decays; a name that none knows is an error,
# so that a new head states its rule. Biases, norms, scale parameters and the base scalars a, b do not decay:
# pulling them to zero is no simpler model. By name rather than by shape: heads stacked for a sweep have one
# more dimension.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(^|\.)bias$", False),
    (r"(^|\.)norm\w*\.weight$", False),
    (r"(^|\.)theta$", False),
    (r"(^|\.)c_(slope|offset)$", False),
    (r"(^|\.)weight$", True),
)


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups that hold every trainable parameter exactly once."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decayed if _decays(name) else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_adamw(module: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over the groups of `module`."""
    return torch.optim.AdamW(parameter_groups(module, weight_decay=weight_decay), lr=lr, fused=True)


def _decays(name: str) -> bool:
    for pattern, decays in DECAY_RULES:
        if re.search(pattern, name):
            return decays
    raise ValueError(f"no decay rule for parameter {name!r}; add one to DECAY_RULES")
