"""Memory of training from a million rows, and of extraction as rows grow. Wanted: under 2 GB; no growth.

Training: the stages of `benchmarks.scale`, each a process of its own. Extraction: the highest memory of a process that
embeds 500 and 2,000 images with the bundled backbone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import scale
from benchmarks.measuring import Row, at_most
from benchmarks.models import drawn_jpegs

ROWS, DIM = 1_000_000, 768
FEW, MANY = 500, 2000
SCRIPT = """
import json, sys
from pathlib import Path
from benchmarks.measuring import peak_bytes
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
extract(ExtractConfig(data=sys.argv[1], out=Path(sys.argv[2]), precision="fp32", views="center"))
print(json.dumps(peak_bytes()))
"""


def measure() -> list[Row]:
    """Return what training takes above its modules, and what 1,500 more images add to an extraction."""
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as name:
        folder = Path(name)
        scale._in_process("write", folder, ROWS, DIM)
        found = scale._in_process("train", folder, ROWS, DIM)
    value = found["bytes"] / 1e9
    what = f"train, {ROWS:,} rows, D = {DIM}: memory above the loaded modules"
    rows = [at_most(2, name=what, value=value, unit="GB", note=f"{found['seconds']:.0f} s, one epoch")]
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as name:
        folder = Path(name)
        few, many = (_extraction_bytes(folder, count) for count in (FEW, MANY))
    grown = (many - few) / 1e6
    what = f"extract, {MANY:,} images instead of {FEW}: more memory"
    rows.append(at_most(32, name=what, value=grown, unit="MB", note=f"{many / 1e6:.0f} MB in all"))
    return rows


def _extraction_bytes(folder: Path, count: int) -> int:
    lines = ["image,prompt"]
    for number, content in enumerate(drawn_jpegs(count, side=256)):
        (folder / f"{number}.jpg").write_bytes(content)
        lines.append(f"{number}.jpg,picture {number // 6}")
    data = folder / f"{count}.csv"
    data.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-c", SCRIPT, str(data), str(folder / f"{count}.h5")]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
