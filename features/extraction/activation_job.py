"""Fill a boundary file: run the frozen blocks of a tower once over all images or texts.

Decoding, the blocks and the file go on at the same time, each in threads of its own. Knows cut towers, the decoding of
images and a writer's methods. Must not know settings, heads or rows.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.base.progress import Progress
from deltaclip.base.transfers import Leaving, Sender
from deltaclip.features.backbone.decode_ahead import ImageFile, dealt, default_workers, image_batches
from deltaclip.features.backbone.pixels import input_size, normalise, pixels_ahead
from deltaclip.features.backbone.view_vectors import file_opener
from deltaclip.features.data.decoding import on_host
from deltaclip.features.data.views import CENTER, boundary_recipe, view_pixels
from deltaclip.features.store.activation_file import BoundaryReader, BoundaryWriter, boundary_path
from deltaclip.features.store.schema import text_key
from deltaclip.features.store.writer import part_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from PIL import Image

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.towers import CutTower


BATCH = 64  # the best on a CPU, and enough for a GPU
FACTS = ("backbone", "weights_sha256", "config_sha256", "quick_gelu", "preprocessing", "context_length")


@dataclass(frozen=True, kw_only=True)
class Images:
    """Entry e is the file `files[e]` with the SHA-256 `keys[e]`, (E, 32) uint8.

    Files do not leave the folder `root`; None permits every place.
    """

    keys: NDArray[np.uint8]
    files: Sequence[Path]
    root: Path | None


@dataclass(frozen=True, kw_only=True)
class BoundaryFill:
    """A finished file at `path`; how many of its entries were `computed` just now, and how many were there."""

    path: Path
    computed: int
    reused: int


def boundary_identity(backbone: Backbone, tower: CutTower, *, view: str, precision: Precision) -> dict[str, Any]:
    """Return all that changes an entry of a boundary file but its content, as JSON values."""
    facts = {name: backbone.facts[name] for name in FACTS}
    cut = {"tower": tower.kind, "frozen_blocks": tower.frozen_blocks, "shape": list(tower.boundary_shape)}
    recipe = boundary_recipe(view) | {"decode": on_host(backbone.decode)} if tower.kind == "image" else {}
    return {**facts, **cut, "view": recipe, "precision": precision, "weights_in": backbone.precision}


def fill_boundary(
    cache: Path,
    backbone: Backbone,
    tower: CutTower,
    images: Images,
    *,
    view: str = CENTER,
    precision: Precision = "fp32",
    workers: int | None = None,
) -> BoundaryFill:
    """Write what an image tower gives at its cut; an interrupted run is gone on with, and only what is new is computed.

    Args:
        cache: the feature cache that the file lies beside.
        backbone: whose tower it is.
        tower: cut after at least one block.
        images: to run.
        view: `center`, `flip` or `crop-1` to `crop-99`.
        precision: fp32, or 16 bits: of the frozen blocks' products (where the weights are fp32) and of what is stored.
        workers: threads that decode; None takes one for each processor.

    Raises:
        UserError: an image cannot be read (the others are stored), another process writes the file, the disk is too
            small, or what is there is damaged or for something else.
    """
    size, preprocess = input_size(backbone), pixels_ahead(backbone)

    def prepare(file: ImageFile, image: Image.Image) -> torch.Tensor:
        assert file.sha256 is not None
        return view_pixels(view, image, file.sha256, preprocess=preprocess, input_size=size)

    def batches(todo: NDArray[np.int64]) -> Iterator[tuple[list[int], torch.Tensor]]:
        import torch

        files = [ImageFile(entry, images.files[entry], images.keys[entry].tobytes()) for entry in todo.tolist()]
        decoded = image_batches(
            files,
            prepare,
            root=images.root,
            batch_size=BATCH,
            workers=workers or default_workers(),
            open_file=file_opener(backbone),
        )
        failed: list[tuple[int, str]] = []
        with contextlib.closing(decoded):
            for batch in decoded:
                failed += batch.failed
                if batch.entries:
                    yield batch.entries, torch.stack(batch.prepared)
        if failed:
            message = f"{len(failed):,} images could not be read (the first: {failed[0][1]})"
            raise UserError(
                message,
                place=images.files[failed[0][0]],
                remedy="the others are stored: give the same command again, or extract again without it",
            )

    path = boundary_path(cache, tower.kind, tower.frozen_blocks, view=view, precision=precision)
    identity = boundary_identity(backbone, tower, view=view, precision=precision)
    return _fill(path, tower, images.keys, batches, identity=identity, prepare=partial(normalise, backbone))


def fill_text_boundary(
    cache: Path, backbone: Backbone, tower: CutTower, texts: Sequence[str], *, precision: Precision = "fp32"
) -> BoundaryFill:
    """Write what a text tower gives at its cut for distinct texts; as `fill_boundary`.

    Raises:
        UserError: as `fill_boundary`.
    """

    def batches(todo: NDArray[np.int64]) -> Iterator[tuple[list[int], torch.Tensor]]:
        for start in range(0, len(todo), BATCH):
            entries = todo[start : start + BATCH].tolist()
            ids = backbone.tokenizer([texts[entry] for entry in entries], context_length=backbone.context_length)
            yield entries, ids

    path = boundary_path(cache, tower.kind, tower.frozen_blocks, view=CENTER, precision=precision)
    identity = boundary_identity(backbone, tower, view=CENTER, precision=precision)
    return _fill(path, tower, text_keys(texts), batches, identity=identity)


def text_keys(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Return the keys of texts in a boundary file, (E, 32) uint8."""
    return np.array([list(text_key(text)) for text in texts], dtype=np.uint8)


def _fill(
    path: Path,
    tower: CutTower,
    keys: NDArray[np.uint8],
    batches: Callable[[NDArray[np.int64]], Iterator[tuple[list[int], torch.Tensor]]],
    *,
    identity: dict[str, Any],
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> BoundaryFill:
    if not tower.frozen_blocks or tower.all_frozen:
        raise ValueError("only a tower that is frozen in part has a boundary to keep")
    if not len(keys):
        raise UserError("there is nothing to fill a boundary cache with", place=path, remedy="extract some rows first")
    with one_writer(path):
        if path.exists() and np.array_equal(BoundaryReader.open(path, identity).keys, keys):
            part_path(path).unlink(missing_ok=True)
            return BoundaryFill(path=path, computed=0, reused=len(keys))
        writer = BoundaryWriter.start(path, keys, shape=tower.boundary_shape, identity=identity)
        with (
            contextlib.closing(writer),
            Progress(len(keys), f"running the frozen {tower.kind} blocks", unit=f"{tower.kind}s") as progress,
        ):
            todo = writer.todo()
            progress.advance(len(keys) - len(todo))
            boundaries = _Boundaries(tower, identity["precision"], prepare)
            with contextlib.closing(dealt(boundaries.of(batches(todo)), [partial(_store, writer)])) as stored:
                for count in stored:
                    progress.advance(count)
            if boundaries.failure:  # told once the others are stored
                raise boundaries.failure
            writer.finish(path)
    return BoundaryFill(path=path, computed=len(todo), reused=len(keys) - len(todo))


class _Boundaries:
    """What a tower gives at its cut, batch by batch, on its way to the host as it is stored."""

    def __init__(
        self, tower: CutTower, precision: Precision, prepare: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> None:
        self._tower, self._precision, self._prepare = tower, precision, prepare
        self.failure: UserError | None = None

    def of(self, batches: Iterator[tuple[list[int], torch.Tensor]]) -> Iterator[tuple[list[int], Leaving]]:
        """Yield the entries of each batch with (B, *shape), fp16 or fp32, and whether all of it is finite.

        Ends where an image cannot be read, which `failure` then tells.
        """
        import torch

        sender, stored = Sender(self._tower.device), torch.float32 if self._precision == "fp32" else torch.float16
        try:
            for entries, inputs in batches:
                (here,) = sender.send([inputs]).here()
                with _products_in(self._precision, self._tower):
                    x_B = self._tower.to_boundary(here if self._prepare is None else self._prepare(here))
                x_B = x_B.to(stored)
                yield entries, Leaving([x_B, x_B.isfinite().all()])
        except UserError as failure:
            self.failure = failure


def _store(writer: BoundaryWriter, computed: tuple[list[int], Leaving]) -> int:
    entries, leaving = computed
    x_B, is_finite = leaving.there()
    writer.put(entries, x_B.numpy(), is_finite=bool(is_finite))
    return len(entries)


def _products_in(precision: Precision, tower: CutTower) -> contextlib.AbstractContextManager[object]:
    import torch

    if precision == "fp32" or tower.dtype != torch.float32:
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(tower.device.type, dtype)
