"""The command line: one thin function per stage; no logic, no settings of its own.

Options are made from the fields of each stage's settings. A `UserError` becomes one line and exit code 2. Stages are
imported inside the commands, so that `--help` loads neither numpy nor torch. Spec section 8.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol

import typer

from deltaclip.base.errors import UserError
from deltaclip.base.settings import field_types, is_optional
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.settings import EvaluateConfig, PredictConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130  # what a shell reports of a process ended by Ctrl-C

app = typer.Typer(
    name="deltaclip",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Score AI-generated images for quality and prompt consistency, with CLIP embeddings that are cached once.",
    epilog="A first run on bundled data: `deltaclip extract demo`, then `deltaclip train cache/demo_tiny.h5`.",
    # --residual_scale_q is --residual-scale-q
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


class StageResult(Protocol):
    """What every stage returns."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""

    def summary(self) -> str:
        """Return the lines for a person."""


def command(settings: type, *, example: str) -> Callable[[Callable[[Any], StageResult]], Callable[[Any], StageResult]]:
    """Register a stage: its settings become options, its result is printed, its errors become one line."""

    def register(stage: Callable[[Any], StageResult]) -> Callable[[Any], StageResult]:
        @functools.wraps(stage)
        def run(*, as_json: bool, debug: bool, **values: Any) -> None:
            try:
                result = stage(settings(**values))
            except (UserError, OSError, KeyboardInterrupt) as error:
                if debug:
                    raise
                _fail(error)
            typer.echo(json.dumps(result.to_json(), indent=2) if as_json else result.summary())

        parameters = [_parameter(field, field_types(settings)[field.name]) for field in dataclasses.fields(settings)]
        parameters.append(_flag("as_json", "--json", "Print the result as one JSON object."))
        parameters.append(_flag("debug", "--debug", "Show the traceback of an error."))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(stage.__name__, epilog=f"Example: {example}")(run)
        return stage

    return register


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    words = field.metadata["help"]
    info: Any = (
        typer.Argument(help=words)
        if field.metadata["argument"]
        else typer.Option(help=words, show_default=not is_optional(hint))
    )
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info]
    )


def _flag(name: str, option: str, words: str) -> inspect.Parameter:
    annotation = Annotated[bool, typer.Option(option, help=words)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _fail(error: BaseException) -> NoReturn:
    if isinstance(error, UserError):
        line, code = str(error), 2
    elif isinstance(error, OSError):  # the disk or the rights on it: nothing the input could have said
        line, code = (
            f"{error.filename or 'input/output'}: {error.strerror or error}; check the disk and your rights on it",
            1,
        )
    else:
        line, code = (
            "interrupted; what was finished is kept, the same command goes on from there",
            INTERRUPTED,
        )
    typer.echo(f"deltaclip: {line}", err=True)
    raise typer.Exit(code)


@command(ExtractConfig, example="deltaclip extract agiqa-3k:DIR --backbone ViT-L-14 --pretrained openai")
def extract(config: ExtractConfig) -> StageResult:
    """Embed the images and prompts of a data set once, into a cache; only what is new is computed."""
    from deltaclip.features.extract import extract as stage

    return stage(config)


@command(TrainConfig, example="deltaclip train cache/demo_tiny.h5 --residual-scale-q 0.1 --epochs 30")
def train(config: TrainConfig) -> StageResult:
    """Train quality and consistency heads on a cache, in seconds; print metrics beside their floors."""
    from deltaclip.pipeline.train import train as stage

    return stage(config)


@command(EvaluateConfig, example="deltaclip evaluate runs/demo_tiny_residual_frozen --cache cache/other_tiny.h5")
def evaluate(config: EvaluateConfig) -> StageResult:
    """Score a cache with a trained run and print its metrics beside their floors."""
    from deltaclip.pipeline.evaluate import evaluate as stage

    return stage(config)


@command(
    PredictConfig,
    example="deltaclip predict runs/demo_tiny_residual_frozen picture.png --prompt 'a red circle'",
)
def predict(config: PredictConfig) -> StageResult:
    """Score new images: one image and prompt, a folder, or a manifest."""
    from deltaclip.pipeline.predict import predict as stage

    return stage(config)


def main() -> None:
    """Run the command line."""
    # A reader that closes the pipe early (head) is no error of ours to report with a traceback.
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
