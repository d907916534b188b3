"""A finished run in MLflow or Weights & Biases: its curves, its metrics beside their floors, its settings.

Read from the run directory, which is there whatever a tracker does. Must not know what was trained.
"""

from __future__ import annotations

import csv
import json
import math
import os
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError, one_line
from deltaclip.base.progress import say
from deltaclip.pipeline.runs.curves import CURVES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

PROJECT = "deltaclip"
FINAL = ("test", "val", "train", "floors", "intervals", "unlike")
VERDICT = ("difference", "lo", "hi")
LONGEST = 500  # characters of a parameter that MLflow takes


def track_run(tool: str, run: Path) -> None:
    """Write a finished run to a tracker, and say where it is.

    Args:
        tool: `mlflow`, to MLFLOW_TRACKING_URI or what the library takes without one, local files; or `wandb`, offline
            unless WANDB_MODE or WANDB_API_KEY say otherwise.
        run: its directory.

    Raises:
        UserError: the tracker refuses it; the run itself is there.
    """
    write, failures = TOOLS[tool]
    config, metrics = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("config.json", "metrics.json"))
    curves, final = list(_curves(run / "history.csv")), final_figures(metrics)
    try:
        where = write(run.name, _parameters(config), curves, final)
    except failures() as error:
        message = f"{tool} did not take it ({one_line(str(error), 160)})"
        raise UserError(
            message, place=run, remedy="the run is complete; look at the settings of the tracker"
        ) from error
    say(f"tracked: {where}")


def final_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of `metrics.json` by names such as `test/quality/srocc` and `floors/no_image/quality/srocc`.

    Of repeats the means, with `.../sd` beside them.
    """
    found = {name: value for side in FINAL for name, value in _flat(side, metrics.get(side))}
    for label, verdict in metrics.get("verdict", {}).items():
        found |= {f"verdict/{label}/{name}": value for name in VERDICT for _, value in _flat(name, verdict.get(name))}
    return found


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        if value.keys() >= {"mean", "sd", "values"}:
            yield from _flat(name, value["mean"])
            yield from _flat(f"{name}/sd", value["sd"])
            return
        for key, inner in value.items():
            if key != "per_source":
                yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for end, inner in zip(("low", "high"), value, strict=False):
            yield from _flat(f"{name}/{end}", inner)
    elif isinstance(value, (int, float)) and math.isfinite(value):
        yield name, float(value)


def _curves(history: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the epochs of a history with the curves that `--tensorboard` has, by the same names."""
    with history.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = {_curve(name): float(text or "nan") for name, text in row.items() if name != "epoch"}
            yield int(row["epoch"]), {name: value for name, value in values.items() if math.isfinite(value)}


def _curve(column: str) -> str:
    if column.startswith("scale_"):
        return f"scale/{column.removeprefix('scale_')}"
    return CURVES.get(column, f"validation/{column}")


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    about = {name: config[name] for name in ("stage", "mode", "labels", "best_epoch")}
    backbone = {f"backbone/{name}": config["backbone"][name] for name in ("backbone", "pretrained", "precision")}
    return {**config["settings"], **about, **backbone}


def _to_mlflow(
    name: str, parameters: Mapping[str, Any], curves: list[tuple[int, dict[str, float]]], final: Mapping[str, float]
) -> str:
    import mlflow

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    with mlflow.start_run(run_name=name) as started:
        mlflow.log_params({key: str(value)[:LONGEST] for key, value in parameters.items()})
        for epoch, values in curves:
            mlflow.log_metrics(values, step=epoch)
        mlflow.log_metrics(dict(final))
    return f"MLflow run {started.info.run_id} in {mlflow.get_tracking_uri()}"


def _to_wandb(
    name: str, parameters: Mapping[str, Any], curves: list[tuple[int, dict[str, float]]], final: Mapping[str, float]
) -> str:
    import wandb

    told: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    with wandb.init(project=project, name=name, config=dict(parameters), mode=told) as started:
        for epoch, values in curves:
            started.log(values, step=epoch)
        started.summary.update(dict(final))
        folder = started.dir.removesuffix("files").rstrip("/\\")
    return f"Weights & Biases, {told}: {folder}" + (f" (send it: wandb sync {folder})" if told == "offline" else "")


def _of_mlflow() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)


def _of_wandb() -> tuple[type[Exception], ...]:
    import wandb

    return (wandb.Error, OSError)


TOOLS: dict[str, tuple[Callable[..., str], Callable[[], tuple[type[Exception], ...]]]] = {
    "mlflow": (_to_mlflow, _of_mlflow),
    "wandb": (_to_wandb, _of_wandb),
}
