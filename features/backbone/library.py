"""Calls of the libraries that make, fill and first run a model: whatever they raise becomes one line.

Knows how torch, open_clip, timm, safetensors, transformers and the hub's client fail. Must not know models.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
import zlib
from typing import TYPE_CHECKING

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import refuse_other

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A configuration is somebody's file and decides what the libraries compute with: a text for a number is a TypeError
# here, an AttributeError there, no layers an IndexError, no heads a ZeroDivisionError, an unknown pool an assertion or
# a KeyError, a broken archive an EOFError. No shorter list holds what a hundred modules raise, and none of it is a
# mistake of ours inside these calls.
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
    pickle.PickleError,
    zipfile.BadZipFile,
    zlib.error,
)
LONGEST = 200  # characters of a library's own words


@contextlib.contextmanager
def library_call(place: str | Path, doing: str, remedy: str) -> Iterator[None]:
    """Turn what a library raises inside the block into one line.

    The machine's own errors go through as they are: no memory, and system errors that have a number.

    Args:
        place: the file or option that is at fault.
        doing: what went wrong, in words before the library's.
        remedy: what to do.

    Raises:
        UserError: `place: doing (the library's first line); remedy`.
    """
    import safetensors
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (*LIBRARY_ERRORS, safetensors.SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "can't allocate memory" in str(error):  # of a CPU, which torch has no class for
            raise MemoryError(first_line(error)) from error
        raise UserError(f"{doing} ({first_line(error)})", place=place, remedy=remedy) from error


def first_line(error: BaseException) -> str:
    """Return what an error says, on one line and not too long; its name where it says nothing or a key alone."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = next((line for line in lines if line), "").rstrip(":")
    if not text or isinstance(error, KeyError) or text.isdigit():
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def read_json(path: Path) -> object:
    """Return the value of a JSON file.

    Raises:
        UserError: it is broken, or not in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        refuse_other(path, {"json", "text"}, what="JSON file")
        if isinstance(error, UnicodeDecodeError):
            raise UserError("is no UTF-8 text", place=path, remedy="save it as UTF-8") from error
        raise UserError(f"broken JSON ({first_line(error)})", place=path, remedy="correct it") from error
