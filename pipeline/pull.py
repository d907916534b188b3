"""STAGE pull: a shared folder from a Hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.files import keep_result, whole_folder
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.hub import check_names, fetch
from deltaclip.pipeline.settings.sharing import Repo

if TYPE_CHECKING:
    from pathlib import Path

    from deltaclip.pipeline.settings import PullConfig


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """A shared folder that was fetched, and what it scores with which backbone."""

    out: Path
    repo: str
    sizes: dict[str, int]
    labels: list[str]
    backbone: str

    def to_json(self) -> dict[str, Any]:
        """Return where it is and from where, its files with their sizes in bytes, its targets and its backbone."""
        about = {"files": self.sizes, "labels": self.labels, "backbone": self.backbone}
        return {"out": str(self.out), "repo": self.repo, **about}

    def summary(self) -> str:
        """Return where it is, and what it scores."""
        total = f"{len(self.sizes)} files, {sum(self.sizes.values()) / 1e6:.1f} MB"
        what = f"scores {' and '.join(self.labels)} on the backbone {self.backbone}"
        return f"{self.out}: {self.repo}, {total}; {what}"


def pull(config: PullConfig) -> PullResult:
    """Fetch a shared folder from a Hub into a folder of its own, which appears whole, after it was opened as a run.

    Raises:
        UserError: no such repository, no network, or what lies there is no shared folder.
    """
    config.check_more()
    repo = Repo.parse(config.repo, "REPO")
    fetched = fetch(repo)
    there = {path.name: path.stat().st_size for path in fetched.iterdir()}
    names = check_names(there, place=str(repo))
    run = open_run(fetched)
    if not run.is_shared:
        raise UserError("is no shared folder", place=str(repo), remedy="give what `deltaclip share` wrote")
    out = keep_result(config.out, lambda path: _copy(fetched, names, path))
    sizes = {name: there[name] for name in names}
    return PullResult(
        out=out, repo=str(repo), sizes=sizes, labels=list(run.labels), backbone=run.config["backbone"]["backbone"]
    )


def _copy(fetched: Path, names: list[str], out: Path) -> Path:
    with whole_folder(out) as growing:
        for name in names:
            shutil.copyfile(fetched / name, growing.work / name)  # the cache of the client holds links
    return growing.path
