"""`make bench`: measure every row, print the table, write `bench.json`.

Both sides of a ratio run in turns in this one process, several times; the median of the paired ratios is the figure.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `goal` in words, `met` None where the row is only shown."""

    name: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired_ratio(a: Callable[[], object], b: Callable[[], object], *, repeats: int = 5) -> float:
    """Return the median over repeats of time(a) / time(b), after one warm-up of each, in alternating order."""
    a(), b()
    ratios = []
    for repeat in range(repeats):
        first, second = (a, b) if repeat % 2 == 0 else (b, a)
        times = {first: seconds(first), second: seconds(second)}
        ratios.append(times[a] / times[b])
    return statistics.median(ratios)


def machine() -> dict[str, object]:
    """Return what the figures were measured on."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "gpu": gpu, "torch": torch.__version__}


def main() -> None:
    """Measure and print everything."""
    from benchmarks import extraction, frozen

    rows = [*frozen.measure(), *extraction.measure()]
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
