"""From a manifest and the content of its files to the plan of a cache: distinct images, distinct texts, rows.

Knows manifests and the schema. Must not know h5py or backbones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltaclip.features.store.schema import KEY_BYTES, MISSING_KEY, NO_TEXT, NUMBER_COLUMNS, Plan, text_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deltaclip.features.data.content import ImageContent
    from deltaclip.features.data.manifest import Manifest
    from deltaclip.features.data.sharding import Part


def make_plan(manifest: Manifest, contents: Sequence[ImageContent], *, part: Part | None = None) -> Plan:
    """Lay out what a cache is to hold.

    Args:
        manifest: N rows.
        contents: hash or reason of the image of each row, N of them.
        part: of a shard, what its rows are of the whole table.
    """
    row_image, first_rows = _first_seen([c.sha256 or f"missing {manifest.images[r]}" for r, c in enumerate(contents)])
    explanations = [text for text in manifest.explanations if text]
    texts = list(dict.fromkeys([*(text for text in manifest.prompts if text), *explanations]))
    text_index = {text: entry for entry, text in enumerate(texts)} | {"": NO_TEXT}
    codes, names = {}, {}
    for column, values in (
        ("group", _groups(manifest, contents)),
        ("source", manifest.sources),
        ("split", manifest.splits),
    ):
        names[column] = sorted(set(values) - {""})
        code_of = {name: code for code, name in enumerate(names[column])} | {"": -1}
        codes[column] = np.array([code_of[value] for value in values], dtype=np.int32)
    return Plan(
        image_keys=_key_array([contents[row].sha256 or MISSING_KEY for row in first_rows]),
        image_files=[manifest.images[row] for row in first_rows],
        image_reasons=[contents[row].reason for row in first_rows],
        image_frames=np.array([contents[row].more_frames for row in first_rows], dtype=np.uint8),
        text_keys=_key_array([text_key(text) for text in texts]),
        texts=texts,
        row_files=manifest.images,
        row_image=row_image,
        row_prompt=np.array([text_index[text] for text in manifest.prompts], dtype=np.int64),
        row_explanation=np.array([text_index[text] for text in manifest.explanations], dtype=np.int64),
        numbers={column: manifest.labels[column].astype(np.float32) for column in NUMBER_COLUMNS},
        codes=codes,
        names=names,
        dataset={
            "name": manifest.name,
            "label_ranges": {k: str(v) for k, v in manifest.label_ranges.items()},
            "image_root": str(manifest.image_root.absolute()),
        },
        part=part,
    )


def _groups(manifest: Manifest, contents: Sequence[ImageContent]) -> list[str]:
    """Return the group of each row; where neither a column nor a prompt gives one, the image by its content does."""
    return [
        group or f"image {content.sha256.hex()[:16] if content.sha256 else name}"
        for group, content, name in zip(manifest.groups, contents, manifest.images, strict=True)
    ]


def _first_seen(keys: Sequence[bytes | str]) -> tuple[NDArray[np.int64], list[int]]:
    """Return the number of each row's key, in order of appearance, and the first row of each number."""
    entry_of: dict[bytes | str, int] = {}
    first_rows: list[int] = []
    numbers = np.empty(len(keys), dtype=np.int64)
    for row, key in enumerate(keys):
        if key not in entry_of:
            entry_of[key] = len(first_rows)
            first_rows.append(row)
        numbers[row] = entry_of[key]
    return numbers, first_rows


def _key_array(keys: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
