"""JSON of other programs that is no list of rows: Label Studio's tasks, and captions as COCO has them.

Knows these layouts. Must not know files, or what a column means.
"""

from __future__ import annotations

import re
from typing import Any

from deltaclip.base.vocabulary import side_of

FILE_NAME = re.compile(r".*\.\w{2,5}")
RESULTS = ("rating", "number", "text", "choices", "taxonomy", "labels")  # in a value of Label Studio


def rows_of(found: Any) -> tuple[list[dict[str, Any]], str] | None:
    """Return the rows of a parsed file and what it is, None where it is not of a known layout."""
    if isinstance(found, list) and found and all(_is_task(task) for task in found):
        return [row for task in found for row in _rows_of_task(task)], "an export of Label Studio"
    if isinstance(found, dict) and _are_objects(found.get("images")) and _are_objects(found.get("annotations")):
        return _captions(found["images"], found["annotations"]), "captions as COCO has them"
    return _rows_of_object(found) if isinstance(found, dict) else None


def _rows_of_object(found: dict[str, Any]) -> tuple[list[dict[str, Any]], str] | None:
    """Return the rows of one object that holds a table in any of the ways in which programs write one."""
    lists = {name: value for name, value in found.items() if _are_objects(value)}
    if len(lists) == 1 and sum(isinstance(value, list) for value in found.values()) == 1:
        name = next(iter(lists))
        return lists[name], f"one object with its rows under {name!r}"
    if lists and len(lists) == len(found) and all(map(side_of, lists)):
        rows = [{"split": name, **row} for name, part in lists.items() for row in part]
        return rows, "one object with the rows of each side of a split"
    names, data = found.get("columns"), found.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(map(str, names), row, strict=False)) for row in data], "one object with columns and data"
    values = list(found.values())
    if values and all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
        return [
            dict(zip(found, row, strict=True)) for row in zip(*values, strict=True)
        ], "one object with a list a column"
    if values and all(isinstance(value, dict) and value for value in values):
        return _rows_of_objects(found)
    return None


def _rows_of_objects(found: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], str] | None:
    if all(name.isdecimal() for value in found.values() for name in value):  # as pandas writes a table
        numbers = dict.fromkeys(name for value in found.values() for name in value)
        rows = [{name: cells.get(number) for name, cells in found.items()} for number in numbers]
        return rows, "one object with an object a column"
    if all(name.isdecimal() for name in found):
        return list(found.values()), "one object with its rows by number"
    if all(FILE_NAME.fullmatch(name) for name in found):
        return [{"image": name} | row for name, row in found.items()], "one object with its rows by image"
    return None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _is_task(task: Any) -> bool:
    return isinstance(task, dict) and isinstance(task.get("data"), dict) and isinstance(task.get("annotations"), list)


def _rows_of_task(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each annotation: the data of the task, who annotated, and each result under its name."""
    rows = []
    for annotation in task["annotations"]:
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        row = {**task["data"], "annotator": _person(annotation.get("completed_by"))}
        results = annotation.get("result")
        for result in results if isinstance(results, list) else []:
            if isinstance(result, dict) and isinstance(result.get("value"), dict):
                row[str(result.get("from_name", "rating"))] = _value(result["value"])
        rows.append(row)
    return rows


def _person(completed_by: Any) -> Any:
    if isinstance(completed_by, dict):
        completed_by = completed_by.get("email") or completed_by.get("id")
    return None if completed_by is None else str(completed_by)


def _value(value: dict[str, Any]) -> Any:
    found = next((value[name] for name in RESULTS if name in value), None)
    return found[0] if isinstance(found, list) and len(found) == 1 else found


def _captions(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each caption, in the order of the images; an image without one has a row without a prompt."""
    of_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in annotations:
        of_image.setdefault(annotation.get("image_id"), []).append(annotation)
    rows = []
    for image in images:
        about = {name: value for name, value in image.items() if name not in {"id", "license"}}
        rows += [about | {"caption": each.get("caption")} for each in of_image.get(image.get("id"), [{}])]
    return rows
