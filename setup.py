"""The page of a package index: README.md, with links that lead somewhere from there too.

All else of the package is in pyproject.toml.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)")


def index_page(readme: str, repository: str | None) -> str:
    """Return the text with links into the repository as whole addresses, and as their words where it has no address."""
    if repository is None:
        return LINK.sub(r"\1", readme)
    return LINK.sub(lambda link: f"[{link[1]}]({repository.rstrip('/')}/blob/main/{link[2]})", readme)


class PackageOnly(build_py):  # type: ignore[misc] # setuptools is not typed
    """The root of the repository is the package, and this file lies there: it is no part of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return the modules of a package."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


if __name__ == "__main__":
    root = Path(__file__).parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = index_page((root / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository"))
    setup(long_description=page, long_description_content_type="text/markdown", cmdclass={"build_py": PackageOnly})
