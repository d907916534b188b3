"""What a cache or a run was made with, found again: the backbone, refused where its weights are others, and the images.

Knows what caches and runs record of both. Must not know heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.decode_ahead import ImageFile
from deltaclip.features.backbone.load import check_same, load_backbone, request_facts
from deltaclip.features.backbone.low_rank import weight_deltas
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.addresses import address, as_place
from deltaclip.features.data.sources import is_there
from deltaclip.features.store.shards import open_cache
from deltaclip.features.store.writer import differences

if TYPE_CHECKING:
    from torch import Tensor

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.pipeline.rows.cached_rows import CacheRows
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
    if run.low_rank:
        tensors = _merged(tensors, known, run)
    wrong = [name for name, tensor in tensors.items() if name not in known or known[name].shape != tensor.shape]
    if wrong or not tensors:
        what = (
            f"holds {wrong[0]}, which its backbone has not in this form" if wrong else "holds nothing of its backbone"
        )
        raise UserError(what, place=run.checkpoint, remedy="fine-tune again")
    backbone.model.load_state_dict(tensors, strict=False)


def _merged(tensors: dict[str, Tensor], known: dict[str, Tensor], run: RunFolder) -> dict[str, Tensor]:
    """Return weights with the additions of a run in them; one that does not fit as it is."""
    assert run.low_rank is not None
    try:
        deltas = weight_deltas(tensors, run.low_rank)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"holds damaged additions ({error})", place=run.checkpoint, remedy="fine-tune again") from error
    fits = {name for name, delta in deltas.items() if name in known and known[name].shape == delta.shape}
    return {
        name: known[name].float() + delta.to(known[name].device) if name in fits else delta
        for name, delta in deltas.items()
    }


# ---- Where the images of a cache lie


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """The image files of a cache by entry, with the content that was extracted; `root` as in `image_batches`."""

    files: dict[int, ImageFile]
    root: Path | None


def image_files(rows: CacheRows, image_root: Path | None, *, allow_outside: bool) -> ImageFiles:
    """Return where the images of the usable rows lie.

    Args:
        rows: the cache.
        image_root: their folder; None takes the one that the cache recorded.
        allow_outside: whether paths may leave it.

    Raises:
        UserError: the folder is not known, or files are missing.
    """
    with open_cache(rows.path) as store:
        keys, recorded = store.keys("images"), store.dataset.get("image_root")
    folder = as_place(image_root or Path(str(recorded))) if image_root or recorded else None
    if folder is None:
        raise UserError("does not say where its images lie", place=rows.path, remedy="give --image-root FOLDER")
    entries, first_row = np.unique(rows.rows.image, return_index=True)
    names = rows.rows.text["file"][first_row]
    files = {
        int(entry): ImageFile(int(entry), address(folder, str(name)), keys[entry].tobytes())
        for entry, name in zip(entries, names, strict=True)
    }
    missing = [file.path for file in files.values() if not is_there(file.path)]
    if missing:
        message = f"{len(missing):,} of {len(files):,} images are not there, the first: {missing[0].name}"
        raise UserError(message, place=folder, remedy="give --image-root FOLDER of the images that were extracted")
    return ImageFiles(files=files, root=None if allow_outside else folder)
