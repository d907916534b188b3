"""No result comes from a damaged cache: `train` and `evaluate` check what they read."""

from __future__ import annotations

import shutil

import h5py
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.store.schema import DONE
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.settings import EvaluateConfig, TrainConfig
from deltaclip.pipeline.train import train

ANEW = "give another path, or remove it and extract again"
OF_THE_REST = "is damaged or was changed (checksum of names, labels and structure)"


def flip(path, name, row):
    """Flip one bit of a row of a dataset, and return how many rows it has."""
    with h5py.File(path, "r") as file:
        dataset = file[name]
        assert name != "views/center/embedding" or file["views/center/status"][row] == DONE
        place, count = dataset.id.get_offset() + row * dataset.id.get_storage_size() // len(dataset), len(dataset)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    return count


@pytest.mark.parametrize("name", ["views/center/embedding", "texts/embedding", "rows/quality", "views/center/norm"])
def test_one_bit_is_enough_to_be_refused(demo_cache, tmp_path, name):
    path, run = tmp_path / "c.h5", tmp_path / "run"
    shutil.copy(demo_cache, path)
    train(TrainConfig(cache=path, out=run, epochs=1))
    rows = flip(path, name, 7)
    what = OF_THE_REST
    if name.endswith("embedding"):
        what = f"is damaged ({name}: 1 of {rows} rows, the first is row 7)"
    for stage, config in (
        (train, TrainConfig(cache=path, out=tmp_path / "other", epochs=1)),
        (evaluate, EvaluateConfig(run=run)),
    ):
        with pytest.raises(UserError) as caught:
            stage(config)
        assert str(caught.value) == f"{path}: {what}; {ANEW}"
    assert not (tmp_path / "other").exists()
