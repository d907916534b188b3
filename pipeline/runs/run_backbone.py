"""The backbone that a cache or a run was made with, loaded again; refused where its weights are others.

Knows what caches and runs record of a backbone. Must not know heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.load import check_same, load_backbone, request_facts
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.store.writer import differences

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.pipeline.runs.folder import RunFolder


@dataclass(frozen=True)
class Recorded:
    """`facts` and `request` of a backbone as they stand at `place`; `what` links both in an error."""

    facts: dict[str, Any]
    request: dict[str, Any]
    place: Path | str
    what: str


def load_recorded(
    recorded: Recorded,
    *,
    device: str,
    backbone: str | None = None,
    pretrained: str | None = None,
    precision: Precision | None = None,
) -> Backbone:
    """Load a backbone from where it lay, or lies now.

    Args:
        recorded: what is known of it.
        device: a torch device.
        backbone: where it lies now, if it has moved.
        pretrained: where its checkpoint lies now, if it has moved.
        precision: to load it in; default that of the record.

    Raises:
        UserError: it cannot be found, has other weights, or is loaded otherwise than by the version that recorded it.
    """
    facts, request = recorded.facts, recorded.request
    source = find_weights(backbone or facts["backbone"], pretrained if backbone or pretrained else facts["pretrained"])
    decode = request.get("decode", "exact")
    found = request_facts(source, request["precision"], quick_gelu=request["quick_gelu_asked"], decode=decode)
    if wrong := differences(request, found):
        remedy = (
            f"give --backbone and --pretrained of the {'cache' if recorded.what == 'is of' else 'run'}'s own backbone"
        )
        message = f"{recorded.what} another backbone: {'; '.join(wrong)}"
        raise UserError(message, place=recorded.place, remedy=remedy)
    loaded = load_backbone(
        source,
        device=device,
        precision=precision or request["precision"],
        quick_gelu=request["quick_gelu_asked"],
        decode=decode,
    )
    check_same(facts, loaded, place=recorded.place, remedy="extract and train again")
    return loaded


def put_tuned(backbone: Backbone, run: RunFolder) -> None:
    """Put what a run changed of its backbone in place.

    Raises:
        UserError: the checkpoint holds nothing of it, or what does not fit.
    """
    tensors, known = run.tuned_tensors(), backbone.model.state_dict()
    wrong = [name for name, tensor in tensors.items() if name not in known or known[name].shape != tensor.shape]
    if wrong or not tensors:
        what = (
            f"holds {wrong[0]}, which its backbone has not in this form" if wrong else "holds nothing of its backbone"
        )
        raise UserError(what, place=run.checkpoint, remedy="fine-tune again")
    backbone.model.load_state_dict(tensors, strict=False)
