"""PKU-I2IQA: text files of path, quality, authenticity, consistency, prompt between tabs, or `annotations.csv`.

1,600 images by Midjourney and Stable Diffusion, scores about 1 to 5. `annotations.csv` has `name, mos_quality` and no
prompts. Yuan et al. 2023, arXiv 2311.15556.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters.finding import (
    DataTables,
    find_optional,
    image_folder,
    required,
    with_columns,
)
from deltaclip.features.data.listing import is_system_name
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.data.table import read_table

if TYPE_CHECKING:
    from deltaclip.features.data.table import Table

RANGE = LabelRange(1.0, 5.0, "adapter")
COLUMNS = ("path", "quality", "authenticity", "consistency", "prompt")
SIDES = ("train", "val", "test")
MODELS = {"Midjourney": r"midjourney|mj", "Stable Diffusion V1.5": r"stable[ _-]*diffusion|sd"}


def read_pku_i2iqa(folder: Path) -> DataTables:
    """Read the set from its folder; files whose names say train, val or test become the split column.

    Raises:
        UserError: no such table is there, or one is broken.
    """
    texts = (path for path in folder.iterdir() if path.suffix.lower() in {".txt", ".tsv"})
    lists = sorted(path for path in texts if not is_system_name(path.name) and path.is_file() and _has_tabs(path))
    annotations = find_optional(folder, ("annotations.csv", "annotations.xlsx"))
    if annotations is not None and not lists:
        lists = [annotations]
    if not lists:
        raise UserError(
            "annotations.csv is missing (the table of images and scores)",
            place=folder,
            remedy="expected it, or .txt with path, quality, authenticity, consistency and prompt between tabs",
        )
    tables = [_table(path) for path in lists]
    root = image_folder(folder, tables[0].columns["image"], ("images", "image", "Generated_image", "PKU-I2IQA"))
    return DataTables(name="pku-i2iqa", tables=tables, image_root=root, label_range=RANGE)


def _has_tabs(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(65536).count(b"\t") >= len(COLUMNS) - 1


def _table(path: Path) -> Table:
    is_list = path.suffix.lower() in {".txt", ".tsv"}
    table = read_table(path, names=COLUMNS if is_list else (), delimiter="\t" if is_list else "")
    images = [image.replace("\\", "/") for image in required(table, "path", "image", "name", "img_path", "filename")]
    quality = required(table, "quality", "mos_quality", "mos")
    side = next((side for side in SIDES if side in path.stem.lower()), "")
    table = with_columns(table, image=images, quality=quality, source=[source_of(image) for image in images])
    if side:
        table = with_columns(table, split=[side] * len(images))
    return table


def source_of(image: str) -> str:
    """Return the generator that a path names, else its folder."""
    for model, words in MODELS.items():
        if re.search(rf"(?<![a-z])({words})(?![a-z])", image.lower()):
            return model
    parent = Path(image).parent.name
    return parent if parent not in {"", "."} else ""
