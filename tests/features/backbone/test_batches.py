"""Decoding ahead: order, failures, files that change, and how far ahead it runs."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from deltaclip.features.backbone.decode_ahead import BATCHES_AHEAD, ImageFile, default_workers, pixel_batches


@pytest.fixture
def files(tmp_path):
    found = []
    for number in range(23):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (2, 2), (number, 0, 0)).save(path)
        found.append(ImageFile(100 + number, path, hashlib.sha256(path.read_bytes()).digest()))
    return found


def red(image):
    return torch.tensor(np.asarray(image)[0, 0, 0], dtype=torch.float32)


def run(files, preprocess=red, *, root=None, batch_size=4, workers=3):
    return list(pixel_batches(files, preprocess, root=root, batch_size=batch_size, workers=workers))


@pytest.mark.parametrize("batch_size", [1, 4, 22, 23, 24])
@pytest.mark.parametrize("workers", [1, 5])
def test_order(files, batch_size, workers):
    def uneven(image):
        time.sleep(0.003 * (int(red(image)) % 3))  # later files are ready before earlier ones
        return red(image)

    batches = run(files, uneven, batch_size=batch_size, workers=workers)
    assert [len(batch.entries) for batch in batches] == [
        min(batch_size, 23 - start) for start in range(0, 23, batch_size)
    ]
    assert [entry for batch in batches for entry in batch.entries] == list(range(100, 123))
    assert torch.cat([batch.pixels_B3HW for batch in batches]).tolist() == list(range(23))
    assert all(not batch.failed for batch in batches)


def test_failures_stay_in_their_batch(files, tmp_path):
    files[1].path.unlink()
    files[2].path.write_bytes(b"no image")
    for file in files[4:8]:
        file.path.write_bytes(b"")
    Image.new("RGB", (2, 2)).save(files[9].path)  # readable, yet not what was hashed
    batches = run(files, root=tmp_path)
    assert batches[0].failed == [(101, "no such file"), (102, "changed since its content was recorded")]
    assert batches[0].passing == {101, 102}
    assert batches[0].entries == [100, 103]
    assert batches[0].pixels_B3HW.tolist() == [0, 3]
    assert batches[1].pixels_B3HW is None
    assert batches[1].entries == []
    assert batches[1].failed == [(entry, "empty file") for entry in range(104, 108)]
    assert batches[2].failed == [(109, "changed since its content was recorded")]
    assert sum(len(batch.entries) for batch in batches) == 23 - 7


def test_only_what_could_not_be_read_passes(files):
    files[1].path.unlink()
    files[2].path.write_bytes(b"no image")
    expected = [*files[:2], dataclasses.replace(files[2], sha256=hashlib.sha256(b"no image").digest())]
    (batch,) = run(expected)
    assert batch.failed == [(101, "no such file"), (102, "not an image in a known format")]
    assert batch.passing == {101}


def test_content_is_free_without_a_hash(files):
    Image.new("RGB", (2, 2), (200, 0, 0)).save(files[9].path)
    anything = [ImageFile(file.entry, file.path, None) for file in files]
    assert torch.cat([batch.pixels_B3HW for batch in run(anything)])[9] == 200


def test_no_files():
    assert run([]) == []


def test_back_pressure(files):
    started, lock = [0], threading.Lock()

    def counting(image):
        with lock:
            started[0] += 1
        return red(image)

    batches = pixel_batches(files, counting, root=None, batch_size=2, workers=8)
    for number in range(1, 5):
        next(batches)
        time.sleep(0.05)  # all that may run ahead has
        assert started[0] <= 2 * (number + BATCHES_AHEAD)
    assert started[0] >= 2 * 5  # and it does run ahead
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_an_error_of_ours_is_no_failure_of_an_image(files):
    def broken(_image):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(files, broken)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_default_workers():
    assert default_workers() >= 1
