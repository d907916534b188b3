"""Read a feature cache: what made it, its rows, its embeddings. Spec section 6.

Knows h5py and the schema. Must not know how embeddings are computed or what is trained on them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.store.schema import (
    CODE_COLUMNS,
    DONE,
    FAILED,
    FORMAT,
    NUMBER_COLUMNS,
    SCHEMA_VERSION,
    VIEW,
)

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

Kind = Literal["images", "texts"]
ANEW = "give another path, or remove it and extract again"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The usable rows of a cache: those whose image has an embedding.

    `image`, `prompt`, `explanation` (N,) int64 index the embeddings (-1: no explanation); `numbers` (N,) float32
    labels in [0, 1] and their SDs, NaN where missing; `text` columns (N,) str: file, prompt, group, source, split.
    """

    image: NDArray[np.int64]
    prompt: NDArray[np.int64]
    explanation: NDArray[np.int64]
    numbers: dict[str, NDArray[np.float32]]
    text: dict[str, NDArray[np.object_]]

    def __len__(self) -> int:
        return len(self.image)


class FeatureStore:
    """A feature cache opened for reading."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._file = path, file

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
            raise UserError("no such cache", place=path, remedy="make it with `deltaclip extract`")
        try:
            # Finished caches never change in place (they are replaced by a rename), so readers need no HDF5 lock,
            # which fails on some network file systems.
            file = h5py.File(path, "r", locking=False)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"is no readable HDF5 file ({reason})", place=path, remedy=ANEW) from error
        problem = _problem(file, unfinished=unfinished)
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

    def group(self, kind: Kind) -> h5py.Group:
        """Return the group with `embedding` (K, D), `norm` (K,) and `status` (K,) of images or texts."""
        return self._file[f"views/{VIEW}"] if kind == "images" else self._file["texts"]

    def keys(self, kind: Kind) -> NDArray[np.uint8]:
        """Return the content addresses, (K, 32) uint8."""
        return np.asarray(self._file[f"{kind}/sha256"])

    def reasons(self) -> list[str]:
        """Return why each image has no embedding, '' where it has one, I texts."""
        return [bytes(reason).decode(errors="replace") for reason in self._file["images/reason"][:]]

    def failed(self) -> list[tuple[str, str]]:
        """Return (file, reason) of every image that could not be read."""
        entries = np.flatnonzero(self.group("images")["status"][:] == FAILED)
        files, reasons = self._file["images/file"].asstr(), self.reasons()
        return [(str(files[int(entry)]), reasons[int(entry)]) for entry in entries]

    def truncated(self) -> NDArray[np.bool_]:
        """Tell which texts were cut at the context length, (T,) bool."""
        return np.asarray(self._file["texts/truncated"], dtype=bool)

    def texts(self) -> NDArray[np.object_]:
        """Return the distinct texts, (T,) str."""
        return np.asarray(self._file["texts/text"].asstr()[:], dtype=object)

    def embeddings(self, kind: Kind) -> NDArray[np.floating]:
        """Return all embeddings of a kind as stored, (K, D) float32 or float16, L2 norm 1, 0 where there is none."""
        return np.asarray(self.group(kind)["embedding"])

    def norms(self) -> NDArray[np.float32]:
        """Return the lengths that the image embeddings had before they were normalised, (I,) float32."""
        return np.asarray(self.group("images")["norm"])

    def rows(self) -> Rows:
        """Return the rows whose image has an embedding, in manifest order."""
        rows = self._file["rows"]
        image = np.asarray(rows["image"])
        usable = np.flatnonzero(self.group("images")["status"][:][image] == DONE)
        prompt = np.asarray(rows["prompt"])[usable]
        text = {
            "file": np.asarray(rows["file"].asstr()[:], dtype=object)[usable],
            "prompt": self.texts()[prompt],
        }
        for column in CODE_COLUMNS:
            names = np.array([*self._file[f"names/{column}"].asstr()[:], ""], dtype=object)  # code -1 is the last one
            text[column] = names[np.asarray(rows[column])[usable]]
        return Rows(
            image=image[usable],
            prompt=prompt,
            explanation=np.asarray(rows["explanation"])[usable],
            numbers={column: np.asarray(rows[column])[usable] for column in NUMBER_COLUMNS},
            text=text,
        )


_EMBEDDED = ("embedding", "norm", "status")
_LENGTHS = {  # datasets that have one length
    "rows": [f"rows/{name}" for name in ("image", "prompt", "explanation", "file", *NUMBER_COLUMNS, *CODE_COLUMNS)],
    "images": [*(f"views/{VIEW}/{name}" for name in _EMBEDDED), "images/sha256", "images/file", "images/reason"],
    "texts": [f"texts/{name}" for name in (*_EMBEDDED, "sha256", "text", "truncated")],
}


def _problem(file: h5py.File, *, unfinished: bool) -> str | None:
    if file.attrs.get("format") != FORMAT:
        return "is no deltaclip cache"
    version = file.attrs.get("schema_version", 0)
    if version != SCHEMA_VERSION:
        return f"has schema version {version}, this release reads {SCHEMA_VERSION}"
    if "header" not in file.attrs or not (unfinished or file.attrs.get("complete")):
        return "is not complete"
    return _broken_words(file) or _broken_lengths(file) or _broken_indices(file)


def _broken_words(file: h5py.File) -> str | None:
    needed = {"header": {"request", "plan"}, "facts": {"dim", "precision"}, "dataset": {"name", "label_ranges"}}
    for name, parts in needed.items():
        try:
            found = json.loads(file.attrs[name])
        except (KeyError, TypeError, ValueError):
            found = None
        if not isinstance(found, dict) or not parts <= found.keys():
            return f"is damaged ({name})"
    return None


def _broken_lengths(file: h5py.File) -> str | None:
    for kind, names in _LENGTHS.items():
        wrong = [name for name in names if not isinstance(file.get(name), h5py.Dataset) or not file[name].shape]
        wrong = wrong or [name for name in names if len(file[name]) != len(file[names[0]])]
        if wrong:
            return f"is damaged ({kind}: no {wrong[0]} of the right length)"
    widths = [file[name].shape[1:] for name in (f"views/{VIEW}/embedding", "texts/embedding")]
    return None if len(widths[0]) == 1 and widths[0] == widths[1] else "is damaged (width of the embeddings)"


def _broken_indices(file: h5py.File) -> str | None:
    num_images, num_texts = len(file["images/file"]), len(file["texts/text"])
    limits = {"image": (0, num_images), "prompt": (0, num_texts), "explanation": (-1, num_texts)}
    for column in CODE_COLUMNS:
        if not isinstance(file.get(f"names/{column}"), h5py.Dataset):
            return f"is damaged (no names/{column})"
        limits[column] = (-1, len(file[f"names/{column}"]))
    for column, (first, end) in limits.items():
        values = np.asarray(file[f"rows/{column}"])
        if ((values < first) | (values >= end)).any():
            return f"is damaged (rows/{column} is out of range)"
    return None
