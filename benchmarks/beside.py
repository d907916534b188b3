"""What other work on the machine costs: a head fit and an extraction alone, and beside busy processes.

Each is run with threads that wait by spinning, as the libraries do by themselves, and with those that the commands ask
for, in turns: `python -m benchmarks.beside --busy 0,2,4 --rounds 3`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.caches import random_cache
from deltaclip.base.device import THREAD_SETTINGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS, DIM = 3000, 768
# What the libraries do where nobody asks for anything else; set, so that the commands leave it alone.
SPINNING = {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200", "OPENBLAS_THREAD_TIMEOUT": "26"}
WAYS = {"spinning": SPINNING, "as the commands ask": {}}


def main() -> None:
    """Print seconds of the fit and of the extraction, by number of busy processes and way to wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", default="0,2,4", help="busy processes beside")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as name:
        folder = Path(name)
        cache = random_cache(folder / "random.h5", rows=ROWS, dim=DIM)
        tasks = {
            "fit": (["train", str(cache), "--base", "identity"], lambda told: told["fit_seconds"]),
            "extraction": (
                ["extract", "demo", "--workers", "2", "--views", "center"],
                lambda told: told["new_images"] / told["images_per_s"],
            ),
        }
        for busy in map(int, given.busy.split(",")):
            with busy_processes(busy):
                for task, (words, figure) in tasks.items():
                    found: dict[str, list[float]] = {way: [] for way in WAYS}
                    for number in range(given.rounds):
                        for way, environment in WAYS.items():
                            out = folder / f"{task}-{busy}-{number}-{way.split()[0]}.h5"
                            found[way].append(seconds([*words, "--out", str(out)], figure, environment))
                    for way, each in found.items():
                        listed = " ".join(f"{one:.2f}" for one in each)
                        print(f"{busy} busy beside  {task:10}  {way:20}  {median(each):8.2f} s  ({listed})", flush=True)


def seconds(words: list[str], figure: Callable[[dict[str, Any]], float], environment: dict[str, str]) -> float:
    """Return what a command says of its own time."""
    kept = {name: value for name, value in os.environ.items() if name not in THREAD_SETTINGS}
    command = [sys.executable, "-m", "deltaclip", *words, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=kept | environment)
    return float(figure(json.loads(done.stdout)))


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many processes computing without end inside the block."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
