"""How HDF5 files are written here: datasets in their full size from the start, and nothing counts before it is on disk.

Knows h5py. Must not know what the datasets mean.
"""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def allocate(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Make a dataset in its full size, in one piece."""
    # Early allocation fixes the layout before the first batch; no fill, or 10 million rows would be written twice.
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_obj_track_times(False)  # equal content, equal bytes
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(group.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, dcpl=properties)


def commit(file: h5py.File, path: Path) -> None:
    """Wait until all that was written is on the disk.

    Raises:
        OSError: with its number and `path`.
    """
    try:
        file.flush()
        os.fsync(file.id.get_vfd_handle())
    except (RuntimeError, OSError) as error:  # h5py gives a RuntimeError that holds the number
        found = re.search(r"errno = (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None) or errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def selection(entries: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Return how HDF5 addresses rising entries: a slice is one write, a list of points one per row."""
    first, last = int(entries[0]), int(entries[-1])
    return slice(first, last + 1) if last - first + 1 == len(entries) else entries
