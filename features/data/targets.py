"""The targets of a table: those that are known by their columns, and those that a user names.

Knows names of columns and how `--target` is written. Must not know tables, labels or heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.vocabulary import CONSISTENCY, KNOWN_TARGETS, QUALITY, Sees, Target, known_target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

OPTION = "--target"
FORM = "give NAME=COLUMN:image, or :pair where raters saw the prompt too"


@dataclass(frozen=True)
class AskedTarget:
    """A target that a user named, and the column that has its labels."""

    target: Target
    column: str


def parse_targets(given: Sequence[str] | None) -> tuple[AskedTarget, ...]:
    """Read `composition=comp_score:image`; the column may be left out where it has the name of the target.

    Raises:
        UserError: a bad name, what an unknown target sees is not said, or a target is named twice.
    """
    found: dict[str, AskedTarget] = {}
    for text in given or ():
        rest, colon, sees = text.rpartition(":")
        rest, sees = (rest, sees.strip()) if colon else (text, "")
        name, _, column = (part.strip() for part in rest.partition("="))
        known = known_target(name)
        if colon and sees not in get_args(Sees):
            raise UserError(f"{text!r} is no target", place=OPTION, remedy=did_you_mean(sees, get_args(Sees)))
        if not sees and known is None:
            raise UserError(f"{text!r} does not say what raters saw", place=OPTION, remedy=FORM)
        if name in found:
            raise UserError(f"{name!r} is given twice", place=OPTION, remedy="give each target once")
        target = known if known and not sees else _named(name, "pair" if sees == "pair" else "image")
        if known and target != known:
            message = f"{name} is of {'the image alone' if known.sees == 'image' else 'the image and its prompt'}"
            raise UserError(message, place=OPTION, remedy=f"give {name}={column or name}, or another name")
        found[name] = AskedTarget(target, column or name)
    return tuple(found.values())


def _named(name: str, sees: Sees) -> Target:
    try:
        return Target(name, sees)
    except UserError as error:
        raise UserError(error.message, place=OPTION, remedy=error.remedy) from None


def targets_of(present: Iterable[str], asked: Sequence[AskedTarget] = ()) -> tuple[Target, ...]:
    """Return the known targets whose columns are there, then those that were asked for, each once."""
    names = set(present)
    known = [target for target in KNOWN_TARGETS if target.name in names]
    return tuple(dict.fromkeys([*known, *(each.target for each in asked)]))


def recorded_targets(dataset: Mapping[str, Any]) -> tuple[Target, ...]:
    """Return the targets that a cache has labels of, by what it says of its data set."""
    if "targets" not in dataset:  # before version 3
        return (QUALITY, CONSISTENCY)
    return tuple(Target(**each) for each in dataset["targets"])
