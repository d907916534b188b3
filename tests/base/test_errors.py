"""One line that names the place, the value and the remedy."""

from __future__ import annotations

import errno
import json
import zipfile
from pathlib import Path

import h5py
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError

from deltaclip.base.errors import Ending, MachineError, UserError, did_you_mean, ending_of, nearest, system_number

SMALLER = "give a smaller --batch-size, with `finetune` also --checkpointing"


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "is wrong"),
        ({"place": "--lr"}, "--lr: is wrong"),
        ({"remedy": "correct it"}, "is wrong; correct it"),
        ({"place": Path("a/b.csv"), "remedy": "correct it"}, "a/b.csv: is wrong; correct it"),
    ],
)
def test_line(parts, line):
    error = UserError("is wrong", **parts)
    assert str(error) == line
    assert (error.message, error.place, error.remedy) == ("is wrong", parts.get("place"), parts.get("remedy"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("VIT-b-32", "ViT-B-32"), ("ViTB32", "ViT-B-32"), ("openia", "openai"), ("zzz", None), ("", None)],
)
def test_nearest_ignores_case(name, expected):
    assert nearest(name, ["openai", "ViT-B-32", "RN50"]) == expected


def test_did_you_mean_proposes_or_lists():
    assert did_you_mean("fixd", ["fixed", "learned"]) == "did you mean 'fixed'?"
    assert did_you_mean("zzz", ["fixed", "learned"]) == "known: fixed, learned"


DISK = "check the disk and your rights on it"


def raised(work):
    with pytest.raises(Exception) as caught:
        work()
    return caught.value


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (UserError("is\nwrong", remedy="correct it"), Ending(2, "is wrong; correct it")),
        (MachineError("is full", place="a"), Ending(1, "a: is full")),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), Ending(1, f"a/b: No space left on device; {DISK}")),
        (PermissionError(errno.EACCES, "Permission denied", "a"), Ending(1, f"a: Permission denied; {DISK}")),
        (OSError(errno.ENOSPC, "No space left on device"), Ending(1, f"input/output: No space left on device; {DISK}")),
        (OSError(errno.ELOOP, "Loop", "a"), Ending(2, "a: Loop; check the path")),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), Ending(2, "a: No such file; check the path")),
        (ConnectionResetError(errno.ECONNRESET, "Reset", "h"), Ending(1, "h: Reset; check the network")),
        (
            RuntimeError("Symlink loop from 'a'"),
            Ending(2, "a: Too many levels of symbolic links; check the path"),
        ),
        (
            RuntimeError("Unable to flush (errno = 28, error message = 'x')"),
            Ending(1, f"input/output: No space left on device; {DISK}"),
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            Ending(1, f"input/output: No space left on device; {DISK}"),
        ),
        (KeyboardInterrupt(), Ending(130, "interrupted; nothing half-written is left, give the same command again")),
        (
            MemoryError(),
            Ending(
                1,
                f"the memory is used up; {SMALLER}, or close other programs",
            ),
        ),
        (
            torch.OutOfMemoryError("CUDA out"),
            Ending(
                1,
                f"the memory of the GPU is used up; {SMALLER}, or --device cpu",
            ),
        ),
        (
            ModuleNotFoundError("No module named 'x'"),
            Ending(1, "a library is missing or broken (No module named 'x'); install deltaclip again"),
        ),
        (
            pa.ArrowInvalid("Not a Parquet file"),
            Ending(2, "a table cannot be read or written (Not a Parquet file); save it again"),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_family_of_errors_ends_in_one_line(error, ending):
    assert ending_of(error) == ending


def test_what_libraries_really_raise_is_known_by_its_class(tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"no such thing \xff")
    for work, code, words in (
        (lambda: json.loads("{"), 2, "a JSON file is broken (Expecting property name"),
        (lambda: broken.read_text(encoding="utf-8"), 2, "a text file is not in UTF-8 ('utf-8' codec"),
        (lambda: zipfile.ZipFile(broken), 2, "a file is no archive that can be read (File is not a zip file)"),
        (lambda: h5py.File(broken, "r"), 2, "a file cannot be read ("),
        ((tmp_path / ("x" * 300)).read_bytes, 2, f"{tmp_path}/xxx"),
    ):
        found = ending_of(raised(work))
        assert found.exit_code == code
        assert found.line.startswith(words)
        assert "\n" not in found.line


def test_what_nobody_has_foreseen_is_said_to_be_a_fault_of_ours():
    assert ending_of(ZeroDivisionError("division\nby zero")) == Ending(
        1, "internal error: ZeroDivisionError: division; give --debug too for the traceback, and report it with that"
    )
    assert system_number(ValueError("x")) is None


def test_memory_that_torch_does_not_get_is_told_with_its_remedy():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert ending_of(caught.value) == (1, f"the memory is used up; {SMALLER}, or close other programs")


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        (
            "OutOfMemoryError",
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore",
            f"the memory of the GPU is used up; {SMALLER}, or --device cpu",
        ),
        (
            "RuntimeError",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            f"the memory of the GPU is used up; {SMALLER}, or --device cpu",
        ),
        (
            "RuntimeError",
            "Found no NVIDIA driver on your system. Please check",
            "the GPU failed (Found no NVIDIA driver on your system. Please check); give the same command again, or "
            "--device cpu",
        ),
        (
            "RuntimeError",
            "\"slow_conv2d_cpu\" not implemented for 'Half'",
            "this device does not compute in that number format (\"slow_conv2d_cpu\" not implemented for 'Half'); give "
            "--precision fp32",
        ),
        (
            "DistNetworkError",
            "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29500).",
            "the processes of torchrun do not reach each other (The client socket has timed out after 60000ms while "
            "trying to connect to (10.0.0.1, 29500).); check its --nnodes, --rdzv-endpoint and the network, and start "
            "all of them again",
        ),
        (
            "RuntimeError",
            "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.1.1]:3456",
            "the processes of torchrun have lost each other ([gloo/transport/tcp/pair.cc:553] Connection closed by "
            "peer [127.0.1.1]:3456); look for the first error above, and give the same command again: it goes on",
        ),
    ],
)
def test_failures_of_devices_and_processes_are_told_in_one_line(kind, text, line):
    import torch

    kinds = {"OutOfMemoryError": torch.OutOfMemoryError, "DistNetworkError": torch.distributed.DistNetworkError}
    assert ending_of(kinds.get(kind, RuntimeError)(text)) == (1, line)
