"""The base of a residual head as it was fitted in closed form: members, kernels or lines, each with its share.

Knows what a member sees and how what it says is summed. Must not know how members are fitted, heads or files.

Shapes: N rows, A anchor prompts, D embedding width, W width of what a member sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaclip.pipeline.model.kernel import Kernel, Line, MemberKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ANCHORS = "anchors"


class MemberShape(NamedTuple):
    """What shapes a member of a fitted base: its kind, what it sees, its landmarks, and its share of the base."""

    kind: MemberKind
    inputs: tuple[str, ...]
    points: int = 0
    share: float = 1.0


class BaseShape(NamedTuple):
    """What shapes fitted bases: the width of each further input of rows, and the members of each target's base.

    Inputs are views of the image by name, and besides: `center` (v), `prompt` (t), `cosine` ((s + 1)/2), `anchors`
    (cosines of v with prompts that the heads keep), `score` (what the base of the first image target says). Those of a
    second backbone are called `2:center` and so on.
    """

    widths: Mapping[str, int]
    members: Mapping[str, tuple[MemberShape, ...]]

    @property
    def views(self) -> tuple[str, ...]:
        """The views of the image that some member sees, beside `center`."""
        return tuple(name for name in self.widths if name != ANCHORS)

    @property
    def sees_others(self) -> bool:
        """Whether some member sees what a further backbone makes of rows."""
        return any(":" in name for name in self.widths)

    def width(self, name: str, dim: int) -> int:
        """Return the width of an input."""
        return {"center": dim, "prompt": dim, "cosine": 1, "score": 1, **self.widths}[name]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        members = {target: [member._asdict() for member in found] for target, found in self.members.items()}
        return {"widths": dict(self.widths), "members": members}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BaseShape:
        """Return the shape that `to_json` wrote."""
        members = {
            target: tuple(MemberShape(**{**member, "inputs": tuple(member["inputs"])}) for member in found)
            for target, found in values["members"].items()
        }
        return cls(dict(values["widths"]), members)


class FittedBase(nn.Module):
    """The sum of what members say of rows, each by its share: closed form, not trained here."""

    def __init__(self, members: Sequence[MemberShape], shape: BaseShape, dim: int) -> None:
        super().__init__()
        self.shapes = tuple(members)
        if any(ANCHORS in member.inputs for member in members):
            self.register_buffer("anchors_AD", torch.zeros(shape.widths[ANCHORS], dim))
        self.members = nn.ModuleList()
        for member in members:
            width = sum(shape.width(name, dim) for name in member.inputs)
            self.members.append(Kernel(width, member.points) if member.kind == "kernel" else Line(width))

    def forward(self, inputs: Mapping[str, Tensor], like_N: Tensor) -> Tensor:
        """Return what the base says of rows, (N,), like `like_N`; `inputs` are (N, W) by name."""
        # A slice, as len() would make the number of rows a constant of what is exported.
        said_N, nothing_N0 = torch.zeros_like(like_N), like_N[:, None][:, :0]
        if (anchors_AD := getattr(self, "anchors_AD", None)) is not None:
            inputs = {**inputs, ANCHORS: inputs["center"] @ anchors_AD.T}
        for shape, member in zip(self.shapes, self.members, strict=True):
            said_N = said_N + shape.share * member(
                torch.cat([nothing_N0, *(inputs[name] for name in shape.inputs)], dim=1)
            )
        return said_N
