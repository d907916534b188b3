"""State of a training in one file, written whole, from which it goes on exactly.

Knows tensors, JSON values and generators of random numbers. Must not know what they mean to a training loop.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_KEY = "deltaclip_state"


class StateFile:
    """A file with the state of one training; `save` replaces it as a whole, so a kill leaves the one before.

    Of several processes with one state, the one that `writes` saves it, and all load it. The generators of random
    numbers are those of the CPU and of `device`.
    """

    def __init__(self, path: Path, *, writes: bool = True, device: torch.device | None = None) -> None:
        self.path, self.writes = path, writes
        self._gpu = device if device is not None and device.type == "cuda" else None

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write tensors and JSON values, and the state of the generators of random numbers."""
        from safetensors.torch import save_file

        if not self.writes:
            return
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in (*tensors.items(), *self._generators())}
        with whole_file(self.path) as temporary:
            save_file(state, temporary, metadata={_KEY: json.dumps(values)})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and values, None where there is no file; generators go on where they were.

        Raises:
            UserError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                values = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            detail = str(error).splitlines()[0][:160]
            remedy = "remove it to start again"
            raise UserError(f"cannot be resumed from ({detail})", place=self.path, remedy=remedy) from error
        torch.set_rng_state(tensors.pop("random.cpu"))
        cuda = tensors.pop("random.cuda", None)
        if cuda is not None and self._gpu is not None:
            torch.cuda.set_rng_state(cuda, self._gpu)
        return tensors, values

    def _generators(self) -> list[tuple[str, Tensor]]:
        on_gpu = [] if self._gpu is None else [("random.cuda", torch.cuda.get_rng_state(self._gpu))]
        return [("random.cpu", torch.get_rng_state()), *on_gpu]
