"""docs/api.md: every example runs and prints what stands there."""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path

import pytest

import deltaclip
from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.settings import InspectConfig

DOCUMENT = Path(deltaclip.__file__).parent / "docs" / "api.md"


@pytest.fixture
def surroundings(demo_run, demo_cache, demo_folder, *, demo_rows, tmp_path, monkeypatch):
    """The files that the examples name, in the working directory."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo_tiny_residual_frozen").symlink_to(demo_run)
    for name, row in zip(("a.png", "b.png"), demo_rows[:2], strict=True):
        shutil.copyfile(demo_folder / row["image"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    inspect_cache(InspectConfig(caches=[demo_cache], export=Path("features"), export_format="npy"))


@pytest.mark.usefixtures("surroundings")
def test_examples_print_what_the_document_says():
    blocks = re.findall(r"^```pycon\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    runner = doctest.DocTestRunner()
    said: list[str] = []
    for number, block in enumerate(blocks):
        test = doctest.DocTestParser().get_doctest(block, names, f"block {number}", str(DOCUMENT), 0)
        test.globs = names  # the parser copies; later blocks go on where earlier ones ended
        runner.run(test, out=said.append, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
    assert runner.tries > 30
