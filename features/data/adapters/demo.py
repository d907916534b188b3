"""The bundled data set: scenes drawn by `features/scenes`, rendered on first use.

Lives in the user's cache folder (`DELTACLIP_CACHE`, else `XDG_CACHE_HOME/deltaclip`, else `~/.cache/deltaclip`);
the folder's name carries the version of the drawing, so that a new release draws a new set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltaclip.base.files import user_cache
from deltaclip.features.data.adapters.finding import DataTables
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.data.table import read_table

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1
RANGE = LabelRange(0.0, 1.0, "adapter")


def read_demo() -> DataTables:
    """Read the demo set, rendering it first where it is not there yet."""
    folder = demo_folder()
    if not folder.exists():
        from deltaclip.features.scenes.render import render_demo

        render_demo(folder)
    table = read_table(folder / "demo.csv")
    return DataTables(name="demo", tables=[table], image_root=folder, label_range=RANGE)


def demo_folder() -> Path:
    """Return where the demo set of this version lies."""
    return user_cache() / f"demo-v{VERSION}"
