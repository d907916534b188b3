"""AGIQA-1K: `AIGC_MOS_Zscore.xlsx` (Image, Prompt, MOS), else `AIGC_all.csv` (Image, Score) alone; images in `file/`.

1,080 rows, one score of quality, z-scored and laid on 0 to 5; images are called
`<service>_<object>_<second object>_<place>_<style>.jpg`. Zhang et al. 2023, arXiv 2303.12618.
"""

from __future__ import annotations

from pathlib import Path

from deltaclip.features.data.adapters.finding import (
    DataTables,
    column,
    find_file,
    image_folder,
    required,
    with_columns,
)
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.data.table import read_table

RANGE = LabelRange(0.0, 5.0, "adapter")
FILES = ("AIGC_MOS_Zscore.xlsx", "AIGC_MOS_Zscore.csv", "AIGC_all.csv", "AIGC_all.xlsx")
# The services that drew the images, and the models that these ran.
MODELS = {"deepai": "stable-diffusion-v2.0", "dreamstudio": "stable-inpainting-v1.0"}
# The authors' key to the four numbers in a name, for copies whose table has no prompts.
WORDS = (
    ("bird", "cat", "dog", "batman", "snoopy", "teddy bear", "kid", "man", "woman", "alien", "demon", "witch"),
    (
        *("driving aircraft", "driving bike", "driving car", "having hamburger", "having icecream", "having pizza"),
        *("playing baseball", "playing football", "playing yoga", "using CD", "using laptop", "using phone"),
        *("wearing coat", "wearing hat", "wearing shirt"),
    ),
    ("city", "wild"),
    ("anime style", "realistic style"),
)


def read_agiqa_1k(folder: Path) -> DataTables:
    """Read the set from its folder; quality only.

    Raises:
        UserError: neither table is there, or the one that is, is broken.
    """
    path = find_file(folder, FILES, what="the table of images and scores")
    table = read_table(path, names=("image", "score") if "all" in path.stem else ("image", "prompt", "mos"))
    images = required(table, "image", "name")
    scores = required(table, "mos", "score", "mos_quality")
    prompts = column(table, "prompt")
    notes: tuple[str, ...] = ()
    if prompts is None:
        prompts = [prompt_of(image) for image in images]
        notes = (f"{path.name} has no prompts: they are put together from the names of the images",)
    sources = [source_of(image) for image in images]
    table = with_columns(table, image=images, prompt=prompts, quality=scores, source=sources)
    root = image_folder(folder, images, ("file", "images", "image"))
    return DataTables(name="agiqa-1k", tables=[table], image_root=root, label_range=RANGE, notes=notes)


def source_of(image: str) -> str:
    """Return the model behind `deepai_0_1_0_1.jpg`."""
    service = Path(image).stem.partition("_")[0]
    return MODELS.get(service.lower(), service)


def prompt_of(image: str) -> str:
    """Return `cat driving bike, city, realistic style` of `deepai_1_1_0_1.jpg`; a name without a key has none, ''."""
    keys = Path(image).stem.split("_")[1:]
    if len(keys) != len(WORDS) or not all(key.isascii() and key.isdigit() for key in keys):
        return ""
    if any(int(key) >= len(words) for key, words in zip(keys, WORDS, strict=True)):
        return ""
    first, second, *rest = (words[int(key)] for key, words in zip(keys, WORDS, strict=True))
    return ", ".join([f"{first} {second}", *rest])
