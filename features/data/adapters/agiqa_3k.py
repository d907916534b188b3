"""AGIQA-3K as its authors publish it: `data.csv` and the images beside it or under `images/`.

2,982 rows, CRLF; labels are z-scores around 2.5 with SD 1, used on the scale 0 to 5; images are called
`<generator>_<setting>_<index of the prompt>.jpg`. Li et al. 2023, arXiv 2306.04717; licence MIT.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deltaclip.features.data.labels import LabelRange
from deltaclip.features.data.manifest import manifest_from_table
from deltaclip.features.data.table import read_table

if TYPE_CHECKING:
    from deltaclip.features.data.manifest import Manifest

RANGE = LabelRange(0.0, 5.0, "adapter")


def read(folder: Path, label_range: LabelRange | None, *, read_labels: bool = True) -> Manifest:
    """Read the set from its folder; the source of a row is its generator with the setting.

    Raises:
        UserError: `data.csv` is missing or broken.
    """
    table = read_table(folder / "data.csv")
    root = folder / "images" if (folder / "images").is_dir() else folder
    return manifest_from_table(
        table,
        name="agiqa-3k",
        image_root=root,
        label_range=label_range or RANGE,
        source_of=generator_of,
        read_labels=read_labels,
    )


def generator_of(image: str) -> str:
    """Return `AttnGAN_normal` of `AttnGAN_normal_000.jpg`."""
    return Path(image).stem.rpartition("_")[0]
