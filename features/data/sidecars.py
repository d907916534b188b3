"""What is known of loose pictures: the files beside them by name, and what the pictures say of themselves.

`NAME.txt` or `NAME.caption` is the prompt of `NAME.png`, `NAME.json` an object with its columns. Knows names and small
files. Must not know whether they lie in a folder or in an archive.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.progress import Progress
from deltaclip.features.data.cells import as_column, sharing
from deltaclip.features.data.manifest import ALIASES, plain_name
from deltaclip.features.data.own_prompts import own_prompt
from deltaclip.features.data.table import Part, Table, json_reason
from deltaclip.features.data.text import decoded

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

TEXTS, OBJECT = (".txt", ".caption"), ".json"
PROMPTS = frozenset(plain_name(name) for name in ALIASES["prompt"])
OWN, NO_PROMPT = "the pictures themselves", "none"


@dataclass
class Known:
    """What was found of N pictures.

    `prompts` are '' where there is none; `values` are by column of the objects, None without; `used` are the names of
    the files that were read; `origins` counts where prompts come from, `differing` those whose object has another,
    `encodings` files in another than UTF-8.
    """

    prompts: list[str] = field(default_factory=list)
    values: dict[str, list[Any]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    origins: Counter[str] = field(default_factory=Counter)
    differing: int = 0
    encodings: Counter[str] = field(default_factory=Counter)

    def text_of(self, content: bytes, place: str) -> str:
        """Return what a file beside a picture says, and count those that are not in UTF-8."""
        text, encoding = decoded(content, place)
        self.encodings.update([encoding] if encoding else [])
        return text.strip()

    def notes(self) -> list[str]:
        """Say where the prompts come from."""
        if not self.prompts:
            return []
        found = {origin: count for origin, count in self.origins.items() if origin != NO_PROMPT}
        words = [", ".join(f"{count:,} from {origin}" for origin, count in found.items())] if found else []
        notes = [f"prompts: {words[0]}"] if words else []
        if self.differing:
            notes.append(f"{self.differing:,} pictures have another prompt in NAME.json than in NAME.txt, which counts")
        named = (
            ("Windows-1252" if name == "cp1252" else name.upper(), count) for name, count in self.encodings.items()
        )
        return [*notes, *(f"{count:,} files beside pictures are read as {name}" for name, count in named)]


def find_known(
    images: Sequence[str],
    names: Collection[str],
    *,
    read: Callable[[str], bytes],
    look: Callable[[str], AbstractContextManager[IO[bytes]]],
    place: Callable[[str], str],
) -> Known:
    """Find what is known of pictures.

    Args:
        images: their names, with `/` between folders.
        names: of all files beside them.
        read: returns the bytes of a file beside them.
        look: opens a picture; None-like failures are those of `OSError`.
        place: what a file beside them is called in messages.

    Raises:
        UserError: a text that is no UTF-8, or an object that is none.
    """
    found, share = Known(), sharing()
    with Progress(len(images), "reading prompts", unit="pictures") as progress:
        for row, image in enumerate(images):
            text, record = _text_beside(image, names), _object_beside(image, names)
            found.used |= {name for name in (text, record) if name}
            prompt = found.text_of(read(text), place(text)) if text else ""
            fields = _object(found.text_of(read(record), place(record)), place(record)) if record else {}
            said = next((value.strip() for name, value in fields.items() if _is_prompt(name, value)), "")
            found.differing += bool(prompt and said and prompt != said)
            origin = "NAME.txt" if prompt else "NAME.json" if said else NO_PROMPT
            prompt = prompt or said
            if not prompt and (own := _own(image, look)) is not None:
                prompt, origin = own.prompt, f"{OWN} ({own.program})"
            found.origins[origin] += 1
            found.prompts.append(share(prompt))
            _add_fields(found.values, fields, row)
            progress.advance()
    return found


def _add_fields(values: dict[str, list[Any]], fields: dict[str, Any], row: int) -> None:
    for name, value in fields.items():
        if plain_name(name) not in PROMPTS:
            values.setdefault(name, [None] * row).append(value)
    for column in values.values():
        column.extend([None] * (row + 1 - len(column)))


def picture_table(path: Path, images: Sequence[str], known: Known, *, folder: Path, notes: Sequence[str] = ()) -> Table:
    """Return the pictures of a folder or an archive as a table; each row is named by its picture.

    Args:
        path: the folder or archive.
        images: N paths relative to `folder`.
        known: what is known of them.
        folder: the folder itself, or that of the archive.
        notes: what is to be said besides.
    """
    columns = {name: as_column(values) for name, values in known.values.items() if name.casefold() != "image"}
    cells = {name: column.cells for name, column in columns.items()}
    cells["prompt"] = known.prompts
    return Table(
        path,
        {"image": list(images), **cells},
        list(range(1, len(images) + 1)),
        "",
        {name: column.odd for name, column in columns.items() if column.odd},
        {name: column.number for name, column in columns.items() if column.number is not None},
        (*notes, *known.notes()),
        parts=(Part(0, folder, ""),),
    )


def _own(image: str, look: Callable[[str], AbstractContextManager[IO[bytes]]]) -> Any:
    from deltaclip.features.data.sources import UnreadableImage

    try:
        with look(image) as file:
            return own_prompt(file)
    except (UnreadableImage, OSError):  # whoever reads the picture says so
        return None


def _is_prompt(name: str, value: object) -> bool:
    return plain_name(name) in PROMPTS and isinstance(value, str) and bool(value.strip())


def _stems(image: str) -> list[str]:
    """Return what a file beside a picture may begin with: the name without its suffix, all of it, the key of a shard.

    A key ends at the first dot of a name: `7.left.png` has `7.txt`.
    """
    folder, name = posixpath.split(image)
    key = posixpath.join(folder, name.partition(".")[0])
    return list(dict.fromkeys([posixpath.splitext(image)[0], image, *([key] if not name.startswith(".") else [])]))


def _text_beside(image: str, names: Collection[str]) -> str | None:
    return next((name for stem in _stems(image) for end in TEXTS if (name := stem + end) in names), None)


def _object_beside(image: str, names: Collection[str]) -> str | None:
    return next((name for stem in _stems(image) if (name := stem + OBJECT) in names), None)


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON ({json_reason(error)})", place=place, remedy="write it again") from error
    if not isinstance(found, dict):
        raise UserError("is no JSON object", place=place, remedy="give one object with the columns of its picture")
    return found
