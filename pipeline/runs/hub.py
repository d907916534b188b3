"""Shared folders on a Hub and back, through the Hub's own client, which keeps what it has fetched.

Knows which files a shared folder has: what else lies in a repository is named and left there. Must not know what the
files mean.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError, one_line, require_extra
from deltaclip.base.progress import say
from deltaclip.features.backbone.weights import hub_errors, stay_offline_without_hub
from deltaclip.pipeline.settings.sharing import SCHEME, Repo

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a shared folder may hold, with the largest size in bytes: text, and tensors up to those of a tuned tower.
_TEXT, _TENSORS = 4 << 20, 16 << 30
ALLOWED = dict.fromkeys(("README.md", "config.json", "metrics.json", "example.py", "LICENSE"), _TEXT)
ALLOWED |= {"trust.safetensors": 1 << 30, "*_best.safetensors": _TENSORS}
NEEDED = ("config.json", "metrics.json", "*_best.safetensors")
_OF_HUB = (".gitattributes",)  # that the Hub puts into every repository


def place_of_run(run: Path | str) -> Path:
    """Return the folder of a run, that of `hf://ORG/NAME` fetched where it is not there yet.

    Raises:
        UserError: it cannot be fetched, or is no shared folder.
    """
    return fetch(Repo.parse(run, run)) if isinstance(run, str) and run.startswith(SCHEME) else Path(run)


def fetch(repo: Repo) -> Path:
    """Return the folder of a repository in the client's cache, its known files alone, fetched where they are not there.

    Raises:
        UserError: no such repository or revision, no network and nothing in the cache, a file that is missing or larger
            than any of its kind.
    """
    require_extra("hub", "huggingface_hub", place=str(repo))
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    stay_offline_without_hub()
    try:
        try:
            info = HfApi().model_info(repo.name, revision=repo.revision, files_metadata=True)
        except HfHubHTTPError:
            raise
        except hub_errors():  # no network: what was fetched before
            kept = list(ALLOWED)
            return Path(
                snapshot_download(repo.name, revision=repo.revision, local_files_only=True, allow_patterns=kept)
            )
        names = check_names({each.rfilename: each.size for each in info.siblings or []}, place=str(repo))
        # By its name, so that the client finds it by that without a network; by the commit whose list was checked,
        # where another one has come in between.
        found = Path(snapshot_download(repo.name, revision=repo.revision, allow_patterns=names))
        if found.name != info.sha:
            found = Path(snapshot_download(repo.name, revision=info.sha, allow_patterns=names))
    except hub_errors() as error:
        raise _told(error, repo) from error
    return found


def check_names(sizes: Mapping[str, int | None], *, place: str) -> list[str]:
    """Return which files of a repository or folder belong to a shared one; the others are named on the terminal.

    Raises:
        UserError: one that is needed is missing, or one is too large.
    """
    known = {name: bound for name in sizes if (bound := _bound(name)) is not None}
    if others := sorted(set(sizes) - set(known) - set(_OF_HUB)):
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        say(f"{place}: left out, as no part of a shared folder: {', '.join(others[:5])}{more}")
    for pattern in NEEDED:
        found = [name for name in known if fnmatch(name, pattern)]
        if len(found) != 1:
            what = f"has no {pattern}" if not found else f"has {len(found)} files {pattern}"
            raise UserError(what, place=place, remedy="give what `deltaclip share` wrote")
    for name, bound in known.items():
        if (sizes[name] or 0) > bound:
            message = (
                f"{name} has {(sizes[name] or 0) / 1e6:,.0f} MB, more than the {bound / 1e6:,.0f} MB of such a file"
            )
            raise UserError(message, place=place, remedy="give what `deltaclip share` wrote")
    return sorted(known)


def _bound(name: str) -> int | None:
    is_ours = "/" not in name and not name.startswith(".")
    return next((bound for pattern, bound in ALLOWED.items() if is_ours and fnmatch(name, pattern)), None)


def upload(folder: Path, names: list[str], repo: Repo, *, private: bool) -> str:
    """Put files of a folder into a repository, made where it is not there, and return the address of the commit.

    Heads of another mode that lie there are removed: a folder has one.

    Raises:
        UserError: no token, no network, or the Hub refuses it.
    """
    from huggingface_hub import HfApi, get_token

    if not get_token():
        remedy = "give HF_TOKEN, or log in with `hf auth login`"
        raise UserError("the Hub takes no files without a token", place=str(repo), remedy=remedy)
    stay_offline_without_hub()
    api = HfApi()
    try:
        api.create_repo(repo.name, private=private or None, exist_ok=True)
        found: Any = api.upload_folder(
            repo_id=repo.name,
            folder_path=folder,
            revision=repo.revision,
            allow_patterns=names,
            delete_patterns="*_best.safetensors",
            commit_message="Scorer shared by deltaclip",
        )
    except hub_errors() as error:
        raise _told(error, repo) from error
    return str(found.commit_url)


def _told(error: Exception, repo: Repo) -> UserError:
    """Say in one line what the Hub or its client refused."""
    import huggingface_hub.constants as hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    message, remedy = f"the Hub's client failed ({one_line(str(error.__cause__ or error), 160)})", "try again later"
    if isinstance(error, GatedRepoError):
        message, remedy = "the Hub wants its licence accepted first", "accept it on its page, then give HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        message, remedy = "the Hub knows no such model, or it is private", "check the name, or give HF_TOKEN"
    elif isinstance(error, RevisionNotFoundError):
        message, remedy = "the Hub has no such revision of it", "give a branch, a tag or a commit"
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else "?"
        message = f"the Hub refused with status {status}"
        remedy = "give a HF_TOKEN that may write there" if status in (401, 403) else remedy
    elif isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
        message = f"is not on this machine, and the Hub at {hub.ENDPOINT} does not answer"
        remedy = "try where there is a network, or give a folder"
    return UserError(message, place=str(repo), remedy=remedy)
