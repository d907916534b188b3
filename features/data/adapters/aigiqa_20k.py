"""AIGIQA-20K (AIGCQA-30K-Image): `info_train`, `info_val`, `info_test` as csv or xlsx, images in folders `train/` etc.

Columns name, prompt, mos, of which public copies lack the header or, in `info_val` and `info_test`, the last; images
are called `<MODEL>_<number>.png`. One score, 0 to 5, in which raters mixed how an image looks with how well it fits:
it is read as quality, and consistency stays empty, since a label of both would teach the consistency head what is not
there. Li et al. 2024, arXiv 2404.03407.
"""

from __future__ import annotations

from pathlib import Path

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters.finding import DataTables, column, find_optional, required, with_columns
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.data.table import Table, read_table

RANGE = LabelRange(0.0, 5.0, "adapter")
PARTS = ("train", "val", "test")
COLUMNS = ("name", "prompt", "mos")


def read_aigiqa_20k(folder: Path) -> DataTables:
    """Read the parts of the set that are there; the source of a row is its model.

    Raises:
        UserError: no `info_*` file is there, or one is broken.
    """
    tables = []
    for part in PARTS:
        path = find_optional(folder, (f"info_{part}.csv", f"info_{part}.xlsx"), inside=("", part, "info"))
        if path is not None:
            tables.append(_part(folder, path, part))
    if not tables:
        raise UserError(
            "info_train.csv is missing (the table of images, prompts and scores)",
            place=folder,
            remedy="expected info_train, info_val or info_test as .csv or .xlsx; give the folder of the set",
        )
    return DataTables(name="aigiqa-20k", tables=tables, image_root=folder, label_range=RANGE, labelled_only=True)


def _part(folder: Path, path: Path, part: str) -> Table:
    table = read_table(path, names=COLUMNS)
    names = required(table, "name", "image", "filename")
    places = [sub for sub in (part, "images", "all") if (folder / sub).is_dir()]
    sub = next((sub for sub in places if (folder / sub / names[0]).is_file()), places[0] if places else "")
    has_sub = not sub or names[0].startswith(f"{sub}/") or (folder / names[0]).is_file()
    images = names if has_sub else [f"{sub}/{name}" if name else "" for name in names]
    scores = column(table, "mos", "mos_quality", "score") or [""] * len(names)
    sources = [Path(name).stem.rpartition("_")[0] for name in names]
    return with_columns(table, image=images, quality=scores, source=sources, split=[part] * len(names))
