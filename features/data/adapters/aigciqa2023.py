"""AIGCIQA2023: scores in `DATA/MOS/mosz1.mat` to `mosz3.mat`, images `Image/allimg/<i>.png`, prompts in a workbook.

2,400 images, i = 0 to 2399: 6 models, each 100 prompts, each 4 images. mosz1 is quality, mosz2 authenticity,
mosz3 correspondence, about 26 to 72 on a scale of 0 to 100; `DATA/STD/SD1.mat` to `SD3.mat`, where they are there, are
their SDs. Wang et al. 2023, arXiv 2307.00211.

The MATLAB files (versions 4 to 7.2) are read by scipy in a process of its own: a few bytes that are wrong can end that
process with a bus error.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters.finding import DataTables, column, find_file, find_optional, image_folder
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.data.table import Table, read_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


# ---- AIGCIQA2023


RANGE = LabelRange(0.0, 100.0, "adapter")
MOS_PLACES = ("DATA/MOS", "MOS", "DATA", "")
STD_PLACES = ("DATA/STD", "STD")
BESIDE = ("", "DATA", "DATA/MOS", "Image")
PROMPT_FILES = ("AIGCIQA2023_Prompts.xlsx", "AIGCIQA2023_Prompts.csv", "prompts.xlsx", "prompt.xlsx", "prompts.csv")
PROMPT_COLUMNS = ("style", "object", "prompt")
INDEX_FILES = ("pic-index.xlsx", "pic-index.csv")
PER_PROMPT = 4
QUOTES = "\"'“”‘’„ "


def read_aigciqa2023(folder: Path) -> DataTables:
    """Read the set from its folder; quality, correspondence as consistency, and authenticity where it is there.

    Which prompt an image has is said by `pic-index.xlsx`; without it rows are taken in the published order.

    Raises:
        UserError: a file is missing or broken, or the files do not belong together.
    """
    path = find_file(folder, ("mosz1.mat",), inside=MOS_PLACES, what="scores of quality")
    other = find_file(folder, ("mosz3.mat",), inside=MOS_PLACES, what="scores of correspondence")
    scores = {"quality": read_vector(path, "MOSz"), "consistency": read_vector(other, "MOSz")}
    if authentic := find_optional(folder, ("mosz2.mat",), inside=MOS_PLACES):
        scores["authenticity"] = read_vector(authentic, "MOSz")
    for label, name in (("quality", "SD1.mat"), ("authenticity", "SD2.mat"), ("consistency", "SD3.mat")):
        if label not in scores:
            continue
        if deviations := find_optional(folder, (name,), inside=STD_PLACES):
            scores[f"{label}_std"] = read_vector(deviations, "SD")
    num_rows = len(scores["quality"])
    for label, values in scores.items():
        if len(values) != num_rows:
            raise UserError(
                f"{len(values):,} values of {label} and {num_rows:,} of quality",
                place=path.parent,
                remedy="unpack the set again",
            )
    prompts_at = find_file(folder, PROMPT_FILES, inside=BESIDE, what="the prompts")
    prompts = _prompts(prompts_at)
    index_at = find_optional(folder, INDEX_FILES, inside=BESIDE)
    rows = _indexed(index_at, len(prompts)) if index_at else _in_order(num_rows, len(prompts), prompts_at)
    if len(rows) != num_rows:
        raise UserError(
            f"{len(rows):,} rows for {num_rows:,} scores", place=index_at or prompts_at, remedy="unpack the set again"
        )
    images = [f"{i}.png" for i in range(num_rows)]
    table = Table(
        path,
        {
            "image": images,
            "prompt": [prompts[number] for _, number in rows],
            **{label: ["" if np.isnan(value) else repr(float(value)) for value in v] for label, v in scores.items()},
            "source": [source for source, _ in rows],
        },
        list(range(1, num_rows + 1)),
        "row",
    )
    root = image_folder(folder, images, ("Image/allimg", "allimg", "Image", "images"))
    notes = () if index_at else ("pic-index.xlsx is missing: models and prompts follow from the order of the images",)
    return DataTables(name="aigciqa2023", tables=[table], image_root=root, label_range=RANGE, notes=notes)


def _prompts(path: Path) -> list[str]:
    table = read_table(path, names=PROMPT_COLUMNS)
    prompts = column(table, "prompt", "prompts") or list(table.columns.values())[-1]
    return [prompt.strip(QUOTES) for prompt in prompts]


def _indexed(path: Path, num_prompts: int) -> list[tuple[str, int]]:
    """Return model and number of the prompt of each row; `PPP-k.png` may count prompts from 0 or from 1."""
    table = read_table(path, names=("model", "image"))
    cells = list(table.columns.values())
    if len(cells) < 2:
        raise UserError("has one column", place=path, remedy="expected two: model and PPP-k.png")
    numbers = []
    for row, name in enumerate(cells[1]):
        found = re.fullmatch(r"0*(\d{1,6})-\d+\.\w+", name.strip())
        if not found:
            message = f"{name!r} does not name a prompt"
            raise UserError(message, place=table.place(row, list(table.columns)[1]), remedy="expected PPP-k.png")
        numbers.append(int(found[1]))
    first = 1 if numbers and min(numbers) > 0 and max(numbers) == num_prompts else 0
    if numbers and max(numbers) - first >= num_prompts:
        raise UserError(f"prompt {max(numbers)} is none of {num_prompts}", place=path, remedy="unpack the set again")
    return [(model, number - first) for model, number in zip(cells[0], numbers, strict=True)]


def _in_order(num_rows: int, num_prompts: int, path: Path) -> list[tuple[str, int]]:
    per_model = PER_PROMPT * num_prompts
    if num_rows % per_model:
        raise UserError(
            f"{num_rows:,} images are no whole number of models with {PER_PROMPT} images of {num_prompts} prompts",
            place=path,
            remedy="add pic-index.xlsx, which says what each image shows",
        )
    return [(f"model-{i // per_model + 1}", i % per_model // PER_PROMPT) for i in range(num_rows)]


# ---- A vector of numbers in a MATLAB file (versions 4 to 7.2), from files that nobody vouches for


TIMEOUT_S = 120
READER = """
import json, sys
import numpy, scipy.io
path, variable = sys.argv[1:]
names = [name for name, _, _ in scipy.io.whosmat(path, appendmat=False)]
found = scipy.io.loadmat(path, appendmat=False, variable_names=[variable]) if variable in names else {}
values = found.get(variable)
usable = isinstance(values, numpy.ndarray) and values.dtype.kind in "iuf" and values.size > 0
sys.stdout.buffer.write(json.dumps({"names": names, "usable": usable}).encode() + b"\\n")
if usable:
    numpy.save(sys.stdout.buffer, values.astype(numpy.float64).ravel(), allow_pickle=False)
"""


def read_vector(path: Path, variable: str) -> NDArray[np.float64]:
    """Return a variable of any shape as (N,) float64; NaN stays.

    Raises:
        UserError: no MATLAB file, damaged, of version 7.3, or without such a variable of numbers.
    """
    command = [sys.executable, "-W", "ignore", "-c", READER, str(path), variable]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)  # noqa: S603 - our own program
    except subprocess.TimeoutExpired as error:
        message = f"is no readable MATLAB file (not read in {TIMEOUT_S} s)"
        raise UserError(message, place=path, remedy="unpack it again") from error
    if done.returncode:
        raise _unreadable(path, done)
    about, _, content = done.stdout.partition(b"\n")
    found = json.loads(about)
    if not found["usable"]:
        have = ", ".join(found["names"]) or "nothing"
        raise UserError(f"has no numbers called {variable!r}", place=path, remedy=f"found: {have}")
    return np.asarray(np.load(io.BytesIO(content), allow_pickle=False), dtype=np.float64)


def _unreadable(path: Path, done: subprocess.CompletedProcess[bytes]) -> UserError:
    """Say why the reader failed: the last line of its traceback, or the signal that ended it."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    kind, _, reason = lines[-1].partition(": ") if lines else ("", "", "")
    if kind == "NotImplementedError":
        return UserError("is of MATLAB 7.3", place=path, remedy="save it with -v7")
    words = f"signal {-done.returncode}" if done.returncode < 0 else reason or kind
    return UserError(f"is no readable MATLAB file ({words})", place=path, remedy="unpack it again")
