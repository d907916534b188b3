"""Settings of the stages that show results: `report`, `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltaclip.base.errors import UserError
from deltaclip.base.places import check_suffix
from deltaclip.base.settings import check_settings, setting

RUNS = Path("runs")
PAGES = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `report`."""

    runs: list[Path] | None = setting(
        None,
        help="One run directory, or several side by side; default the newest in runs/.",
        argument=True,
        names="run",
    )
    out: Path | None = setting(
        None, help="Page to write; default RUN/report.html, of several RUN/../report.html.", names="file"
    )
    image_root: Path | None = setting(
        None,
        help="Where the images lie now; default the folder that the cache recorded.",
        names="folder",
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    gallery: int = setting(
        12, help="Worst and best rows of each label in the gallery, this many of each.", ge=0, le=500
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.out:  # so that it never replaces a file of a run
            check_suffix(self.out, PAGES)

    def check_more(self) -> None:
        """Refuse to look for the newest run where there is none."""
        if self.runs is None:
            newest_run(RUNS)


def newest_run(folder: Path) -> Path:
    """Return the run directory that was finished last.

    Raises:
        UserError: there is none.
    """
    there = folder.iterdir() if folder.is_dir() else ()
    # What a killed training left half written has a name that begins with a dot.
    found = [path for path in there if not path.name.startswith(".") and (path / "metrics.json").is_file()]
    if not found:
        raise UserError("holds no run", place=folder, remedy="give RUN, or make one with `deltaclip train`")
    return max(found, key=lambda path: (path / "metrics.json").stat().st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of `demo`."""

    out: Path = setting(Path(), help="Folder to make cache/ and runs/ in; default this one.", names="within")

    def __post_init__(self) -> None:
        check_settings(self)
