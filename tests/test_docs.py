"""The documents against the program: every command has its place, links lead somewhere, options exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import deltaclip
from deltaclip import cli
from deltaclip.cli import command_names

ROOT = Path(deltaclip.__file__).parent


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_nothing_cites_a_document_that_no_reader_has():
    """A formula names its paper, a decision its page under docs/."""
    cites = re.compile(r"\b[Ss]pec\s+sections?\b|\bPEERS\b|\bSTYLE\s+(rule|section)|\bHOUSE\.md|\bFORMATS\.md")
    ending = {".py", ".md", ".toml", ".html", ".js", ".css"}
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    files = [ROOT / name for name in listed if Path(name).suffix in ending and name != "tests/test_docs.py"]
    assert len(files) > 100
    found = [f"{path.name}: {cites.search(text)[0]}" for path in files if cites.search(text := path.read_text("utf-8"))]
    assert not found
