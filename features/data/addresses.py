"""Addresses as paths: what a text such as `https://host/a.png` is to code that knows files.

Only a `RemotePath` is ever fetched, so that nobody reaches the network who did not make one. Names and passwords in an
address are used and never written. Knows addresses. Must not know how anything is fetched.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.places import ADDRESS, is_address

if TYPE_CHECKING:
    PathOfMachine = Path
else:
    PathOfMachine = type(Path())

WEB = frozenset({"https", "http"})
# Parameters that open a door: what signed addresses have, which changes with each signature, and what people put in.
SIGNED = re.compile(
    r"x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|key-pair-id|signature|policy|expires|sig", re.IGNORECASE
)
BESIDE_SIG = frozenset({"se", "sp", "sr", "st", "sv", "skoid", "sktid", "skt", "ske", "sks", "skv", "spr"})  # of Azure
SECRET = re.compile(r".*token.*|.*api[-_]?key|auth.*|.*secret.*|password|passwd", re.IGNORECASE)


class RemotePath(PathOfMachine):
    """An address as a path: `name`, `suffix`, `parent` and `/` work, and no file of this machine has it."""

    _exact: str | None = None  # where a path would make another address of it, as of `//` further on

    @classmethod
    def of(cls, text: str | os.PathLike[str]) -> RemotePath:
        """Return the address that a text is, without its secrets, which are remembered for fetching."""
        whole = ADDRESS.sub(lambda found: f"{found[1].lower()}://", os.fspath(text), count=1)
        public = _without(whole)
        if public != whole:
            _remember(public, whole)
        made = cls(public)
        if str(made) != public:
            made._exact = public
        return made

    def __str__(self) -> str:
        return self._exact or ADDRESS.sub(lambda found: f"{found[1]}://", super().__str__(), count=1)

    def __fspath__(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath.of, (str(self),)

    def absolute(self) -> RemotePath:
        """Return itself: an address is whole."""
        return self

    def resolve(self, strict: bool = False) -> RemotePath:  # noqa: FBT001, FBT002 - as pathlib has it
        """Return itself."""
        return self

    @property
    def scheme(self) -> str:
        """What stands before `://`."""
        return str(self).partition(":")[0]

    @property
    def host(self) -> str:
        """The machine, bucket or user that the address is of."""
        return urllib.parse.urlsplit(str(self)).netloc

    @property
    def file_name(self) -> str:
        """The last part without a query."""
        if self.scheme in WEB:
            return urllib.parse.unquote(urllib.parse.urlsplit(str(self)).path).rpartition("/")[2] or "file"
        return self.name

    @property
    def folder(self) -> RemotePath:
        """The address that relative names are below; a query is none of it."""
        there = urllib.parse.urlsplit(str(self))
        path = there.path if self.scheme in WEB else str(self).partition(f"://{there.netloc}")[2]
        return RemotePath(f"{there.scheme}://{there.netloc}{path.rpartition('/')[0]}")


def address(root: Path, image: str) -> Path:
    """Return where an image lies: at its own address, else below the root, which may be one itself."""
    if "://" in image and is_address(image):
        return RemotePath.of(image)
    if isinstance(root, RemotePath) and root.scheme in WEB:
        return root / image.replace("#", "%23").replace("?", "%3F")
    return root / image


def shown(data: str) -> str:
    """Return what a user named without the secrets of an address."""
    return str(RemotePath.of(data)) if is_address(data) else data


def as_place(path: Path) -> Path:
    """Return a path that was typed, as an address where it is one: the command line makes paths of all texts."""
    return RemotePath.of(path) if is_address(path) else path


_FULL: dict[str, str] = {}  # whole addresses by what is written of them
_USERS: dict[str, str] = {}  # name and password by `https://host`


def full_address(path: RemotePath) -> str:
    """Return the address to fetch, secrets included; one on the same host as another has its name and password too."""
    public = str(path)
    scheme, _, rest = public.partition("://")
    user = _USERS.get(f"{scheme}://{path.host}")
    return _FULL.get(public) or (f"{scheme}://{user}@{rest}" if user else public)


def forget_secrets() -> None:
    """Forget the secrets of addresses that were given before."""
    _FULL.clear()
    _USERS.clear()


def _remember(public: str, whole: str) -> None:
    known = _FULL.setdefault(public, whole)
    if known != whole and _without(known, is_signed=True) != _without(whole, is_signed=True):
        message = "two addresses differ in secrets alone, which are written nowhere"
        raise UserError(message, place=public, remedy="download the files and give their folder")
    _FULL[public] = whole
    there = urllib.parse.urlsplit(whole)
    user, at, host = there.netloc.rpartition("@")
    if at:
        _USERS[f"{there.scheme}://{host}"] = user


def _without(text: str, *, is_signed: bool = False) -> str:
    """Return an address without signatures, and without names, passwords and other secrets but where `is_signed`."""
    scheme, _, rest = text.partition("://")
    if scheme not in WEB:
        return text
    before, mark, query = rest.partition("?")
    host, slash, path = before.partition("/")
    query, hash_, fragment = query.partition("#")
    parts = [(urllib.parse.unquote(part.partition("=")[0]).lower(), part) for part in query.split("&")]
    of_azure = BESIDE_SIG if any(name == "sig" for name, _ in parts) else frozenset()
    query = "&".join(
        part
        for name, part in parts
        if not (SIGNED.fullmatch(name) or name in of_azure or (not is_signed and SECRET.fullmatch(name)))
    )
    host = host if is_signed else host.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}{mark if query else ''}{query}{hash_}{fragment}"
