"""Pairs of images that people chose between, in the ways that tables write them.

A table of pairs becomes a table of single images, which is read like any other, and the numbers of its rows. Knows
tables and names of columns. Must not know files of images, caches or how anything is learned.

| columns | what is preferred |
|---|---|
| `image_a, image_b, preferred`, also `image_1, image_2` or `jpg_0, jpg_1` | a name, a tie, or how probably the first |
| `image_0, image_1, label_0, label_1` | shares; rows whose `has_label` is 0 are left out |
| `chosen, rejected` | the first |
| a list of images and a list `human_preference` | the higher number; all pairs of the list |
| a list of images and a list `ranking` or `rank` | the lower number; all pairs of the list |

Shapes: P pairs, N rows.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.lazy import LazySequence
from deltaclip.base.vocabulary import PREFERENCE, QUALITY, Target, known_target
from deltaclip.features.data.cells import as_column, words_of
from deltaclip.features.data.manifest import ALIASES, Manifest, manifest_from_table, plain_name
from deltaclip.features.data.numbers import read_numbers, says_nothing
from deltaclip.features.data.table import Part, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.features.data.images import ImageContent

OPTION = "--pairs-target"
# Endings of two columns that belong together, and what stands before them: `image_a`, `image_b`; `jpg_0`, `jpg_1`.
ENDINGS = (("a", "b"), ("0", "1"), ("1", "2"), ("left", "right"))
STEMS = ("image", "img", "image_path", "img_path", "jpg", "png", "image_file", "file", "filename", "path", "picture")
CHOSEN = (("chosen", "rejected"), ("image_chosen", "image_rejected"), ("chosen_image", "rejected_image"))
PREFERRED = ("preferred", "preference", "label", "winner", "choice", "human_preference", "better", "answer", "vote")
LISTS = ("image_path", "image_paths", "images", "generations", "img_path", "img_paths", "file_path", "file_paths")
HIGHER = ("human_preference", "preference", "preferences")
LOWER = ("ranking", "rank", "ranks")
FIRST, SECOND = ("a", "left", "first", "image_a"), ("b", "right", "second", "image_b")
TIES = ("tie", "tied", "equal", "both", "same", "draw", "none", "neither")
SOURCES = ("source", "model", "generator")
FALSE = ("0", "0.0", "false", "no")
PYTHONS_NONE = "None"
WAYS = "give a, b, tie, or the probability that the first is preferred"


# ---- What is read of a table


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """P pairs of rows of a manifest: `a_P` and `b_P` (P,) int64, `preferred_P` (P,) float64.

    `preferred_P` is the probability in [0, 1] that a is preferred; exactly .5 is a tie. Rows from `first_row` on were
    made for pairs: one that equals an earlier row in content and prompt is that row. `places` name the pairs in
    messages.
    """

    a_P: NDArray[np.int64]
    b_P: NDArray[np.int64]
    preferred_P: NDArray[np.float64]
    target: Target
    places: Sequence[str]
    first_row: int = 0

    def __len__(self) -> int:
        return len(self.a_P)

    def selected(self, kept_P: NDArray[np.bool_], row_of_N: NDArray[np.int64]) -> Preferences:
        """Return some of the pairs, their rows renumbered."""
        chosen = np.flatnonzero(kept_P).tolist()
        return replace(
            self,
            a_P=row_of_N[self.a_P[chosen]],
            b_P=row_of_N[self.b_P[chosen]],
            preferred_P=self.preferred_P[chosen],
            places=[self.places[pair] for pair in chosen],
        )


class PairTable(NamedTuple):
    """A table with one row for each image and prompt, and the pairs of its rows."""

    rows: Table
    a_P: NDArray[np.int64]
    b_P: NDArray[np.int64]
    preferred_P: NDArray[np.float64]
    places: Sequence[str]
    notes: tuple[str, ...]

    def said(self) -> tuple[str, ...]:
        """Return how many pairs there are, how many are ties, and what was left out."""
        tied = int((self.preferred_P == 0.5).sum())
        count = f"{len(self.a_P):,} pairs of {len(self.rows.lines):,} images, {tied:,} of them ties"
        return (count, *self.notes)


class _Columns(NamedTuple):
    """The two columns of images, with the words that name either; or one of lists, whose order is in another."""

    a: str
    b: str = ""
    ending_a: str = ""
    ending_b: str = ""
    order: str = ""
    is_higher: bool = True


def holds_pairs(table: Table) -> bool:
    """Tell whether a table is one of pairs, by its columns.

    Raises:
        UserError: it has columns of pairs beside one of single images, or only one of two.
    """
    return _find(table) is not None


def _find(table: Table) -> _Columns | None:
    by_name = {plain_name(name): name for name in reversed(table.columns)}
    if (found := _two_columns(by_name)) is not None:
        single = next((by_name[plain] for alias in ALIASES["image"] if (plain := plain_name(alias)) in by_name), None)
        if single is not None and single not in (found.a, found.b):
            message = f"mixes pairs ({found.a}, {found.b}) with single images ({single})"
            raise UserError(
                message, place=table.path, remedy="put pairs into a table of their own, and give it to --pairs"
            )
        return found
    images = _first_of_lists(table, by_name, LISTS)
    for names, is_higher in ((HIGHER, True), (LOWER, False)):
        order = _first_of_lists(table, by_name, names)
        if images is not None and order is not None:
            return _Columns(images, order=order, is_higher=is_higher)
    _refuse_half(table, by_name)
    return None


def _first_of_lists(table: Table, by_name: Mapping[str, str], names: Sequence[str]) -> str | None:
    """Return the first column of these names that holds lists."""
    found = [by_name[plain] for plain in map(plain_name, names) if plain in by_name]
    return next((name for name in found if any(isinstance(v, list) for v in table.others.get(name, {}).values())), None)


def _two_columns(by_name: Mapping[str, str]) -> _Columns | None:
    for ends, stem in itertools.product(ENDINGS, STEMS):
        for form in ("{stem}{end}", "{end}{stem}"):
            plain = [form.format(stem=plain_name(stem), end=end) for end in ends]
            if all(name in by_name for name in plain):
                return _Columns(by_name[plain[0]], by_name[plain[1]], *ends)
    for a, b in CHOSEN:
        if plain_name(a) in by_name and plain_name(b) in by_name:
            return _Columns(by_name[plain_name(a)], by_name[plain_name(b)], "chosen", "rejected")
    return None


def _refuse_half(table: Table, by_name: Mapping[str, str]) -> None:
    """Refuse a table that has one column of a pair, and nothing that stands for the other or for an image."""
    if any(plain_name(alias) in by_name for alias in ALIASES["image"]):
        return
    for first, second in (("imagea", "image_b"), ("imageb", "image_a"), ("jpg0", "jpg_1"), ("jpg1", "jpg_0")):
        if first in by_name:
            message = f"has a column {by_name[first]!r} and none for the other image of a pair"
            raise UserError(message, place=table.path, remedy=f"call it {second!r}")


def moved_images(table: Table, folder: str) -> Table:
    """Return a table of pairs whose relative paths of images lead through a folder."""
    columns = _find(table)
    assert columns is not None

    def moved(image: str) -> str:
        return image if not image or PurePosixPath(image).is_absolute() else f"{folder}/{image}"

    if columns.order:
        lists = {row: [moved(str(image)) for image in images] for row, images in table.others[columns.a].items()}
        return replace(table, others={**table.others, columns.a: lists})
    cells = {name: [moved(image) for image in table.columns[name]] for name in (columns.a, columns.b)}
    return replace(table, columns=table.columns | cells)


def read_pair_table(table: Table, *, need_labels: bool = True) -> PairTable:
    """Turn a table of pairs into one of single images, each once with its prompt.

    Args:
        table: one that `holds_pairs`.
        need_labels: False takes the images alone, whatever is said of them; there are no pairs then.

    Raises:
        UserError: no column says what is preferred, or a cell of it is not understood; a pair lacks an image or has one
            twice; no pair is left.
    """
    columns = _find(table)
    assert columns is not None
    maker = _Rows(table)
    if columns.order:
        _read_lists(table, columns, maker, need_labels=need_labels)
    else:
        _read_columns(table, columns, maker, need_labels=need_labels)
    if need_labels and not maker.pairs:
        raise UserError("has no pair with a preference", place=table.path, remedy=f"fill in the preferences: {WAYS}")
    a, b, preferred, places = zip(*maker.pairs, strict=True) if maker.pairs else ((), (), (), ())
    notes = [f"{count:,} pairs {why}: left out" for why, count in maker.left_out.items()]
    return PairTable(
        maker.table(), np.array(a, np.int64), np.array(b, np.int64), np.array(preferred, float), places, tuple(notes)
    )


class _Rows:
    """Collects the distinct images with their prompts, and the pairs of them."""

    def __init__(self, table: Table) -> None:
        self.source, self.origins = table, list[int]()
        self._numbers: dict[tuple[str, ...], int] = {}
        self._embedded: list[bool] = []
        self.pairs: list[tuple[int, int, float, str]] = []
        self.left_out: dict[str, int] = {}
        by_name = {plain_name(name): name for name in reversed(table.columns)}
        self.texts: dict[str, list[str]] = {}
        for name in ("prompt", "group", "split"):
            column = next((by_name[plain] for a in ALIASES[name] if (plain := plain_name(a)) in by_name), None)
            if column is not None:
                self.texts[name] = table.texts(column) if name == "prompt" else table.names(column)

    def row(self, image: str, origin: int, *, embedded: bool = False, source: str = "") -> int:
        key = (image, source, *(cells[origin] for cells in self.texts.values()))
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self.origins.append(origin)
            self._embedded.append(embedded)
        return self._numbers[key]

    def leave_out(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1

    def table(self) -> Table:
        source = self.source
        names = ["image", "source", *self.texts]
        columns: dict[str, list[str]] = {name: [] for name in names}
        for key in self._numbers:
            for name, value in zip(names, key, strict=True):
                columns[name].append(value)
        if not any(columns["source"]):
            del columns["source"]
        embedded = np.array(self._embedded, dtype=bool)
        return Table(
            source.path,
            columns,
            [source.lines[origin] for origin in self.origins],
            source.line_word,
            notes=source.notes,
            pictures={"image": embedded} if embedded.any() else {},
            parts=tuple(
                Part(bisect.bisect_left(self.origins, part.first), part.path, part.line_word) for part in source.parts
            ),
        )


def _read_columns(table: Table, columns: _Columns, maker: _Rows, *, need_labels: bool) -> None:
    cells = [table.images(name) for name in (columns.a, columns.b)]
    none_N = np.zeros(len(table.lines), dtype=bool)
    inside = [table.pictures.get(name, none_N) for name in (columns.a, columns.b)]
    sources = [_source_cells(table, end) for end in (columns.ending_a, columns.ending_b)]
    preferred = _preferences(table, columns) if need_labels else [None for _ in table.lines]
    for row, share in enumerate(preferred):
        for name, of in zip((columns.a, columns.b), cells, strict=True):
            if not of[row]:
                message = "is empty: of two images only one is there"
                raise UserError(message, place=table.place(row, name), remedy="fill it in or remove the row")
        if cells[0][row] == cells[1][row]:
            refuse_itself(cells[0][row], place=table.place(row, columns.b))
        a, b = (
            maker.row(of[row], row, embedded=bool(inside_N[row]), source=made_by[row] if made_by else "")
            for of, inside_N, made_by in zip(cells, inside, sources, strict=True)
        )
        if share is not None:
            maker.pairs.append((a, b, share, table.place(row, columns.b).rpartition(",")[0]))
        elif need_labels:
            maker.leave_out("have no preference")


def refuse_itself(image: str, *, place: str) -> None:
    """Refuse a pair of one image with itself."""
    message = f"{image!r} is paired with itself"
    raise UserError(message, place=place, remedy="give two images, or remove the pair")


def _source_cells(table: Table, ending: str) -> list[str] | None:
    by_name = {plain_name(name): name for name in table.columns}
    found = next((by_name[name] for stem in SOURCES if (name := f"{stem}{ending}") in by_name), None)
    return table.names(found) if found else None


def _preferences(table: Table, columns: _Columns) -> list[float | None]:
    """Return of each pair the probability that the first is preferred, None where nothing is said."""
    by_name = {plain_name(name): name for name in reversed(table.columns)}
    said = [True] * len(table.lines)
    if "haslabel" in by_name:
        said = [cell.lower() not in FALSE for cell in _cells(table, by_name["haslabel"])]
    if columns.ending_a == "chosen":
        return [1.0 if is_said else None for is_said in said]
    shares = [by_name.get(f"{stem}{end}") for stem in ("label",) for end in (columns.ending_a, columns.ending_b)]
    if all(shares):
        return _from_shares(table, [str(name) for name in shares], said)
    column = next((by_name[plain] for name in PREFERRED if (plain := plain_name(name)) in by_name), None)
    if column is None:
        message, remedy = "has pairs of images and no column 'preferred'", "add it: a, b, tie, or a probability"
        raise UserError(message, place=table.path, remedy=remedy)
    return _from_words(table, column, columns, said)


def _cells(table: Table, column: str) -> list[str]:
    """Return cells, truth values as 1 and 0, '' where a word stands for no value.

    Raises:
        UserError: one is neither text, number nor truth value.
    """
    others, odd = table.others.get(column, {}), table.odd.get(column)
    truths = {row: value for row, value in others.items() if isinstance(value, bool)}
    if odd is not None and odd.count > len(truths):
        row = odd.row if odd.row not in truths else min(others.keys() - truths.keys(), default=odd.row)
        words = words_of(others[row]) if row in others else odd.words
        raise UserError(f"holds {words}, no preference", place=table.place(row, column), remedy=WAYS)
    cells = [str(int(truths[row])) if row in truths else cell for row, cell in enumerate(table.columns[column])]
    # A word that may be a tie as well is left for whoever knows that.
    return ["" if says_nothing(cell) and plain_name(cell) not in TIES else cell for cell in cells]


def _from_shares(table: Table, names: Sequence[str], said: Sequence[bool]) -> list[float | None]:
    found: list[float | None] = []
    numbers = [read_numbers(_cells(table, name)) for name in names]
    for name, of in zip(names, numbers, strict=True):
        for row, why in of.wrong.items():
            raise UserError(why, place=table.place(row, name), remedy="give 1 and 0, or .5 and .5 for a tie")
    first, second = (of.values for of in numbers)
    for row, (is_said, one, other) in enumerate(zip(said, first.tolist(), second.tolist(), strict=True)):
        if not is_said or (np.isnan(one) and np.isnan(other)):
            found.append(None)
        elif not (one >= 0 and other >= 0 and one + other > 0):
            message = f"labels {table.columns[names[0]][row]!r} and {table.columns[names[1]][row]!r} prefer neither"
            raise UserError(message, place=table.place(row, names[0]), remedy="give 1 and 0, or .5 and .5 for a tie")
        else:
            found.append(one / (one + other))
    return found


def _from_words(table: Table, column: str, columns: _Columns, said: Sequence[bool]) -> list[float | None]:
    """Read names of the two images, ties and probabilities; a number that names a column does so in all cells."""
    cells = _cells(table, column)
    names = (
        {plain_name(word): 1.0 for word in (*FIRST, columns.a)}
        | {plain_name(word): 0.0 for word in (*SECOND, columns.b)}
        | dict.fromkeys(map(plain_name, TIES), 0.5)
        | {"true": 1.0, "false": 0.0}
    )
    read = read_numbers(["" if plain_name(cell) in names else cell for cell in cells])
    numbers = read.values / (read.full or 1.0)
    there = set(numbers[~np.isnan(numbers)].tolist())
    numbered = columns.ending_a.isdecimal()
    ends = (float(columns.ending_a), float(columns.ending_b)) if numbered else (1.0, 2.0)
    by_end = there <= set(ends) and (numbered or 2.0 in there)
    found: list[float | None] = []
    for row, (cell, number) in enumerate(zip(cells, numbers.tolist(), strict=True)):
        if not said[row] or not cell:
            found.append(None)
        elif cell == PYTHONS_NONE:
            message = f"{cell!r} may be a tie, or what a program has made of an empty cell"
            raise UserError(message, place=table.place(row, column), remedy="write tie, or leave the cell empty")
        elif (share := names.get(plain_name(cell))) is not None:
            found.append(share)
        elif cell in (table.columns[columns.a][row], table.columns[columns.b][row]):
            found.append(float(cell == table.columns[columns.a][row]))
        elif by_end and number in ends:
            found.append(float(number == ends[0]))
        elif 0 <= number <= 1:
            found.append(number)
        else:
            message = f"{cell[:40]!r} is neither of the two images, no tie and no probability"
            raise UserError(message, place=table.place(row, column), remedy=WAYS)
    return found


def _read_lists(table: Table, columns: _Columns, maker: _Rows, *, need_labels: bool) -> None:
    lists, orders = table.others[columns.a], table.others[columns.order]
    for row in range(len(table.lines)):
        place = table.place(row, columns.a)
        images = _paths(lists.get(row, [table.columns[columns.a][row]]), place)
        if len(images) < 2 or not all(images):
            message = "has fewer than two images"
            raise UserError(message, place=place, remedy="give a list of paths, or remove the entry")
        if len(set(images)) < len(images):
            refuse_itself(next(image for image in images if images.count(image) > 1), place=place)
        numbers = [maker.row(image, row) for image in images]
        if not need_labels:
            continue
        order = _order(orders.get(row), len(images), place=table.place(row, columns.order), is_higher=columns.is_higher)
        if order is None:
            maker.leave_out("have no preference")
            continue
        where = place.rpartition(",")[0]
        for i, j in itertools.combinations(range(len(images)), 2):
            maker.pairs.append((numbers[i], numbers[j], order(i, j), where))


def _paths(values: Sequence[object], place: str) -> list[str]:
    """Return the images of a list: texts, or objects with a path and no more."""
    read = as_column(values)
    if read.odd is not None:
        raise UserError(f"has {read.odd.words} in its list of images", place=place, remedy="give a list of paths")
    return read.cells


def _order(
    values: Sequence[object] | None, count: int, *, place: str, is_higher: bool
) -> Callable[[int, int], float] | None:
    """Return what gives the probability that one of two images of a list is preferred; None where nothing is said."""
    read = as_column(str(int(value)) if isinstance(value, bool) else value for value in values or ())
    found = read_numbers(read.cells)
    numbers = found.values.tolist()
    if read.odd is None and not found.wrong and np.isnan(found.values).all():  # nobody has said anything
        return None
    if values is None or read.odd or len(numbers) != count or any(not number >= 0 for number in numbers):
        message = f"{str(list(values or ()))[:40]} does not order {count} images"
        raise UserError(message, place=place, remedy="give one number for each image")

    def share(i: int, j: int) -> float:
        one, other = numbers[i], numbers[j]
        if one == other:
            return 0.5
        # Two votes or shares of a pair are as good as a probability; of more images only their order is one.
        if is_higher and count == 2:
            return float(one / (one + other))
        return float((one > other) == is_higher)

    return share


# ---- From a table of pairs to rows of a manifest


def parse_pairs_target(given: str | None, *, has_prompts: bool) -> Target:
    """Read `--pairs-target`: `quality`, a known name, or `NAME:image` and `NAME:pair`.

    Without it pairs of images speak for quality, and pairs of images of one prompt for `preference`, which sees both:
    who prefers an image of a prompt may do so for its looks or because it shows what was asked for.

    Raises:
        UserError: no name, or an unknown one of which nobody says what it sees.
    """
    if given is None:
        return PREFERENCE if has_prompts else QUALITY
    name, colon, sees = given.partition(":")
    known = known_target(name.strip())
    if known is not None and (not colon or sees == known.sees):
        return known
    if sees not in ("image", "pair") or known is not None:
        remedy = f"give {known.name}" if known else "give NAME:image, or NAME:pair where people saw the prompt too"
        raise UserError(f"{given!r} does not say what people saw", place=OPTION, remedy=remedy)
    try:
        return Target(name.strip(), "pair" if sees == "pair" else "image")
    except UserError as error:
        raise UserError(error.message, place=OPTION, remedy=error.remedy) from None


def manifest_of_pairs(
    table: Table, *, name: str, image_root: Path, target: str | None, allow_outside: bool, read_labels: bool = True
) -> Manifest:
    """Turn a table of pairs into a manifest whose rows are its images.

    Raises:
        UserError: see `read_pair_table` and `manifest_from_table`; a pair target without prompts.
    """
    found = read_pair_table(table, need_labels=read_labels)
    rows = manifest_from_table(
        found.rows, name=name, image_root=image_root, allow_outside=allow_outside, read_labels=False, raters=None
    )
    notes = tuple(note for note in rows.notes if "have no prompt" not in note and "no row has" not in note)
    if not read_labels:
        return replace(rows, notes=notes)
    spoken = parse_pairs_target(target, has_prompts=all(rows.prompts))
    if spoken.sees == "pair" and not all(rows.prompts):
        message = f"has pairs of {spoken.name}, which sees the prompt, and images without one"
        raise UserError(message, place=table.path, remedy="add a column prompt, or give --pairs-target quality")
    empty = np.full(len(rows), np.nan)
    how = "" if target else f" ({OPTION} names another)"
    spoken_for = f"the pairs speak for {spoken.name}{how}"
    return replace(
        rows,
        targets=(spoken,),
        labels={spoken.name: empty, spoken.std: empty},
        notes=(*notes, *found.said(), spoken_for),
        preferences=Preferences(
            a_P=found.a_P, b_P=found.b_P, preferred_P=found.preferred_P, target=spoken, places=found.places
        ),
    )


def with_preferences(ratings: Manifest, pairs: Manifest) -> Manifest:
    """Return the rows of ratings, those of pairs behind them, and the pairs; both relative to one folder.

    Raises:
        UserError: a target of both is seen differently.
    """
    assert pairs.preferences is not None
    spoken, first = pairs.preferences.target, len(ratings)
    for target in ratings.targets:
        if target.name == spoken.name and target != spoken:
            message = f"{spoken.name} of pairs sees the {spoken.sees}, that of ratings the {target.sees}"
            raise UserError(message, place=OPTION, remedy="give the pairs another target")
    targets = tuple(dict.fromkeys([*ratings.targets, spoken]))
    both = [name for target in targets for name in (target.name, target.std)]
    nothing = [np.full(len(part), np.nan) for part in (ratings, pairs)]
    labels = {name: np.concatenate([ratings.labels.get(name, nothing[0]), nothing[1]]) for name in both}
    texts: dict[str, Any] = {name: [*getattr(ratings, name), *getattr(pairs, name)] for name in TEXTS}
    moved = replace(
        pairs.preferences, a_P=pairs.preferences.a_P + first, b_P=pairs.preferences.b_P + first, first_row=first
    )
    places = LazySequence(
        first + len(pairs), lambda row: ratings.places[row] if row < first else pairs.places[row - first]
    )
    notes = (*ratings.notes, *pairs.notes)
    return replace(ratings, targets=targets, labels=labels, notes=notes, preferences=moved, places=places, **texts)


TEXTS = ("images", "prompts", "explanations", "groups", "sources", "splits")


# ---- Rows that are the same in content


class Folded(NamedTuple):
    """A manifest whose images of pairs are each there once, and what its files hold."""

    manifest: Manifest
    contents: list[ImageContent]


def folded(manifest: Manifest, contents: list[ImageContent]) -> Folded:
    """Make one row of those of pairs that show the same content for the same prompt, or of one with ratings and them.

    A pair without a prompt may take any row of its image. Nothing is known of images that cannot be read: those of one
    name are one.

    Raises:
        UserError: a pair is of one image with itself, under two names.
    """
    pairs = manifest.preferences
    if pairs is None:
        return Folded(manifest, contents)
    names = [content.sha256 or f"missing {image}" for content, image in zip(contents, manifest.images, strict=True)]
    for a, b, place in zip(pairs.a_P.tolist(), pairs.b_P.tolist(), pairs.places, strict=True):
        if names[a] == names[b]:
            both = f"{manifest.images[a]!r} and {manifest.images[b]!r} hold one image, which"
            raise UserError(f"{both} is paired with itself", place=place, remedy="give two images, or remove the pair")
    seen: dict[tuple[bytes | str, str], int] = {}
    any_prompt: dict[bytes | str, int] = {}
    row_of_N, kept = np.empty(len(names), dtype=np.int64), list[int]()
    for row, (name, prompt) in enumerate(zip(names, manifest.prompts, strict=True)):
        there = seen.get((name, prompt), None if prompt else any_prompt.get(name))
        if row < pairs.first_row or there is None:
            there = row_of_N[row] = len(kept)
            kept.append(row)
            seen.setdefault((name, prompt), there)
            any_prompt.setdefault(name, there)
        else:
            row_of_N[row] = there
    if len(kept) == len(names):
        return Folded(manifest, contents)
    renumbered = pairs.selected(np.ones(len(pairs), dtype=bool), row_of_N)
    chosen = manifest.selected(np.array(kept, dtype=np.int64))
    return Folded(replace(chosen, preferences=renumbered), [contents[row] for row in kept])


def readable(pairs: Preferences, is_readable: Iterable[bool]) -> tuple[NDArray[np.bool_], list[str]]:
    """Tell which pairs have both images, (P,), and name the places of the others."""
    known_N = np.fromiter(is_readable, dtype=bool)
    kept_P = known_N[pairs.a_P] & known_N[pairs.b_P]
    return kept_P, [pairs.places[pair] for pair in np.flatnonzero(~kept_P).tolist()]
