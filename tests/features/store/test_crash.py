"""Crashes at every point where a write can stop, and writes that fail: never a wrong cache, never a refused rest."""

from __future__ import annotations

import os
import resource
import signal
from functools import partial

import h5py
import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import DONE, ViewLayout
from deltaclip.features.store.verify import find_problems
from deltaclip.features.store.writer import open_writer, part_path
from deltaclip.tests.features.store.dying import child, dying_at
from deltaclip.tests.features.store.making import FACTS, REQUEST, fill, norms_of, plan_of, vector_of, write

TILES = ViewLayout(width=5, recipe={"pixels": "tiles"})
BEFORE = [(number, f"p{number}", "", "g", 0.5) for number in range(1, 5)]
AFTER = [(number, f"p{number % 4}", "", "g", 0.25) for number in (9, 3, 7, 1, 8, 2)]


def tile_of(content):
    return np.resize(vector_of(content), 5) + 1


def work(path, rows):
    """Bring a cache with two views up to date, two vectors a batch; return what was computed."""
    plan = plan_of(path.parent.parent, rows)  # one data set for every cache of a test
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS, views={"tiles": TILES})
    log = []
    fill(writer, plan, fail={7}, log=log)
    todo = writer.todo("images", "tiles").tolist()
    for start in range(0, len(todo), 2):
        entries = todo[start : start + 2]
        vectors = np.stack([tile_of(plan.image_keys[entry].tobytes()) for entry in entries])
        writer.put_images({"tiles": (entries, vectors, norms_of(vectors))}, [])
        log += [("tiles", plan.image_keys[entry].tobytes()) for entry in entries]
    writer.finish(path)
    return log


def held(path):
    """Every vector that counts as done, by view and content."""
    found = {}
    for name in (path, part_path(path)):
        if name.exists():
            with FeatureStore.open(name, unfinished=name != path) as store:
                keys = [key.tobytes() for key in store.keys("images")]
                for view in store.view_names():
                    vectors = store.group("images", view)["embedding"][:]
                    for entry in np.flatnonzero(store.status(view) == DONE):
                        found[view, keys[entry]] = vectors[entry]
            assert find_problems(name) == []
    return found


@pytest.mark.parametrize("start", ["nothing", pytest.param("a cache", marks=pytest.mark.slow)])
def test_killed_at_every_call_that_makes_something_durable(tmp_path, start):
    reference = tmp_path / "reference" / "c.h5"
    reference.parent.mkdir()
    if start == "a cache":
        work(reference, BEFORE)
    asked = len(work(reference, AFTER))
    for number in range(1000):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "c.h5"
        if start == "a cache":
            work(path, BEFORE)
        ended = child(dying_at(number, partial(work, path, AFTER)))
        if ended == 0:
            break
        assert os.WIFSIGNALED(ended)
        assert os.WTERMSIG(ended) == signal.SIGKILL
        before = held(path)
        for (view, content), vector in before.items():
            expected = vector_of(content) if view == "center" else tile_of(content)
            np.testing.assert_array_equal(vector, expected)
        log = work(path, AFTER)
        assert len(log) == len(set(log)) <= asked
        views = {"images": "center", "tiles": "tiles"}
        assert not [(kind, key) for kind, key in log if kind in views and (views[kind], key) in before]
        assert path.read_bytes() == reference.read_bytes()
        assert [entry.name for entry in folder.iterdir()] == ["c.h5"]
    assert number > 20  # so many places there are


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_a_disk_that_fills_up_says_so_and_leaves_no_file(tmp_path, share):
    path = tmp_path / "c.h5"
    rows = [(number, "p" * 2000 + str(number), "", "g", 0.5) for number in range(1, 100)]
    work(tmp_path / "whole.h5", rows)
    size = (tmp_path / "whole.h5").stat().st_size
    limit = int(size * share)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        work(path, rows)

    ended = child(limited)
    assert os.waitstatus_to_exitcode(ended) == 100  # an OSError with the name of the file
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole.h5"]
    assert work(path, rows)
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_an_interrupted_run_that_was_cut_is_refused_or_right(tmp_path):
    path, plan = tmp_path / "c.h5", plan_of(tmp_path, BEFORE)
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS)
    vectors = np.stack([vector_of(key.tobytes()) for key in plan.image_keys[:2]])
    writer.put_images({"center": ([0, 1], vectors, norms_of(vectors))}, [])
    writer.close()
    part = part_path(path)
    content = part.read_bytes()
    for length in np.linspace(0, len(content) - 1, 100).astype(int):
        part.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"c\.h5\.part: (is no readable HDF5|is damaged|is no deltaclip cache)"):
            write(path, plan)
        assert part.read_bytes() == content[:length]
        assert not path.exists()
    part.write_bytes(content)
    write(path, plan)
    assert find_problems(path) == []
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["views/center/embedding"][:2], vectors)
