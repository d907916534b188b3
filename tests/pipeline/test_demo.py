"""The demo: the whole path once, and what is there already stays."""

from __future__ import annotations

import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters import demo as demo_set
from deltaclip.features.scenes.render import render_demo
from deltaclip.pipeline.demo import demo
from deltaclip.pipeline.settings import DemoConfig
from deltaclip.tests.pipeline.conftest import read_csv, read_json, write_csv


@pytest.fixture
def small_set(tmp_path, monkeypatch):
    """A smaller demo set where the real one would be drawn."""
    monkeypatch.setenv("DELTACLIP_CACHE", str(tmp_path / "user_cache"))
    render_demo(demo_set.demo_folder(), seed=0, num_prompts=12, images_per_prompt=3)
    return demo_set.demo_folder()


def test_the_whole_path_from_nothing_and_again(small_set, tmp_path):
    made = demo(DemoConfig(out=tmp_path))
    assert (made.data, made.run, made.cache) == (small_set, tmp_path / "runs/demo", tmp_path / "cache/demo_tiny.h5")
    assert made.page == made.run / "report.html"
    assert made.page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert made.metrics == read_json(made.run / "metrics.json")
    for path in (made.data, made.run, made.cache, made.page):
        assert path.exists()
        assert str(path) in made.summary()
        assert str(path) in made.to_json().values()

    before = {path: path.stat().st_mtime_ns for path in (made.cache, made.run / "metrics.json")}
    again = demo(DemoConfig(out=tmp_path))
    assert again == made
    assert before == {path: path.stat().st_mtime_ns for path in before}

    write_csv(small_set / "demo.csv", read_csv(small_set / "demo.csv")[:-1])
    with pytest.raises(UserError) as error:
        demo(DemoConfig(out=tmp_path))
    assert str(error.value) == f"{made.run}: was trained on another demo set; remove it or give another --out"
