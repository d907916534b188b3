"""Write docs/commands.md, every command with all its options, from the settings: `python -m tools.commands_page`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from deltaclip import cli
from deltaclip.base.options import field_types, is_optional, option_name

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """# All commands and options

Made from the settings of the program by `make docs`; `deltaclip COMMAND --help` says the same. Every command also has
`--json` (the result as one JSON object on stdout), `--debug` (the traceback of an error) and `--help`. Exit codes:
0 done, 1 the machine failed (disk, rights, memory), 2 the input is wrong: one line names file, value and remedy, 3
a drop that `rank` does not allow. An underscore in the name of an option is taken for its hyphen.
"""


def page() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(section(command) for command in cli.registered_commands())])


def section(command: cli.Registered) -> str:
    """Return one command: what it does, an example, its arguments and options."""
    hints = field_types(command.settings)
    fields = dataclasses.fields(command.settings)
    lines = [f"## {command.name}", "", command.summary, "", f"    {command.example}", ""]
    lines += ["| argument or option | default | meaning |", "| --- | --- | --- |"]
    for field in fields:
        name = field.name.upper() if field.metadata["argument"] else option_name(field.name)
        lines.append(f"| {_code(name)} | {_default(field, hints[field.name])} | {_words(field, hints[field.name])} |")
    return "\n".join([*lines, ""])


def _code(words: str) -> str:
    return f"`{words}`"


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "none" if is_optional(hint) else ""
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    return _code(str(field.default)) if str(field.default) else ""


def _words(field: dataclasses.Field[Any], hint: Any) -> str:
    choices = [each for part in (hint, *get_args(hint)) if get_origin(part) is Literal for each in get_args(part)]
    words = str(field.metadata["help"]).replace("|", "\\|")
    return f"{words} One of {', '.join(_code(str(choice)) for choice in choices)}." if choices else words


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
