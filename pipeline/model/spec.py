"""The description from which heads are built again, exactly.

Knows which heads exist and what shapes them; it is the JSON header of a checkpoint. Must not know files or
training settings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from deltaclip.base.errors import did_you_mean
from deltaclip.pipeline.model.direct import DirectHeads
from deltaclip.pipeline.model.heads import KernelShape, ResidualHeads, ScaleMode
from deltaclip.pipeline.model.rationale import RationaleHead
from deltaclip.pipeline.model.refinement import BOUND

if TYPE_CHECKING:
    from collections.abc import Mapping

HeadKind = Literal["residual", "direct"]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """Everything that shapes heads.

    Scales in [0, 1] are read by residual heads only; `two_branch`, `refinement` and its bound by direct ones.
    """

    dim: int
    kind: HeadKind = "residual"
    scale_q: float = 0.2
    scale_c: float = 0.2
    scale_mode: ScaleMode = "fixed"
    dropout: float = 0.1
    hidden_q: int = 128
    hidden_c: tuple[int, int] = (256, 64)
    two_branch: bool = False
    refinement: bool = False
    refine_bound: float = BOUND
    rationale: bool = False
    kernels: KernelShape | None = None

    def __post_init__(self) -> None:
        """Refuse values that no head can be built from."""
        for name, value, known in (
            ("kind", self.kind, get_args(HeadKind)),
            ("scale_mode", self.scale_mode, get_args(ScaleMode)),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; {did_you_mean(value, known)}")
        for name in ("scale_q", "scale_c", "refine_bound"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        for name, kind in (("two_branch", "direct"), ("refinement", "direct"), ("kernels", "residual")):
            if self.kind != kind and getattr(self, name):
                raise ValueError(f"{name} needs {kind} heads, these are {self.kind}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        for width in (self.dim, self.hidden_q, *self.hidden_c):
            if width < 1:
                raise ValueError(f"dim and hidden widths must be at least 1, not {width}")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; floats survive exactly."""
        kernels = None if self.kernels is None else self.kernels._asdict()
        return asdict(self) | {"hidden_c": list(self.hidden_c), "kernels": kernels}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeadSpec:
        """Return the spec that `to_json` wrote; unknown names are an error: they would change the heads."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"unknown head setting {name!r}; {did_you_mean(name, known)}")
        wide, narrow = values.get("hidden_c", cls.hidden_c)
        kernels = values.get("kernels")
        shape = None if kernels is None else KernelShape(**kernels)
        return cls(**{**values, "hidden_c": (wide, narrow), "kernels": shape})


def build_heads(spec: HeadSpec) -> ResidualHeads | DirectHeads:
    """Return new heads; their random weights come from torch's global generator."""
    heads = _build_scores(spec)
    if spec.rationale:  # after the rest, whose random start is the same without
        heads.rationale = RationaleHead(spec.hidden_c[0], spec.dim)
    if spec.kernels and isinstance(heads, ResidualHeads):
        heads.use_kernels(spec.kernels)
    return heads


def _build_scores(spec: HeadSpec) -> ResidualHeads | DirectHeads:
    if spec.kind == "direct":
        return DirectHeads(
            spec.dim,
            dropout=spec.dropout,
            hidden_c=spec.hidden_c,
            two_branch=spec.two_branch,
            refinement=spec.refinement,
            refine_bound=spec.refine_bound,
        )
    return ResidualHeads(
        spec.dim,
        scale_q=spec.scale_q,
        scale_c=spec.scale_c,
        scale_mode=spec.scale_mode,
        dropout=spec.dropout,
        hidden_q=spec.hidden_q,
        hidden_c=spec.hidden_c,
    )
