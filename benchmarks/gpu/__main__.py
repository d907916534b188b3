"""`make bench-gpu`: whether a GPU gives the right numbers, and how near it comes to what it could do.

    python -m benchmarks.gpu [--only correct,heads] [--dry]

Needs no network and no files: pictures are drawn, models have random weights. Each figure is a line of JSON: part,
name, value, unit, and where one is asked for `floor` (at least) or `most` (at most), the `ratio` to it and a `verdict`;
those that are NOT MET come again at the end. A part is a process with a time limit of its own, so that one that hangs
costs no other. `--dry` tries every part on the CPU, small; its speeds say nothing and have no floor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import as_line
from deltaclip.base.device import ask_for_large_pages

LIMITS_S = {"correct": 170, "extract": 95, "finetune": 165, "heads": 50, "ceilings": 30, "compiled": 60}
IN_ALL_S = 570
DRY_FACTOR = 4  # a CPU takes its time
FIGURE, LAST_WORDS = '{"part"', 15
PACKAGES = ("deltaclip", "torchvision", "open_clip_torch", "timm", "numpy")


def main() -> int:
    """Run the parts; 0 where all is met, 1 where something is not, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"parts, comma-separated: {', '.join(LIMITS_S)}")
    parser.add_argument("--dry", action="store_true", help="on the CPU, small")
    parser.add_argument("--here", metavar="FOLDER", type=Path, help="one part in this process, its files in FOLDER")
    options = parser.parse_args()
    parts = options.only.split(",") if options.only else list(LIMITS_S)
    if unknown := set(parts) - set(LIMITS_S):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS_S)}")
    ask_for_large_pages()  # as the commands do
    if options.here:
        run_here(parts[0], options.here, dry=options.dry)
        return 0
    if options.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # here, and in what is started
    import torch

    if not options.dry and not torch.cuda.is_available():
        message = "deltaclip: no CUDA GPU is present (give DRY=1, or --dry: every part on the CPU, small)"
        print(message, file=sys.stderr)
        return 2
    print(json.dumps({"machine": about()}), flush=True)
    return run_parts(parts, dry=options.dry)


def about() -> dict[str, Any]:
    """Return the machine, its GPUs and the versions of what computes."""
    import importlib.metadata
    import platform

    import torch

    from benchmarks.machine import about as about_machine

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return about_machine() | {
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def run_here(part: str, folder: Path, *, dry: bool) -> None:
    """Run a part in this process."""
    from benchmarks.gpu import correct, speed
    from benchmarks.gpu.scene import Check, Scene

    scene = Scene(part=part, folder=folder, dry=dry)
    work = {"correct": correct.measure} | {name: getattr(speed, name) for name in LIMITS_S if name != "correct"}
    with Check(scene, part):
        work[part](scene)


def run_parts(parts: list[str], *, dry: bool) -> int:
    """Run parts one after the other, each in a process of its own; return 1 where something is not met."""
    started, lines = time.monotonic(), list[str]()
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-gpu-") as folder:
        for part in parts:
            limit = LIMITS_S[part] * DRY_FACTOR if dry else min(LIMITS_S[part], IN_ALL_S - elapsed(started))
            command = [sys.executable, "-m", "benchmarks.gpu", "--only", part, "--here", folder]
            lines += run_limited([*command, "--dry"] if dry else command, part, limit)
            errors = Path(folder) / f"{part}.errors"
            if errors.exists():
                print(errors.read_text(), file=sys.stderr)
    missed = [line for line in lines if json.loads(line).get("verdict") == "NOT MET"]
    judged = sum("verdict" in json.loads(line) for line in lines)
    print(f"\nNOT MET: {len(missed)} of {judged} asked for, {len(lines)} figures, {elapsed(started):.0f} s")
    print(*missed, sep="\n", end="\n" if missed else "")
    return int(bool(missed))


def elapsed(started: float) -> float:
    """Return the seconds since then."""
    return time.monotonic() - started


def run_limited(command: list[str], part: str, limit_s: float) -> list[str]:
    """Run a part for so many seconds at most; print its figures as they come and return them.

    One that is cut off, or ends with an error, is a figure that is not met; the end of what it said is shown then.
    """
    lines: list[str] = []

    def note(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as words:
        # A session of its own: what it has started ends with it.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True, start_new_session=True)
        printed = process.stdout or []
        reader = threading.Thread(target=lambda: [note(each.rstrip()) for each in printed if each.startswith(FIGURE)])
        reader.start()
        try:
            code = process.wait(max(limit_s, 1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join()
            if process.stdout:
                process.stdout.close()
        if code is None:
            note(as_line(part, "seconds, then cut off", elapsed(started), "s", most=limit_s))
        elif code:
            note(as_line(part, "exit code", code, most=0))
            words.seek(0)
            print(*words.read().splitlines()[-LAST_WORDS:], sep="\n", file=sys.stderr)
    note(as_line(part, "the part, all of it", elapsed(started), "s"))
    return lines


if __name__ == "__main__":
    sys.exit(main())
