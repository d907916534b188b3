"""Extraction on a local cluster of Ray, one of whose workers is killed: the result is that of one process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.extract import _everywhere
from deltaclip.features.extraction.on_ray import share_of_actor
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import DONE
from deltaclip.tests.features.killing import read_rows, write_rows
from deltaclip.tests.features.test_extract_shards import TARGET, check_equal, merged, run

COUNT = 3


def test_settings_that_mean_the_same_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "tiny", "openai", "set", "own", "ORG"):  # folders of these names change nothing
        Path(name).mkdir()
    Path("a:b.csv").touch()
    Path("weights.pt").touch()
    here = str(tmp_path)

    def everywhere(**options):
        found = _everywhere(ExtractConfig(ray="auto", ray_workers=5, **options))
        assert (found.ray, found.ray_workers) == (None, 2)
        return found

    assert everywhere(data="demo").data == "demo"
    assert everywhere(data="a:b.csv").data == f"{here}/a:b.csv"
    assert everywhere(data="agiqa-3k:set").data == f"agiqa-3k:{here}/set"
    assert everywhere(data="demo").backbone == "tiny"
    assert everywhere(data="demo", backbone="hf-hub:ORG").backbone == "hf-hub:ORG"
    assert everywhere(data="demo", backbone="local-dir:own").backbone == f"local-dir:{here}/own"
    for pretrained, expected in (("openai", "openai"), ("weights.pt", f"{here}/weights.pt")):
        assert everywhere(data="demo", backbone="ViT-B-32", pretrained=pretrained).pretrained == expected


def writer_of(part):
    """Return the process that has a file open."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if any(os.path.realpath(file) == str(part) for file in (entry / "fd").iterdir()):
                    return int(entry.name)
            except OSError:  # it has ended, or is another user's
                continue
    return None


def begun(folder):
    """Return a shard in the making that holds at least two images and not all, None where there is none."""
    for part in folder.glob("*.part"):
        try:
            with FeatureStore.open(part, unfinished=True) as store:
                done, total = int((store.status() == DONE).sum()), len(store.status())
        except (OSError, UserError):  # it was finished meanwhile
            continue
        if 2 <= done < total - 3:
            return part
    return None


@pytest.mark.parametrize(
    ("nodes", "workers", "use_gpus", "expected"),
    [
        ([{"CPU": 2}], 2, True, (2, 1, None)),
        ([{"CPU": 9}], 2, True, (2, 4, None)),
        ([{"CPU": 2}], 5, True, (2, 1, None)),
        ([{"CPU": 8}] * 3, 2, True, (2, 8, None)),  # not 12: no machine has so many
        ([{"CPU": 8}] * 3, 4, True, (4, 4, None)),
        ([{"CPU": 8}, {"CPU": 4}, {}], 2, True, (2, 4, None)),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 64}], 2, True, (1, 8, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 4, "GPU": 1}], 3, True, (3, 4, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 4, "GPU": 1}], 3, False, (3, 4, None)),
        ([{}], 2, True, (1, 1, None)),
    ],
)
def test_share_of_an_actor(nodes, workers, use_gpus, expected):
    assert share_of_actor(nodes, workers, use_gpus=use_gpus) == expected


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(demo_folder, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="no ray: pip install 'deltaclip[distributed]', as `make slow` does")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    shutil.copytree(demo_folder / "images", tmp_path / "images", copy_function=os.link)
    write_rows(tmp_path, read_rows(demo_folder)[:120])
    run(tmp_path, tmp_path / "whole.h5", batch_size=1)
    folder = tmp_path / "cache"
    command = [sys.executable, "-m", "deltaclip", "extract", str(tmp_path / "demo.csv"), "--out", str(folder / "c.h5")]
    options = [
        "--target",
        TARGET[0],
        "--precision",
        "fp32",
        "--views",
        "center",
        "--batch-size",
        "1",
        "--ray",
        "local",
        "--ray-workers",
        "2",
        "--ray-shards",
        str(COUNT),
    ]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT)
        killed = None
        while killed is None and child.poll() is None:
            time.sleep(0.001)
            if (part := begun(folder)) and (killed := writer_of(part)):
                os.kill(killed, signal.SIGKILL)
        assert child.wait() == 0, (tmp_path / "log").read_text()
    assert killed is not None
    assert "in 3 shards that read as one" in (tmp_path / "log").read_text()
    shards = sorted(folder.iterdir())
    assert [path.name for path in shards] == [f"c.shard-{number}-of-3.h5" for number in (1, 2, 3)]
    check_equal(merged(shards, tmp_path / "all.h5"), tmp_path / "whole.h5")
