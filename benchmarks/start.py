"""What people wait for before anything happens: `--help`, and `extract` with nothing to do."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.measuring import Row, at_most, seconds
from benchmarks.models import drawn_jpegs
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig

ROWS, REPEATS = 3000, 5


def measure() -> list[Row]:
    """Return wall times of whole commands, the median of some."""
    shown = [at_most(0.3, name="deltaclip --help", value=_command("--help"), unit="s")]
    shown.append(at_most(0.3, name="deltaclip extract --help", value=_command("extract", "--help"), unit="s"))
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as name:
        folder = Path(name)
        lines = ["image,prompt"]
        for number, content in enumerate(drawn_jpegs(ROWS, side=64)):
            (folder / f"{number}.jpg").write_bytes(content)
            lines.append(f"{number}.jpg,picture {number // 6}")
        (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
        data, out = str(folder / "manifest.csv"), folder / "cache.h5"
        assert extract(ExtractConfig(data=data, out=out)).usable_rows == ROWS
        value = _command("extract", data, "--out", str(out))
    shown.append(at_most(0.7, name=f"extract with nothing to do, {ROWS:,} rows", value=value, unit="s"))
    return shown


def _command(*words: str) -> float:
    command = [sys.executable, "-m", "deltaclip", *words]
    run = partial(subprocess.run, command, check=True, capture_output=True)
    return median([seconds(run) for _ in range(REPEATS + 1)][1:])  # the first reads files from the disk
