"""A cache as files that other programs read: clip-retrieval's folder, npy, safetensors; one row a usable row.

Knows readers and those layouts. Must not know backbones. `docs/cache.md` has the layouts.
"""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.files import require_space, reserve, whole_folder
from deltaclip.base.progress import Progress
from deltaclip.features.data.foreign import ABOUT, IMAGES_NPY, TABLE, TENSORS, TEXTS_NPY
from deltaclip.features.store.schema import CODE_COLUMNS
from deltaclip.features.store.shards import open_cache

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


Layout = Literal["clip-retrieval", "npy", "safetensors"]
ANCHORS_NPY = "anchors.npy"
COPY_ROWS = 65_536
OF_CLIP_RETRIEVAL = {"image": "image_path", "prompt": "caption"}  # its names of our columns


def export_cache(cache: Path, out: Path, *, layout: Layout, view: str) -> tuple[int, Path]:
    """Write the usable rows of a finished cache to a folder; it appears whole or not at all.

    Args:
        cache: the file.
        out: folder, must not exist.
        layout: clip-retrieval (float16, as that tool writes), npy or safetensors (both as stored).
        view: of the images.

    Returns:
        the number of rows, and where they are: `out`, or the next free name where it was taken meanwhile.

    Raises:
        UserError: no such view, or some usable image lacks it; no usable row; `out` exists; an embedding that is not
            what was computed, or that float16 cannot hold.
    """
    with open_cache(cache) as store:
        rows = store.rows()
        if not len(rows):
            raise UserError("has no usable rows", place=cache, remedy="nothing to export")
        store.check_view(view)
        images, texts = store.embeddings("images", view=view), store.embeddings("texts")
        if layout == "clip-retrieval":
            images, texts = (_as_float16(vectors, cache) for vectors in (images, texts))
        about = {
            "view": view,
            "recipe": dict(store.view_layouts()[view].recipe),
            "request": store.header["request"],
            "facts": store.facts,
            "dataset": store.dataset,
        }
        anchors = store.anchors()
        if anchors is not None:
            about["anchors"] = anchors[0]
        explanations = np.append(store.texts(), "")[rows.explanation]  # -1, no explanation, is the last one
    columns: dict[str, NDArray[Any]] = {"image": rows.text["file"][:], "prompt": rows.text["prompt"][:]}
    columns |= rows.numbers | {"explanation": explanations} | {name: rows.text[name][:] for name in CODE_COLUMNS}
    row_bytes = images.itemsize * images.shape[1] + texts.itemsize * texts.shape[1]
    require_space(out.parent, len(rows) * row_bytes, "the export")
    with whole_folder(out) as growing:
        folder = growing.work
        of_anchors = None if anchors is None else anchors[1]
        _write_vectors(folder, layout, (images, rows.image), (texts, rows.prompt), anchors=of_anchors)
        _write_table(folder, layout, {name: cells for name, cells in columns.items() if _says_something(name, cells)})
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return len(rows), growing.path


Indexed = tuple["NDArray[np.floating]", "NDArray[np.int64]"]  # distinct vectors, and which of them each row has


def _as_float16(vectors: NDArray[np.floating], cache: Path) -> NDArray[np.floating]:
    if np.abs(vectors).max(initial=0) > np.finfo(np.float16).max:
        remedy = "give --export-format npy"
        raise UserError("has vectors that float16, clip-retrieval's format, cannot hold", place=cache, remedy=remedy)
    return vectors.astype(np.float16)


def _write_vectors(
    folder: Path, layout: Layout, images: Indexed, texts: Indexed, *, anchors: NDArray[np.floating] | None
) -> None:
    if layout == "safetensors":
        from safetensors.numpy import save_file

        found = {"images": _rows_of(*images), "texts": _rows_of(*texts)}
        save_file(found | ({} if anchors is None else {"anchors": anchors}), folder / TENSORS)
        return
    if anchors is not None:
        np.save(folder / ANCHORS_NPY, anchors)
    names = {"npy": (IMAGES_NPY, TEXTS_NPY)}.get(layout, ("img_emb/img_emb_0.npy", "text_emb/text_emb_0.npy"))
    for name, (vectors, entries) in zip(names, (images, texts), strict=True):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        shape = (len(entries), vectors.shape[1])
        file = np.lib.format.open_memmap(path, mode="w+", dtype=vectors.dtype, shape=shape)
        reserve(path, path.stat().st_size)  # a disk that is full would kill whoever writes to mapped memory
        with Progress(len(entries), f"writing {path.name}", unit="rows") as progress:
            for start in range(0, len(entries), COPY_ROWS):  # a million rows of one prompt are not a million in memory
                block = entries[start : start + COPY_ROWS]
                file[start : start + COPY_ROWS] = _rows_of(vectors, block)
                progress.advance(len(block))
        file.flush()


def _rows_of(vectors: NDArray[np.floating], entries: NDArray[np.int64]) -> NDArray[np.floating]:
    """Return the vectors of rows; of a row without a text, entry -1, it is 0."""
    found = np.zeros((len(entries), vectors.shape[1]), dtype=vectors.dtype)
    found[entries >= 0] = vectors[entries[entries >= 0]]
    return found


def _says_something(name: str, column: NDArray[Any]) -> bool:
    return bool(np.isfinite(column).any()) if column.dtype.kind == "f" else any(column)


def _write_table(folder: Path, layout: Layout, columns: Mapping[str, NDArray[Any]]) -> None:
    cells = {
        name: [value if np.isfinite(value) else None for value in column.astype(float).tolist()]
        if column.dtype.kind == "f"
        else column.tolist()
        for name, column in columns.items()
    }
    if layout != "clip-retrieval":
        with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(cells)
            writer.writerows(zip(*cells.values(), strict=True))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "metadata").mkdir()
    table = pa.table({OF_CLIP_RETRIEVAL.get(name, name): column for name, column in cells.items()})
    pq.write_table(table, folder / "metadata" / "metadata_0.parquet")
