"""Write the file map of the README from the first sentence of every module: `python docs/tree.py`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def first_sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return text.split(". ")[0].rstrip(".:").removesuffix(" (spec section 7)").removesuffix("; spec section 7")


def lines(folder: Path, indent: str) -> list[str]:
    """Return one line per module and package below a folder, modules first."""
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    found = [_line(f"{indent}{path.name}", path) for path in modules]
    for sub in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        found += [_line(f"{indent}{sub.name}/", sub / "__init__.py"), *lines(sub, f"{indent}    ")]
    return found


def _line(name: str, path: Path) -> str:
    return f"{name:30}# {first_sentence(path)}"


def tree() -> str:
    """Return the whole map."""
    top = [_line(f"    {name}", ROOT / name) for name in ("__init__.py", "__main__.py", "cli.py", "cli_app.py")]
    for package in ("base", "features", "pipeline"):
        top += [_line(f"    {package}/", ROOT / package / "__init__.py"), *lines(ROOT / package, "        ")]
    return "\n".join(["deltaclip/", *top])


def main() -> None:
    """Put the map in its place in the README."""
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition("```\ndeltaclip/\n")
    _, end, after = rest.partition("\n```\n")
    if not (start and end):
        sys.exit("README.md has no block that starts with deltaclip/: nothing was changed")
    readme.write_text(f"{before}```\n{tree()}\n```\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
