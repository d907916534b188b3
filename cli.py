"""The command line: one thin function per stage; no logic, no settings of its own.

Stages are imported inside the commands, so that `--help` loads neither numpy nor torch.
"""

from __future__ import annotations

from deltaclip.cli_app import StageResult, app, command, main
from deltaclip.features.settings import CheckConfig, ExtractConfig, ImportConfig, InspectConfig
from deltaclip.pipeline.settings import (
    AblateConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    PredictConfig,
    ReportConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
)

__all__ = ["app", "main"]


@command(ExtractConfig, example="deltaclip extract agiqa-3k:DIR --backbone ViT-L-14 --pretrained openai")
def extract(config: ExtractConfig) -> StageResult:
    """Embed images and prompts into a cache, only what is new."""
    from deltaclip.features.extract import extract as stage

    return stage(config)


@command(CheckConfig, name="data check", example="deltaclip data check ratings.csv --image-root pictures/")
def check_data(config: CheckConfig) -> StageResult:
    """List every problem of a data set before anything is computed."""
    from deltaclip.features.check_data import check_data as stage

    return stage(config)


@command(TrainConfig, example="deltaclip train cache/demo_tiny.h5 --residual-scale-q 0.1 --epochs 30")
def train(config: TrainConfig) -> StageResult:
    """Train heads on a cache in seconds and print metrics."""
    from deltaclip.pipeline.train import train as stage

    return stage(config)


@command(SweepConfig, example="deltaclip sweep cache/demo_tiny.h5 --residual-scale-q 0.05,0.1,0.2 --lr 1e-3,3e-3")
def sweep(config: SweepConfig) -> StageResult:
    """Train many settings at once; the best becomes a run."""
    from deltaclip.pipeline.sweep import sweep as stage

    return stage(config)


@command(FinetuneConfig, example="deltaclip finetune cache/demo_tiny.h5 --freeze-layers 3 --epochs 5")
def finetune(config: FinetuneConfig) -> StageResult:
    """Train heads and the later blocks of CLIP on the images."""
    from deltaclip.pipeline.finetune import finetune as stage

    return stage(config)


@command(AblateConfig, example="deltaclip ablate cache/demo_tiny.h5 --repeats 10 --against ridge")
def ablate(config: AblateConfig) -> StageResult:
    """Compare floors, baselines and heads, parts off in turn."""
    from deltaclip.pipeline.ablate import ablate as stage

    return stage(config)


@command(EvaluateConfig, example="deltaclip evaluate runs/demo_tiny_residual_frozen --cache cache/other_tiny.h5")
def evaluate(config: EvaluateConfig) -> StageResult:
    """Score a cache with a run and print metrics."""
    from deltaclip.pipeline.evaluate import evaluate as stage

    return stage(config)


@command(
    CompareConfig,
    example="deltaclip compare runs/demo_tiny_residual_frozen runs/demo_tiny_direct_frozen",
)
def compare(config: CompareConfig) -> StageResult:
    """Compare runs on the rows that are test in all of them."""
    from deltaclip.pipeline.compare import compare as stage

    return stage(config)


@command(
    PredictConfig,
    example="deltaclip predict runs/demo_tiny_residual_frozen picture.png --prompt 'a red circle'",
)
def predict(config: PredictConfig) -> StageResult:
    """Score an image, a folder or a manifest with a run."""
    from deltaclip.pipeline.predict import predict as stage

    return stage(config)


@command(ReportConfig, example="deltaclip report runs/demo_tiny_residual_frozen")
def report(config: ReportConfig) -> StageResult:
    """Show a run, or several, as one page to open in a browser."""
    from deltaclip.pipeline.report import report as stage

    return stage(config)


@command(ExportConfig, example="deltaclip export runs/demo_tiny_residual_frozen --out scorer.onnx")
def export(config: ExportConfig) -> StageResult:
    """Write a run as ONNX, checked against torch."""
    from deltaclip.pipeline.export import export as stage

    return stage(config)


@command(DemoConfig, example="deltaclip demo")
def demo(config: DemoConfig) -> StageResult:
    """Show the whole path once, on bundled data."""
    from deltaclip.pipeline.demo import demo as stage

    return stage(config)


@command(ServeConfig, example="deltaclip serve runs/demo_tiny_residual_frozen --port 8000")
def serve(config: ServeConfig) -> StageResult:
    """Answer requests for scores over HTTP, with a page to try."""
    from deltaclip.pipeline.serve import serve as stage

    return stage(config)


@command(InspectConfig, name="inspect", example="deltaclip inspect cache/demo_tiny.h5 --verify")
def inspect_cache(config: InspectConfig) -> StageResult:
    """Say what is in a cache, from what and how complete; verify it."""
    from deltaclip.features.inspect_cache import inspect_cache as stage

    return stage(config)


@command(
    ImportConfig,
    name="import",
    example="deltaclip import embeddings/ --out cache/mine.h5 --backbone ViT-L-14 --pretrained openai --precision fp16",
)
def import_embeddings(config: ImportConfig) -> StageResult:
    """Make a cache of embeddings that another program computed."""
    from deltaclip.features.import_embeddings import import_embeddings as stage

    return stage(config)


if __name__ == "__main__":
    main()
