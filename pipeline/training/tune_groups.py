"""Parameter groups of heads and towers that train together: learning rates by depth, decay by rule.

Knows names and shapes of parameters. Must not know the training loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from deltaclip.pipeline.training.optimizer import decays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


class Tower(Protocol):
    """What training must know of a tower of CLIP."""

    depth: int

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by their names in the whole model."""

    def block_of(self, name: str) -> int:
        """Return the block of a parameter: 0 before the first, depth + 1 behind the last."""


def tuning_groups(
    heads: nn.Module,
    towers: Sequence[Tower],
    *,
    lr: float,
    head_lr: float,
    layer_decay: float = 1.0,
    weight_decay: float = 1e-4,
) -> list[dict[str, Any]]:
    """Return torch's parameter groups, every trainable parameter in exactly one; `lr` in them is the peak.

    A tower's parameter in block b of L learns at lr * layer_decay ** (L + 1 - b) (Clark et al., arXiv:2003.10555,
    as in BEiT). In towers vectors and scalars do not decay, also those with axes of length 1: biases, norms, scales,
    class embeddings.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in heads.named_parameters():
        if parameter.requires_grad:
            key = head_lr, weight_decay if decays(name) else 0.0
            groups.setdefault(key, []).append(parameter)
    for tower in towers:
        for name, parameter in tower.named_trainable().items():
            rate = lr * layer_decay ** (tower.depth + 1 - tower.block_of(name))
            groups.setdefault((rate, weight_decay if parameter.squeeze().ndim > 1 else 0.0), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
