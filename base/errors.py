"""What went wrong, in one line a user can act on.

Knows the single error type for bad input and how to propose the nearest name.
Must not know any stage, file format or terminal.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class UserError(Exception):
    """Bad input: one line that names the place, the value and the remedy; the command line exits with 2.

    `place` is a file (with row and column where there are any) or an option.
    """

    def __init__(self, message: str, *, place: str | Path | None = None, remedy: str | None = None) -> None:
        self.message, self.place, self.remedy = message, place, remedy
        line = f"{place}: {message}" if place is not None else message
        super().__init__(f"{line}; {remedy}" if remedy else line)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the known name closest to a mistyped one, case ignored, or None when none is near."""
    by_lower = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for a mistyped name, or the list of names when none is near."""
    known = list(names)
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
