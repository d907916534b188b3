"""STAGE demo: the whole path once on bundled data: draw, extract, train, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters.demo import demo_folder
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.shards import open_cache
from deltaclip.pipeline.report import report
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import ReportConfig, TrainConfig
from deltaclip.pipeline.train import train
from deltaclip.pipeline.words.result_words import metrics_table, verdict_lines

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.settings import DemoConfig


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What was made, or was there already, and the metrics of the run."""

    data: Path
    cache: Path
    run: Path
    page: Path
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the paths and the metrics in the shape of `metrics.json`."""
        paths = {"data": str(self.data), "cache": str(self.cache), "run": str(self.run), "page": str(self.page)}
        return {**self.metrics, **paths}

    def summary(self) -> str:
        """Return the metrics table, where everything lies with the command that made it, and the verdict."""
        lines = [
            metrics_table(self.metrics),
            "",
            f"images: {self.data} (drawn by deltaclip)",
            f"cache:  {self.cache} (deltaclip extract demo --out {self.cache})",
            f"run:    {self.run} (deltaclip train {self.cache} --out {self.run})",
            f"page:   {self.page} (deltaclip report {self.run})",
            *verdict_lines(self.metrics),
        ]
        return "\n".join(lines)


def demo(config: DemoConfig) -> DemoResult:
    """Make the demo set, its cache, a run and its page; what is there already stays.

    Raises:
        UserError: see `extract`, `train` and `report`; or the run is of another cache, as an older release made it.
    """
    cache, run = config.out / "cache" / "demo_tiny.h5", config.out / "runs" / "demo"
    extract(ExtractConfig(data="demo", out=cache))
    if not run.exists():
        run = train(TrainConfig(cache=cache, out=run)).run
    elif not _is_of(open_run(run), cache):
        raise UserError("was trained on another demo set", place=run, remedy="remove it or give another --out")
    page = report(ReportConfig(runs=[run])).page
    return DemoResult(data=demo_folder(), cache=cache, run=run, page=page, metrics=open_run(run).metrics)


def _is_of(run: RunFolder, cache: Path) -> bool:
    with open_cache(cache) as store:
        return all(run.config["cache"][name] == store.header[name] for name in ("request", "plan"))
