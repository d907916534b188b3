"""A run as one module from tensors to named scores, and as an ONNX file that is held against torch.

Knows heads, a backbone's two towers, torch's exporter, onnx and onnxruntime, which come with the extra `onnx`. Must not
know run directories.

Shapes: N rows, the first axis of every input and output, D width, F width of a view, L tokens, H and W pixels.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_file
from deltaclip.pipeline.model.scores import Batch, HeadScores, run_heads

if TYPE_CHECKING:
    from collections.abc import Collection

    from deltaclip.pipeline.model.heads import Heads


# ---- A module as an ONNX file, and how it fares under onnxruntime beside torch


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    Draw = Callable[[int], dict[str, Tensor]]

OPSET = 23  # of ONNX 1.18, May 2025
MAX_BYTES = 2**31 - 1  # one protobuf message holds no more
TRACED_ROWS = 2  # the exporter takes 1 for a constant
CHECKED_ROWS = (1, 3, 8)
TOLERANCE = 1e-4  # fp32 in another order of summation gives 1e-6; scores are read to three digits
TIMED_S = 0.5


class Speed(NamedTuple):
    """Rows a second of the largest checked batch, medians."""

    torch: float
    onnxruntime: float


def to_onnx(graph: nn.Module, draw: Draw, *, outputs: Sequence[str], about: Mapping[str, Any]) -> bytes:
    """Return a module as an ONNX model with a free first axis.

    Args:
        graph: called with the inputs by name, returns a tuple of tensors (N,).
        draw: makes inputs of so many rows.
        outputs: names of what it returns.
        about: JSON values for the metadata of the file, under `deltaclip`.

    Raises:
        UserError: an operation that ONNX does not have, or weights over 2 GB.
    """
    size_bytes = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    if size_bytes > MAX_BYTES:
        message = f"{size_bytes / 1e9:.1f} GB of weights do not fit into one ONNX file, which holds 2.1 GB"
        raise UserError(message, place="--part scorer", remedy="give --part heads")
    inputs = draw(TRACED_ROWS)
    free = torch.export.Dim("N")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter to its own developers
        try:
            program = torch.onnx.export(
                graph.eval(),
                kwargs=inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes={name: {0: free} for name in inputs},
                output_names=list(outputs),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            detail = str(error.__cause__ or error).strip().splitlines()[0][:160]
            raise UserError(f"cannot be exported to ONNX ({detail})", place=type(graph).__name__) from error
    assert program is not None, "the exporter was asked for a program, not for a file"
    model = program.model_proto
    model.producer_name = "deltaclip"
    entry = model.metadata_props.add()
    entry.key, entry.value = "deltaclip", json.dumps(dict(about))
    return bytes(model.SerializeToString())


def check_onnx(
    content: bytes, graph: nn.Module, draw: Draw, *, outputs: Sequence[str]
) -> tuple[dict[str, float], Speed]:
    """Run a model under onnxruntime on fresh inputs of several sizes.

    Returns:
        the largest difference from torch by output, and the speed of both.

    Raises:
        UserError: a difference over the tolerance, or a file that onnxruntime does not take.
    """
    import onnxruntime

    drawn = [draw(rows) for rows in CHECKED_ROWS]
    with torch.no_grad():
        expected = [graph(**inputs) for inputs in drawn]
        # Before onnxruntime has threads of its own, which wait actively for a while and would take torch's cores.
        torch_s = _median_seconds(lambda: graph(**drawn[-1]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except RuntimeError as error:
        detail = str(error).splitlines()[0][:160]
        raise UserError(f"onnxruntime does not take the exported model ({detail})", place="export") from error
    largest = dict.fromkeys(outputs, 0.0)
    fed: dict[str, Any] = {}
    for inputs, of_torch in zip(drawn, expected, strict=True):
        fed = {name: value.numpy() for name, value in inputs.items()}
        for name, there, here in zip(outputs, of_torch, session.run(list(outputs), fed), strict=True):
            largest[name] = max(largest[name], float(np.abs(there.numpy() - here).max()))
    # Written so that NaN fails too.
    if wrong := {name: value for name, value in largest.items() if not value <= TOLERANCE}:
        message = f"onnxruntime differs from torch by {wrong}, over {TOLERANCE:g}"
        raise UserError(message, place="export", remedy="nothing was written; update onnxruntime and torch")
    onnx_s = _median_seconds(lambda: session.run(list(outputs), fed))
    return largest, Speed(CHECKED_ROWS[-1] / torch_s, CHECKED_ROWS[-1] / onnx_s)


def write_onnx(path: Path, content: bytes) -> None:
    """Write a model, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def _median_seconds(call: Callable[[], Any]) -> float:
    found: list[float] = []
    while len(found) < 3 or sum(found) < TIMED_S:
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


# ---- A run as one module from tensors to named scores, which is what an exported file holds


def input_name(view: str) -> str:
    """Return what the input of a view is called: as the view, and of the second backbone's `2:center` `center_2`."""
    number, _, name = view.rpartition(":")
    return f"{name}_{number}" if number else name


class HeadGraph(nn.Module):
    """v, t (N, D) of unit length, and (N, W) of each of the `views` that the bases see, to `outputs`, each (N,).

    Where no label sees the prompt, t is left out. Views are given by `input_name`.
    """

    def __init__(self, heads: Heads, labels: Collection[str]) -> None:
        super().__init__()
        self.heads = heads.eval()
        self.outputs = _outputs(heads, labels)
        self.views = heads.bases.views if heads.bases else ()

    def forward(self, v: Tensor, t: Tensor | None = None, **views: Tensor) -> tuple[Tensor, ...]:
        """Return the scores and their parts in the order of `outputs`."""
        t = torch.zeros_like(v) if t is None else t
        terms = self.heads.base_terms({name: views[input_name(name)] for name in self.views}, v, t)
        columns = _columns(run_heads(self.heads, Batch(v, t, {}, fitted_B=terms)))
        return tuple(columns[name] for name in self.outputs)


class ScorerGraph(nn.Module):
    """Preprocessed pixels (N, 3, H, W) and tokens (N, L) to the outputs of the heads; without tokens as `HeadGraph`."""

    def __init__(self, model: nn.Module, heads: HeadGraph) -> None:
        super().__init__()
        self.model, self.heads = model.eval(), heads
        self.outputs = heads.outputs

    def forward(self, pixels: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the scores and their parts in the order of `outputs`."""
        encode: Any = self.model
        v = nn.functional.normalize(encode.encode_image(pixels), dim=-1)
        t = None if tokens is None else nn.functional.normalize(encode.encode_text(tokens), dim=-1)
        scores: tuple[Tensor, ...] = self.heads(v, t)
        return scores


def _outputs(heads: Heads, labels: Collection[str]) -> tuple[str, ...]:
    """Return the names of what these heads say of the targets that they learned."""
    with torch.no_grad():  # which parts a head has, it says itself
        nothing = {each.name: torch.zeros(1) for each in heads.targets} if heads.bases else {}
        found = run_heads(heads, Batch(torch.zeros(1, heads.dim), torch.zeros(1, heads.dim), {}, fitted_B=nothing))
    return tuple(name for target in labels for name in _columns(HeadScores({target: found.targets[target]})))


def _columns(found: HeadScores) -> dict[str, Tensor]:
    columns = {}
    for target, (_, base, delta, scale) in found.targets.items():
        columns[target] = found.of(target)
        if base is not None and delta is not None and scale is not None:
            columns |= {f"{target}_base": base, f"{target}_delta": scale * delta}
    return columns
