"""STAGE evaluate: metrics, floors and diagnostics of a run on a cache.

On the run's own cache the rows keep the sides that they had in training; in another cache every row is test.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.files import keep_result, write_json
from deltaclip.base.options import option_name
from deltaclip.base.places import check_outside
from deltaclip.features.store.shards import open_cache
from deltaclip.features.store.writer import check_request
from deltaclip.pipeline.api.scorer import tuned_scores
from deltaclip.pipeline.rows.beside import with_caches_beside
from deltaclip.pipeline.rows.cached_rows import lacking_views, load_rows, views_there
from deltaclip.pipeline.rows.pair_rows import spoken_for
from deltaclip.pipeline.rows.task import present_labels
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.measure import measure
from deltaclip.pipeline.runs.prediction_table import SCORE_BATCH, base_terms, score
from deltaclip.pipeline.runs.run_split import split_of_run
from deltaclip.pipeline.runs.trust import trusted
from deltaclip.pipeline.words.result_words import metrics_table, verdict_lines

if TYPE_CHECKING:
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.settings import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Metrics of a run on a cache; `heads` says which heads of a run with repeats were scored.

    `scores` says where those of a run with a changed backbone come from.
    """

    run: Path
    cache: Path
    metrics: dict[str, Any]
    heads: str = ""
    scores: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics in the shape of `metrics.json`, with run and cache."""
        origin = {"scores": self.scores} if self.scores else {}
        return {**self.metrics, "run": str(self.run), "cache": str(self.cache), **origin}

    def summary(self) -> str:
        """Return the metrics table and the verdict."""
        origin = f": {self.scores}" if self.scores else ""
        where = f"{self.run} on {self.cache}{self.heads}{origin}"
        return "\n".join([where, metrics_table(self.metrics), *verdict_lines(self.metrics)])


def _caches_beside(run: RunFolder, config: EvaluateConfig) -> list[Path]:
    """Return the caches whose views the bases of the run see beside those of the first.

    Raises:
        UserError: they are not given, or are by other backbones than the run's, or would not be used.
    """
    bases, recorded = run.spec.bases, run.config.get("beside", [])
    if bases is None or not bases.sees_others:
        if config.beside:
            remedy = "leave it out: the bases of this run see one cache"
            raise UserError("would not be used", place="--beside", remedy=remedy)
        return []
    caches = config.beside or ([] if config.cache else [Path(each["path"]) for each in recorded])
    if len(caches) != len(recorded):
        many = "cache" if len(recorded) == 1 else "caches"
        message = f"the run was trained on {len(recorded)} {many} beside the first, {len(caches)} are given"
        raise UserError(message, place="--beside", remedy="give each, in the order of `train`")
    for path, each in zip(caches, recorded, strict=True):
        with open_cache(path) as store:
            check_request(store, each["request"], remedy="extract the data with the run's backbones")
    return caches


def _rows(run: RunFolder, config: EvaluateConfig, cache: Path) -> CacheRows:
    """Return the rows of a cache with what the heads of the run, and what it knows of its rows, need of them."""
    with open_cache(cache) as store:
        check_request(
            store,
            run.config["request"],
            remedy="extract the data with the run's backbone, or train on this cache",
        )
    bases, trust = run.spec.bases, None if run.is_tuned else run.trust
    # Heads need their views; without one of the others less is known of what rows are like.
    there = views_there(cache) if trust and trust.views else []
    views = [*(bases.views if bases else ()), *(view for view in there if trust and view in trust.views)]
    rows = load_rows(cache, "cpu", views=[name for name in views if ":" not in name])
    caches = _caches_beside(run, config)
    return with_caches_beside(rows, caches) if caches else rows


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Score a cache with the heads of a run.

    Raises:
        UserError: the cache is of another backbone than the run, has no labels, or cannot be read.
    """
    check_outside(config.out, [config.run])
    run = open_run(config.run)
    unused = [name for name in ("image_root", "backbone", "pretrained") if getattr(config, name) is not None]
    if unused and not run.is_tuned:
        remedy = "leave it out: the run scores embeddings, not images"
        raise UserError("would not be used", place=option_name(unused[0]), remedy=remedy)
    if config.cache is None:
        run.check_has_rows()
    cache = config.cache or Path(run.config["cache"]["path"])
    bases, trust = run.spec.bases, None if run.is_tuned else run.trust
    rows = _rows(run, config, cache)
    present, trained = present_labels(rows), run.config["labels"]
    if not {*present, *spoken_for(rows)} & set(trained):
        lacking = f"has no {' or '.join(trained)} labels to compare with"
        raise UserError(lacking, place=cache, remedy="use `deltaclip predict` for scores alone")
    split = split_of_run(run, rows)
    if run.is_tuned:
        scores, origin = tuned_scores(
            run, rows, image_root=config.image_root, backbone=config.backbone, pretrained=config.pretrained
        )
    else:
        columns = {"fitted_B": base_terms(run.heads, rows)} if bases else None
        batches = rows.batches(None, batch_size=1, columns=columns).in_order(SCORE_BATCH)
        scores, origin = score(run.heads, batches, total=len(rows.rows)), ""
    if trust is not None:
        scores = trusted(trust, rows, scores)
    # Of bases that were fitted to these rows, figures of all but test rows would be those of a fit to itself.
    is_fitted = bases is not None and split.train.size > 0
    scales = {} if is_fitted else run.heads.scales()
    sees_all = bases is not None and run.config["settings"].get("base") == "auto"
    lacks_views = lacking_views(rows) if sees_all else []
    metrics = measure(rows, scores, split, labels=trained, scales=scales, lacks_views=lacks_views)
    if is_fitted:
        note = "train and validation rows are left out: the bases were fitted to them, see the run's metrics.json"
        metrics |= {"train": {}, "val": {}}
        metrics["split"]["note"] = "; ".join(part for part in (metrics["split"]["note"], note) if part)
    if config.out:
        keep_result(config.out, lambda path: write_json(path, metrics))
    seeds = run.metrics["split"]["seeds"]
    heads = f", the heads of the first of {len(seeds)} repeats, split seed {seeds[0]}" if len(seeds) > 1 else ""
    return EvaluateResult(run=config.run, cache=cache, metrics=metrics, heads=heads, scores=origin)
