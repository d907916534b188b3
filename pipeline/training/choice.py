"""Which epoch of a head is kept, and when to stop waiting for a better one. Knows scores only."""

from __future__ import annotations

import math


class BestEpoch:
    """The best epoch so far of one head; epoch 0 is the start, before any step.

    The highest score wins, the earlier epoch on a tie; NaN loses to any number and, while there is none, to a later
    NaN. With a `patience` above 0, nothing is taken any more after so many epochs without a better score.
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.epoch, self.score = 0, math.nan
        self.stopped = False

    def take(self, epoch: int, score: float | None) -> bool:
        """Judge an epoch; True where its weights are to be kept. None: the head is not judged, the last one is kept."""
        if self.stopped:
            return False
        better = score is None or math.isnan(self.score) or score > self.score
        if better:
            self.epoch, self.score = epoch, math.nan if score is None else score
        self.stopped = bool(self.patience) and score is not None and epoch - self.epoch >= self.patience
        return better
