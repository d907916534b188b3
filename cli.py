"""The command line: one thin function per stage, options from the fields of its settings, errors as one line.

Stages are imported inside the commands, so that `--help` loads neither numpy nor torch. No logic and no settings of its
own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol

import typer
from typer.core import TyperCommand
from typer.main import get_command

from deltaclip.base.device import ask_for_large_pages, share_processors
from deltaclip.base.errors import INPUT, MACHINE, UserError, did_you_mean, ending_of
from deltaclip.base.options import field_types, is_optional, option_name
from deltaclip.base.places import check_places, understood_places
from deltaclip.base.progress import say
from deltaclip.features.settings import CheckConfig, ExtractConfig, ImportConfig, InspectConfig
from deltaclip.pipeline.settings import (
    AblateConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    PredictConfig,
    PullConfig,
    PushConfig,
    RankConfig,
    ReportConfig,
    ServeConfig,
    ShareConfig,
    SweepConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


# ---- How stages become commands: options from the fields of their settings, errors as one line


HELP = ("-h", "--help")

app = typer.Typer(
    name="deltaclip",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Score AI-generated images for quality and prompt consistency, with CLIP embeddings that are cached once.",
    epilog="\b\nA first run, on bundled data:\n  deltaclip extract demo\n  deltaclip train cache/demo_tiny.h5\n\n"
    "`deltaclip help COMMAND` shows its options, `deltaclip --version` the version.",
    # --residual_scale_q is --residual-scale-q
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": list(HELP),
    },
)


GROUPS = {"data": "Look at data before anything is computed."}


class _Command(TyperCommand):
    """A command that shows its help before any value is looked at, and refuses values that say nothing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(word in HELP for word in args[: args.index("--") if "--" in args else None]):
            typer.echo(ctx.get_help())
            ctx.exit()
        _refuse_blank(args)
        return super().parse_args(ctx, args)


def _refuse_blank(args: Sequence[str]) -> None:
    """Refuse values that say nothing, as scripts give of variables that are not set: a path of none is this folder."""
    for place, word in enumerate(args):
        option, joined, value = word.partition("=")
        if not word.strip() or (joined and option.startswith("--") and not value.strip()):
            before = args[place - 1] if place and args[place - 1].startswith("-") else "an argument"
            name = option if joined else before
            raise UserError("is blank", place=name.replace("_", "-"), remedy="give a value, or leave it out")


@dataclasses.dataclass(frozen=True)
class Registered:
    """A command: its name (of two words in a group), the settings that its options are, a sentence and an example."""

    name: str
    settings: type
    summary: str
    example: str


_registered: list[Registered] = []


class StageResult(Protocol):
    """What every stage returns."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""

    def summary(self) -> str:
        """Return the lines for a person."""


@contextlib.contextmanager
def _told_by_the_first() -> Iterator[None]:
    """Mark an error as silent in a process of torchrun that is not the first: that one comes to it alike."""
    try:
        yield
    except UserError as error:
        is_other = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
        error.is_silent = is_other  # type: ignore[attr-defined]
        raise


def command(
    settings: type, *, example: str, name: str | None = None, together: bool = False
) -> Callable[[Callable[[Any], StageResult]], Callable[[Any], StageResult]]:
    """Register a stage: its settings become options, its result is printed, its errors become one line.

    A result with an `exit_code` other than 0 has found what the caller should stop at; one that `is_silent`, of a
    process that is not the first, is not printed. The command has the name of the stage, or `name`, which may be of two
    words: a group and the command in it. Of a stage that processes run `together`, under torchrun, mistakes in the
    settings are told by the first alone.
    """

    def register(stage: Callable[[Any], StageResult]) -> Callable[[Any], StageResult]:
        @functools.wraps(stage)
        def run(*, context: typer.Context, as_json: bool, debug: bool, **values: Any) -> None:
            # `debug` is read by `main`, which tells of errors. Only what was given: settings know their own defaults,
            # and a preset what it may change.
            with _told_by_the_first() if together else contextlib.nullcontext():
                given = {name: value for name, value in values.items() if _is_given(context, name)}
                config = settings(**understood_places(settings, given))
                check_places(config)  # before the stage is imported, which takes seconds
            result = stage(config)
            if not getattr(result, "is_silent", False):
                typer.echo(json.dumps(result.to_json(), indent=2) if as_json else result.summary())
            if code := getattr(result, "exit_code", 0):
                raise typer.Exit(code)

        parameters = [_parameter(field, field_types(settings)[field.name]) for field in dataclasses.fields(settings)]
        parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        parameters.append(_flag("as_json", "--json", "Print the result as one JSON object."))
        parameters.append(_flag("debug", "--debug", "Show the traceback of an error."))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        # \b keeps the example on a line of its own, so that it can be copied.
        full = name or stage.__name__
        _registered.append(Registered(full, settings, (stage.__doc__ or "").strip(), example))
        group, _, word = full.rpartition(" ")
        _group(group, example).command(word, cls=_Command, epilog=f"\b\nExample:\n  {example}")(run)
        return stage

    return register


def _group(name: str, example: str) -> typer.Typer:
    if not name:
        return app
    known = next((info.typer_instance for info in app.registered_groups if info.name == name), None)
    if known is None:
        known = typer.Typer(rich_markup_mode=None, help=GROUPS[name], epilog=f"\b\nExample:\n  {example}")
        app.add_typer(known, name=name)
    return known


def registered_commands() -> list[Registered]:
    """Return all commands, in the order of a project."""
    return list(_registered)


def command_names() -> list[str]:
    """Return the names of all commands, those of groups in two words."""
    return [command.name for command in _registered]


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    words = field.metadata["help"]
    info: Any = (
        typer.Argument(help=words)
        if field.metadata["argument"]
        else typer.Option(*_spellings(field), help=words, show_default=not is_optional(hint))
    )
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info]
    )


def _spellings(field: dataclasses.Field[Any]) -> list[str]:
    """Return the options that set a field, none where it has the one of its name."""
    also = field.metadata["spelling"]
    return [option_name(field.name), also] if also else []


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _flag(name: str, option: str, words: str) -> inspect.Parameter:
    annotation = Annotated[bool, typer.Option(option, help=words)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 the machine failed, 2 the input is wrong, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ask_for_large_pages()
    share_processors()
    _open_streams()
    if given[:1] == ["help"]:  # as git and many others
        given = [*given[1:], "--help"]
    try:
        code = _run(given)
        sys.stdout.flush()  # here, where a full disk can still be told
    except BrokenPipeError:  # whoever read our output has gone: `| head`
        _drop_output()
        code = MACHINE
    except BaseException as error:  # noqa: BLE001 - the one place that nothing may pass: a user sees a line, no traceback
        code = _end(error, show_traceback="--debug" in given)
    sys.exit(code)


def _run(given: Sequence[str]) -> int:
    # Not by `app(...)`, which turns Ctrl-C and the end of an input into exits that say nothing.
    command, is_partial = get_command(app), list(given) in ([], *([group] for group in GROUPS))
    if list(given) in (["--version"], ["-V"]):  # no option of the library's: each run would import pydantic for it
        typer.echo(f"deltaclip {importlib.metadata.version('deltaclip')}")
        return 0
    try:
        with command.make_context("deltaclip", [*given, "--help"] if is_partial else list(given)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return INPUT if is_partial else end.exit_code
    except typer.TyperException as error:
        raise _usage(error, given) from error
    return 0


def _end(error: BaseException, *, show_traceback: bool) -> int:
    """Say in one line what ended the program, and return its exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else MACHINE
    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C, while threads end, ends everything at once
    if show_traceback:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    code, line = ending_of(error)
    if not getattr(error, "is_silent", False):  # of a process that is not the first, where that one has told
        say(f"deltaclip: {line}")
    _drop_output()
    return code


def _open_streams() -> None:
    """Give a process without output one that leads nowhere, and let a name that a terminal cannot show end nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us, `>&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Forget what could not be written: Python would try again at its end, and end in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _usage(error: typer.TyperException, given: Sequence[str]) -> UserError:
    """Say in our words what the library found wrong with the arguments."""
    commands = command_names()
    command = given[0]
    if command in GROUPS:
        command = " ".join([command, *(word for word in given[1:2] if not word.startswith("-"))])
    if not command.startswith("-") and command not in commands:
        return UserError(f"{command!r} is no command", remedy=did_you_mean(command, commands))
    remedy = f"see `deltaclip {command} --help`" if command in commands else "see `deltaclip --help`"
    message = error.message.removeprefix("Value error, ").rstrip(".")
    message = message[:1].lower() + message[1:]
    if option := getattr(error, "option_name", None):
        if message.startswith("no such option"):
            message, remedy = "no such option", _other_option(error, option) or remedy
        return UserError(message.removeprefix(f"option {option!r} "), place=option, remedy=remedy)
    if (parameter := getattr(error, "param", None)) is None:
        return UserError(message, remedy=remedy)
    is_option = parameter.param_type_name == "option"
    place = option_name(parameter.name) if is_option else parameter.name.upper()
    return UserError(_bad_value(error, message), place=place, remedy=remedy)


def _other_option(error: typer.TyperException, option: str) -> str:
    """Say what option could be meant instead, or which commands have this one."""
    commands: dict[str, Any] = dict(getattr(get_command(app), "commands", {}))
    having = [
        f"`deltaclip {name}`"
        for name, command in commands.items()
        if any(option in (*parameter.opts, *parameter.secondary_opts) for parameter in command.params)
    ]
    close = getattr(error, "possibilities", None)
    if having:
        return f"it is one of {' and '.join(having[:3])}"
    return f"did you mean {close[0]!r}?" if close else ""


def _bad_value(error: typer.TyperException, message: str) -> str:
    if not message:
        return "is missing"
    # Numbers are parsed by pydantic, whose message leaves the value out.
    details = getattr(error.__cause__ or error.__context__, "errors", None)
    if details and "unable to parse" in message:
        return f"{details()[0]['input']!r} is no {'whole number' if 'integer' in message else 'number'}"
    return message


# ---- The command line: one thin function per stage; no logic, no settings of its own


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


@command(TrainConfig, example="deltaclip train cache/demo_tiny.h5 --scale 0.1 --epochs 30")
def train(config: TrainConfig) -> StageResult:
    """Train heads on a cache in seconds and print metrics."""
    from deltaclip.pipeline.train import train as stage

    return stage(config)


@command(SweepConfig, example="deltaclip sweep cache/demo_tiny.h5 --scale 0.05,0.1,0.2 --lr 1e-3,3e-3")
def sweep(config: SweepConfig) -> StageResult:
    """Train many settings at once; the best becomes a run."""
    from deltaclip.pipeline.sweep import sweep as stage

    return stage(config)


@command(FinetuneConfig, example="deltaclip finetune cache/demo_tiny.h5 --freeze-layers 3 --epochs 5", together=True)
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


@command(
    RankConfig,
    example="deltaclip rank runs/demo_tiny_residual_frozen new=build-42/ old=build-41/ --baseline old --max-drop 0.02",
)
def rank(config: RankConfig) -> StageResult:
    """Say which generator is better, and whether a build may ship."""
    from deltaclip.pipeline.rank import rank as stage

    return stage(config)


@command(ReportConfig, example="deltaclip report runs/demo_tiny_residual_frozen")
def report(config: ReportConfig) -> StageResult:
    """Show a run, or several, as one page to open in a browser."""
    from deltaclip.pipeline.report import report as stage

    return stage(config)


@command(ExportConfig, example="deltaclip export runs/demo_tiny_residual_frozen --part heads --out heads.onnx")
def export(config: ExportConfig) -> StageResult:
    """Write a run as ONNX, checked against torch."""
    from deltaclip.pipeline.export import export as stage

    return stage(config)


@command(ShareConfig, example="deltaclip share runs/demo_tiny_residual_frozen shared/ --license apache-2.0")
def share(config: ShareConfig) -> StageResult:
    """Write what scores elsewhere and tells no prompts or ratings."""
    from deltaclip.pipeline.share import share as stage

    return stage(config)


@command(PushConfig, example="deltaclip push shared/ ORG/NAME --dry-run")
def push(config: PushConfig) -> StageResult:
    """Send a shared folder to a Hub."""
    from deltaclip.pipeline.push import push as stage

    return stage(config)


@command(PullConfig, example="deltaclip pull ORG/NAME scorer/")
def pull(config: PullConfig) -> StageResult:
    """Fetch a shared folder from a Hub."""
    from deltaclip.pipeline.pull import pull as stage

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
