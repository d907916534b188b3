"""Values of any type as cells of text: what is text or a number keeps its meaning, nothing is written as Python would.

Knows types of values. Must not know files or what a column means.
"""

from __future__ import annotations

import ast
import datetime as dt
import decimal
import numbers
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltaclip.base.kinds import IMAGE, kind_of_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SPELLED = re.compile(r"[\[({].*[\])}]|b(['\"]).*\1", re.DOTALL)
SHARED_TEXTS = 65_536  # texts that are looked at for an equal one
WORDS = (
    (bool, "a truth value"),
    (dict, "an object"),
    ((list, tuple, set), "a list"),
    ((dt.date, dt.time, dt.timedelta), "a date or time"),
)


@dataclass
class Odd:
    """The cells of a column that are neither text nor number: how many, the first, and what it is in words."""

    row: int
    words: str
    count: int = 1


@dataclass
class Column:
    """Cells as text, '' where missing or `odd`; `number` is the first row that held a number and no text.

    Lists and truth values among the odd ones stay in `others`, by row: tables of pairs have such columns.
    """

    cells: list[str] = field(default_factory=list)
    odd: Odd | None = None
    number: int | None = None
    others: dict[int, Any] = field(default_factory=dict)


def as_column(values: Iterable[object]) -> Column:
    """Turn values into cells: text without spaces around it, numbers in their shortest form.

    A list of one text is that text, bytes of UTF-8 are text, and so is the path of an object that has nothing else; one
    of a picture with neither is missing.
    """
    column, share = Column(), sharing()
    for row, value in enumerate(values):
        plain = unwrapped(value)
        if isinstance(plain, str):
            column.cells.append(share(plain.strip()))
        elif plain is None or plain != plain:  # noqa: PLR0124 - NaN, and NaT: how programs say missing
            column.cells.append("")
        elif (number := _number(plain)) is not None:
            column.cells.append(share(number))
            column.number = row if column.number is None else column.number
        else:
            column.cells.append("")
            if isinstance(plain, bool | list | tuple):
                column.others[row] = plain
            if column.odd is None:
                column.odd = Odd(row, words_of(plain))
            else:
                column.odd.count += 1
    return column


def sharing() -> Callable[[str], str]:
    """Return a function that gives equal texts as one object, of those that it saw lately: prompts repeat."""
    seen: dict[str, str] = {}

    def share(text: str) -> str:
        if len(seen) >= SHARED_TEXTS:
            seen.clear()
        return seen.setdefault(text, text)

    return share


def unwrapped(value: object) -> Any:
    """Return the text that a value holds where it can be but one, else the value."""
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict) and (isinstance(value.get("path"), str) or value.keys() == {"bytes", "path"}):
        others = [part for name, part in value.items() if name != "path"]
        return value if any(part is not None for part in others) else value["path"]
    return value


def spelled_out(text: str) -> str | None:
    """Return what a text is Python's spelling of, in words, where that is no text: `['a']`, `{'a': 1}`, `b'a'`.

    Programs that turn every value into text write so. Signs that a prompt may have, such as `[a, b]`, are none.
    """
    if not SPELLED.match(text):
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return words_of(value) if isinstance(value, (list, tuple, dict, set, bytes)) else None


def _number(value: object) -> str | None:
    if isinstance(value, (bool, complex)) or not isinstance(value, (numbers.Number, decimal.Decimal)):
        return None
    return repr(float(value)) if isinstance(value, float) else str(value)


def words_of(value: object) -> str:
    """Name the type of a value that is no text, as a person would."""
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        return "a picture inside the table"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "a picture inside the table" if kind_of_bytes(bytes(value[:64])) is IMAGE else "bytes"
    return next((words for kind, words in WORDS if isinstance(value, kind)), f"of type {type(value).__name__}")
