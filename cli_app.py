"""How stages become commands: options from the fields of their settings, errors as one line.

Knows Typer and settings in general. Must not know any stage.
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
from deltaclip.base.places import check_places
from deltaclip.base.progress import say
from deltaclip.base.settings import field_types, is_optional, option_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    """A command that shows its help before any value is looked at: the library would import pydantic for that."""

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
            # `debug` is read by `main`, which tells of errors. Only what was given: settings know their own defaults,
            # and a preset what it may change.
            config = settings(**{name: value for name, value in values.items() if _is_given(context, name)})
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
        group, _, word = (name or stage.__name__).rpartition(" ")
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
