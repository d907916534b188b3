"""`make bench`: measure every row of the speed table in docs/speed.md, print the table, write `bench.json`.

Both sides of a ratio run in turns, several times; the median of the paired ratios is the figure. `--only start,texts`
runs some parts, `--quick` leaves out those that take minutes, `--keep` also puts the result into `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import importlib.util
import json
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measuring import Row, not_measured
from deltaclip.base.device import ask_for_large_pages

# In the order of the table; what each module measures stands in its first lines.
PARTS = (
    "machine",
    "start",
    "texts",
    "precision",
    "frozen",
    "towers",
    "extraction",
    "heads",
    "finetune",
    "memory",
    "peers",
)
SLOW = ("memory", "peers", "finetune")
GOALS = {"finetune": ("partial freeze: time of an epoch over the trainable share", "at most 1.25")}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--only", help=f"parts, comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help=f"without {', '.join(SLOW)}")
    parser.add_argument("--keep", action="store_true", help="also write benchmarks/results/MACHINE-DATE.json")
    options = parser.parse_args()
    ask_for_large_pages()  # as the commands do
    parts = (
        options.only.split(",") if options.only else [part for part in PARTS if not (options.quick and part in SLOW)]
    )
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    machine = importlib.import_module("benchmarks.machine").about()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    rows: list[Row] = []
    for part in parts:
        started = time.monotonic()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
            found = own.submit(measured, part).result()  # what one part leaves in memory is not to touch the next
        print(f"\n{part} ({time.monotonic() - started:.0f} s)", *(row.line() for row in found), sep="\n  ", flush=True)
        rows += found
    goals = [row for row in rows if row.met is not None]
    print(f"\n{sum(row.met is True for row in goals)} of {len(goals)} goals met")
    text = json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"
    Path("bench.json").write_text(text)
    if options.keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{_name(machine)}.json").write_text(text)


def measured(part: str) -> list[Row]:
    """Return the rows of one part; one that is not there yet is a goal that is not met."""
    if importlib.util.find_spec(f"benchmarks.{part}") is None:
        return [not_measured(*GOALS[part], "no such part yet")]
    rows: list[Row] = importlib.import_module(f"benchmarks.{part}").measure()
    return rows


def _name(machine: dict[str, Any]) -> str:
    what = machine["gpu"] or f"{machine['cpu']}-{machine['cores']}-cores"
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', what).strip('-').lower()}-{dt.datetime.now(tz=dt.UTC).date().isoformat()}"


if __name__ == "__main__":
    sys.exit(main())
