"""Settings of the stages that show results: `report`, `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltaclip.base.settings import check_settings, setting


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `report`."""

    runs: list[Path] | None = setting(
        None, help="One run directory, or several side by side; default the newest in runs/.", argument=True
    )
    out: Path | None = setting(None, help="Page to write; default RUN/report.html, of several RUN/../report.html.")
    image_root: Path | None = setting(
        None, help="Where the images lie now; default the folder that the cache recorded."
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    gallery: int = setting(
        12, help="Worst and best rows of each label in the gallery, this many of each.", ge=0, le=500
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of `demo`."""

    out: Path = setting(Path(), help="Folder to make cache/ and runs/ in; default this one.")

    def __post_init__(self) -> None:
        check_settings(self)
