"""The towers of a fine-tuning with what goes into them: boundary files where activations are cached, else raw inputs.

Knows caches, boundary files and towers. Must not know heads or training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import require_space
from deltaclip.base.progress import say
from deltaclip.features.backbone.batches import ImageFile
from deltaclip.features.backbone.pixels import input_size, single_pixels
from deltaclip.features.backbone.views import file_opener
from deltaclip.features.data.boundary_views import FLIP
from deltaclip.features.data.views import CENTER
from deltaclip.features.extraction.boundary import (
    BoundaryFill,
    Images,
    boundary_identity,
    fill_boundary,
    fill_text_boundary,
    text_keys,
)
from deltaclip.features.store.boundary import BoundaryReader, boundary_bytes, boundary_path
from deltaclip.features.store.joined import open_cache
from deltaclip.pipeline.run.tower_inputs import BoundaryInputs, PixelInputs, TokenInputs
from deltaclip.pipeline.run.tuned import TowerSide

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.load import Backbone
    from deltaclip.features.backbone.towers import CutTower
    from deltaclip.pipeline.run.processes import Processes
    from deltaclip.pipeline.run.rows import CacheRows
    from deltaclip.pipeline.run.tower_inputs import Augment, TowerInputs


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
    folder = image_root or (Path(str(recorded)) if recorded else None)
    if folder is None:
        raise UserError("does not say where its images lie", place=rows.path, remedy="give --image-root FOLDER")
    entries, first_row = np.unique(rows.rows.image, return_index=True)
    names = rows.rows.text["file"][first_row]
    files = {
        int(entry): ImageFile(int(entry), folder / str(name), keys[entry].tobytes())
        for entry, name in zip(entries, names, strict=True)
    }
    missing = [file.path for file in files.values() if not file.path.is_file()]
    if missing:
        message = f"{len(missing):,} of {len(files):,} images are not there, the first: {missing[0].name}"
        raise UserError(message, place=folder, remedy="give --image-root FOLDER of the images that were extracted")
    return ImageFiles(files=files, root=None if allow_outside else folder)


@dataclass(frozen=True, kw_only=True)
class SideMaker:
    """Makes the sides of a fine-tuning.

    `precision` is the number format of cached activations; `crops` the number of those among the views of `augment`
    "views"; validation and test see the view `center` in any case.
    """

    backbone: Backbone
    rows: CacheRows
    files: ImageFiles
    processes: Processes
    boundary_cache: bool
    augment: Augment
    crops: int
    precision: Precision
    workers: int
    seed: int

    @property
    def views(self) -> tuple[str, ...]:
        """Views of training images, `center` first."""
        crops = (f"crop-{number}" for number in range(1, self.crops + 1))
        return (CENTER, FLIP, *crops) if self.augment == "views" else (CENTER,)

    def image(self, tower: CutTower) -> TowerSide:
        """Return the image tower with its inputs; fills boundary files that are missing."""
        if self.boundary_cache and tower.frozen_blocks:
            return TowerSide(tower=tower, inputs=self._image_boundaries(tower))
        inputs = PixelInputs(
            files=self.files.files,
            open_file=file_opener(self.backbone),
            preprocess=single_pixels(self.backbone),
            input_size=input_size(self.backbone),
            augment=self.augment,
            views=self.views,
            root=self.files.root,
            workers=self.workers,
            seed=self.seed,
        )
        return TowerSide(tower=tower, inputs=inputs)

    def text(self, tower: CutTower) -> TowerSide | None:
        """Return the text tower with its inputs, None where all of it is frozen: its embeddings are in the cache."""
        if tower.all_frozen:
            return None
        with open_cache(self.rows.path) as store:
            texts = [str(text) for text in store.texts()]
        # Half of 64 bits, for millions of texts.
        tokens_TL = self.backbone.tokenizer(texts, context_length=self.backbone.context_length).int()
        inputs: TowerInputs = TokenInputs(tokens_TL=tokens_TL)
        if self.boundary_cache and tower.frozen_blocks:
            inputs = self._text_boundary(tower, texts)
        return TowerSide(tower=tower, inputs=inputs, tokens_TL=tokens_TL)

    def _image_boundaries(self, tower: CutTower) -> BoundaryInputs:
        entries = np.array(sorted(self.files.files), dtype=np.int64)
        files = [self.files.files[entry] for entry in entries.tolist()]
        images = Images(
            keys=np.array([list(file.sha256 or b"") for file in files], dtype=np.uint8),
            files=[file.path for file in files],
            root=self.files.root,
        )
        self._announce(tower, len(entries), self.views)

        def fill(view: str) -> BoundaryFill:
            return fill_boundary(
                self.rows.path,
                self.backbone,
                tower,
                images,
                view=view,
                precision=self.precision,
                workers=self.workers,
            )

        readers = {view: self._filled(tower, view, partial(fill, view), images.keys) for view in self.views}
        return BoundaryInputs(readers=readers, entries=entries, seed=self.seed)

    def _text_boundary(self, tower: CutTower, texts: list[str]) -> BoundaryInputs:
        entries = np.unique(self.rows.rows.prompt)  # explanations do not go through the tower
        entries = entries[entries >= 0]
        self._announce(tower, len(entries), (CENTER,))
        prompts = [texts[entry] for entry in entries.tolist()]

        def fill() -> BoundaryFill:
            return fill_text_boundary(self.rows.path, self.backbone, tower, prompts, precision=self.precision)

        reader = self._filled(tower, CENTER, fill, text_keys(prompts))
        return BoundaryInputs(readers={CENTER: reader}, entries=entries)

    def _filled(
        self, tower: CutTower, view: str, fill: Callable[[], BoundaryFill], keys: NDArray[np.uint8]
    ) -> BoundaryReader:
        """Let the first process fill a file, and open it in all."""
        path = self._path(tower, view)
        if self.processes.is_first:
            fill()
        self.processes.wait()
        identity = boundary_identity(self.backbone, tower, view=view, precision=self.precision)
        return BoundaryReader.open(path, identity, keys=keys)  # read by position: it must be these

    def _announce(self, tower: CutTower, num_entries: int, views: Sequence[str]) -> None:
        """Say what the files that are missing will take, before the first is written, and that the disk has it."""
        missing = [view for view in views if not self._path(tower, view).exists()]
        if not missing or not self.processes.is_first:
            return
        size = len(missing) * boundary_bytes(num_entries, tower.boundary_shape, self.precision)
        folder = self.rows.path.resolve().parent
        require_space(folder, size, "the boundary cache")
        what = (
            f"{num_entries:,} {tower.kind}s x {len(missing)} views"
            if len(views) > 1
            else f"{num_entries:,} {tower.kind}s"
        )
        line = f"boundary      {what} after block {tower.frozen_blocks}: {size / 1e6:,.1f} MB in {folder}"
        say(line)

    def _path(self, tower: CutTower, view: str) -> Path:
        return boundary_path(self.rows.path, tower.kind, tower.frozen_blocks, view=view, precision=self.precision)
