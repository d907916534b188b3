"""Real parts, made once per session: the demo set, its cache, and the public data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import deltaclip
from deltaclip.features.extract import extract
from deltaclip.features.scenes.render import render_demo
from deltaclip.features.settings import ExtractConfig

SHARED = Path(os.environ.get("DELTACLIP_SHARED", Path(deltaclip.__file__).parent.parent / "shared"))

LONGEST_ID = 60


def pytest_make_parametrize_id(config, val, argname) -> str | None:
    """Keep contents out of the names of tests, and what terminals cannot show.

    Bytes may hold the time at which they were packed: then two processes that share the work collect other tests.
    """
    is_content = isinstance(val, bytes) or (isinstance(val, str) and not (len(val) <= LONGEST_ID and val.isascii()))
    return argname if is_content else None


def pytest_generate_tests(metafunc) -> None:
    """Refuse sets as parameters: their order, and so that of the tests, is another in each process."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if isinstance(mark.args[1], (set, frozenset)):
            raise TypeError(f"{metafunc.definition.nodeid} takes its parameters from a set: give a list")


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory):
    """Keep the user's cache folder out of the tests, in this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTACLIP_CACHE", str(tmp_path_factory.mktemp("user_cache")))
        yield


@pytest.fixture(scope="session")
def tiny_backbone() -> str:
    """Name of the bundled backbone."""
    return "tiny"


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory) -> Path:
    """Folder with demo.csv and images/: 40 prompts, 6 images each."""
    folder = tmp_path_factory.mktemp("demo") / "set"
    render_demo(folder, seed=5, num_prompts=40, images_per_prompt=6)
    return folder


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory, demo_folder, tiny_backbone) -> Path:
    """Return the cache of the demo set, extracted with the bundled backbone; never written to by a test."""
    out = tmp_path_factory.mktemp("cache") / "demo.h5"
    return extract(
        ExtractConfig(data=str(demo_folder / "demo.csv"), out=out, backbone=tiny_backbone, views="center")
    ).cache


def _shared(part: str) -> Path:
    path = SHARED / part
    if not path.is_dir():
        pytest.skip(f"no {path}; set DELTACLIP_SHARED to the folder that holds {part}")
    return path


@pytest.fixture(scope="session")
def agiqa_folder() -> Path:
    """Folder of AGIQA-3K: data.csv and images/."""
    return _shared("agiqa-3k")


@pytest.fixture(scope="session")
def mobilenet_backbone() -> str:
    """Name of a CLIP with a MobileNetV2 image tower, which loses more in 16 bits than a transformer."""
    return f"local-dir:{_shared('backbones/mobilenetv2-imagenet')}"
