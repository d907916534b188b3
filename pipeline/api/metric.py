"""A torchmetrics metric: mean scores of images, against their prompts where a target sees them.

Knows torchmetrics, which comes with the extra `metrics`, and the scorer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.runs.prediction_table import SHORT_NAMES

if TYPE_CHECKING:
    from pathlib import Path


try:
    from torchmetrics import Metric
except ModuleNotFoundError as missing:
    raise ImportError("DeltaclipMetric needs torchmetrics: pip install 'deltaclip[metrics]'") from missing


class DeltaclipMetric(Metric):
    """Mean of every target of the run over all images of all updates; over processes sums and counts are added up.

    Copies, pickles and `torch.save` hold the whole scorer, its weights included; `state_dict` holds sums alone.

    Args:
        scorer: a scorer, or the run directory to load one from.
        batch_size: images per forward pass.
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    failed: torch.Tensor

    def __init__(self, scorer: Scorer | Path | str, *, batch_size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scorer = scorer if isinstance(scorer, Scorer) else Scorer.load(scorer)
        self.batch_size = batch_size
        for target in self._targets:
            self.add_state(f"{target}_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{target}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("failed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def _targets(self) -> list[str]:
        return [target.name for target in self.scorer.heads.targets]

    def update(self, images: Any, prompts: Any = None) -> None:
        """Add pairs, as `Scorer.score` takes them; what cannot be read is counted in `failed`, not in the means."""
        found = self.scorer.score(images, prompts, batch_size=self.batch_size)
        for target in self._targets:
            value_N = torch.from_numpy(found.scores.of(target)).to(self.failed.device, torch.float64)
            there_N = ~torch.isnan(value_N)
            setattr(self, f"{target}_sum", getattr(self, f"{target}_sum") + value_N[there_N].sum())
            setattr(self, f"{target}_count", getattr(self, f"{target}_count") + there_N.sum())
        self.failed = self.failed + len(found.failed)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the mean by target, scalar float64, those of quality and consistency as `q` and `c` too.

        NaN where nothing was scored, or the target was not learned.
        """
        means = {each: getattr(self, f"{each}_sum") / getattr(self, f"{each}_count") for each in self._targets}
        return means | {short: means[target] for target, short in SHORT_NAMES.items() if target in means}
