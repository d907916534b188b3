"""Settings of what gives a run to others: a folder of it, and that folder on a Hub and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deltaclip.base.errors import UserError
from deltaclip.base.options import check_settings, setting

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """Settings of `share`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    out: Path = setting(help="Folder to write.", argument=True, names="new")
    license: str | None = setting(None, help="Licence of what is shared, as the Hub spells it: apache-2.0, cc-by-4.0.")
    trained_on: str | None = setting(None, help="What to call the training data in the model card; default no name.")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.license is not None and not _LICENCE.fullmatch(self.license):
            remedy = "give one word, such as apache-2.0, or other"
            raise UserError(f"{self.license!r} is no name of a licence", place="--license", remedy=remedy)
        if self.trained_on is not None and not self.trained_on.isprintable():
            raise UserError("is no line of text", place="--trained-on", remedy="give one line, or leave it out")
