"""The documents against the program: commands and options exist, links lead somewhere, what is shown runs."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import deltaclip
from deltaclip import cli
from deltaclip.tools.commands_page import PAGE, page

ROOT = Path(deltaclip.__file__).parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = cli.command_names()
NAMES = "|".join(COMMANDS)


def text_of(path):
    return path.read_text(encoding="utf-8")


def shown(path):
    """The commands of a document: indented lines, or list items, that start with `deltaclip`."""
    return re.findall(r"^ +(deltaclip .*?)(?: +#.*)?$", text_of(path), flags=re.MULTILINE)


def test_the_readme_is_read_in_one_sitting():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_place(name):
    assert re.search(rf"^\| `{name}\b", text_of(ROOT / "README.md"), flags=re.MULTILINE), "no row in README.md"
    assert re.search(rf"^## {name}$", text_of(ROOT / "docs" / "guide.md"), flags=re.MULTILINE), "no section in guide.md"


def test_links_of_the_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *DOCS]
    for document in documents:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(document)):
            if "://" not in link and not link.startswith("mailto:"):
                assert (document.parent / link).exists(), f"{document.name} links to {link}, which does not exist"


def test_every_page_is_found_from_the_index():
    listed = set(re.findall(r"\]\(([^)#\s]+)", text_of(ROOT / "docs" / "index.md")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= listed


def test_options_in_the_documents_exist():
    commands = get_command(cli.app).commands
    known = {}
    for name in COMMANDS:
        group, _, word = name.rpartition(" ")
        parameters = (commands[group].commands if group else commands)[word].params
        known[name] = {spelling for each in parameters for spelling in [*each.opts, *each.secondary_opts]}
    for document in DOCS:
        for line in text_of(document).splitlines():
            for found in re.finditer(rf"\bdeltaclip ({NAMES})\b([^`|]*)", line):
                for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", found[2]):
                    assert option.replace("_", "-") in known[found[1]] | {"--help"}, f"{document.name}: {line}"


def test_the_page_of_all_options_is_that_of_the_settings():
    assert text_of(PAGE) == page(), "run `make docs`"


def test_the_chinese_readme_shows_commands_of_the_readme():
    there = shown(ROOT / "docs" / "README.zh-CN.md")
    assert len(there) > 3
    assert set(there) <= set(shown(ROOT / "README.md"))


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


# What the tutorials show, run in their order in one folder.


@pytest.fixture
def project(demo_folder, tmp_path):
    """What the tutorials say lies there: a table, its pictures, new pictures."""
    folder = tmp_path / "project"
    (folder / "new").mkdir(parents=True)
    shutil.copytree(demo_folder, folder / "pictures")
    with (demo_folder / "demo.csv").open(encoding="utf-8", newline="") as file:
        demo_rows = list(csv.DictReader(file))
    with (folder / "ratings.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["image", "prompt", "quality", "consistency"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(demo_rows)
    for row in demo_rows[:3]:
        shutil.copy(demo_folder / row["image"], folder / "new")
    shutil.copy(demo_folder / demo_rows[0]["image"], folder / "picture.png")
    return folder


def run_shown(command, folder):
    """Run one command as it is shown; a server is ended as soon as it says that it listens."""
    words = [sys.executable, "-m", *shlex.split(command)]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = ""
        for line in process.stdout:
            said += line
            if "http://" in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, f"{command}\n{said}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorials_run_as_they_are_shown(project):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    for name in ("own-data", "trust", "share"):
        commands = shown(ROOT / "docs" / f"{name}.md")
        assert len(commands) >= 5
        for command in commands:
            run_shown(command, project)
    for made in ("scores.csv", "scorer.onnx", "heads.onnx", "runs/mine/report.html"):
        assert (project / made).is_file()
    assert (project / "embeddings").is_dir()
