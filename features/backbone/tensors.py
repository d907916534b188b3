"""Files of weights to tensors by name, whatever they are packed in; no code of a file ever runs.

Knows weight formats. Must not know models: what the names mean is found out elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import SAFETENSORS, kind_of, refuse_other
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


@dataclass(frozen=True, kw_only=True)
class StoredTensors:
    """All tensors of a checkpoint: `by_name` under the names that they have in it, keys of dictionaries before them.

    `keys` are the dictionaries, '' the outermost; `is_openai` tells OpenAI's published archives.
    """

    by_name: dict[str, torch.Tensor]
    keys: frozenset[str]
    is_openai: bool

    def key_of(self, name: str) -> str:
        """Return the dictionary that holds a tensor."""
        while name and name not in self.keys:
            name = name.rpartition(".")[0]
        return name


def read_tensors(files: Sequence[Path]) -> StoredTensors:
    """Read one file, or all shards of one checkpoint.

    Raises:
        UserError: a file is no weights file, is damaged, or holds what could run code.
    """
    by_name: dict[str, torch.Tensor] = {}
    keys: set[str] = set()
    for path in files:
        by_name |= dict(_tensors(_content(path), "", keys))
    if not by_name:
        raise UserError(
            "holds no tensors", place=files[0], remedy="give a file of weights: safetensors or a state dict"
        )
    last = {name.rpartition(".")[2] for name in by_name if by_name[name].ndim == 0}
    is_openai = last >= OPENAI_NUMBERS
    if is_openai:
        by_name = {name: tensor for name, tensor in by_name.items() if name.rpartition(".")[2] not in OPENAI_NUMBERS}
    return StoredTensors(by_name=by_name, keys=frozenset(keys), is_openai=is_openai)


def _tensors(content: Any, place: str, keys: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if not isinstance(content, dict) or place.count(".") > DEEPEST:
        return
    keys.add(place)
    for key, value in content.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, torch.Tensor):
            yield name, value
        else:
            yield from _tensors(value, name, keys)


def _content(path: Path) -> Any:
    """Return what a file holds: a dictionary of tensors, or of dictionaries."""
    refuse_other(path, WEIGHTS, what="file of weights")
    if path.suffix == ".safetensors":
        refuse_other(path, {SAFETENSORS.name}, what="safetensors file")
    if path.suffix == ".safetensors" or kind_of(path) is SAFETENSORS:
        from safetensors.torch import load_file

        with library_call(path, "is no safetensors file", FETCH):
            return load_file(path)
    if is_torchscript(path):
        with library_call(path, "cannot be read", FETCH):
            return _of_torchscript(path)
    return _of_torch(path)


def _of_torch(path: Path) -> Any:
    import torch

    with _quiet(), torch.serialization.safe_globals(_harmless()), library_call(path, "cannot be read", FETCH):
        try:
            # Mapped, not read: a training state holds three times the weights.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # noqa: TID251
        except EOFError as error:
            raise UserError("is empty or cut off", place=path, remedy=FETCH) from error
        except pickle.UnpicklingError as error:
            raise _refused_pickle(path, error) from error


def _harmless() -> list[Any]:
    """Return classes that training states hold beside tensors and that only hold values."""
    import numpy as np

    kinds = [np.dtype(kind) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    scalar = np.float64(0).__reduce__()[0]  # what makes a number of numpy; its module differs between versions
    return [argparse.Namespace, pathlib.PosixPath, np.dtype, scalar, *(type(kind) for kind in kinds)]


def _refused_pickle(path: Path, error: Exception) -> UserError:
    # torch names the class that it did not make, in words of several lines.
    named = re.search(r"(?:GLOBAL|Unsupported class|Unsupported global:) ([\w.]+)", str(error))
    what = f"holds more than tensors ({named[1]})" if named else "holds more than tensors"
    remedy = "convert it to safetensors where it comes from: a pickle can run code"
    if not named and "persistent_load" not in str(error) and "weights_only" not in str(error).lower():
        what, remedy = f"is no file of weights ({first_line(error)})", FETCH
    return UserError(what, place=path, remedy=remedy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        # Torch announces the end of TorchScript; the published archives are what they are.
        warnings.filterwarnings("ignore", message=".*torch.jit.load", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.load", category=DeprecationWarning)
        yield


def is_torchscript(weights: Path) -> bool:
    """Tell OpenAI's published format, a TorchScript archive, from an ordinary `torch.save` file."""
    if weights.suffix == ".safetensors" or not zipfile.is_zipfile(weights):
        return False
    with zipfile.ZipFile(weights) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _of_torchscript(weights: Path) -> dict[str, torch.Tensor]:
    # open_clip 3.3's loader refuses these archives under `weights_only=True`.
    import torch

    with _quiet():
        return dict(torch.jit.load(str(weights), map_location="cpu").state_dict())
