"""What went wrong, in one line a user can act on; and extras of the installation that are missing.

Knows the error types for bad input and for a machine that fails, how errors of libraries end a program, and how to
propose the nearest name. Must not know any stage, file format or terminal.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
import os
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


# ---- What went wrong, in one line a user can act on


MACHINE, INPUT, INTERRUPTED = 1, 2, 130  # exit codes; 130 is what a shell reports of a process ended by Ctrl-C


class UserError(Exception):
    """Bad input: one line that names the place, the value and the remedy; the command line exits with 2.

    `place` is a file (with row and column where there are any) or an option.
    """

    exit_code = INPUT

    def __init__(self, message: str, *, place: str | Path | None = None, remedy: str | None = None) -> None:
        self.message, self.place, self.remedy = message, place, remedy
        line = f"{place}: {message}" if place is not None else message
        super().__init__(f"{line}; {remedy}" if remedy else line)


def moved(error: UserError, copy: Path, path: Path) -> UserError:
    """Return an error about a copy of a file as one about the file."""
    place = None if error.place is None else str(error.place).replace(str(copy), str(path))
    return type(error)(error.message.replace(str(copy), str(path)), place=place, remedy=error.remedy)


class MachineError(UserError):
    """The disk, the memory or the rights on them failed, whatever the input says; the command line exits with 1."""

    exit_code = MACHINE


class Ending(NamedTuple):
    """How a program ends: its exit code and its last line."""

    exit_code: int
    line: str


# What libraries raise where no code of ours knows better, by the name of the class: their modules are not imported
# here. `{}` is the library's own first line.
_OF_LIBRARIES = {
    "MemoryError": (
        MACHINE,
        "the memory is used up",
        "give a smaller --batch-size, with `finetune` also --checkpointing, or close other programs",
    ),
    "OutOfMemoryError": (
        MACHINE,
        "the memory of the GPU is used up",
        "give a smaller --batch-size, with `finetune` also --checkpointing, or --device cpu",
    ),
    "DistError": (
        MACHINE,
        "the processes of torchrun do not reach each other ({})",
        "check its --nnodes, --rdzv-endpoint and the network, and start all of them again",
    ),
    "AcceleratorError": (MACHINE, "the GPU failed ({})", "give the same command again, or --device cpu"),
    "ImportError": (MACHINE, "a library is missing or broken ({})", "install deltaclip again"),
    "SafetensorError": (INPUT, "a safetensors file cannot be read ({})", "it is damaged: make or fetch it again"),
    "ArrowException": (INPUT, "a table cannot be read or written ({})", "save it again"),
    "BadZipFile": (INPUT, "a file is no archive that can be read ({})", "make or fetch it again"),
    "InvalidFileException": (INPUT, "a workbook cannot be read ({})", "save it again, as .xlsx or .csv"),
    "JSONDecodeError": (INPUT, "a JSON file is broken ({})", "correct it, or make it again"),
    "UnicodeDecodeError": (INPUT, "a text file is not in UTF-8 ({})", "save it as UTF-8"),
}
# torch says most of its failures in a RuntimeError, and tells them apart in words alone.
_OF_TORCH = (
    (
        r"DefaultCPUAllocator|can't allocate memory|not enough memory|could not allocate|unable to mmap",
        "the memory is used up",
        "give a smaller --batch-size, with `finetune` also --checkpointing, or close other programs",
    ),
    (
        r"CUDA out of memory|(CUBLAS|CUDNN)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|out of memory",
        "the memory of the GPU is used up",
        "give a smaller --batch-size, with `finetune` also --checkpointing, or --device cpu",
    ),
    (
        r"not implemented for '(Half|BFloat16|ComplexHalf)'|does not support (bf16|bfloat16|fp16|float16)",
        "this device does not compute in that number format ({})",
        "give --precision fp32",
    ),
    (
        r"CUDA error|CUDA driver|NVIDIA|No CUDA GPUs|not compiled with CUDA|cuDNN|CUBLAS|CUDNN|NCCL",
        "the GPU failed ({})",
        "give the same command again, or --device cpu",
    ),
    (
        r"gloo|Connection (closed|reset) by peer|rendezvous|process group|TCPStore",
        "the processes of torchrun have lost each other ({})",
        "look for the first error above, and give the same command again: it goes on",
    ),
)
# Numbers of the system that a path can be at fault for; the others are the disk's or those of the rights on it.
_OF_PATHS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


def system_number(error: BaseException) -> int | None:
    """Return the system's number of what failed, also where a library gives it in words alone; None if there is none.

    h5py says `errno = 28` in a RuntimeError, safetensors `os error 28` in an error of its own, pathlib of Python 3.11
    tells of a loop of links in a RuntimeError.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := re.search(r"\b(?:errno = |os error |Errno )(\d+)", text):
        return int(found[1])
    return errno.ELOOP if text.startswith("Symlink loop from") else None


def ending_of(error: BaseException) -> Ending:
    """Return how a program ends that an error has stopped; the line is one, whatever the error says.

    What nobody has foreseen is a fault of ours, and said to be one.
    """
    if isinstance(error, UserError):
        return Ending(error.exit_code, " ".join(str(error).splitlines()))
    if isinstance(error, KeyboardInterrupt):
        return Ending(INTERRUPTED, "interrupted; nothing half-written is left, give the same command again")
    if isinstance(error, OSError) or system_number(error) is not None:
        return _of_system(error)
    for kind in type(error).__mro__:
        if kind.__name__ in _OF_LIBRARIES:
            code, words, remedy = _OF_LIBRARIES[kind.__name__]
            return Ending(code, f"{words.format(one_line(str(error)))}; {remedy}")
    if isinstance(error, RuntimeError):
        for pattern, words, remedy in _OF_TORCH:
            if re.search(pattern, str(error)):
                return Ending(MACHINE, f"{words.format(one_line(str(error)))}; {remedy}")
    words = f"internal error: {type(error).__name__}: {one_line(str(error))}"
    return Ending(MACHINE, f"{words}; give --debug too for the traceback, and report it with that")


def _of_system(error: BaseException) -> Ending:
    number, place = system_number(error), getattr(error, "filename", None)
    if place is None and (loop := re.match(r"Symlink loop from '(.+)'", str(error))):
        place = loop[1]
    if number is None:  # an OSError of a library about what is in a file: Pillow's, h5py's
        return Ending(INPUT, f"a file cannot be read ({one_line(str(error))}); it is damaged: make or fetch it again")
    words = getattr(error, "strerror", None) or os.strerror(number)
    line = f"{place if place is not None else 'input/output'}: {words}"
    if isinstance(error, ConnectionError | TimeoutError):
        return Ending(MACHINE, f"{line}; check the network")
    if number in _OF_PATHS:
        return Ending(INPUT, f"{line}; check the path")
    return Ending(MACHINE, f"{line}; check the disk and your rights on it")


def one_line(text: str, most: int = 300) -> str:
    """Return the first line of a text that says something, cut where it is very long."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    return line if len(line) <= most else f"{line[: most - 3]}..."


def and_more(names: Sequence[str], count: int | None = None) -> str:
    """Return the first of some names, and how many more there are: of `count` in all, or of those given."""
    others = (len(names) if count is None else count) - 1
    return names[0] + (f" and {others} more" if others > 0 else "")


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


# ---- Libraries that come with an extra of the installation: say which is missing, and how to get it


def require_extra(extra: str, *modules: str, place: str) -> None:
    """Refuse to start `place`, a command or an option, without the modules of an extra.

    Raises:
        UserError: names the first one that is missing, and the extra.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            remedy = f"install it with: pip install 'deltaclip[{extra}]'"
            raise UserError(f"needs {module}, which is not installed", place=place, remedy=remedy)
