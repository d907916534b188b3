"""The variants that an ablation compares, and their predictions of the test rows of one split.

Knows one table: a further variant is one line of it. Must not know figures, intervals or run directories. The two heads
share no parameter, so a variant may turn a part of both off: each label's column shows its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaclip.pipeline.run.learning import learn, of_rows
from deltaclip.pipeline.run.predictions import SCORE_BATCH, score
from deltaclip.pipeline.run.references import (
    Predicted,
    predict_cosine,
    predict_no_image,
    predict_ridge,
    predict_ridge_on_view,
    predict_svr,
)
from deltaclip.pipeline.run.stacking import Stacked
from deltaclip.pipeline.run.targets import loss_weights
from deltaclip.pipeline.settings.swept import SWEPT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from deltaclip.pipeline.run.learning import Learned
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.scoring.splits import Split
    from deltaclip.pipeline.settings import TrainConfig


@dataclass(frozen=True)
class Variant:
    """One line of the table: heads that are trained with other settings, or (`predict`) something without heads.

    `overrides` are settings of `train` that differ from its defaults. `on_view` lines need a cache with a further view.
    """

    name: str
    words: str
    overrides: Mapping[str, Any] | None = None
    predict: Callable[[CacheRows, Split, str], Predicted] | None = None
    on_view: bool = False


VARIANTS = (
    Variant("no-image", "floor: means of source and prompt", predict=predict_no_image),
    Variant("cosine", "floor: zero-shot cosine", predict=predict_cosine),
    Variant("ridge", "ridge on v (c: [v, t, s])", predict=predict_ridge),
    Variant("svr", "RBF SVR on the same", predict=predict_svr),
    Variant("direct", "direct heads", {"residual_learning": False}),
    Variant("direct-two-branch", "direct, with cosine branch", {"residual_learning": False, "two_branch": True}),
    Variant("residual", "residual heads", {}),
    Variant("identity-base", "residual, base not calibrated", {"base_init": "identity"}),
    Variant("no-correction", "residual, scales 0: base alone", {"residual_scale_q": 0.0, "residual_scale_c": 0.0}),
    Variant("no-dropout", "residual, dropout 0", {"dropout": 0.0}),
    Variant("ridge-view", "ridge on the view (c: [view, t, s])", predict=predict_ridge_on_view, on_view=True),
    Variant("kernel", "residual on a kernel base", {"base_init": "kernel"}, on_view=True),
    Variant(
        "kernel-only",
        "kernel base alone: scales 0",
        {"base_init": "kernel", "residual_scale_q": 0.0, "residual_scale_c": 0.0},
        on_view=True,
    ),
)


def variants_of(rows: CacheRows) -> list[Variant]:
    """Return the variants that can be compared on a cache."""
    return [one for one in VARIANTS if rows.x_IF is not None or not one.on_view]


def predict_variants(
    config: TrainConfig,
    rows: CacheRows,
    split: Split,
    labels: Sequence[str],
    *,
    on_variant: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Predicted]]:
    """Train every variant on one split and return its predictions of the test rows, by variant and label.

    Args:
        config: settings of `train` that the variants start from.
        rows: the cache.
        split: sides of its rows.
        labels: those to predict.
        on_variant: called after each variant.

    Raises:
        UserError: a training loss that is not finite.
    """
    variants = variants_of(rows)
    configs = {one.name: replace(config, **one.overrides) for one in variants if one.overrides is not None}
    together = [configs[one.name] for one in variants if one.overrides is not None and _stacks(one)]
    stacked = Stacked(together, rows, split, half=False) if together else None
    found = {}
    for one in variants:
        if one.predict is not None:
            found[one.name] = {label: one.predict(rows, split, label) for label in labels}
        elif stacked is not None and _stacks(one):
            found[one.name] = _of_heads(stacked.learned(configs[one.name]), rows, split, labels)
        else:
            own = configs[one.name]
            learned = learn(own, rows, split, loss_weights(own, rows), what=one.name)
            found[one.name] = _of_heads(learned, rows, split, labels)
        on_variant()
    return found


def _stacks(variant: Variant) -> bool:
    """Tell whether a variant differs from the others only in what heads of one stack may differ in."""
    return variant.overrides is not None and set(variant.overrides) <= set(SWEPT)


def _of_heads(learned: Learned, rows: CacheRows, split: Split, labels: Sequence[str]) -> dict[str, Predicted]:
    columns = of_rows(learned.columns, split.test)
    scores = score(learned.heads, rows.batches(split.test, batch_size=1, columns=columns).in_order(SCORE_BATCH))
    epochs = learned.fitted.best_epoch
    return {label: Predicted(score_M=scores.of(label), about={"best_epoch": epochs[label]}) for label in labels}
