"""Heads on disk: safetensors with a JSON header from which they are built again. Spec sections 3 and 12."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.pipeline.model.spec import HeadSpec, build_heads

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

HEADER_KEY = "deltaclip"


def save_heads(path: Path, heads: nn.Module, spec: HeadSpec, about: dict[str, Any]) -> None:
    """Write heads; `about` (JSON values) goes into the header beside the spec."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
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
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        heads = build_heads(HeadSpec.from_json(header["spec"]))
        heads.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        detail = str(error).splitlines()[0][:160]
        raise UserError(f"is no checkpoint of deltaclip heads ({detail})", place=path, remedy="train again") from error
    return heads.eval(), header
