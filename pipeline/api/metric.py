"""A torchmetrics metric: mean quality and consistency of images against their prompts.

Knows torchmetrics, which comes with the extra `metrics`, and the scorer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deltaclip.pipeline.api.scorer import Scorer

if TYPE_CHECKING:
    from pathlib import Path


try:
    from torchmetrics import Metric
except ModuleNotFoundError as missing:
    raise ImportError("DeltaclipMetric needs torchmetrics: pip install 'deltaclip[metrics]'") from missing


class DeltaclipMetric(Metric):
    """Mean `q` and `c` over all images of all updates; over processes sums and counts are added up.

    Copies, pickles and `torch.save` hold the whole scorer, its weights included; `state_dict` holds sums alone.

    Args:
        scorer: a scorer, or the run directory to load one from.
        batch_size: images per forward pass.
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    q_sum: torch.Tensor
    q_count: torch.Tensor
    c_sum: torch.Tensor
    c_count: torch.Tensor
    failed: torch.Tensor

    def __init__(self, scorer: Scorer | Path | str, *, batch_size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scorer = scorer if isinstance(scorer, Scorer) else Scorer.load(scorer)
        self.batch_size = batch_size
        for letter in ("q", "c"):
            self.add_state(f"{letter}_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{letter}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("failed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Any, prompts: Any = None) -> None:
        """Add pairs, as `Scorer.score` takes them; what cannot be read is counted in `failed`, not in the means."""
        found = self.scorer.score(images, prompts, batch_size=self.batch_size)
        for letter, values in (("q", found.q), ("c", found.c)):
            value_N = torch.from_numpy(values).to(self.failed.device, torch.float64)
            there_N = ~torch.isnan(value_N)
            setattr(self, f"{letter}_sum", getattr(self, f"{letter}_sum") + value_N[there_N].sum())
            setattr(self, f"{letter}_count", getattr(self, f"{letter}_count") + there_N.sum())
        self.failed = self.failed + len(found.failed)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return `{"q", "c"}`, scalar float64; NaN where nothing was scored or the run has no such label."""
        return {"q": self.q_sum / self.q_count, "c": self.c_sum / self.c_count}
