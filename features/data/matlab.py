"""A vector of numbers in a MATLAB file (versions 4 to 7.2), from files that nobody vouches for.

Knows scipy.io, which is imported inside the function. Must not know what the numbers mean.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# What scipy raises on broken content; a few bytes can claim more elements than memory has.
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    NameError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)


def read_vector(path: Path, variable: str) -> NDArray[np.float64]:
    """Return a variable of any shape as (N,) float64; NaN stays.

    Raises:
        UserError: no MATLAB file, damaged, of version 7.3, or without such a variable of numbers.
    """
    import scipy.io

    try:
        names = [name for name, _, _ in scipy.io.whosmat(str(path), appendmat=False)]
        found = {} if variable not in names else scipy.io.loadmat(
            str(path), appendmat=False, variable_names=[variable]
        )  # fmt: skip
    except NotImplementedError as error:
        raise UserError("is of MATLAB 7.3", place=path, remedy="save it with -v7") from error
    except (scipy.io.matlab.MatReadError, *BROKEN) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"is no readable MATLAB file ({reason})", place=path, remedy="unpack it again") from error
    values = found.get(variable)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf" or not values.size:
        have = ", ".join(names) or "nothing"
        raise UserError(f"has no numbers called {variable!r}", place=path, remedy=f"found: {have}")
    return values.astype(np.float64).ravel()
