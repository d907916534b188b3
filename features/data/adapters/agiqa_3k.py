"""AGIQA-3K as its authors publish it: `data.csv` and the images beside it or under `images/`.

2,982 rows, CRLF; labels are z-scores around 2.5 with SD 1, used on the scale 0 to 5; images are called
`<generator>_<setting>_<index of the prompt>.jpg`. Li et al. 2023, arXiv 2306.04717; licence MIT.
"""

from __future__ import annotations

from pathlib import Path

from deltaclip.features.data.adapters.finding import DataTables, find_file, image_folder, required, with_columns
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.data.table import read_table

RANGE = LabelRange(0.0, 5.0, "adapter")
FILES = ("data.csv", "data.xlsx", "AIGC_MOS_Zscore.xlsx")
COLUMNS = ("name", "prompt", "adj1", "adj2", "style", "mos_quality", "std_quality", "mos_align", "std_align")


def read_agiqa_3k(folder: Path) -> DataTables:
    """Read the set from its folder; the source of a row is its generator with the setting.

    Raises:
        UserError: `data.csv` is missing or broken.
    """
    table = read_table(find_file(folder, FILES, what="the table of images, prompts and scores"), names=COLUMNS)
    images = required(table, "name", "image")
    table = with_columns(table, source=[generator_of(image) for image in images])
    root = image_folder(folder, images, ("images", "image", "AGIQA-3K"))
    return DataTables(name="agiqa-3k", tables=[table], image_root=root, label_range=RANGE)


def generator_of(image: str) -> str:
    """Return `AttnGAN_normal` of `AttnGAN_normal_000.jpg`."""
    return Path(image).stem.rpartition("_")[0]
