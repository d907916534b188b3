"""README.md against the program: the tree it shows is the disk, and every command has its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import deltaclip
from deltaclip import cli
from deltaclip.cli_app import command_names

ROOT = Path(deltaclip.__file__).parent
CODE = ("base", "features", "pipeline")


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(readme):
    """Lines of the fenced block that shows the tree, without its first."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    found = [block for block in blocks if block.startswith("deltaclip/")]
    assert len(found) == 1, "README.md must show the tree once, in a fenced block that starts with deltaclip/"
    return [line for line in found[0].splitlines()[1:] if line.strip()]


def test_every_line_of_the_tree_has_words(tree):
    for line in tree:
        path, _, words = line.strip().partition("#")
        assert path.strip()
        assert words.strip(), f"{line!r} says nothing"


def test_the_tree_is_the_disk(tree):
    listed = paths_of(tree)
    assert len(listed) == len(set(listed)), "a line stands twice"
    code = {path for path in listed if path.partition("/")[0] in CODE or "/" not in path}
    disk = {str(path.relative_to(ROOT)) for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    disk |= {path.name for path in ROOT.glob("*.py")}
    shown = {path for path in code if path.endswith(".py")}
    # An __init__.py that only names its folder needs no line of its own.
    silent = {path for path in disk if path.endswith("/__init__.py")}
    assert disk - silent - shown == set(), "on the disk but not in the tree"
    assert shown - disk == set(), "in the tree but not on the disk"


def test_whatever_the_tree_names_exists(tree):
    for path in paths_of(tree):
        assert (ROOT / path).exists(), f"{path} is in the tree but not on the disk"


def paths_of(tree):
    """Return the paths of the lines: whole ones (`a/b.py`), or names indented below their folder."""
    found, folders = [], []
    for line in tree:
        name = line.partition("#")[0].strip()
        depth = len(line) - len(line.lstrip())
        folders = [(at, folder) for at, folder in folders if at < depth]
        path = folders[-1][1] + name if folders else name
        if name.endswith("/"):
            folders.append((depth, path))
        found.append(path.rstrip("/"))
    return found


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_a_section(readme, name):
    headings = [line for line in readme.splitlines() if line.startswith("#")]
    assert any(re.search(rf"\b{name}\b", heading) for heading in headings), f"README.md has no section on {name}"


def test_links_of_the_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert documents
    for document in documents:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in link and not link.startswith("mailto:"):
                assert (document.parent / link).exists(), f"{document.name} links to {link}, which does not exist"


def test_options_in_the_readme_exist(readme):
    from typer.main import get_command

    known = {
        spelling
        for command in get_command(cli.app).commands.values()
        for parameter in command.params
        for spelling in [*parameter.opts, *parameter.secondary_opts]
    }
    for line in readme.splitlines():
        if re.search(
            r"\bdeltaclip (extract|train|sweep|finetune|ablate|evaluate|compare|predict|report|demo|inspect|import|"
            r"export|serve)\b",
            line,
        ):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", line):
                assert option.replace("_", "-") in {*known, "--help"}, f"README.md shows {option} in: {line}"
