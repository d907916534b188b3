"""Settings of what gives a run to others: a folder of it, and that folder to a Hub and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deltaclip.base.errors import UserError, require_extra
from deltaclip.base.options import check_settings, setting
from deltaclip.pipeline.settings.finished import recorded

SCHEME = "hf://"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True)
class Repo:
    """A repository of a Hub, `revision` a branch, tag or commit; None is its default branch."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, place: str) -> Repo:
        """Read `ORG/NAME` or `ORG/NAME@REVISION`, also behind hf://.

        Raises:
            UserError: it is neither.
        """
        name, at, revision = text.removeprefix(SCHEME).partition("@")
        if not _NAME.fullmatch(name) or (at and not revision) or "--" in name or ".." in name:
            raise UserError(
                f"{text!r} is no name of a repository", place=place, remedy="give ORG/NAME or ORG/NAME@REVISION"
            )
        return cls(name, revision or None)

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"@{self.revision}" if self.revision else "")


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


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Settings of `push`."""

    folder: Path = setting(help="Folder made by `deltaclip share`.", argument=True, names="run")
    repo: str = setting(help="Repository of the Hub, ORG/NAME, made where it is not there; @BRANCH.", argument=True)
    dry_run: bool = setting(False, help="Only list what would go, with sizes; needs no network.")
    private: bool = setting(False, help="Make a new repository private.")

    def __post_init__(self) -> None:
        check_settings(self)

    def check_more(self) -> None:
        """Refuse to start without the extra, with no name of a repository, or with a run that was not shared."""
        require_extra("hub", "huggingface_hub", place="push")
        Repo.parse(self.repo, "REPO")
        if (found := recorded(self.folder)) and "shared" not in found:
            remedy = f"make a folder without them: deltaclip share {self.folder} OUT"
            raise UserError("is a run with the rows of its training", place=self.folder, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """Settings of `pull`."""

    repo: str = setting(help="Repository of the Hub: ORG/NAME or ORG/NAME@REVISION.", argument=True)
    out: Path = setting(help="Folder to write.", argument=True, names="new")

    def __post_init__(self) -> None:
        check_settings(self)

    def check_more(self) -> None:
        """Refuse to start without the extra, or with no name of a repository."""
        require_extra("hub", "huggingface_hub", place="pull")
        Repo.parse(self.repo, "REPO")
