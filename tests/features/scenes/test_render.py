"""The demo set: same bytes from the same seed, whole or not at all, labels that spread apart."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from deltaclip.base.errors import UserError
from deltaclip.features.scenes.damage import quality_label
from deltaclip.features.scenes.render import COLUMNS, SOURCES, plan_demo, render_demo

if TYPE_CHECKING:
    from pathlib import Path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_other_seed_other(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        render_demo(tmp_path / name, seed=seed, num_prompts=4, images_per_prompt=3, size=64)
    one, same, other = (bytes_of(tmp_path / name) for name in "abc")
    assert one == same
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_what_is_written(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = render_demo(
        tmp_path / "x" / "demo",
        num_prompts=5,
        images_per_prompt=7,
        size=48,
        progress=lambda n, all_: calls.append((n, all_)),
    )
    assert path == tmp_path / "x" / "demo" / "demo.csv"
    assert calls == [(n, 35) for n in range(1, 36)]
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(list((path.parent / "images").iterdir())) == 35
    assert len({row["prompt"] for row in rows}) == 5
    assert {row["source"] for row in rows} == {s.name for s in SOURCES}
    for row in rows:
        with Image.open(path.parent / row["image"]) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (48, 48))
        assert 0 <= float(row["quality"]) <= 1
        assert 0 <= float(row["consistency"]) <= 1
        if float(row["consistency"]) < 1:
            assert row["explanation"]
        if float(row["quality"]) == float(row["consistency"]) == 1:
            assert row["explanation"] == ""


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_spread_and_are_not_each_other(seed: int) -> None:
    rows = plan_demo(seed, 200, 6)
    quality = np.array([quality_label(row.damages) for row in rows])
    consistency = np.array([row.shown.consistency for row in rows])
    assert abs(spearmanr(quality, consistency).statistic) < 0.4
    for label in (quality, consistency):
        assert label.std() > 0.2
        # Every fifth of the range holds at least 3 % of the pictures.
        assert np.histogram(label, 5, (0, 1))[0].min() > 0.03 * len(rows)
    # The source alone must not give the label: most of the variance lies within sources.
    names = np.array([row.source for row in rows])
    for label in (quality, consistency):
        within = np.mean([label[names == name].var() for name in set(names)])
        assert 0.4 < within / label.var() < 0.97
    assert len({row.caption.text for row in rows}) == 200


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    with pytest.raises(UserError, match="already exists"):
        render_demo(tmp_path / "demo", num_prompts=1)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"num_prompts": 0}, "demo: num_prompts is 0; give at least 1"),
        ({"images_per_prompt": 0}, "demo: images_per_prompt is 0; give at least 1"),
        ({"size": 31}, "demo: size is 31; give at least 32"),
    ],
)
def test_error_text(tmp_path: Path, setting: dict[str, int], text: str) -> None:
    with pytest.raises(UserError) as caught:
        render_demo(tmp_path / "demo", **setting)
    assert str(caught.value) == text
    assert not (tmp_path / "demo").exists()


def test_an_error_midway_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, _all: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_demo(tmp_path / "demo", num_prompts=2, size=32, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_killed_midway_leaves_no_finished_folder_and_the_next_run_works(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from deltaclip.features.scenes.render import render_demo;"
        "render_demo(Path(sys.argv[1]), num_prompts=800, size=64, progress=lambda n, a: print(n, flush=True))"
    )
    target = tmp_path / "demo"
    with subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 20:
                break
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not target.exists()
    began = time.monotonic()
    assert render_demo(target, num_prompts=3, size=64).exists()
    assert time.monotonic() - began < 30
