"""Losses of the steps of one epoch, read from the device together. Knows numbers only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

# Reading a loss waits for the device, so losses are kept as tensors and read together: at the end of each
# epoch, and within long ones after this many steps, so that a diverged run does not go on for an hour.
STEPS_PER_CHECK = 256


class NotFinite(NamedTuple):
    """A loss that is no number, and the step of the epoch that gave it, counted from 1."""

    step: int
    loss: float


class StepLosses:
    """Losses of an epoch in the order of its steps; `values` are those that were read, from an earlier process too."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.values = list(values)
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor) -> NotFinite | None:
        """Take the loss of a step, and read what has gathered where that is much."""
        self._unread.append(loss.detach())
        return self.read() if len(self._unread) == STEPS_PER_CHECK else None

    def read(self) -> NotFinite | None:
        """Read what has gathered; the first loss that is not finite is returned."""
        if not self._unread:
            return None
        start = len(self.values)
        self.values += torch.stack(self._unread).tolist()
        self._unread = []
        found = (NotFinite(step, loss) for step, loss in enumerate(self.values[start:], start + 1))
        return next((one for one in found if not math.isfinite(one.loss)), None)

    def mean(self) -> float:
        """Return the mean loss of the steps that were read, the same however often they were read."""
        return math.fsum(self.values) / len(self.values)
