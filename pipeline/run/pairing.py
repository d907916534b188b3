"""Images and prompts of a caller as pairs to score: what goes with what.

Knows lists, columns and batches. Must not know heads or backbones.

Shapes: N pairs of image and prompt.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.features.backbone.batches import ImageFile, MemoryImage
from deltaclip.features.data.paths import understood
from deltaclip.features.data.prompts import prompt_fault
from deltaclip.pipeline.run.pictures import as_numpy, as_picture, image_column, is_array, is_one_image, named, plain

if TYPE_CHECKING:
    from collections.abc import Hashable


@dataclass(frozen=True)
class Pairs:
    """N pairs: `sources` are the distinct images, their entries 0, 1, ...; pair n has source `image_N[n]`.

    `prompts` is None where there are none at all, and one of them '' where its pair has none.
    """

    sources: list[ImageFile | MemoryImage]
    image_N: list[int]
    prompts: list[str] | None


def pair(images: Any, prompts: Any) -> Pairs:
    """Pair images and prompts.

    Lists go pair by pair and must be of equal length; a single image or a single prompt goes with every one of the
    others. One image that stands in several pairs (the same path, or the same object) is one source.

    Args:
        images: what `as_picture` takes, or a list, column, generator or batch (N, ...) of such.
        prompts: a text; or a list, column or generator of texts; or None for images alone.

    Raises:
        ValueError: lengths differ, an array is no image, or a prompt is empty.
        TypeError: something is neither image nor text.
    """
    given, lone_image = _images(images)
    texts, lone_prompt = _texts(prompts)
    if texts is not None:
        if lone_image:
            given *= len(texts)
        elif lone_prompt:
            texts *= len(given)
        if len(given) != len(texts):
            message = (
                f"{len(given):,} images but {len(texts):,} prompts: give one prompt an image, or a single text for all"
            )
            raise ValueError(message)
    entry_of: dict[Hashable, int] = {}
    sources: list[ImageFile | MemoryImage] = []
    image_N = []
    for place, image in enumerate(given):
        key = Path(image) if isinstance(image, (str, os.PathLike)) else id(image)
        if key not in entry_of:
            entry_of[key] = len(sources)
            sources.append(_source(len(sources), image, f"images[{place}]"))
        image_N.append(entry_of[key])
    return Pairs(sources, image_N, texts)


def _images(images: Any) -> tuple[list[Any], bool]:
    """Return images as a list, and whether a single one was given."""
    images = plain(images)
    if isinstance(images, Mapping) and (column := image_column(images)) and not is_one_image(images[column]):
        images = images[column]  # a batch of rows, by column
    if is_one_image(images):
        return [images], True
    if is_array(images):
        images = as_numpy(images)
    return _listed(images, "images", "an image or a list of images"), False


def _texts(prompts: Any) -> tuple[list[str] | None, bool]:
    """Return prompts as a list, None where there are none, and whether a single one was given."""
    prompts = plain(prompts)
    if prompts is None:
        return None, False
    lone = isinstance(prompts, str)
    given = [prompts] if lone else _listed(prompts, "prompts", "a text or a list of texts")
    texts = []
    for number, text in enumerate(given):
        place = "prompts" if lone else f"prompts[{number}]"
        if not isinstance(text, str):
            raise TypeError(f"{place} is {named(text)}, not a text")
        if fault := prompt_fault(text):
            raise ValueError(f"{place} {fault}")
        texts.append(str(text))
    return texts, lone


def _listed(values: Any, name: str, wanted: str) -> list[Any]:
    # A table would give the names of its columns, a set its values in any order.
    if hasattr(values, "columns"):
        raise TypeError(f"{name} is a table, {named(values)}: give one of its columns")
    if isinstance(values, (Mapping, Set, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {named(values)}: give {wanted}")
    return [plain(value) for value in values]


def _source(entry: int, image: Any, place: str) -> ImageFile | MemoryImage:
    picture = as_picture(image, place)
    if not isinstance(picture, Path):
        return MemoryImage(entry, picture)
    # The caller is the one who says where a file may lie: `root` holds for what is opened.
    return ImageFile(entry, Path(understood(str(picture), Path(), allow_outside=True)[0]), None)
