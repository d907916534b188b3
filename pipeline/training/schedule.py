"""Learning rate and curriculum scale as functions of progress.

Knows formulas only. Must not know heads, optimizers or data.
"""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]

# A curriculum starts at a tenth of the given scale: small against any base error, yet not so small that the
# correction gets no gradient (it is proportional to the scale).
CURRICULUM_START = 0.1


def lr_factor(step: int, *, num_steps: int, warmup_ratio: float = 0.05, schedule: Schedule = "cosine") -> float:
    """Return the factor in [0, 1] on the learning rate at `step` = 0 .. num_steps - 1.

    Warm-up rises linearly over the first warmup_ratio * num_steps steps (rounded) and is never 0; then
    cosine: (1 + cos(pi p)) / 2, linear: 1 - p, constant: 1, with p in [0, 1) the share of the remaining
    steps.
    """
    warmup_steps = round(warmup_ratio * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if schedule == "linear" else 1.0


def curriculum_fraction(epoch: int, *, num_epochs: int) -> float:
    """Return the share of the given scale in epoch 1 .. num_epochs: linear from CURRICULUM_START to 1.

    The scale stays the same within an epoch, so that validation judges an epoch under the scale it trained
    with.
    """
    remaining = (num_epochs - epoch) / max(num_epochs - 1, 1)
    return 1 - (1 - CURRICULUM_START) * remaining
