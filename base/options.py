"""Settings of a stage: one frozen dataclass whose fields carry default, range and help.

Knows how a field is declared, checked and dumped. Must not know any stage or the command line, which
builds its options from the same fields.
"""

from __future__ import annotations

import dataclasses
import math
import types
from pathlib import Path
from typing import (
    Any,
    Literal,
    TypedDict,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
)

from deltaclip.base.errors import UserError, did_you_mean

# Bounds of what says no other: where the libraries' own integers and numbers of 32 bits end.
LARGEST_INTEGER = 2**31 - 1
LARGEST_NUMBER = 3e38


class Limits(TypedDict, total=False):
    """Bounds of a number."""

    ge: float
    gt: float
    le: float
    lt: float


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,  # noqa: A002 - the word that typer and argparse use
    argument: bool = False,
    names: str | None = None,
    spelling: str | None = None,
    **limits: Unpack[Limits],
) -> Any:
    """Declare one setting.

    Args:
        default: value when not given; none means the setting is required.
        help: one sentence for the help page, with the unit.
        argument: a positional argument of the command instead of an option.
        names: what the value names, for `base.places.CHECKS`: `cache`, `run`, another file (`input`) or `folder` of
            images that must be there; `data`, which may be more than a file; what is to be written, `new` or a `file`
            that may replace one or things `within` a folder; or a `device`, `backbone` or its `pretrained` weights.
        spelling: another option that sets it, such as one of before.
        limits: `ge`, at least this; `gt`, above; `le`, at most; `lt`, below.
    """
    bounds = {name: limits.get(name) for name in ("ge", "gt", "le", "lt")}
    metadata = {"help": help, "argument": argument, "names": names, "spelling": spelling, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Return the resolved annotation of every field of a settings class."""
    return get_type_hints(cls)


def option_name(field_name: str) -> str:
    """Return the option that sets a field: `residual_scale_q` gives `--residual-scale-q`."""
    return "--" + field_name.replace("_", "-")


def check_settings(settings: Any) -> None:
    """Check every field against its range and choices; called from `__post_init__`.

    Without a range of its own, a number must be finite and not beyond all reason; a text must say something.

    Raises:
        UserError: names the option, the value and what is allowed.
    """
    hints = field_types(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            continue
        place = field.name.upper() if field.metadata["argument"] else option_name(field.name)
        _check_choice(value, hints[field.name], place)
        _check_range(value, field.metadata, place)
        for part in value if isinstance(value, list) else [value]:
            _check_sense(part, place, has_limit=field.metadata["le"] is not None or field.metadata["lt"] is not None)
        if isinstance(value, list) and not value:
            raise UserError("is empty", place=place, remedy="give one at least")


def _check_choice(value: Any, hint: Any, place: str) -> None:
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal and value not in get_args(part):
            raise UserError(f"{value!r} is not a choice", place=place, remedy=did_you_mean(str(value), get_args(part)))


def _check_range(value: Any, limits: Any, place: str) -> None:
    for name, holds, words in (
        ("ge", lambda bound: value >= bound, "at least"),
        ("gt", lambda bound: value > bound, "above"),
        ("le", lambda bound: value <= bound, "at most"),
        ("lt", lambda bound: value < bound, "below"),
    ):
        bound = limits[name]
        if bound is not None and not holds(bound):  # NaN fails every comparison and is refused
            raise UserError(f"{value} is out of range", place=place, remedy=f"give a value {words} {bound}")


def _check_sense(value: Any, place: str, *, has_limit: bool) -> None:
    if isinstance(value, str | Path) and not str(value).strip():
        raise UserError("is blank", place=place, remedy="give a value, or leave it out")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{value} is no finite number", place=place, remedy="give one")
    if isinstance(value, bool) or not isinstance(value, int | float) or has_limit:
        return
    largest = LARGEST_INTEGER if isinstance(value, int) else LARGEST_NUMBER
    if abs(value) > largest:
        raise UserError(f"{value} is out of range", place=place, remedy=f"give a value at most {largest:.10g}")


def settings_to_json(settings: Any) -> dict[str, Any]:
    """Dump settings as plain JSON values, paths as strings."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def is_optional(hint: Any) -> bool:
    """Tell whether an annotation allows None."""
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
