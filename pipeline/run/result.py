"""What a training says at its end, as JSON values and in words, whatever was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from deltaclip.pipeline.run.tables import metrics_table

if TYPE_CHECKING:
    from pathlib import Path


class Trained(Protocol):
    """A finished run; of repeats, the metrics are those of all, epoch and scales those of the first."""

    @property
    def run(self) -> Path:
        """Where it lies."""

    @property
    def metrics(self) -> dict[str, Any]:
        """As in `metrics.json`."""

    @property
    def best_epoch(self) -> dict[str, int]:
        """The epoch that each head keeps."""

    @property
    def scales(self) -> tuple[float | None, float | None]:
        """Scales of quality and consistency."""

    @property
    def fit_seconds(self) -> float:
        """Time of all epochs."""

    @property
    def seconds(self) -> float:
        """Time of the stage."""


def result_json(done: Trained) -> dict[str, Any]:
    """Return the metrics in the shape of `metrics.json`, with the run and its times."""
    about = {
        "run": str(done.run),
        "best_epoch": done.best_epoch,
        "scales": {"quality": done.scales[0], "consistency": done.scales[1]},
        "fit_seconds": done.fit_seconds,
        "seconds": done.seconds,
    }
    return {**done.metrics, **about}


def result_words(done: Trained) -> str:
    """Return the metrics table and where the run lies."""
    q, c = done.scales
    scales = f", scales q {q:.3f} c {c:.3f}" if q is not None and c is not None else ""
    times = f"fit {done.fit_seconds:.1f} s, all {done.seconds:.1f} s"
    best = " ".join(f"{label[0]} {done.best_epoch[label]}" for label in done.metrics["test"])
    seeds = done.metrics["split"]["seeds"]
    kept = f"keeps the first of {len(seeds)} repeats, split seed {seeds[0]}: " if len(seeds) > 1 else ""
    where = f"run: {done.run} ({kept}best epoch {best}{scales}, {times})"
    return f"{metrics_table(done.metrics)}\n\n{where}"
