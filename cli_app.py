"""How stages become commands: options from the fields of their settings, errors as one line.

Knows Typer and settings in general. Must not know any stage.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol

import typer

from deltaclip.base.device import ask_for_large_pages
from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.settings import field_types, is_optional, option_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INTERRUPTED = 130  # what a shell reports of a process ended by Ctrl-C

app = typer.Typer(
    name="deltaclip",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Score AI-generated images for quality and prompt consistency, with CLIP embeddings that are cached once.",
    epilog="\b\nA first run, on bundled data:\n  deltaclip extract demo\n  deltaclip train cache/demo_tiny.h5",
    # --residual_scale_q is --residual-scale-q
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


GROUPS = {"data": "Look at data before anything is computed."}


class StageResult(Protocol):
    """What every stage returns."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""

    def summary(self) -> str:
        """Return the lines for a person."""


def command(
    settings: type, *, example: str, name: str | None = None
) -> Callable[[Callable[[Any], StageResult]], Callable[[Any], StageResult]]:
    """Register a stage: its settings become options, its result is printed, its errors become one line.

    A result with an `exit_code` other than 0 has found what the caller should stop at; one that `is_silent`, of a
    process that is not the first, is not printed. The command has the name of the
    stage, or `name`, which may be of two words: a group and the command in it.
    """

    def register(stage: Callable[[Any], StageResult]) -> Callable[[Any], StageResult]:
        @functools.wraps(stage)
        def run(*, context: typer.Context, as_json: bool, debug: bool, **values: Any) -> None:
            try:
                # Only what was given: settings know their own defaults, and a preset what it may change.
                result = stage(settings(**{name: value for name, value in values.items() if _is_given(context, name)}))
            except (UserError, OSError, KeyboardInterrupt) as error:
                if debug:
                    traceback.print_exc()
                _fail(error)
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
        group, _, word = (name or stage.__name__).rpartition(" ")
        _group(group, example).command(word, epilog=f"\b\nExample:\n  {example}")(run)
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


def command_names() -> list[str]:
    """Return the names of all commands, those of groups in two words."""
    names = [str(info.name) for info in app.registered_commands]
    for group in app.registered_groups:
        assert group.typer_instance is not None, "made by _group"
        names += [f"{group.name} {info.name}" for info in group.typer_instance.registered_commands]
    return names


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


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


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
        line, code = "interrupted; nothing half-written is left, give the same command again", INTERRUPTED
    typer.echo(f"deltaclip: {line}", err=True)
    raise typer.Exit(code)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 the disk failed, 2 the input is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ask_for_large_pages()
    try:
        # Not standalone: the library would print its own errors as three lines in a style of their own.
        code = app(given or ["--help"], standalone_mode=False, prog_name="deltaclip")
    except typer.TyperException as error:
        typer.echo(f"deltaclip: {_usage(error, given)}", err=True)
        code = 2
    sys.exit((code or 0) if given else 2)  # a command that ends well returns nothing


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
        close = getattr(error, "possibilities", None)
        if message.startswith("no such option"):
            message, remedy = "no such option", f"did you mean {close[0]!r}?" if close else remedy
        return UserError(message.removeprefix(f"option {option!r} "), place=option, remedy=remedy)
    if (parameter := getattr(error, "param", None)) is None:
        return UserError(message, remedy=remedy)
    is_option = parameter.param_type_name == "option"
    place = option_name(parameter.name) if is_option else parameter.name.upper()
    return UserError(_bad_value(error, message), place=place, remedy=remedy)


def _bad_value(error: typer.TyperException, message: str) -> str:
    if not message:
        return "is missing"
    # Numbers are parsed by pydantic, whose message leaves the value out.
    details = getattr(error.__cause__ or error.__context__, "errors", None)
    if details and "unable to parse" in message:
        return f"{details()[0]['input']!r} is no {'whole number' if 'integer' in message else 'number'}"
    return message
