"""STAGE push: a shared folder to a Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.hub import check_names, upload
from deltaclip.pipeline.settings.sharing import Repo

if TYPE_CHECKING:
    from deltaclip.pipeline.settings import PushConfig


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What went to a Hub, or would go; `address` is that of the commit, None where nothing was sent."""

    repo: str
    sizes: dict[str, int]
    address: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the repository, the files with their sizes in bytes, and the address of the commit."""
        return {"repo": self.repo, "files": self.sizes, "address": self.address}

    def summary(self) -> str:
        """Return the files with their sizes, and where they are."""
        width = max(map(len, self.sizes))
        total = f"{len(self.sizes)} files, {sum(self.sizes.values()) / 1e6:.1f} MB"
        head = f"{self.repo}: {total}" + ("" if self.address else " would go; nothing was sent")
        files = [f"  {name:{width}}  {size / 1e3:10,.1f} kB" for name, size in self.sizes.items()]
        return "\n".join([head, *files, *([f"commit: {self.address}"] if self.address else [])])


def push(config: PushConfig) -> PushResult:
    """Send a shared folder to a repository of a Hub; with `dry_run` only list what would go, without any network.

    Raises:
        UserError: a run that was not shared, which has the rows of its training; no token, no network, a refusal.
    """
    config.check_more()
    repo = Repo.parse(config.repo, "REPO")
    if not open_run(config.folder).is_shared:
        remedy = f"make a folder without them: deltaclip share {config.folder} OUT"
        raise UserError("is a run with the rows of its training", place=config.folder, remedy=remedy)
    there = {path.name: path.stat().st_size for path in config.folder.iterdir()}
    names = check_names(there, place=str(config.folder))
    sizes = {name: there[name] for name in names}
    address = None if config.dry_run else upload(config.folder, names, repo, private=config.private)
    return PushResult(repo=str(repo), sizes=sizes, address=address)
