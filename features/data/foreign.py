"""Embeddings that another program computed, row by row: clip-retrieval's folders, plain npy, safetensors.

Knows those layouts. Must not know caches, backbones or what a column means. `docs/cache.md` has them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import refuse_other
from deltaclip.features.data.manifest import find_columns
from deltaclip.features.data.table import Table, read_table
from deltaclip.features.data.targets import recorded_targets
from deltaclip.features.data.views import CENTER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.base.vocabulary import Target
    from deltaclip.features.data.targets import AskedTarget


IMAGES_NPY, TEXTS_NPY, TENSORS, TABLE, ABOUT = (
    "images.npy",
    "texts.npy",
    "embeddings.safetensors",
    "table.csv",
    "about.json",
)
KINDS = {"img_emb": ".npy", "text_emb": ".npy", "metadata": ".parquet"}  # folders of clip-retrieval's layout
AGAIN = "write it again"


class Vectors:
    """N vectors of width D that lie in several arrays, one after another; read in blocks, never all at once."""

    def __init__(self, parts: Sequence[NDArray[Any]], places: Sequence[str]) -> None:
        self._parts, self._places = parts, places
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def width(self) -> int:
        """Width D of the vectors."""
        return int(self._parts[0].shape[1])

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return some rows, in any order, (B, D) float64."""
        found = np.empty((len(rows), self.width))
        of_part = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(of_part):
            here = of_part == number
            found[here] = self._parts[number][rows[here] - self._first(number)]
        return found

    def place(self, row: int) -> str:
        """Name one row in an error message: its file, and its number there, from 1."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return f"{self._places[number]}, row {row - self._first(number) + 1}"

    def _first(self, number: int) -> int:
        return int(self._ends[number]) - len(self._parts[number])


@dataclass(frozen=True)
class Source:
    """N rows: `images` and `texts` of one width, and the `table` that says what they are of.

    The text of a row without a prompt may be anything, and is 0 where nothing was given.
    """

    layout: str
    images: Vectors
    texts: Vectors
    table: Table
    targets: tuple[Target, ...] = ()  # that the folder says its table has labels of


def read_source(
    path: Path, *, texts: Path | None = None, table: Path | None = None, targets: Sequence[AskedTarget] = ()
) -> Source:
    """Open embeddings and their table.

    Args:
        path: a folder of clip-retrieval, a folder that `inspect --export` wrote, an npy file of images, or a
            safetensors file with the tensors `images` and `texts`.
        texts: npy file of texts, for an npy file of images.
        table: manifest whose rows are those of the embeddings; where the source has one of its own, instead of that.
        targets: those that were asked for beside the known ones.

    Raises:
        UserError: unknown layout, a missing or damaged file, widths or numbers of rows that disagree.
    """
    said = _read_about(path / ABOUT)
    return replace(_opened(path, texts, table, targets), targets=said)


def _opened(path: Path, texts: Path | None, table: Path | None, targets: Sequence[AskedTarget]) -> Source:
    if (path / "img_emb").is_dir():
        return _clip_retrieval(path, texts, table, targets)
    if path.is_dir() and (path / IMAGES_NPY).is_file():
        return _npy(path / IMAGES_NPY, texts or path / TEXTS_NPY, table or path / TABLE)
    if path.is_dir() and (path / TENSORS).is_file():
        return _safetensors(path / TENSORS, texts, table or path / TABLE)
    if path.is_file() and path.suffix in {".npy", ".safetensors"}:
        if table is None:
            raise UserError("says not what its rows are of", place=path, remedy="give --manifest with one line a row")
        return _npy(path, texts, table) if path.suffix == ".npy" else _safetensors(path, texts, table)
    message = "holds no embeddings in a known layout" if path.exists() else "no such file or folder"
    raise UserError(message, place=path, remedy="give a folder with img_emb/, an .npy or a .safetensors file")


def _read_about(about: Path) -> tuple[Target, ...]:
    """Return the targets that a folder of ours says it has; refuse one of another view."""
    # Only a folder that we wrote says what its vectors are: crops or mirror images must not pass for CLIP's own view.
    if not about.is_file():
        return ()
    try:
        said = json.loads(about.read_text(encoding="utf-8"))
        view = said["view"]
    except (ValueError, KeyError, TypeError) as error:
        refuse_other(about, {"json", "text"}, what="JSON file")
        raise UserError("does not say which view it is of", place=about, remedy="export it again") from error
    if view != CENTER:
        raise UserError(f"says that this is the view {view}", place=about, remedy=f"export the view {CENTER}")
    try:
        return recorded_targets(said.get("dataset", {}))
    except (TypeError, UserError) as error:
        raise UserError("does not say which targets it has", place=about, remedy="export it again") from error


def _clip_retrieval(folder: Path, texts: Path | None, table: Path | None, targets: Sequence[AskedTarget]) -> Source:
    _refuse_texts(folder, texts)
    needed = [kind for kind in KINDS if table is None or kind != "metadata"]
    files = {kind: _numbered(folder / kind, KINDS[kind]) for kind in needed}
    first, numbers = files["img_emb"], [*files["img_emb"]]
    for kind, found in files.items():
        for number in dict.fromkeys([*numbers, *found]):
            if number not in found:
                raise UserError(f"no part {number}, which {first[number]} has", place=folder / kind, remedy=AGAIN)
            if number not in first:
                raise UserError(f"is a part that {folder / 'img_emb'} lacks", place=found[number], remedy=AGAIN)
    parts = {kind: [_read_npy(files[kind][number]) for number in numbers] for kind in ("img_emb", "text_emb")}
    tables = [] if table else [read_table(files["metadata"][number]) for number in numbers]
    for place, number in enumerate(numbers):
        rows = {files[kind][number]: len(parts[kind][place]) for kind in parts}
        if tables:
            rows[tables[place].path] = len(tables[place].lines)
        _same_rows(rows)
    vectors = {kind: _joined(parts[kind], [files[kind][number] for number in numbers]) for kind in parts}
    rows_of = read_table(table) if table else _joined_tables(folder / "metadata", tables, targets)
    return _checked(Source("clip-retrieval", vectors["img_emb"], vectors["text_emb"], rows_of), folder)


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Return the parts of a folder by number, rising: part 10 comes after part 9, however many zeros they have."""
    pattern = re.compile(rf"{folder.name}_(\d+)\{suffix}")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (name := pattern.fullmatch(path.name)) is not None:
            if int(name[1]) in found:
                raise UserError(f"has the number of {found[int(name[1])].name}", place=path, remedy="remove one")
            found[int(name[1])] = path
    if not found:
        remedy = "images and texts are both needed" if suffix == ".npy" else "give --manifest with one line a row"
        raise UserError(f"no {folder.name}_0{suffix}", place=folder, remedy=remedy)
    return dict(sorted(found.items()))


def _joined_tables(place: Path, tables: Sequence[Table], targets: Sequence[AskedTarget]) -> Table:
    names = [*tables[0].columns]
    for table in tables[1:]:
        if [*table.columns] != names:
            message = f"has the columns {', '.join(table.columns)}, {tables[0].path.name} has {', '.join(names)}"
            raise UserError(message, place=table.path, remedy=AGAIN)
    for table in tables:
        for name in names:
            if name in find_columns(table, targets).values():
                table.values(name)  # in the file that has it, rather than in a row of all
    columns = {name: [cell for table in tables for cell in table.columns[name]] for name in names}
    first = np.cumsum([0, *(len(table.lines) for table in tables)]).tolist()
    numbers = {
        name: first[i] + row for i, table in reversed([*enumerate(tables)]) for name, row in table.numbers.items()
    }
    return Table(place, columns, list(range(1, first[-1] + 1)), "row", numbers=numbers)


def _npy(images: Path, texts: Path | None, table: Path) -> Source:
    rows, of_images = read_table(table), _read_npy(images)
    if texts is not None:
        of_texts = _read_npy(texts)
    elif "prompt" in find_columns(rows):
        raise UserError("holds images alone", place=images, remedy="give --texts with the npy file of the texts")
    else:  # images alone, as their table says too
        of_texts = np.broadcast_to(np.zeros((1, of_images.shape[1]), of_images.dtype), of_images.shape)
    vectors = [_joined([of_images], [images]), _joined([of_texts], [texts or images])]
    return _checked(Source("npy", vectors[0], vectors[1], rows), images, texts)


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError("no such file", place=path, remedy="check the path") from None
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        refuse_other(path, {"npy"}, what="npy file")
        raise UserError(f"is no readable npy file ({str(error).splitlines()[0]})", place=path, remedy=AGAIN) from error
    return _matrix(found, str(path))


def _safetensors(path: Path, texts: Path | None, table: Path) -> Source:
    from safetensors import SafetensorError, safe_open

    _refuse_texts(path, texts)
    try:
        with safe_open(path, framework="np") as file:
            missing = [name for name in ("images", "texts") if name not in file.keys()]  # noqa: SIM118 - no mapping
            if missing:
                message = f"has no tensor {missing[0]!r}, only {', '.join(sorted(file.keys()))}"
                raise UserError(message, place=path, remedy="call them images and texts")
            found = {name: _matrix(file.get_tensor(name), f"{path}, {name}") for name in ("images", "texts")}
    except (SafetensorError, TypeError) as error:
        refuse_other(path, {"safetensors"}, what="safetensors file")
        raise UserError(f"is no readable safetensors file ({error})", place=path, remedy=AGAIN) from error
    vectors = [Vectors([part], [f"{path}, {name}"]) for name, part in found.items()]
    return _checked(Source("safetensors", vectors[0], vectors[1], read_table(table)), path)


def _refuse_texts(path: Path, texts: Path | None) -> None:
    if texts is not None:
        raise UserError(f"{path} has texts of its own", place="--texts", remedy="leave the option out")


def _matrix(found: Any, place: str) -> NDArray[Any]:
    if not isinstance(found, np.ndarray) or found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
        kind = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise UserError(f"holds {kind}", place=place, remedy="rows of vectors in 16, 32 or 64 bits are needed")
    return found


def _joined(parts: Sequence[NDArray[Any]], paths: Sequence[Path]) -> Vectors:
    for part, path in zip(parts, paths, strict=True):
        if part.shape[1] != parts[0].shape[1]:
            message = f"has vectors of width {part.shape[1]}, {paths[0]} of {parts[0].shape[1]}"
            raise UserError(message, place=path, remedy=AGAIN)
    return Vectors(parts, [str(path) for path in paths])


def _checked(source: Source, images: Path, texts: Path | None = None) -> Source:
    _same_rows(
        {
            images: len(source.images),
            texts or f"texts of {images.name}": len(source.texts),
            source.table.path: len(source.table.lines),
        }
    )
    if source.images.width != source.texts.width:
        message = f"has vectors of width {source.images.width}, the texts of {source.texts.width}"
        raise UserError(message, place=images, remedy="both must come from one model")
    return source


def _same_rows(rows: dict[Path | str, int] | dict[Path, int]) -> None:
    (first, count), *others = rows.items()
    for place, found in others:
        if found != count:
            message = f"has {found:,} rows, {first} has {count:,}"
            raise UserError(message, place=place, remedy="rows of one number must be of one pair")
    if not count:
        raise UserError("has no rows", place=first, remedy="give embeddings of at least one image")
