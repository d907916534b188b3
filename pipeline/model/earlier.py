"""Heads of earlier runs, which knew quality and consistency alone: names of weights, their description, their scales.

Knows names. Must not know heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaclip.base.vocabulary import CONSISTENCY, QUALITY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# From the first part of a name in such a checkpoint to the names of today.
_OLD_NAMES = {
    "q_base": "quality_head.base",
    "q_linear": "quality_head.linear",
    "q_mlp": "quality_head.mlp",
    "q_kernel": "quality_head.fitted.members.0",
    "scale_q": "quality_head.scale",
    "c_slope": "consistency_head.slope",
    "c_offset": "consistency_head.offset",
    "c_fusion": "consistency_head.fusion",
    "c_kernel": "consistency_head.fitted.members.0",
    "scale_c": "consistency_head.scale",
    "cosine_slope": "consistency_head.cosine_slope",
    "cosine_offset": "consistency_head.cosine_offset",
    "refinement": "consistency_head.refinement",
    "rationale": "consistency_head.rationale",
}


def today_name(name: str) -> str:
    """Return how a weight of heads is called today, whichever way a checkpoint calls it."""
    first, dot, rest = name.partition(".")
    return (_OLD_NAMES.get(first, first) + dot + rest).replace("_head.kernel.", "_head.fitted.members.0.")


def of_two_targets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of such a description as those of today."""
    found = dict(values)
    scales = {"quality": found.pop("scale_q", 0.2), "consistency": found.pop("scale_c", 0.2)}
    found["targets"] = [{**each.to_json(), "scale": scales[each.name]} for each in (QUALITY, CONSISTENCY)]
    for old, new in (("hidden_q", "hidden_image"), ("hidden_c", "hidden_pair")):
        if old in found:
            found[new] = found.pop(old)
    if kernels := found.get("kernels"):
        points = {"quality": kernels["points_q"], "consistency": kernels["points_c"]}
        found["kernels"] = {"view": kernels["view"], "width": kernels["width"], "points": points}
    return found


def with_bases(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a description with one kernel for each target, on one view, as those of today."""
    found = dict(values)
    if (kernels := found.pop("kernels", None)) is None:
        return found
    view, points = kernels["view"], kernels["points"]
    inputs = {"image": (view,), "pair": (view, "prompt", "score")}
    members = {
        target["name"]: [
            {"kind": "kernel", "inputs": inputs[target["sees"]], "points": points[target["name"]], "share": 1.0}
        ]
        for target in found["targets"]
    }
    found["bases"] = {"widths": {} if view == "center" else {view: kernels["width"]}, "members": members}
    return found


def scales_of_two_targets(scales: Sequence[float | None]) -> dict[str, float]:
    """Return the scales of a run, quality's first, by target; direct heads had none."""
    names = (QUALITY.name, CONSISTENCY.name)
    return {name: scale for name, scale in zip(names, scales, strict=True) if scale is not None}
