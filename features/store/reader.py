"""Read a feature cache: what made it, its rows with labels and texts, its embeddings; or what is wrong with its layout.

Vectors of chosen rows are read in few calls of bounded size: datasets are contiguous, and what a call costs beside the
bytes is about 0.1 ms. Knows h5py and the schema. Must not know how embeddings are computed or what is trained on them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.places import no_such_cache, refuse_no_cache
from deltaclip.features.data.targets import recorded_targets
from deltaclip.features.data.views import ANCHORS, CENTER, RECIPES, of_images
from deltaclip.features.store.integrity import damage_words, damaged_rows, find_damage, has_seal
from deltaclip.features.store.near import near_copies
from deltaclip.features.store.schema import (
    CODE_COLUMNS,
    DONE,
    FAILED,
    FORMAT,
    PENDING,
    READABLE_VERSIONS,
    SCHEMA_VERSION,
    StoredPairs,
    ViewLayout,
    number_columns,
)
from deltaclip.features.store.texts import TextColumn, Texts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import ExitStack
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from deltaclip.base.vocabulary import Target


# ---- Read a feature cache: what made it, its rows, its embeddings


Kind = Literal["images", "texts", "anchors"]
ANEW = "give another path, or remove it and extract again"
PAIR_COLUMNS = ("a", "b", "preferred", "target")


class FeatureStore:
    """A feature cache opened for reading."""

    def __init__(
        self,
        path: Path,
        file: h5py.File,
        *,
        vectors: Mapping[tuple[Kind, str], Any] = MappingProxyType({}),
        opened: ExitStack | None = None,
    ) -> None:
        """Read `file`, but embeddings from `vectors` where they lie elsewhere; `opened` is closed with the file."""
        self.path, self._file, self._vectors, self._opened = path, file, vectors, opened

    @classmethod
    def open(cls, path: Path, *, unfinished: bool = False) -> FeatureStore:
        """Open a cache.

        Args:
            path: the file.
            unfinished: accept the file of an interrupted run, to take over what it holds.

        Raises:
            UserError: no such file, not a cache, another schema version, damaged or not complete.
        """
        if not path.is_file():
            raise no_such_cache(path)
        if damage := find_damage(path):
            raise UserError(damage, place=path, remedy=ANEW)
        try:
            # Finished caches never change in place (they are replaced by a rename), so readers need no HDF5 lock,
            # which fails on some network file systems.
            file = h5py.File(path, "r", locking=False)
        except OSError as error:
            refuse_no_cache(path)
            reason = str(error).splitlines()[0] if path.stat().st_size else "it is empty"
            raise UserError(f"is no readable HDF5 file ({reason})", place=path, remedy=ANEW) from error
        problem = find_problem(file, unfinished=unfinished, has_seal=has_seal(path))
        if problem:
            file.close()
            raise UserError(problem, place=path, remedy=ANEW)
        return cls(path, file)

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._opened:
            self._opened.close()

    @property
    def header(self) -> dict[str, Any]:
        """What was asked for: `request` (the backbone's identity) and `plan` (the digest of the rows)."""
        return dict(json.loads(self._file.attrs["header"]))

    @property
    def facts(self) -> dict[str, Any]:
        """All that changes an embedding, as the backbone said it, with library versions."""
        return dict(json.loads(self._file.attrs["facts"]))

    @property
    def dataset(self) -> dict[str, Any]:
        """Name and label ranges of the data set."""
        return dict(json.loads(self._file.attrs["dataset"]))

    @property
    def targets(self) -> tuple[Target, ...]:
        """The targets that rows have labels of."""
        return recorded_targets(self.dataset)

    @property
    def num_rows(self) -> int:
        """Rows of the manifest, those without a readable image included."""
        return len(self._file["rows/image"])

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return int(self.group("images")["embedding"].shape[1])

    @property
    def schema_version(self) -> int:
        """Version of the layout that the file has."""
        return int(self._file.attrs["schema_version"])

    def view_names(self) -> list[str]:
        """Return the views that the images have, `center` first."""
        return [CENTER, *(name for name in self._file["views"] if name != CENTER)]

    def view_layouts(self) -> dict[str, ViewLayout]:
        """Return width and recipe of every view, of the anchors too."""
        groups = {name: self.group("images", name) for name in self.view_names()}
        groups |= {ANCHORS: self.group(ANCHORS)} if ANCHORS in self._file else {}
        return {
            name: ViewLayout(width=group["embedding"].shape[1], recipe=read_recipe(self._file, name))
            for name, group in groups.items()
        }

    def group(self, kind: Kind, view: str = CENTER) -> Any:
        """Return the group with `embedding` (K, W), `norm` and `status` (K,) of a view of the images, or of others."""
        group = self._file[f"views/{view}" if kind == "images" else kind]
        vectors = self._vectors.get((kind, view))
        return group if vectors is None else dict(group) | {"embedding": vectors}

    @property
    def is_current(self) -> bool:
        """Tell whether the file has the layout that this release writes."""
        return self.schema_version == SCHEMA_VERSION

    @property
    def is_complete(self) -> bool:
        """Tell a finished cache from an interrupted run."""
        return bool(self._file.attrs["complete"])

    def check_vectors(
        self, vectors_BW: NDArray[Any], kind: Kind, *, view: str = CENTER, rows: slice | NDArray[np.int64] = slice(None)
    ) -> None:
        """Refuse vectors that are not what was computed; a cache of version 1 has nothing to tell by.

        Args:
            vectors_BW: as read from the group's `embedding`.
            kind: images or texts.
            view: of images.
            rows: which rows these are, a slice or indices in any order.

        Raises:
            UserError: with the number of damaged rows and the first of them.
        """
        group = self.group(kind, view)
        if "crc32" not in group or not len(vectors_BW):
            return
        # Only the part of the small columns that is about these rows: a reader of blocks asks often.
        first = 0 if isinstance(rows, slice) else int(rows.min())
        part, inside = (
            (rows, slice(None)) if isinstance(rows, slice) else (slice(first, int(rows.max()) + 1), rows - first)
        )
        damaged = damaged_rows(vectors_BW, group["crc32"][part][inside], group["status"][part][inside])
        if damaged.size:
            row = int(np.arange(len(group["status"]))[part][inside][damaged[0]])
            raise UserError(damage_words(group, damaged.size, row), place=self.path, remedy=ANEW)

    def status(self, view: str = CENTER) -> NDArray[np.uint8]:
        """Return of each image whether a view of it is to do, done or failed, (I,) uint8."""
        return np.asarray(self.group("images", view)["status"])

    def holds_views(self, names: Sequence[str]) -> bool:
        """Tell whether nothing is left to do for these views."""
        there = self.view_layouts()
        groups = {name: self.group(ANCHORS) if name == ANCHORS else self.group("images", name) for name in there}
        return all(name in there and not (groups[name]["status"][:] == PENDING).any() for name in names)

    def check_view(self, name: str) -> None:
        """Refuse to read a view that some usable image lacks.

        Raises:
            UserError: with the number of images, or the views that there are.
        """
        there, usable = self.view_names(), self.status() == DONE
        if name not in there and name not in of_images(RECIPES):
            raise UserError(f"has no view {name!r}", place=self.path, remedy=did_you_mean(name, there))
        lacking = usable.sum() if name not in there else (usable & (self.status(name) != DONE)).sum()
        if lacking:
            remedy = f"give --views {name} to `deltaclip extract`"
            raise UserError(f"has no view {name} for {lacking:,} images", place=self.path, remedy=remedy)

    def keys(self, kind: Kind) -> NDArray[np.uint8]:
        """Return the content addresses, (K, 32) uint8."""
        return np.asarray(self._file[f"{kind}/sha256"])

    def reasons(self) -> list[str]:
        """Return why each image has no embedding, '' where it has one, I texts."""
        return [bytes(reason).decode(errors="replace") for reason in self._file["images/reason"][:]]

    def failed(self) -> list[tuple[str, str]]:
        """Return (file, reason) of every image that could not be read."""
        files, reasons = self._file["images/file"].asstr(), self._file["images/reason"]
        entries = np.flatnonzero(self.group("images")["status"][:] == FAILED).tolist()
        return [(str(files[entry]), bytes(reasons[entry]).decode(errors="replace")) for entry in entries]

    def more_frames(self) -> NDArray[np.bool_]:
        """Tell of which images the file has more frames than the one that was taken, (I,) bool.

        A cache of before this was asked has False everywhere.
        """
        if "images/more_frames" not in self._file:
            return np.zeros(len(self.status()), dtype=bool)
        return np.asarray(self._file["images/more_frames"], dtype=bool)

    def truncated(self) -> NDArray[np.bool_]:
        """Tell which texts were cut at the context length, (T,) bool."""
        return np.asarray(self._file["texts/truncated"], dtype=bool)

    def tokens(self) -> NDArray[np.uint64]:
        """Return what stands for the tokens of each text, (T,) uint64: equal where the tower is given the same ones.

        0 where nobody knows: in imported caches, and in those of before this was kept.
        """
        if "texts/tokens" not in self._file:
            return np.zeros(len(self.truncated()), dtype=np.uint64)
        return np.asarray(self._file["texts/tokens"], dtype=np.uint64)

    def texts(self) -> NDArray[np.object_]:
        """Return the distinct texts, (T,) str."""
        return np.asarray(self._file["texts/text"].asstr()[:], dtype=object)

    def embeddings(self, kind: Kind, *, view: str = CENTER) -> NDArray[np.floating]:
        """Return all embeddings of a kind as stored, (K, W) float32 or float16, 0 where there is none.

        Those of texts and of the view `center` have L2 norm 1; other views as their recipe says.

        Raises:
            UserError: a usable image lacks the view; an embedding is not what was computed.
        """
        if view != CENTER:
            self.check_view(view)
        vectors = np.asarray(self.group(kind, view)["embedding"])
        self.check_vectors(vectors, kind, view=view)
        return vectors

    def take(self, kind: Kind, entries_K: NDArray[np.int64], *, view: str = CENTER) -> NDArray[np.floating]:
        """Return some embeddings as stored, (K, W) float32 or float16; what is read is checked, as in `embeddings`.

        Args:
            kind: images or texts.
            entries_K: (K,) rising and distinct. They are read in few pieces, so neighbours cost least.
            view: of images; `check_view` says whether it has all of them.

        Raises:
            UserError: an embedding is not what was computed.
        """
        dataset = self.group(kind, view)["embedding"]
        vectors = np.empty((len(entries_K), dataset.shape[1]), dtype=dataset.dtype)
        for part, rows in pieces(entries_K, dataset.dtype.itemsize * dataset.shape[1]):
            vectors[part] = dataset[rows][entries_K[part] - rows.start]
            self.check_vectors(vectors[part], kind, view=view, rows=entries_K[part])
        return vectors

    def size_bytes(self, kind: Kind, *, view: str = CENTER) -> int:
        """Return how much all embeddings of a kind take."""
        dataset = self.group(kind, view)["embedding"]
        return int(dataset.size * dataset.dtype.itemsize)

    def norms(self, *, view: str = CENTER) -> NDArray[np.float32]:
        """Return the lengths that the image embeddings had before they were normalised, (I,) float32.

        Raises:
            UserError: a usable image lacks the view.
        """
        if view != CENTER:
            self.check_view(view)
        return np.asarray(self.group("images", view)["norm"])

    def anchors(self) -> tuple[list[str], NDArray[np.floating]] | None:
        """Return the anchor prompts and their embeddings as stored, A texts and (A, D); None where there are none.

        Raises:
            UserError: an embedding is not what was computed.
        """
        if not self.holds_views([ANCHORS]):
            return None
        return [str(text) for text in self.group(ANCHORS)["text"].asstr()[:]], self.embeddings(ANCHORS)

    def preferences(self, *, usable: bool = True) -> StoredPairs | None:
        """Return the pairs that people chose between, None where the cache has none.

        Args:
            usable: leave out pairs of which an image has no embedding; rows are then numbered as `rows()` does.
        """
        if "pairs" not in self._file:
            return None
        a_P, b_P, preferred_P, target_P = (np.asarray(self._file[f"pairs/{name}"]) for name in PAIR_COLUMNS)
        found = StoredPairs(a_P=a_P, b_P=b_P, preferred_P=preferred_P, target_P=target_P)
        if not usable:
            return found
        usable_N = usable_rows(self._file, self.status())
        kept_P, row_N = usable_N[a_P] & usable_N[b_P], np.cumsum(usable_N) - 1
        return StoredPairs(
            a_P=row_N[a_P[kept_P]],
            b_P=row_N[b_P[kept_P]],
            preferred_P=preferred_P[kept_P],
            target_P=target_P[kept_P],
        )

    def positions(self) -> NDArray[np.int64]:
        """Return the place of each row in its table, (N,); of a shard it is not the row's number here."""
        rows = self._file["rows"]
        return np.asarray(rows["position"]) if "position" in rows else np.arange(self.num_rows)

    def near_copies(self) -> list[tuple[str, str]]:
        """Return the files of the images that are near copies of one another, two and two (see `near.py`)."""
        pair_P2 = near_copies(lambda entries: self.take("images", entries), np.flatnonzero(self.status() == DONE))
        files = Texts.read(self._file["images/file"]) if len(pair_P2) else Texts.of([])
        return [(files[first], files[second]) for first, second in pair_P2.tolist()]

    def rows(self, *, usable: bool = True) -> Rows:
        """Return the rows whose image has an embedding, in manifest order; all of them where not only the `usable`."""
        return read_rows(self._file, usable_rows(self._file, self.status()) if usable else None)

    def num_usable_rows(self) -> int:
        """Return how many rows have an image with an embedding."""
        return int(usable_rows(self._file, self.status()).sum())


# ---- The rows of a cache: which embeddings they have, their labels, their texts


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a cache, by default the usable ones: those whose image has an embedding.

    `image`, `prompt`, `explanation` (N,) int64 index the embeddings (-1: no such text); `numbers` (N,) float32
    labels in [0, 1] and their SDs, NaN where missing; `text` columns: file, prompt, group, source, split.
    """

    image: NDArray[np.int64]
    prompt: NDArray[np.int64]
    explanation: NDArray[np.int64]
    numbers: dict[str, NDArray[np.float32]]
    text: dict[str, TextColumn]

    def __len__(self) -> int:
        return len(self.image)


def usable_rows(file: h5py.File, status_I: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell of every row of the manifest whether its image has an embedding, (N,) bool."""
    return np.asarray((status_I == DONE)[np.asarray(file["rows/image"])])


def read_rows(file: h5py.File, usable_N: NDArray[np.bool_] | None) -> Rows:
    """Read rows in manifest order, all or those that are usable; 85 bytes a row, and the names."""
    rows = file["rows"]
    chosen = slice(None) if usable_N is None or usable_N.all() else np.flatnonzero(usable_N)

    def column(name: str) -> NDArray[np.generic]:
        return np.asarray(rows[name])[chosen]

    prompt = np.asarray(column("prompt"), dtype=np.int64)
    text = {
        "file": TextColumn(np.arange(len(rows["file"]))[chosen], Texts.read(rows["file"])),
        "prompt": TextColumn(prompt, Texts.read(file["texts/text"])),
    }
    for name in CODE_COLUMNS:
        text[name] = TextColumn(np.asarray(column(name), dtype=np.int32), Texts.read(file[f"names/{name}"]))
    return Rows(
        image=np.asarray(column("image"), dtype=np.int64),
        prompt=prompt,
        explanation=np.asarray(column("explanation"), dtype=np.int64),
        numbers={name: np.asarray(column(name), dtype=np.float32) for name in _numbers_of(file)},
        text=text,
    )


def _numbers_of(file: h5py.File) -> list[str]:
    return number_columns(recorded_targets(json.loads(file.attrs["dataset"])))


# ---- Which parts of a dataset to read for some of its rows: few calls, each of bounded size


PIECE_BYTES = 8 << 20  # read at a time
GAP_BYTES = 256 << 10  # a gap between two rows up to which reading through it costs less than another call


def pieces(entries_K: NDArray[np.int64], row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Yield (which of the entries, which rows of the dataset to read for them); entries are rising and distinct."""
    gap, reach = max(1, GAP_BYTES // row_bytes), max(1, PIECE_BYTES // row_bytes)
    borders = [0, *(np.flatnonzero(np.diff(entries_K) > gap) + 1).tolist(), len(entries_K)]
    for first, last in pairwise(borders):
        while first < last:
            start = int(entries_K[first])
            end = first + int(np.searchsorted(entries_K[first:last], start + reach))
            yield slice(first, end), slice(start, int(entries_K[end - 1]) + 1)
            first = end  # noqa: PLW2901 - the rest of this stretch


# ---- What is wrong with the layout of a file that is said to be a feature cache, in one phrase


_ROW_COLUMNS = ("image", "prompt", "explanation", "file", *CODE_COLUMNS)


def find_problem(file: h5py.File, *, unfinished: bool, has_seal: bool) -> str | None:
    """Return why an open file is no cache that can be used, None where it is one.

    Args:
        file: any HDF5 file.
        unfinished: accept the file of an interrupted run.
        has_seal: whether there is a seal on it; version 1 had none.
    """
    if file.attrs.get("format") != FORMAT:
        return "is no deltaclip cache"
    version = file.attrs.get("schema_version", 0)
    if version not in READABLE_VERSIONS:
        *others, last = map(str, READABLE_VERSIONS)
        return f"has schema version {version}, this release reads {', '.join(others)} and {last}"
    is_finished = file.attrs.get("complete") and (has_seal or version == 1)
    if "header" not in file.attrs or not (unfinished or is_finished):
        return "is not complete"
    return _broken_words(file) or _broken_lengths(file, version) or _broken_indices(file)


def _broken_words(file: h5py.File) -> str | None:
    needed = {"header": {"request", "plan"}, "facts": {"dim", "precision"}, "dataset": {"name", "label_ranges"}}
    for name, parts in needed.items():
        try:
            found = json.loads(file.attrs[name])
        except (KeyError, TypeError, ValueError):
            found = None
        if not isinstance(found, dict) or not parts <= found.keys():
            return f"is damaged ({name})"
    try:
        recorded_targets(json.loads(file.attrs["dataset"]))
    except (TypeError, UserError):
        return "is damaged (targets)"
    return None


def _broken_lengths(file: h5py.File, version: int) -> str | None:
    of_vectors = ("embedding", "norm", "status", *(() if version == 1 else ("crc32",)))
    views = [name for name in file["views"] if name != CENTER] if isinstance(file.get("views"), h5py.Group) else []
    same_length = {
        "rows": [
            *(f"rows/{name}" for name in (*_ROW_COLUMNS, *_numbers_of(file))),
            *(["rows/position"] if "shard" in json.loads(file.attrs["header"]) else []),
        ],
        "images": [
            *(f"views/{view}/{name}" for view in (CENTER, *views) for name in of_vectors),
            *(f"images/{name}" for name in ("sha256", "file", "reason")),
            *(["images/more_frames"] if "images/more_frames" in file else []),
        ],
        "texts": [
            *(f"texts/{name}" for name in (*of_vectors, "sha256", "text", "truncated")),
            *(["texts/tokens"] if "texts/tokens" in file else []),
        ],
    }
    if ANCHORS in file:
        same_length[ANCHORS] = [f"{ANCHORS}/{name}" for name in (*of_vectors, "sha256", "text")]
    for kind, names in same_length.items():
        wrong = [name for name in names if not isinstance(file.get(name), h5py.Dataset) or not file[name].shape]
        wrong = wrong or [name for name in names if len(file[name]) != len(file[names[0]])]
        if wrong:
            return f"is damaged ({kind}: no {wrong[0]} of the right length)"
    widths = {view: file[f"views/{view}/embedding"].shape[1:] for view in (CENTER, *views)}
    if any(len(width) != 1 for width in widths.values()) or widths[CENTER] != file["texts/embedding"].shape[1:]:
        return "is damaged (width of the embeddings)"
    if ANCHORS in file:
        if file[f"{ANCHORS}/embedding"].shape[1:] != widths[CENTER]:
            return "is damaged (width of the anchors)"
        views.append(ANCHORS)
    broken = [view for view in (CENTER, *views) if not isinstance(read_recipe(file, view), dict)]
    return f"is damaged (recipe of the view {broken[0]})" if broken else None


def read_recipe(file: h5py.File, view: str) -> Any:
    """Return the recipe of a view, None where it cannot be read."""
    if file.attrs["schema_version"] == 1:
        return RECIPES[CENTER]
    try:
        return json.loads(file[ANCHORS if view == ANCHORS else f"views/{view}"].attrs["recipe"])
    except (KeyError, TypeError, ValueError):
        return None


def _broken_indices(file: h5py.File) -> str | None:
    num_images, num_texts = len(file["images/file"]), len(file["texts/text"])
    limits = {"image": (0, num_images), "prompt": (-1, num_texts), "explanation": (-1, num_texts)}
    for column in CODE_COLUMNS:
        if not isinstance(file.get(f"names/{column}"), h5py.Dataset):
            return f"is damaged (no names/{column})"
        limits[column] = (-1, len(file[f"names/{column}"]))
    for column, (first, end) in limits.items():
        values = np.asarray(file[f"rows/{column}"])
        if ((values < first) | (values >= end)).any():
            return f"is damaged (rows/{column} is out of range)"
    return _broken_pairs(file) if "pairs" in file else None


def _broken_pairs(file: h5py.File) -> str | None:
    columns = [file.get(f"pairs/{name}") for name in PAIR_COLUMNS]
    if not all(isinstance(column, h5py.Dataset) and column.ndim == 1 for column in columns):
        return "is damaged (pairs)"
    if len({len(column) for column in columns}) > 1:
        return "is damaged (pairs of unequal lengths)"
    num_targets = len(recorded_targets(json.loads(file.attrs["dataset"])))
    ends = (len(file["rows/image"]), len(file["rows/image"]), 1, num_targets)
    for name, column, end in zip(PAIR_COLUMNS, columns, ends, strict=True):
        values = np.asarray(column)
        too_large = values > end if name == "preferred" else values >= end
        if not (values >= 0).all() or too_large.any():
            return f"is damaged (pairs/{name} is out of range)"
    return None
