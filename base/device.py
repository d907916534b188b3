"""Choose the device and the number format of a forward pass, with the reason.

Knows what the processor and torch can do; torch is imported inside the functions. Must not know any model.
bf16 pays only where the processor has units for it; fp16 on a CPU never does.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from deltaclip.base.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]


def ask_for_large_pages() -> None:
    """Let torch ask for 2 MB pages for large tensors on a CPU, unless the environment says otherwise.

    The maps of a convolutional tower are given back to the system after each use: with 4 kB pages a MobileNetV2 at
    batch 64 takes 21,000 page faults an image and half its time in them, with large ones 500. torch reads this once, so
    it is for programs, before they import torch; Linux alone has it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


# What the libraries' threads do while they wait for each other, and how that is asked of them. By themselves they spin
# for milliseconds: beside other work each then burns the processor that the one it waits for would need, and a fit of
# 2 s took 328 s at a load of 25. So they spin for some 50 microseconds, then sleep: to sleep at once doubles the time
# of a head fit on idle processors. They read these once, when they are loaded. OpenBLAS counts in powers of 2.
WAITING = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0", "OPENBLAS_THREAD_TIMEOUT": "4"}
THREAD_SETTINGS = {*WAITING, "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}


def share_processors() -> None:
    """Let the threads of numerical libraries sleep while they wait, and be no more than the processors allowed.

    What the environment says already stays, whichever of the settings it has. For programs, before they import numpy
    or torch.
    """
    if not any(name in os.environ for name in (*WAITING, "OMP_WAIT_POLICY")):
        os.environ.update(WAITING)
    count = usable_processors()
    # Left alone where it says nothing new: processes that Ray starts get numbers of their own.
    if count < _allowed_processors():
        os.environ.setdefault("OMP_NUM_THREADS", str(count))


def usable_processors() -> int:
    """Return how many processors this process may keep busy, at least 1: those that it may run on, and their quota."""
    quota = _quota()
    return _allowed_processors() if quota is None else max(1, min(_allowed_processors(), math.ceil(quota)))


def _allowed_processors() -> int:
    """Return how many processors this process may run on: all of the machine where a system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_device_words(requested: str, option: str = "--device") -> None:
    """Refuse what names no device on any machine; whether it is on this one, torch knows.

    Raises:
        UserError: what can be given.
    """
    for name in requested.split(","):
        if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?|cuda:all", name.strip()):
            raise UserError(f"{requested!r} is no device", place=option, remedy="give auto, cpu, cuda or cuda:N")


def _quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return how many processors' time a container or service gets, None where that has no bound.

    Control groups of version 2 say `cpu.max`, those of version 1 `cpu.cfs_quota_us`; the least on the way to the root
    counts.
    """
    try:
        groups = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:  # another system
        return None
    found = []
    for _, names, path in groups:
        if names and "cpu" not in names.split(","):
            continue
        top = root / names if names else root
        folder = top / path.strip("/")
        folders = [folder, *folder.parents]
        found += [quota for each in folders[: folders.index(top) + 1] if (quota := _quota_of(each)) is not None]
    return min(found, default=None)


def _quota_of(folder: Path) -> float | None:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in {"max", "-1"} and float(period) > 0:
            return float(quota) / float(period)
    return None


@contextlib.contextmanager
def own_modes(*, learns: bool = False) -> Iterator[None]:
    """Compute as if nothing were set around a call; for what other programs call, also as a decorator.

    torch has modes of a thread or a process that reach into whatever is called: mixed precision (autocast) rounds the
    products of a scorer to 16 bits, a default type or device makes tensors that do not fit the others. What is set is
    put aside for the call and put back. `learns` also lets gradients flow, where they are switched off.
    """
    import torch

    with contextlib.ExitStack() as modes:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if (before := torch.get_default_dtype()) != torch.float32:
            modes.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        if learns and torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(mode=False))
        if learns:
            modes.enter_context(torch.enable_grad())
        yield


def check_precision(precision: str | None) -> None:
    """Refuse a number format that is none of a model.

    Raises:
        UserError: what there is.
    """
    if precision is not None and precision not in get_args(Precision):
        remedy = did_you_mean(str(precision), get_args(Precision))
        raise UserError(f"{precision!r} is no number format", place="precision", remedy=remedy)


def choose_device(requested: str | torch.device, *, local_rank: int | None = None) -> str:
    """Return a torch device name; `auto` takes a CUDA GPU where there is one.

    Args:
        requested: auto, cpu, cuda or cuda:N, or a device of torch.
        local_rank: number of this process among those of this machine; with `auto` they take the GPUs in turn.

    Raises:
        UserError: the requested device is not known or not present.
    """
    import torch

    requested = str(requested)
    if requested == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        return "cuda" if local_rank is None else f"cuda:{local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise UserError(
            f"{requested!r} is no device", place="--device", remedy="give auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA GPU is present", place="--device", remedy="give cpu or auto")
    if device.type in ("mps", "xpu") and not torch.get_device_module(device).is_available():
        raise UserError(f"no device {device.type} is present", place="--device", remedy="give cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"there is no {requested}", place="--device", remedy=f"the last GPU is cuda:{last}")
    return requested


def choose_devices(requested: str, *, local_rank: int | None = None) -> list[str]:
    """Return the devices of a comma-separated list, all of one kind; `cuda:all` is every CUDA GPU.

    Args:
        requested: names, or `auto`.
        local_rank: number of this process among those of this machine, see `choose_device`.

    Raises:
        UserError: one of them is not known or not present, or their kinds differ.
    """
    if requested == "cuda:all":
        import torch

        choose_device("cuda")
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = [choose_device(name.strip(), local_rank=local_rank) for name in requested.split(",")]
    if len({device.partition(":")[0] for device in devices}) > 1:
        message = f"{requested!r} mixes kinds of devices, whose embeddings differ"
        raise UserError(message, place="--device", remedy="give cpu, cuda:all or GPUs alone")
    return devices


def arithmetic(device: str) -> dict[str, Any] | None:
    """Return how a CUDA GPU computes, as JSON values: what makes its fp32 another than a CPU's; None elsewhere.

    `tf32_products` and `tf32_convolutions` say whether fp32 is rounded to 10 bits where it is multiplied (torch's
    default for convolutions), `deterministic` whether the same input gives the same bits.
    """
    if not device.startswith("cuda"):
        return None
    import torch

    return {
        "device": torch.cuda.get_device_name(device),
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def cpu_has_bf16_units() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware (AVX512_BF16 or AMX); without, bf16 is slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere nothing tells without a library, and fp32 is never wrong
    if not cpuinfo.exists():
        return False
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_precision(requested: PrecisionChoice, device: str) -> Precision:
    """Return the precision of the forward pass; `auto` is the fastest one that keeps a cosine of .999 with fp32.

    Raises:
        UserError: fp16 was asked for on a CPU.
    """
    on_gpu = device.startswith("cuda")
    if requested == "fp16" and not on_gpu:
        raise UserError("fp16 does not work on a CPU", place="--precision", remedy="give bf16, fp32 or auto")
    if requested != "auto":
        return requested
    if on_gpu:
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bf16_units() else "fp32"
