"""KonIQ-10k: `koniq10k_scores_and_distributions.csv` and photographs in `1024x768/` or `512x384/`.

10,073 photographs without prompts; MOS and SD are in the raters' unit, 1 to 5 (`MOS_zscore`, about 0 to 100, has no SD
and is not used). Copies with a column `set` say training, validation or test. Hosu et al. 2020, arXiv 1910.06180.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaclip.features.data.adapters.finding import (
    DataTables,
    find_file,
    image_folder,
    required,
    with_columns,
)
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.data.table import read_table

if TYPE_CHECKING:
    from pathlib import Path

RANGE = LabelRange(1.0, 5.0, "adapter")
FILES = ("koniq10k_scores_and_distributions.csv", "koniq10k_scores_and_distributions.xlsx", "koniq10k_scores.csv")
COLUMNS = ("image_name", "c1", "c2", "c3", "c4", "c5", "c_total", "MOS", "SD", "MOS_zscore")


def read_koniq_10k(folder: Path) -> DataTables:
    """Read the set from its folder; quality only.

    Raises:
        UserError: the table is missing or broken.
    """
    table = read_table(find_file(folder, FILES, what="the table of images and scores"), names=COLUMNS)
    images = required(table, "image_name", "image", "name")
    quality = required(table, "mos")
    table = with_columns(table, image=images, quality=quality)
    root = image_folder(folder, images, ("1024x768", "512x384", "images"))
    return DataTables(name="koniq-10k", tables=[table], image_root=root, label_range=RANGE)
