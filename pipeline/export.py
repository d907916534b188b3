"""STAGE export: a run as an ONNX file, checked against torch."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.files import keep_result, sha256_file
from deltaclip.base.places import check_outside
from deltaclip.pipeline.api.onnx_graph import (
    OPSET,
    TOLERANCE,
    HeadGraph,
    ScorerGraph,
    check_onnx,
    input_name,
    to_onnx,
    write_onnx,
)
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.runs.folder import open_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from deltaclip.features.backbone.load import Backbone
    from deltaclip.pipeline.api.onnx_graph import Speed
    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.settings import ExportConfig

    Draw = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written and how it compares with torch on the CPU."""

    out: Path
    part: str
    inputs: list[str]
    outputs: list[str]
    size_bytes: int
    largest_difference: dict[str, float]
    rows_per_s: Speed

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **self.__dict__,
            "out": str(self.out),
            "opset": OPSET,
            "tolerance": TOLERANCE,
            "rows_per_s": self.rows_per_s._asdict(),
        }

    def summary(self) -> str:
        """Return where it is, what goes in and out, the largest difference and the speed."""
        worst = max(self.largest_difference.values())
        speed = self.rows_per_s
        return "\n".join(
            [
                f"{self.out}: {self.part}, {self.size_bytes / 1e6:.1f} MB, opset {OPSET}",
                f"{', '.join(self.inputs)} -> {', '.join(self.outputs)}",
                f"largest difference from torch on fresh inputs: {worst:.1e} (at most {TOLERANCE:g})",
                "no intervals and no flag: these need the run (`predict`, `serve`, Scorer)",
                f"rows a second, batches of 8: onnxruntime {speed.onnxruntime:,.0f}, torch {speed.torch:,.0f}",
            ]
        )


def export(config: ExportConfig) -> ExportResult:
    """Write the heads of a run, or the whole scorer, as ONNX.

    Raises:
        UserError: the extra is not installed, something that ONNX cannot express, or a difference from torch over the
            tolerance; then nothing is written.
    """
    config.check_more()
    check_outside(config.out, [config.run])
    folder = open_run(config.run)
    heads = HeadGraph(folder.heads, folder.config["labels"])
    graph: nn.Module
    draw: Draw
    if config.part == "heads":
        graph, draw = heads, _draw_embeddings(folder)
    else:
        graph, draw = _whole(config, folder)
    about = _about(config, folder)
    content = to_onnx(graph, draw, outputs=heads.outputs, about=about)
    largest, speed = check_onnx(content, graph, draw, outputs=heads.outputs)
    keep_result(config.out, lambda path: write_onnx(path, content))
    return ExportResult(
        out=config.out,
        part=config.part,
        inputs=list(draw(1)),
        outputs=list(heads.outputs),
        size_bytes=len(content),
        largest_difference=largest,
        rows_per_s=speed,
    )


def _whole(config: ExportConfig, folder: RunFolder) -> tuple[nn.Module, Draw]:
    if views := _views(folder):
        message = f"the heads read the view {views[0]!r}, whose pixels are not those that the model takes"
        remedy = "give --part heads, which takes the vectors of the view, or train with --base calibrated"
        raise UserError(message, place=config.run, remedy=remedy)
    scorer = Scorer.load(
        config.run, device="cpu", backbone=config.backbone, pretrained=config.pretrained, precision="fp32"
    )
    graph = ScorerGraph(scorer.backbone.model, HeadGraph(scorer.heads, scorer.labels))
    return graph, _draw_pairs(scorer.backbone, needs_prompts=folder.needs_prompts)


def _views(folder: RunFolder) -> tuple[str, ...]:
    bases = folder.spec.bases
    return bases.views if bases else ()


def _draw_embeddings(folder: RunFolder) -> Draw:
    from torch.nn.functional import normalize

    heads: Any = folder.heads

    def draw(rows: int) -> dict[str, Tensor]:
        inputs = {"v": normalize(_drawn(heads, "center", heads.dim, rows), dim=-1)}
        if folder.needs_prompts:
            inputs["t"] = normalize(_drawn(heads, "prompt", heads.dim, rows), dim=-1)
        widths = {view: heads.bases.widths[view] for view in _views(folder)}
        return inputs | {input_name(view): _drawn(heads, view, width, rows) for view, width in widths.items()}

    return draw


def _drawn(heads: Any, name: str, width: int, rows: int) -> Tensor:
    """Return vectors (rows, width) of an input, like those that bases were fitted to, where one of them sees it.

    Far from these a kernel says nothing and the score of a line is clamped: there would be little to compare.
    """
    import torch

    for target in heads.targets if heads.bases else ():
        fitted = heads.head(target.name).fitted
        for shape, member in zip(fitted.shapes, fitted.members, strict=True):
            if name in shape.inputs:
                before = shape.inputs[: shape.inputs.index(name)]
                start = sum(heads.bases.width(other, heads.dim) for other in before)
                return _like_fitted(member, slice(start, start + width), rows)
    return torch.randn(rows, width)


def _like_fitted(member: Any, entries: slice, rows: int) -> Tensor:
    """Return some entries of landmarks of a kernel, or points at which a line says about a tenth more or less."""
    import torch

    shift_W: Tensor = member.shift_P[entries]
    if hasattr(member, "points_LP"):
        scale_W = member.scale_P[entries]
        marks_NW = member.points_LP[torch.randint(len(member.points_LP), (rows,))][:, entries]
        return shift_W + torch.where(scale_W > 0, marks_NW / scale_W, 0.0)
    weight_W = member.weight_P[entries]
    steps_NW = 0.1 * torch.randn(rows, len(shift_W)) / len(shift_W) ** 0.5
    return shift_W + torch.where(weight_W != 0, steps_NW / weight_W, 0.0)


def _draw_pairs(backbone: Backbone, *, needs_prompts: bool) -> Draw:
    import torch

    size = backbone.facts["preprocessing"]["size"]
    height, width = size if isinstance(size, list) else (size, size)
    letters = random.Random(0)

    def draw(rows: int) -> dict[str, Tensor]:
        pixels = torch.randn(rows, 3, height, width)
        if not needs_prompts:
            return {"pixels": pixels}
        texts = [" ".join(letters.choices(string.ascii_lowercase, k=letters.randint(1, 30))) for _ in range(rows)]
        return {
            "pixels": pixels,
            "tokens": backbone.tokenizer(texts, context_length=backbone.context_length),
        }

    return draw


def _about(config: ExportConfig, folder: RunFolder) -> dict[str, Any]:
    facts = folder.config["backbone"]
    return {
        "part": config.part,
        "labels": folder.config["labels"],
        "views": {input_name(view): view for view in _views(folder)},
        "tuned": folder.is_tuned,
        "checkpoint": folder.checkpoint.name,
        "checkpoint_sha256": sha256_file(folder.checkpoint),
        "backbone": {name: value for name, value in facts.items() if name != "precision"},
        "precision": "fp32",
    }
