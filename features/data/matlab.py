"""A vector of numbers in a MATLAB file (versions 4 to 7.2), from files that nobody vouches for.

scipy reads them, in a process of its own: a few bytes that are wrong can end that process with a bus error. Knows that
format. Must not know what the numbers mean.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TIMEOUT_S = 120
READER = """
import json, sys
import numpy, scipy.io
path, variable = sys.argv[1:]
names = [name for name, _, _ in scipy.io.whosmat(path, appendmat=False)]
found = scipy.io.loadmat(path, appendmat=False, variable_names=[variable]) if variable in names else {}
values = found.get(variable)
usable = isinstance(values, numpy.ndarray) and values.dtype.kind in "iuf" and values.size > 0
sys.stdout.buffer.write(json.dumps({"names": names, "usable": usable}).encode() + b"\\n")
if usable:
    numpy.save(sys.stdout.buffer, values.astype(numpy.float64).ravel(), allow_pickle=False)
"""


def read_vector(path: Path, variable: str) -> NDArray[np.float64]:
    """Return a variable of any shape as (N,) float64; NaN stays.

    Raises:
        UserError: no MATLAB file, damaged, of version 7.3, or without such a variable of numbers.
    """
    command = [sys.executable, "-W", "ignore", "-c", READER, str(path), variable]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)  # noqa: S603 - our own program
    except subprocess.TimeoutExpired as error:
        message = f"is no readable MATLAB file (not read in {TIMEOUT_S} s)"
        raise UserError(message, place=path, remedy="unpack it again") from error
    if done.returncode:
        raise _unreadable(path, done)
    about, _, content = done.stdout.partition(b"\n")
    found = json.loads(about)
    if not found["usable"]:
        have = ", ".join(found["names"]) or "nothing"
        raise UserError(f"has no numbers called {variable!r}", place=path, remedy=f"found: {have}")
    return np.asarray(np.load(io.BytesIO(content), allow_pickle=False), dtype=np.float64)


def _unreadable(path: Path, done: subprocess.CompletedProcess[bytes]) -> UserError:
    """Say why the reader failed: the last line of its traceback, or the signal that ended it."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    kind, _, reason = lines[-1].partition(": ") if lines else ("", "", "")
    if kind == "NotImplementedError":
        return UserError("is of MATLAB 7.3", place=path, remedy="save it with -v7")
    words = f"signal {-done.returncode}" if done.returncode < 0 else reason or kind
    return UserError(f"is no readable MATLAB file ({words})", place=path, remedy="unpack it again")
