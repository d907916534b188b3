"""Boundary files: what was put in comes out, after every crash; what is damaged or of another cut is found."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from deltaclip.base.errors import UserError
from deltaclip.features.store.activation_file import BoundaryReader, BoundaryWriter, boundary_bytes, boundary_path
from deltaclip.features.store.writer import part_path
from deltaclip.tests.features.store.dying import child, dying_at

SHAPE = (5, 8)
IDENTITY = {"weights_sha256": "ab", "frozen_blocks": 3, "view": {"view": "center"}, "precision": "fp32"}


def keys_of(contents):
    return np.array([[content] * 32 for content in contents], dtype=np.uint8)


def value(content):
    return np.random.default_rng(content).standard_normal(SHAPE).astype(np.float32)


def write(path, contents=range(10), *, identity=IDENTITY, batch=3, stop_after=None):
    """Fill what is to do; return the contents that were computed."""
    computed = []
    keys = keys_of(contents)
    with contextlib.closing(BoundaryWriter.start(path, keys, shape=SHAPE, identity=identity)) as writer:
        todo = writer.todo()
        for start in range(0, len(todo), batch):
            if stop_after is not None and start >= stop_after:
                return computed
            entries = todo[start : start + batch]
            writer.put(entries, np.stack([value(int(keys[entry, 0])) for entry in entries]))
            computed += [int(keys[entry, 0]) for entry in entries]
        writer.finish(path)
    return computed


def refused(work, *arguments, **options):
    with pytest.raises(UserError) as caught:
        work(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.float16), ("fp16", torch.float16)]
)
def test_what_was_put_in_comes_out(tmp_path, precision, dtype):
    path = tmp_path / "b.h5"
    write(path, identity=IDENTITY | {"precision": precision})
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.h5"]
    reader = BoundaryReader.open(path, IDENTITY | {"precision": precision})
    order = [7, 0, 7, 9]
    found = reader.read(order)
    assert (found.dtype, len(reader), reader.shape) == (dtype, 10, SHAPE)
    expected = np.stack([value(content) for content in order]).astype(found.numpy().dtype)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(reader.keys, keys_of(range(10)))


def test_threads_read_at_once(tmp_path):
    path = tmp_path / "b.h5"
    write(path)
    reader = BoundaryReader.open(path)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda entry: reader.read([entry % 10])[0].numpy(), range(200)))
    for entry, x in enumerate(found):
        np.testing.assert_array_equal(x, value(entry % 10))


def test_the_announced_size_is_what_it_takes(tmp_path):
    path = tmp_path / "b.h5"
    write(path, range(100))
    assert 100 * (160 + 32) < path.stat().st_size <= boundary_bytes(100, SHAPE, "fp32") < 100 * 200 + 20_000
    # ViT-B/32 75 KB, ViT-L/14 514 KB an image in 16 bits
    assert boundary_bytes(1000, (50, 768), "bf16") == pytest.approx(76.8e6, rel=0.01)
    assert boundary_bytes(1000, (257, 1024), "fp16") == pytest.approx(526e6, rel=0.01)


def test_a_disk_that_is_too_small(tmp_path):
    line = refused(BoundaryWriter.start, tmp_path / "b.h5", keys_of([1]), shape=(1 << 30, 1 << 20), identity=IDENTITY)
    assert line.startswith(f"{tmp_path}: the boundary cache needs 4503599.63 GB and ")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_file_is_gone_on_with(tmp_path):
    path = tmp_path / "b.h5"
    assert write(path, stop_after=6) == list(range(6))
    assert not path.exists()
    assert write(path) == list(range(6, 10))
    write(tmp_path / "whole.h5")
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_only_what_is_new_is_computed(tmp_path, finished):
    path = tmp_path / "b.h5"
    write(path, range(10), stop_after=None if finished else 6)
    have = set(range(10 if finished else 6))
    assert set(write(path, [12, 3, 11, 1, 9])) == {12, 3, 11, 1, 9} - have
    reader = BoundaryReader.open(path)
    np.testing.assert_array_equal(reader.read(range(5)).numpy(), np.stack([value(c) for c in (12, 3, 11, 1, 9)]))


@pytest.mark.slow
def test_killed_at_every_call_that_makes_something_durable(tmp_path):
    write(tmp_path / "reference.h5")
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "b.h5"
        if child(dying_at(number, partial(write, path))) == 0:
            break
        computed = write(path) if not path.exists() else []
        assert len(set(computed)) == len(computed)
        assert path.read_bytes() == (tmp_path / "reference.h5").read_bytes()
        assert [entry.name for entry in folder.iterdir()] == ["b.h5"]
    assert number > 10


def test_every_flipped_byte_is_found(tmp_path):
    path = tmp_path / "b.h5"
    write(path)
    whole = path.read_bytes()
    expected = BoundaryReader.open(path).read(range(10)).numpy()
    rng, missed = np.random.default_rng(0), 0
    for place in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            # Not refused: the byte means nothing.
            np.testing.assert_array_equal(BoundaryReader.open(path, IDENTITY).read(range(10)).numpy(), expected)
            missed += 1
    assert missed < 100  # bytes between datasets; most of a file is entries, and each of them counts


def test_damage_is_said_in_one_line(tmp_path):
    path = tmp_path / "b.h5"
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(value(4).tobytes(), value(5).tobytes()))
    reader = BoundaryReader.open(path)
    line = refused(reader.read, [9, 4, 2])
    assert line == f"{path}: is damaged (1 of 3 entries read, the first is 4); remove it, and it is made again"
    reader.read([0, 1, 2, 3, 5])
    path.write_bytes(whole[:-5])
    line = f"{path}: is cut off ({len(whole) - 5:,} of {len(whole):,} bytes); remove it, and it is made again"
    assert refused(BoundaryReader.open, path) == line
    path.write_bytes(b"nothing of the kind")
    assert refused(BoundaryReader.open, path).startswith(f"{path}: is no readable HDF5 file (")
    path.unlink()
    assert refused(BoundaryReader.open, path) == f"{path}: no such boundary file; fill it first"


def test_an_unfinished_file_is_not_read(tmp_path):
    path = tmp_path / "b.h5"
    write(path, stop_after=3)
    part_path(path).rename(path)
    assert refused(BoundaryReader.open, path) == f"{path}: is not complete; remove it, and it is made again"


@pytest.mark.parametrize("finished", [True, False])
def test_another_cut_is_refused_by_name(tmp_path, finished):
    path = tmp_path / "b.h5"
    write(path, stop_after=None if finished else 3)
    line = "was made with another weights_sha256 (ab, not cd); remove it, and it is made again"
    other = IDENTITY | {"weights_sha256": "cd"}
    assert refused(write, path, range(4), identity=other).endswith(line)
    if finished:
        assert refused(BoundaryReader.open, path, other) == f"{path}: {line}"


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e5])
def test_values_that_cannot_be_stored(tmp_path, wrong):
    path = tmp_path / "b.h5"
    identity = IDENTITY | {"precision": "bf16"}
    with contextlib.closing(BoundaryWriter.start(path, keys_of([1]), shape=SHAPE, identity=identity)) as writer:
        line = refused(writer.put, [0], np.full((1, *SHAPE), wrong, np.float32))
        assert list(writer.todo()) == [0]
    what = "the tower gives values at the cut that float16 does not hold; give --precision fp32"
    assert line == f"{part_path(path)}: {what}"


def test_the_name_says_which_cut(tmp_path):
    cache = tmp_path / "demo_tiny.h5"
    path = boundary_path(cache, "image", 9, view="center", precision="bf16")
    assert path == tmp_path / "demo_tiny.boundary-image-9-center-fp16.h5"
    assert (
        boundary_path(cache, "text", 3, view="center", precision="fp32").name
        == "demo_tiny.boundary-text-3-center-fp32.h5"
    )
