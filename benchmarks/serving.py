"""`python -m benchmarks.serving [RUN]`: a real server under load, with micro-batches and without, in turns.

Clients run in this process, on the same cores as the server: figures are those of one machine that does both.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deltaclip.features.extract import extract
from deltaclip.features.scenes.render import render_demo
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train

if TYPE_CHECKING:
    from collections.abc import Iterator

KIND = "multipart/form-data; boundary=b"


@dataclass
class Load:
    """What clients saw of one server: seconds of every answered request, others by status, and the whole time."""

    answered_s: list[float] = field(default_factory=list)
    errors: dict[int, int] = field(default_factory=dict)
    whole_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """Return requests a second, and milliseconds of the median and of the slowest hundredth."""
        cuts = statistics.quantiles(self.answered_s, n=100, method="inclusive")
        return {
            "requests_per_s": len(self.answered_s) / self.whole_s,
            "p50_ms": 1000 * cuts[49],
            "p99_ms": 1000 * cuts[98],
            "errors": sum(self.errors.values()),
        }


def body(image: bytes, prompt: str) -> bytes:
    """Return the form of one request."""
    head = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    middle = b'\r\n--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n'
    return head + image + middle + prompt.encode() + b"\r\n--b--\r\n"


@contextlib.contextmanager
def server(run: Path, *options: str) -> Iterator[int]:
    """Run `deltaclip serve` and give its port; it ends with the block."""
    program = "from deltaclip.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(run), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        found = re.search(r":(\d+)$", line.strip())
        if not found:
            raise SystemExit(f"the server did not start: {line}")
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(30)


def press(port: int, bodies: list[bytes], *, requests: int, clients: int) -> Load:
    """Let clients ask as fast as they are answered, each on one connection."""
    load, numbers, lock = Load(), iter(range(requests)), threading.Lock()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                started = time.perf_counter()
                connection.request("POST", "/score", bodies[number % len(bodies)], {"content-type": KIND})
                answer = connection.getresponse()
                answer.read()
                taken = time.perf_counter() - started
                with lock:
                    if answer.status == 200:
                        load.answered_s.append(taken)
                    else:
                        load.errors[answer.status] = load.errors.get(answer.status, 0) + 1

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for job in [pool.submit(ask) for _ in range(clients)]:
            job.result()
    load.whole_s = time.perf_counter() - started
    return load


def demo_run(folder: Path) -> Path:
    """Make a run on drawn pictures and return it."""
    render_demo(folder / "set", seed=0, num_prompts=30, images_per_prompt=4)
    cache = extract(ExtractConfig(data=str(folder / "set" / "demo.csv"), out=folder / "demo.h5", views="center")).cache
    return train(TrainConfig(cache=cache, out=folder / "run", epochs=2)).run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="run directory; default one made on drawn pictures")
    parser.add_argument("--requests", type=int, default=400, help="of one round")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = given.run or demo_run(folder)
        if given.run:
            render_demo(folder / "set", seed=0, num_prompts=30, images_per_prompt=4)
        images = sorted((folder / "set").rglob("*.png"))[:64]
        bodies = [body(path.read_bytes(), f"a red circle above {number} squares") for number, path in enumerate(images)]
        rounds: dict[str, list[dict[str, float]]] = {"micro-batches": [], "one by one": []}
        with server(run) as on, server(run, "--batch-size", "1") as off:
            for port in (on, off):
                press(port, bodies, requests=2 * given.clients, clients=given.clients)  # warm
            for _ in range(given.rounds):
                for words, port in (("micro-batches", on), ("one by one", off)):
                    load = press(port, bodies, requests=given.requests, clients=given.clients)
                    rounds[words].append(load.figures())
    medians = {
        words: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for words, found in rounds.items()
    }
    print(f"{given.clients} clients, {given.rounds} rounds of {given.requests} requests in turns, medians")
    for words, figures in medians.items():
        print(f"{words:14}" + "".join(f"  {key} {value:9.1f}" for key, value in figures.items()))
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
