"""What the machine can do at most: products of matrices, decoding, the disk."""

from __future__ import annotations

import functools
import io
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from benchmarks.measuring import Row, seconds
from benchmarks.models import drawn_jpegs
from deltaclip.base.device import choose_device, cpu_has_bf16_units
from deltaclip.features.backbone.decode_ahead import default_workers

SIDE, REPEATS = 2048, 5
DISK_BYTES = 256 << 20
GFLOP_VIT_B_32 = 8.8  # of one image


def about() -> dict[str, object]:
    """Return what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "bf16_units": cpu_has_bf16_units(),
        "gpu": gpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


@functools.cache
def gflops(dtype: torch.dtype, side: int = SIDE) -> float:
    """Return the rate of products of square matrices, 10^9 operations per second, the best of some.

    On a GPU they have four times the `side`.
    """
    device = choose_device("auto")
    side = side if device == "cpu" else 4 * side
    a = torch.randn(side, side, device=device).to(dtype)

    def product() -> None:
        (a @ a)[0, 0].item()  # waits for a GPU

    product()
    return 2 * side**3 / min(seconds(product) for _ in range(REPEATS)) / 1e9


@functools.cache
def decode_rate() -> float:
    """Return how many 512-pixel JPEG files all processors together decode and resize in a second, the model idle."""
    files = drawn_jpegs(64)

    def work(content: bytes) -> None:
        Image.open(io.BytesIO(content)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)

    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(work, files))
        return len(files) / min(seconds(lambda: list(pool.map(work, files))) for _ in range(3))


def measure() -> list[Row]:
    """Return the ceilings as rows."""
    products: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
    rows = [
        Row(name=f"machine: matrix products, {name}", value=gflops(dtype), unit="GFLOP/s")
        for name, dtype in products.items()
    ]
    rows.append(Row(name="machine: JPEG 512 decoded and resized, all processors", value=decode_rate(), unit="images/s"))
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as folder:
        path, block = Path(folder) / "block", os.urandom(1 << 20)
        write = seconds(lambda: _write(path, block))
        rows.append(Row(name="machine: disk, written with fsync", value=DISK_BYTES / 1e6 / write, unit="MB/s"))
        read = seconds(functools.partial(_read, path))
        rows.append(Row(name="machine: disk, read from its cache", value=DISK_BYTES / 1e6 / read, unit="MB/s"))
    return rows


def _write(path: Path, block: bytes) -> None:
    with path.open("wb") as file:
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass


def share_of_products(images_per_s: float, dtype: torch.dtype) -> float:
    """Return how much of the rate of matrix products ViT-B-32 reaches at this rate."""
    return images_per_s * GFLOP_VIT_B_32 / gflops(dtype)
