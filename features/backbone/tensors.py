"""Files of weights to tensors by name, whatever they are packed in; no code of a file ever runs.

Knows weight formats. Must not know models: what the names mean is found out elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import pickle
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError, and_more
from deltaclip.base.kinds import SAFETENSORS, TORCH, kind_of, refuse_other
from deltaclip.features.backbone.library import first_line, library_call

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

FETCH = "fetch it again"
# Three numbers that OpenAI's archives hold beside the weights, and no other file.
OPENAI_NUMBERS = frozenset({"input_resolution", "context_length", "vocab_size"})
# Kinds of files that can hold weights; what is cut off is said by the library that reads it.
WEIGHTS = frozenset({"safetensors", "torch", "pickle", "zip", "tar"})
DEEPEST = 6  # dictionaries in one another
MOST_CLASSES = 100  # of which objects lie beside the weights; a training state has a handful
# Low-rank additions as peft and others keep them apart: without them the weights are another model's.
ADDITIONS = re.compile(r"(?:^|\.)(?:lora_(?:A|B|a|b|down|up|embedding_A|embedding_B)|base_layer)(?:\.|$)")


@dataclass(frozen=True, kw_only=True)
class StoredTensors:
    """All tensors of a checkpoint: `by_name` under the names that they have in it, keys of dictionaries before them.

    `keys` are the dictionaries, '' the outermost; `is_openai` tells OpenAI's published archives; `notes` say what lay
    beside the tensors and was not read.
    """

    by_name: dict[str, torch.Tensor]
    keys: frozenset[str]
    is_openai: bool
    notes: tuple[str, ...] = ()

    def key_of(self, name: str) -> str:
        """Return the dictionary that holds a tensor."""
        while name and name not in self.keys:
            name = name.rpartition(".")[0]
        return name


def read_tensors(files: Sequence[Path]) -> StoredTensors:
    """Read one file, or all shards of one checkpoint.

    Raises:
        UserError: a file is no weights file, is damaged, holds what could run code, or additions to weights alone.
    """
    by_name: dict[str, torch.Tensor] = {}
    keys: set[str] = set()
    strange: list[str] = []
    for path in files:
        content = _content(path, strange)
        if not isinstance(content, dict):
            what = f"holds a {type(content).__name__}, no tensors by name"
            raise UserError(what, place=path, remedy="save a state dict, or safetensors")
        by_name |= dict(_tensors(content, "", keys))
    if not by_name:
        raise UserError(
            "holds no tensors", place=files[0], remedy="give a file of weights: safetensors or a state dict"
        )
    if (added := next(filter(ADDITIONS.search, by_name), None)) is not None:
        remedy = "merge them where they were trained (peft: merge_and_unload) and save the whole weights"
        raise UserError(f"holds low-rank additions that are not merged ({added})", place=files[0], remedy=remedy)
    last = {name.rpartition(".")[2] for name in by_name if by_name[name].ndim == 0}
    is_openai = last >= OPENAI_NUMBERS
    if is_openai:
        by_name = {name: tensor for name, tensor in by_name.items() if name.rpartition(".")[2] not in OPENAI_NUMBERS}
    notes = (f"left out, as no weights: objects of {and_more(strange)}",) if strange else ()
    return StoredTensors(by_name=by_name, keys=frozenset(keys), is_openai=is_openai, notes=notes)


def _tensors(content: Any, place: str, keys: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    import numpy as np
    import torch

    if not isinstance(content, dict) or place.count(".") > DEEPEST:
        return
    keys.add(place)
    for key, value in content.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, np.ndarray):
            if value.dtype.kind == "f":  # weights of other programs; numbers of random generators are none
                yield name, torch.from_numpy(value)
        else:
            yield from _tensors(value, name, keys)


def _content(path: Path, strange: list[str]) -> Any:
    """Return what a file holds, whatever it is called; classes whose objects were not made go into `strange`."""
    refuse_other(path, WEIGHTS, what="file of weights")
    kind, is_named_so = kind_of(path), path.suffix == ".safetensors"
    if is_named_so and kind is TORCH:
        raise UserError(f"is {TORCH.words}, no safetensors file", place=path, remedy="name it .pt")
    if is_named_so:
        refuse_other(path, {SAFETENSORS.name}, what="safetensors file")
    if is_named_so or kind is SAFETENSORS:
        from safetensors.torch import load_file

        with library_call(path, "is no safetensors file", FETCH):
            return load_file(path)
    with library_call(path, "cannot be read", FETCH):
        if is_torchscript(path):
            return _of_torchscript(path)
    return _of_torch(path, strange)


class _Inert:
    """Stands for an object of a class that is not known here: takes what it is given and keeps nothing."""

    def __new__(cls, *_: object) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Keep nothing."""


def _of_torch(path: Path, strange: list[str]) -> Any:
    """Read what `torch.save` has written; no class of another library is looked up, no code of the file runs."""
    import torch

    classes: dict[str, Any] = {}
    while True:
        allowed = [*_harmless(), *((kind, name) for name, kind in classes.items())]
        with _quiet(), torch.serialization.safe_globals(allowed), library_call(path, "cannot be read", FETCH):
            try:
                # Mapped, not read: a training state holds three times the weights.
                is_mapped = zipfile.is_zipfile(path)
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)  # noqa: TID251
            except EOFError as error:
                raise UserError("is empty or cut off", place=path, remedy=FETCH) from error
            except pickle.UnpicklingError as error:
                if len(classes) >= MOST_CLASSES or not _stands_in(classes, str(error)):
                    raise _refused_pickle(path, error) from error
                continue
        strange += [name for name in classes if name not in strange]
        return found


def _stands_in(classes: dict[str, Any], words: str) -> bool:
    """Let something stand in for the class that torch has not made: a dictionary or a list where it is filled as one.

    Not for classes of torch, which are modules with weights in them, nor of Python, some of which run programs.
    """
    named = re.search(r"GLOBAL ([\w.]+)", words)
    if named:
        module, _, name = named[1].rpartition(".")  # of what is built in, torch leaves the module out
        if not module or module.partition(".")[0] in {"torch", *sys.stdlib_module_names} or named[1] in classes:
            return False
        classes[named[1]] = type(name, (_Inert,), {})
        return True
    for name, kind in classes.items():
        if kind not in (dict, list) and repr(kind) in words and re.search("SETITEM|extend|append", words):
            classes[name] = dict if "SETITEM" in words else list
            return True
    return False


def _harmless() -> list[Any]:
    """Return classes that training states hold beside tensors and that only hold values."""
    import collections
    import datetime as dt
    import decimal
    import types

    import numpy as np
    import torch

    kinds = {np.dtype(kind) for kind in np.sctypeDict.values() if kind not in (np.void, np.object_)}
    # What makes a number and an array of numpy; their module differs between versions.
    makers = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0], np.ndarray]
    windows = [(pathlib.PureWindowsPath, f"pathlib{part}.WindowsPath") for part in ("", "._local")]
    posix = [(pathlib.PurePosixPath, f"pathlib{part}.PosixPath") for part in ("", "._local")]
    filled = [(_dictionary, "collections.defaultdict"), (_list, "collections.deque")]
    plain = [frozenset, slice, range, bool, int, float, str, list, tuple, dict, collections.Counter]
    times = [dt.datetime, dt.date, dt.time, dt.timedelta, dt.timezone]
    more = [argparse.Namespace, types.SimpleNamespace, decimal.Decimal, torch.torch_version.TorchVersion]
    return [*plain, *times, *more, *windows, *posix, *filled, np.dtype, *makers, *(type(kind) for kind in kinds)]


def _dictionary(*_: object) -> dict[Any, Any]:
    """Return what is filled with the items that follow."""
    return {}


def _list(*_: object) -> list[Any]:
    """Return what is filled with the items that follow."""
    return []


def _refused_pickle(path: Path, error: Exception) -> UserError:
    # torch names the class that it did not make, in words of several lines.
    named = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
    reason = re.search(r"WeightsUnpickler error:\s+(.+)", str(error))
    remedy = "convert it to safetensors where it comes from: a pickle can run code"
    what = f"cannot be read safely ({first_line(ValueError(reason[1]))})" if reason else "holds more than tensors"
    if named and named[1].startswith("torch.nn.modules"):
        what, remedy = f"holds a whole module ({named[1]}), not its weights alone", "save its state_dict() instead"
    elif named:
        what = f"holds more than tensors ({named[1]})"
    elif "persistent_load" not in str(error) and "weights_only" not in str(error).lower():
        what, remedy = f"is no file of weights ({first_line(error)})", FETCH
    return UserError(what, place=path, remedy=remedy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        warnings.filterwarnings("ignore", message="Validating sparse tensor invariants")  # which are refused later
        # Torch announces the end of TorchScript; the published archives are what they are.
        warnings.filterwarnings("ignore", message=".*torch.jit.load", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.load", category=DeprecationWarning)
        yield


def is_torchscript(weights: Path) -> bool:
    """Tell OpenAI's published format, a TorchScript archive, from an ordinary `torch.save` file."""
    if not zipfile.is_zipfile(weights):
        return False
    with zipfile.ZipFile(weights) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _of_torchscript(weights: Path) -> dict[str, torch.Tensor]:
    # open_clip 3.3's loader refuses these archives under `weights_only=True`.
    import torch

    with _quiet():
        return dict(torch.jit.load(str(weights), map_location="cpu").state_dict())
