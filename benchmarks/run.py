"""`make bench`: measure every row, print the table, write `bench.json`.

Both sides of a ratio run in turns in this one process, several times; the median of the paired ratios is the figure.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import extraction, frozen, heads, towers


def machine() -> dict[str, object]:
    """Return what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "torch": torch.__version__}


def main() -> None:
    """Measure and print everything."""
    rows = [*heads.measure(), *frozen.measure(), *towers.measure(), *extraction.measure()]
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, GPU: {about['gpu'] or 'none'}\n")
    for row in rows:
        verdict = "" if row.met is None else ("met" if row.met else "NOT MET")
        print(f"{row.name:58}{row.value:>10.3f} {row.unit:12}{row.goal:22}{verdict}")
    Path("bench.json").write_text(
        json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
