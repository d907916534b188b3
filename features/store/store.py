"""Read a feature cache: what made it, its rows, its embeddings.

Knows h5py and the schema. Must not know how embeddings are computed or what is trained on them.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.places import no_such_cache
from deltaclip.features.data.views import CENTER, RECIPES
from deltaclip.features.store.checksums import damage_words, damaged_rows
from deltaclip.features.store.near import near_copies
from deltaclip.features.store.problems import find_problem, read_recipe
from deltaclip.features.store.reading import pieces
from deltaclip.features.store.rows import Rows, read_rows, usable_rows
from deltaclip.features.store.schema import (
    DONE,
    FAILED,
    PENDING,
    SCHEMA_VERSION,
    ViewLayout,
)
from deltaclip.features.store.seal import find_damage, has_seal
from deltaclip.features.store.texts import Texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

Kind = Literal["images", "texts"]
ANEW = "give another path, or remove it and extract again"


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
            reason = str(error).splitlines()[0]
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
        """Return width and recipe of every view."""
        return {
            name: ViewLayout(
                width=self.group("images", name)["embedding"].shape[1], recipe=read_recipe(self._file, name)
            )
            for name in self.view_names()
        }

    def group(self, kind: Kind, view: str = CENTER) -> Any:
        """Return the group with `embedding` (K, W), `norm` and `status` (K,) of a view of the images, or of texts."""
        group = self._file[f"views/{view}"] if kind == "images" else self._file["texts"]
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
        there = self.view_names()
        return all(name in there and not (self.status(name) == PENDING).any() for name in names)

    def check_view(self, name: str) -> None:
        """Refuse to read a view that some usable image lacks.

        Raises:
            UserError: with the number of images, or the views that there are.
        """
        there, usable = self.view_names(), self.status() == DONE
        if name not in there and name not in RECIPES:
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
