"""`python -m benchmarks.torture [KILLS] [SEED]`: kill extractions at random moments, by default 200 times.

Stops with the first assertion that does not hold: a vector lost, doubled, changed or computed again, a file refused, or
a finished cache that differs from that of an uninterrupted run. Half of the kills with one view, half with three.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from deltaclip.features.scenes.render import render_demo
from deltaclip.tests.features.killing import Server, kill_often, make_kill_set

KILLS = 200


def main() -> None:
    """Torture, and print what the kills left."""
    kills, seed = (int(value) for value in [*sys.argv[1:], *(str(KILLS), "0")[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        render_demo(place / "demo", seed=0, num_prompts=20, images_per_prompt=6)
        (place / "set").mkdir()
        kill_set = make_kill_set(place / "demo", place / "set")
        server = Server()
        with server.process:
            for part, views in enumerate(("center", "center,flip,tiles")):
                work = place / str(part)
                work.mkdir()
                started = time.monotonic()
                tally = kill_often(
                    server,
                    kill_set / "demo.csv",
                    work,
                    "tiny",
                    kills=kills // 2 + part * (kills % 2),
                    seed=seed + part,
                    views=views,
                )
                figures = {"views": views, **asdict(tally), "seconds": round(time.monotonic() - started, 1)}
                print(json.dumps(figures), flush=True)
            server.process.stdin.close()


if __name__ == "__main__":
    main()
