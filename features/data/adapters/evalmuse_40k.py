"""EvalMuse-40K: `train_list.json`, a list of objects with prompt, img_path, `total_score` and `element_score`.

`total_score` is a list of integers from 1 to 5, one per rater: their mean is consistency, their sample SD its SD (none
for one rater). `element_score` is a string that holds a dict, element of the prompt -> 0 or 1 per rater, and is read as
a literal: it becomes the explanation `shows a cat, a hat; lacks snow`. Images lie in `images/<model>/`. Han et al.
2024, arXiv 2412.18150.
"""

from __future__ import annotations

import ast
import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import refuse_other
from deltaclip.features.data.adapters.finding import DataTables, find_file, find_optional, image_folder
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.data.table import Table, json_reason, refuse_no_text

if TYPE_CHECKING:
    from pathlib import Path

RANGE = LabelRange(1.0, 5.0, "adapter")
FILES = {
    "train": ("train_list.json", "train.json"),
    "val": ("val_list.json", "val.json"),
    "test": ("test_list.json", "test.json"),
}
INSIDE = ("", "dataset")
MAX_LITERAL = 20_000  # characters; the longest published one has a tenth of that
LITERAL_ERRORS = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


def read_evalmuse_40k(folder: Path) -> DataTables:
    """Read the set from its folder; consistency only.

    Raises:
        UserError: `train_list.json` is missing or broken.
    """
    paths = {"train": find_file(folder, FILES["train"], inside=INSIDE, what="the list of images and scores")}
    for side in ("val", "test"):
        if found := find_optional(folder, FILES[side], inside=INSIDE):
            paths[side] = found
    tables = [_table(path, side) for side, path in paths.items()]
    root = image_folder(folder, tables[0].columns["image"], ("images", "dataset/images"))
    return DataTables(name="evalmuse-40k", tables=tables, image_root=root, label_range=RANGE, labelled_only=True)


def _table(path: Path, side: str) -> Table:
    rows = [_row(record, f"{path}, entry {number}") for number, record in enumerate(_records(path), start=1)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["split"] = [side] * len(rows)
    table = Table(path, columns, list(range(1, len(rows) + 1)), "entry")
    refuse_no_text(table)
    return table


def _records(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        refuse_other(path, {"json", "text"}, what="JSON file")
        raise UserError(f"is no readable JSON ({json_reason(error)})", place=path, remedy="unpack it again") from error
    if not isinstance(records, list) or not records:
        raise UserError("is no list of objects", place=path, remedy="expected [{prompt, img_path, total_score, ...}]")
    return records


def _row(record: Any, place: str) -> dict[str, str]:
    if not isinstance(record, dict):
        raise UserError("is no object", place=place, remedy="expected {prompt, img_path, total_score, ...}")
    for name in ("img_path", "prompt"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise UserError(f"has no text {name!r}", place=place, remedy="add it or remove the entry")
    scores = _scores(record.get("total_score"), place)
    image = record["img_path"].strip().replace("\\", "/")
    folder = PurePosixPath(image).parent.name
    return {
        "image": image,
        "prompt": record["prompt"].strip(),
        "consistency": repr(float(np.mean(scores))) if scores else "",
        "consistency_std": repr(float(np.std(scores, ddof=1))) if len(scores) > 1 else "",
        "explanation": explanation_of(record.get("element_score"), place),
        "source": folder or PurePosixPath(image).stem.rpartition("_")[0],
    }


def _scores(values: Any, place: str) -> list[float]:
    if values is None or values == "":
        return []
    ratings = values if isinstance(values, list) else [values]
    for rating in ratings:
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not 1 <= rating <= 5:
            raise UserError(
                f"total_score holds {str(rating)[:40]!r}", place=place, remedy="expected a list of integers from 1 to 5"
            )
    return [float(rating) for rating in ratings]


def explanation_of(text: Any, place: str) -> str:
    """Return what raters saw of the prompt's elements, by majority; '' where nothing is said of any.

    Args:
        text: a dict of element -> scores in 0 to 1, or a string that holds one; never evaluated.
        place: file and entry, for messages.

    Raises:
        UserError: a string that holds no dict.
    """
    if text is None or text == "":
        return ""
    parsed = _literal(text) if isinstance(text, str) else text
    if not isinstance(parsed, dict):
        raise UserError(
            f"element_score {str(text)[:40]!r} holds no dict", place=place, remedy="correct it or leave it out"
        )
    seen: dict[bool, list[str]] = {True: [], False: []}
    for element, value in parsed.items():
        scores = [score for score in (value if isinstance(value, list | tuple) else [value]) if _is_share(score)]
        if scores:
            name = str(element).partition(" (")[0].strip()
            seen[sum(scores) / len(scores) >= 0.5].append(name)
    said = [f"{word} {', '.join(seen[which])}" for word, which in (("shows", True), ("lacks", False)) if seen[which]]
    return "; ".join(said)


def _is_share(score: Any) -> bool:
    return isinstance(score, int | float) and 0 <= score <= 1


def _literal(text: str) -> Any:
    if len(text) > MAX_LITERAL:
        return None
    try:
        return ast.literal_eval(text.strip())
    except LITERAL_ERRORS:
        return None
