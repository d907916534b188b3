"""Heads on disk: safetensors with a JSON header from which they are built again, and what was tuned of the backbone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.spec import HeadSpec, build_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

HEADER_KEY = "deltaclip"
BACKBONE = "backbone."  # before the names of tensors of the backbone; those of heads stand as they are


@dataclass(frozen=True, kw_only=True)
class TunedBackbone:
    """What a training changed of a backbone: tensors by their names in its model, none of the frozen ones.

    `write_full` writes the whole model with these tensors into a folder, where that is wanted.
    """

    tensors: Mapping[str, Tensor]
    write_full: Callable[[Path, Mapping[str, Tensor]], None] | None = None


def save_heads(
    path: Path, heads: nn.Module, spec: HeadSpec, about: dict[str, Any], *, tuned: TunedBackbone | None = None
) -> None:
    """Write heads and what was tuned below them; `about` (JSON values) goes into the header beside the spec."""
    from safetensors.torch import save_file

    named = dict(heads.state_dict())
    if tuned is not None:
        named |= {f"{BACKBONE}{name}": tensor for name, tensor in tuned.tensors.items()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    save_file(state, path, metadata={HEADER_KEY: json.dumps({"spec": spec.to_json(), **about})})


def load_heads(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build heads from a checkpoint, in evaluation mode.

    Returns:
        the heads on the CPU and the header: `spec` and what was given as `about`.

    Raises:
        UserError: not a checkpoint of ours, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            names = [name for name in file.keys() if not name.startswith(BACKBONE)]  # noqa: SIM118 - no dict
            state = {name: file.get_tensor(name) for name in names}
        heads = build_heads(HeadSpec.from_json(header["spec"]))
        heads.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        detail = str(error).splitlines()[0][:160]
        raise UserError(f"is no checkpoint of deltaclip heads ({detail})", place=path, remedy="train again") from error
    return heads.eval(), header


def load_tuned(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the backbone that a checkpoint holds, by their names in the model.

    Raises:
        UserError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(BACKBONE)]  # noqa: SIM118 - no dict
            return {name.removeprefix(BACKBONE): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        detail = str(error).splitlines()[0][:160]
        raise UserError(f"is no checkpoint of deltaclip heads ({detail})", place=path, remedy="train again") from error
