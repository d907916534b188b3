"""What can be said of the files that a command was given before anything is imported that takes seconds.

A setting declares what it names (`setting(names=...)`). Knows the file system and the names of things that commands
make, and how people write a place. Must not read what is in them: stages do, and refuse by the same words.
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.device import check_device_words
from deltaclip.base.errors import UserError
from deltaclip.base.files import check_place
from deltaclip.base.kinds import HEAD_BYTES, kind_of, wrong_kind
from deltaclip.base.options import option_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# Schemes of addresses that files are fetched from; `memory` is a place in this process, of fsspec.
SCHEMES = ("https", "http", "s3", "gs", "gcs", "hf", "memory")
ADDRESS = re.compile(rf"({'|'.join(SCHEMES)}):/+(?=[^/])", re.IGNORECASE)
CHECKPOINT = "*_best.safetensors"  # of a run
EXTRACTED = ("json", "parquet", "arrow", "xlsx", "tar")  # kinds of files that `extract` takes
QUOTED = re.compile(r"""\s*(?:"(?P<a>.*)"|'(?P<b>.*)'|<(?P<c>.*)>|(?P<d>.*?))\s*""", re.DOTALL)
FILE_ADDRESS = re.compile(r"file:(?://localhost(?=/))?/*", re.IGNORECASE)
DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
AT_HOME = re.compile(r"(|[^/\\~]*[=:])(~[^/\\]*(?:[/\\].*)?)")  # `~/x`, `NAME=~/x`, `local-dir:~/x`
MADE = ("new", "file", "within")  # what a setting names that need not be there
PREFIXED = ("data", "backbone")
WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def is_address(text: str | os.PathLike[str]) -> bool:
    """Tell whether a text, or a path that was made of one, is an address that files are fetched from."""
    return ADDRESS.match(os.fspath(text)) is not None


# ---- A place as people write it


def readings(written: str) -> Iterator[tuple[str, str]]:
    """Yield readings of a text, each on top of the last, with words for how."""
    reading, hows = written, list[str]()
    steps: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("leaving out spaces or quotes around them", lambda text: next(filter(None, _inside_quotes(text)), text)),
        ("their file: address", lambda text: _of_address(text) if FILE_ADDRESS.match(text) else text),
        ("taking backslashes for slashes", lambda text: text.replace("\\", "/")),
        ("percent-encoding", urllib.parse.unquote),
        ("the home folder for ~", lambda text: os.path.expanduser(text) if text.startswith("~") else text),  # noqa: PTH111
    )
    yield "", reading  # as it stands, perhaps in another Unicode form
    for how, step in steps:
        changed = step(reading)
        if changed != reading:
            reading, hows = changed, [*hows, how]
            yield " and ".join(hows), reading


def _inside_quotes(text: str) -> tuple[str, ...]:
    match = QUOTED.fullmatch(text)
    return tuple(part or "" for part in match.groups()) if match else ()


def _of_address(text: str) -> str:
    path = urllib.parse.unquote(FILE_ADDRESS.sub("", text, count=1))
    return path if DRIVE.match(path) else f"/{path}"


def understood_places(settings: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return values for settings with the places that they name as they are here.

    Shells leave `--out=~/x` as it is, and quotes, backslashes and `file:` addresses come from other programs. A text
    that names something that is there is taken as it stands, then each reading of it that does.
    """
    kinds = {field.name: field.metadata["names"] for field in dataclasses.fields(settings)}
    return {
        name: [_understood(one, kinds[name]) for one in value]
        if isinstance(value, list)
        else _understood(value, kinds[name])
        for name, value in given.items()
    }


def _understood(value: Any, kind: str | None) -> Any:
    if kind is None or not isinstance(value, str | Path) or os.path.lexists(value) or is_address(value):
        return value
    text = str(value)
    if kind not in MADE:
        found = next((reading for how, reading in readings(text) if how and os.path.lexists(reading)), None)
        if found is not None:
            return type(value)(found)
    at_home = AT_HOME.fullmatch(text)
    if at_home is None or (at_home[1] and kind not in PREFIXED):
        return value
    return type(value)(at_home[1] + os.path.expanduser(at_home[2]))  # noqa: PTH111 - of a part of a text


# ---- What is there, and what is not


def absent(path: Path, what: str, remedy: str) -> UserError:
    """Return what is said of a file or folder that is not there, or is not `what`: a link that leads nowhere is."""
    if path.is_symlink() and not path.exists():
        return UserError(f"is a link that leads nowhere, no {what}", place=path, remedy="give the place itself")
    return UserError(f"no such {what}", place=path, remedy=remedy)


def no_such_cache(path: Path) -> UserError:
    """Return what is said of a cache that is not there, or where something else is."""
    if path.is_dir():
        is_run = bool(checkpoints(path))
        remedy = "give the cache that it was trained on" if is_run else _extract(path)
        return UserError(f"is a {'run' if is_run else 'folder'}, no cache", place=path, remedy=remedy)
    return absent(path, "cache", "make it with `deltaclip extract`")


def _extract(path: Path) -> str:
    return f"make a cache of it: deltaclip extract {path}"


def refuse_no_cache(path: Path) -> None:
    """Refuse a file that by its first bytes is something else than a cache; what is not known passes.

    Raises:
        UserError: what it is, and what to do.
    """
    kind = kind_of(path)
    if kind is None:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if b"\n" in head and b"\0" not in head:
            raise UserError("is a text, no cache", place=path, remedy=_extract(path))
    elif kind.name in EXTRACTED:
        raise UserError(f"is {kind.words}, no cache", place=path, remedy=_extract(path))
    elif kind.name not in ("hdf5", "cache", "empty"):
        raise wrong_kind(path, kind, "cache")


def check_cache(path: Path, option: str = "") -> None:
    """Refuse a cache that is not there, neither as a file nor in shards (by its name, or by a pattern).

    Raises:
        UserError: what to make it with.
    """
    if path.is_file():
        refuse_no_cache(path)
        return
    if "*" in path.name:
        return
    if path.exists() or not any(path.parent.glob(f"{path.stem.replace('[', '[[]')}.shard-*-of-*")):
        raise no_such_cache(path)


def check_run(path: Path, option: str = "") -> None:
    """Refuse a run directory that is not there, or is none.

    Raises:
        UserError: what to make it with.
    """
    if is_address(path):
        raise UserError("is no folder here", place=path, remedy="fetch it first: deltaclip pull ORG/NAME DIR")
    if path.is_file():
        is_inside = bool(checkpoints(path.parent))
        remedy = f"give the folder that it lies in: {path.parent}" if is_inside else "make one with `deltaclip train`"
        raise UserError("is a file, no run directory", place=path, remedy=remedy)
    if not path.is_dir():
        raise absent(path, "run directory", "make one with `deltaclip train`")
    if (count := len(checkpoints(path))) != 1:
        remedy = "give a directory made by `deltaclip train`"
        raise UserError(f"holds {count} checkpoints, not one", place=path, remedy=remedy)


def checkpoints(run: Path) -> list[Path]:
    """Return the files of heads in a run directory, one of a whole run; what systems hide beside files is none."""
    return [path for path in run.glob(CHECKPOINT) if not path.name.startswith(".")]


def _check_run_or_table(path: Path, option: str) -> None:
    if not path.is_file():  # of a table its content says whether it is one
        check_run(path, option)


def check_new(path: Path, option: str = "--out") -> None:
    """Refuse a name for a result that is taken, or under which nothing can be written.

    Raises:
        UserError: something is there already, or something on the way to it is no folder.
        MachineError: there is no right to write there.
    """
    if os.path.lexists(path):
        raise UserError("already exists", place=path, remedy=f"give another {option} or remove it first")
    check_place(path, option)


def check_file(path: Path, option: str = "--out") -> None:
    """Refuse a name for a file that is a folder's, or under which nothing can be written.

    Raises:
        UserError: it is a folder, or something on the way to it is no folder.
        MachineError: there is no right to write there.
    """
    if path.is_dir():
        raise UserError("is a folder", place=path, remedy=f"give {option} the name of a file in it")
    check_place(path, option)


def check_outside(out: Path | None, runs: Sequence[Path]) -> None:
    """Refuse to write a file into a finished run, or where none can be, before any work.

    Raises:
        UserError: `out` lies in one of the runs, or is a folder, or nothing can be written there.
    """
    if out is None:
        return
    check_file(out)
    if any(out.resolve().is_relative_to(run.resolve()) for run in runs):
        raise UserError("lies in the run", place=out, remedy="give a file outside: a finished run stays as it is")


def _check_within(path: Path, option: str) -> None:
    check_place(path / "x", option)


def _check_input(path: Path, option: str) -> None:
    if not path.exists():
        raise UserError("no such file or folder", place=path, remedy="check the path")


def _check_folder(path: Path, option: str) -> None:
    if not path.is_dir() and not is_address(path):
        raise UserError("no such folder", place=path, remedy=f"give the folder of the images as {option}")


def _check_backbone(name: str, option: str) -> None:
    kind, colon, path = name.partition(":")
    if colon and kind == "local-dir" and not Path(path).is_dir():
        remedy = "give local-dir:PATH of a folder with open_clip_config.json"
        raise UserError("no such folder", place=path, remedy=remedy)


def _check_weights(name: str, option: str) -> None:
    # A tag of open_clip has neither.
    is_path = Path(name).suffix.lower() in WEIGHTS or Path(name).parent != Path()
    if is_path and not Path(name).is_file():
        raise UserError(f"{name!r} is no file that is there", place=option, remedy="check the path")


def check_suffix(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a format that is not written, before anything is computed.

    Raises:
        UserError: unknown suffix.
    """
    if path.suffix.lower() not in suffixes:
        raise UserError(f"unknown suffix {path.suffix!r}", place=path, remedy=f"use one of {', '.join(suffixes)}")


def _check_data(text: str, option: str) -> None:
    if DRIVE.match(text) and not os.path.lexists(text):
        raise UserError("is a path of Windows, and not here", place=text, remedy="give it as it is on this machine")


CHECKS: dict[str, Callable[[Any, str], None]] = {
    "cache": check_cache,
    "run": check_run,
    "run or table": _check_run_or_table,
    "new": check_new,
    "file": check_file,
    "within": _check_within,
    "input": _check_input,
    "data": _check_data,
    "folder": _check_folder,
    "device": check_device_words,
    "backbone": _check_backbone,
    "pretrained": _check_weights,
}


def check_places(settings: Any) -> None:
    """Check what the fields of settings name: what is read first, then what is written, then what only they know.

    Raises:
        UserError: the first that cannot be.
        MachineError: there is no right to write somewhere.
    """
    fields = sorted(dataclasses.fields(settings), key=lambda field: field.metadata["names"] in ("new", "file"))
    for field in fields:
        if (kind := field.metadata["names"]) is not None and (value := getattr(settings, field.name)) is not None:
            for one in value if isinstance(value, list) else [value]:
                CHECKS[kind](one, field.name.upper() if field.metadata["argument"] else option_name(field.name))
    for out in _named(settings, "file"):
        check_outside(out, _named(settings, "run"))
    if hasattr(settings, "check_more"):
        settings.check_more()


def _named(settings: Any, kind: str) -> list[Path]:
    """Return the paths that settings give for what is of a kind."""
    fields = [field for field in dataclasses.fields(settings) if field.metadata["names"] == kind]
    given = [getattr(settings, field.name) for field in fields]
    return [path for value in given if value is not None for path in (value if isinstance(value, list) else [value])]
