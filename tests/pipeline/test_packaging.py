"""What is published: the source archive, the wheel that is built from it, and a user's script against that wheel."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import deltaclip
from deltaclip.features.data.adapters.demo import demo_folder
from deltaclip.features.scenes.render import render_demo

ROOT = Path(deltaclip.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILD = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
RELATIVE = re.compile(r"\]\((?![a-z]+:|#)")
# What people write, annotated as their checker asks for it.
SCRIPT = """
from pathlib import Path

import numpy as np
import torch
from deltaclip import DeltaclipMetric, DeltaclipRegressor, Reward, Scorer, UserError, __version__
from deltaclip.pipeline.api.scorer import ScoredPairs
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.runs.save_run import TrainedResult
from deltaclip.pipeline.train import train


def score(run: Path, picture: Path) -> list[float]:
    try:
        scorer: Scorer = Scorer.load(run, device="cpu")
    except UserError as error:
        raise SystemExit(str(error)) from error
    found: ScoredPairs = scorer.score([picture, torch.zeros(3, 64, 80)], "a red circle")
    metric = DeltaclipMetric(scorer)
    metric.update(picture, "a red circle")
    mean: torch.Tensor = metric.compute()["q"]
    model = DeltaclipRegressor(epochs=1).fit(np.eye(8), np.linspace(0, 1, 8))
    said: list[float] = model.predict(np.eye(8)).tolist()
    return [*found.q.tolist(), mean.item(), *said]


def steer(run: Path, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    reward = Reward(run, device=torch.device("cpu"), clamp=False)
    return reward(pixels, ["a red circle"])


def learn(cache: Path) -> TrainedResult:
    return train(TrainConfig(cache=cache, epochs=1))


if __name__ == "__main__":
    import sys

    print(__version__, *score(Path(sys.argv[1]), Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def index_page():
    return runpy.run_path(str(ROOT / "setup.py"))["index_page"]


def test_links_of_the_readme_are_whole_where_the_repository_has_an_address(index_page):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert RELATIVE.search(readme)
    whole = index_page(readme, "https://example.org/us/deltaclip/")
    assert not RELATIVE.search(whole)
    assert "[docs/data.md](https://example.org/us/deltaclip/blob/main/docs/data.md)" in whole
    assert index_page("[a](https://b.org) [c](#d)", "https://example.org") == "[a](https://b.org) [c](#d)"


def test_without_an_address_a_link_is_its_words(index_page):
    assert index_page("see [docs/a.md](docs/a.md), [b](docs/b.md#c)", None) == "see docs/a.md, b"


def test_the_version_is_written_once_and_again_alike():
    assert deltaclip.__version__ == PROJECT["project"]["version"]


def run(*command, **settings):
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Return a copy of what the repository holds, and its names."""
    if not (ROOT / ".git").exists():
        pytest.skip("no repository: what is tracked is not known")
    names = run("git", "ls-files", cwd=ROOT).splitlines()
    copy = tmp_path_factory.mktemp("tracked")
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    return copy, names


@pytest.fixture(scope="module")
def unpacked(tracked, tmp_path_factory):
    """Return the source archive, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", BUILD, out, cwd=tracked[0])
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """Return the wheel that is built from the source archive."""
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *options, unpacked)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """Return a Python that has the wheel, and the libraries of this one, and nothing of this repository."""
    folder = tmp_path_factory.mktemp("user") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # As a path alone: the link to this repository that an editable installation put there is not followed.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    return python


@pytest.mark.slow
def test_the_source_archive_has_all_that_the_repository_has(tracked, unpacked):
    made = {"PKG-INFO", "setup.cfg"}
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    held = {name for name in held if name not in made and not name.startswith("deltaclip.egg-info/")}
    assert held == set(tracked[1])


@pytest.mark.slow
def test_the_wheel_has_every_module_and_its_data_and_nothing_else(tracked, wheel):
    packages = PROJECT["tool"]["setuptools"]["packages"]
    folders = {Path(*name.split(".")[1:]) for name in packages}
    wanted = {name for name in tracked[1] if Path(name).parent in folders and not name.startswith(".")}
    top = {name for name in wanted if "/" not in name}
    wanted -= top - {"__init__.py", "__main__.py", "cli.py", "py.typed"}
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = message_from_bytes(file.read(next(name for name in names if name.endswith("/METADATA"))))
    assert {name.removeprefix("deltaclip/") for name in names if name.startswith("deltaclip/")} == wanted
    assert {name.partition("/")[0] for name in names} == {"deltaclip", f"deltaclip-{deltaclip.__version__}.dist-info"}
    assert not RELATIVE.search(metadata.get_payload())
    assert metadata.get_payload().startswith("# deltaclip")
    assert {"Author", "Keywords", "License-Expression", "Summary", "Classifier"} <= set(metadata.keys())


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "ours.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_installed_wheel_runs_a_users_script_and_the_command(elsewhere, script, demo_run, demo_folder):
    outside = {"cwd": script.parent, "env": {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}}
    where = run(elsewhere, "-c", "import deltaclip; print(deltaclip.__file__)", **outside).strip()
    assert Path(where).is_relative_to(elsewhere.parent.parent)
    picture = next((demo_folder / "images").iterdir())
    version, *scores = run(elsewhere, script, demo_run, picture, **outside).split()
    assert version == deltaclip.__version__
    assert all(0 <= float(score) <= 1 for score in scores)
    assert len(scores) == 11
    assert "deltaclip demo" in run(elsewhere.parent / "deltaclip", "demo", "--help", **outside)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_wheel_shows_the_demo_and_shares_it(elsewhere, tmp_path, monkeypatch):
    """Backbone, pages and words come with the wheel: no file of the repository is near."""
    monkeypatch.setenv("DELTACLIP_CACHE", str(tmp_path / "user_cache"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    render_demo(demo_folder(), seed=0, num_prompts=12, images_per_prompt=3)  # where it would draw the larger one
    assert "page:   runs/demo/report.html" in run(elsewhere, "-m", "deltaclip", "demo", cwd=tmp_path)
    run(elsewhere, "-m", "deltaclip", "share", "runs/demo", "shared", cwd=tmp_path)
    assert "quality" in run(elsewhere, "shared/example.py", cwd=tmp_path)
    said = run(elsewhere, "-m", "deltaclip", "--version", cwd=tmp_path)
    assert said == f"deltaclip {deltaclip.__version__}\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_users_script_is_typed_in_full(elsewhere, script, tmp_path):
    wrong = script.with_name("wrong.py")
    wrong.write_text("from deltaclip import Scorer\nScorer.load(7).score([], 'x').q.no_such\n", encoding="utf-8")
    options = ("--strict", "--python-executable", elsewhere, "--cache-dir", tmp_path, "--no-error-summary")
    command = [sys.executable, "-m", "mypy", *map(str, options)]
    assert run(*command, script, cwd=script.parent) == ""
    done = subprocess.run([*command, str(wrong)], check=False, capture_output=True, text=True, cwd=script.parent)
    assert {line.rpartition("[")[2] for line in done.stdout.splitlines()} == {"arg-type]", "attr-defined]"}
