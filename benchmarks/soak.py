"""Ten thousand JPEG files through `extract`: images per second and memory over time, and what holds it back.

    python -m benchmarks.soak --images 10000 --set ../agiqa-3k --backbone ViT-B-32 --pretrained random

The real pictures of AGIQA-3K, each several times with a comment of its own so that every file has other bytes; drawn
ones where that set is not at hand. The command runs as a user's would, in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.machine import about
from benchmarks.models import drawn_jpegs, vit_b_32

START_OF_IMAGE, COMMENT = b"\xff\xd8", b"\xff\xfe"
SAMPLES = 12  # lines of the table
DRAWN = 200


def main() -> None:
    """Make the files, extract them, print the table; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--set", type=Path, default=Path("../agiqa-3k"), help="folder of AGIQA-3K")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--pretrained", help="checkpoint, or `random` for ViT-B-32 with random weights")
    parser.add_argument("--decode", default="exact")
    options = parser.parse_args()
    print(about())
    pretrained = str(vit_b_32().weights) if options.pretrained == "random" else options.pretrained
    with tempfile.TemporaryDirectory(prefix="deltaclip-soak-") as name:
        folder = Path(name)
        source = write_files(folder, options.images, options.set)
        print(f"{options.images:,} files, {source}")
        out = folder / "soak.h5"
        command = [sys.executable, "-m", "deltaclip", "extract", str(folder / "manifest.csv"), "--out", str(out)]
        command += ["--backbone", options.backbone, "--decode", options.decode, "--json"]
        command += ["--pretrained", pretrained] if pretrained else []
        samples, result = watch(command, out)
    print(f"\n{'seconds':>8}{'images':>9}{'images/s':>10}{'MB':>7}")
    for before, after in itertools.pairwise(samples):
        rate = (after["images"] - before["images"]) / (after["seconds"] - before["seconds"])
        print(f"{after['seconds']:>8.0f}{after['images']:>9,}{rate:>10.1f}{after['mb']:>7.0f}")
    kept = ("new_images", "images_per_s", "batch_size", "workers", "stages", "bottleneck")
    print(json.dumps({name: result[name] for name in kept} | {"samples": samples}))


def write_files(folder: Path, count: int, real: Path) -> str:
    """Write `count` distinct JPEG files and a manifest of them; return where they come from."""
    files = sorted((real / "images").glob("*.jpg"))[:count]
    pictures = [file.read_bytes() for file in files] or drawn_jpegs(min(count, DRAWN))
    lines = ["image,prompt"]
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(with_comment(pictures[number % len(pictures)], f"copy {number}"))
        lines.append(f"{number}.jpg,picture {number // 8}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return f"{len(files):,} real pictures repeated" if files else f"{len(pictures):,} drawn pictures repeated"


def with_comment(jpeg: bytes, comment: str) -> bytes:
    """Return the same picture with a comment right after its first marker: other bytes, equal pixels."""
    assert jpeg.startswith(START_OF_IMAGE)
    text = comment.encode()
    return START_OF_IMAGE + COMMENT + (len(text) + 2).to_bytes(2) + text + jpeg[2:]


def watch(command: list[str], out: Path) -> tuple[list[dict[str, float]], dict[str, object]]:
    """Run an extraction; return samples of seconds, images done and memory, and what it said at its end."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed: list[str] = []
    reader = threading.Thread(target=lambda: printed.extend(process.stdout or []))
    reader.start()
    samples = [{"seconds": 0.0, "images": 0, "mb": 0.0}]
    while process.poll() is None:
        time.sleep(1)
        images = _done(out.with_name(out.name + ".part"))
        if images is None or process.poll() is not None:
            continue
        memory = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096 / 1e6
        samples.append({"seconds": time.monotonic() - started, "images": images, "mb": memory})
    reader.join()
    if process.returncode:
        sys.exit(process.returncode)
    step = max(1, len(samples) // SAMPLES)
    return samples[::step], json.loads("".join(printed))


def _done(part: Path) -> int | None:
    from deltaclip.base.errors import UserError
    from deltaclip.features.store.reader import FeatureStore
    from deltaclip.features.store.schema import DONE

    try:
        with FeatureStore.open(part, unfinished=True) as store:
            return int((store.status() == DONE).sum())
    except UserError:  # not begun, or it has its own name by now
        return None


if __name__ == "__main__":
    main()
