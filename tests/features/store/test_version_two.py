"""A cache that the last release of schema version 2 wrote, with two fixed labels: read, gone on with, trained on.

`tests/data/cache_version_2.h5` came from `deltaclip extract set.csv --precision fp32` of that release and the bundled
backbone, on the 24 pictures and rows that `draw_set` makes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deltaclip.base.vocabulary import CONSISTENCY, QUALITY, Target
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import SCHEMA_VERSION
from deltaclip.features.store.shards import merge
from deltaclip.features.store.verify import find_problems
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train

VERSION_TWO = Path(__file__).parents[2] / "data" / "cache_version_2.h5"
SIDES = ("train", "train", "train", "train", "val", "val", "test", "test")


def draw_set(folder, count=24, *, more=""):
    """Write the pictures, of bytes that depend on no library, and the table; `more` is one more column of numbers."""
    y, x = np.mgrid[:16, :16]
    lines = [f"image,prompt,quality,consistency,quality_std,source,split{more and ','}{more}"]
    for i in range(count):
        pixels = np.stack([(x * (i + 1) + y * c * (i + 3)) % 256 for c in (1, 2, 3)], axis=2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.bmp")
        side = SIDES[i // 3 % 8]
        line = f"{i}.bmp,prompt {i // 3},{i % 7 / 8},{i % 5 / 4},0.125,{'ab'[i % 2]},{side}"
        lines.append(line + (f",{i % 4 / 4}" if more else ""))
    (folder / "set.csv").write_text("\n".join(lines) + "\n")


def labels_of(numbers):
    return {name: np.nan_to_num(values, nan=-1).tolist() for name, values in numbers.items()}


@pytest.fixture
def cache(tmp_path):
    return shutil.copy(VERSION_TWO, tmp_path / "c.h5")


def test_it_is_read_as_it_is(cache):
    with FeatureStore.open(cache) as store:
        assert (store.schema_version, store.targets) == (2, (QUALITY, CONSISTENCY))
        assert "targets" not in store.dataset
        rows = store.rows()
        assert labels_of(rows.numbers) == {
            "quality": [i % 7 / 8 for i in range(24)],
            "consistency": [i % 5 / 4 for i in range(24)],
            "quality_std": [0.125] * 24,
            "consistency_std": [-1] * 24,
        }
        assert list(rows.text["prompt"]) == [f"prompt {i // 3}" for i in range(24)]
        lengths = np.linalg.norm(store.embeddings("images"), axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-5)
    assert find_problems(cache) == []
    assert cache.read_bytes() == VERSION_TWO.read_bytes()


def test_extraction_goes_on_from_it(cache, tiny_backbone):
    """The vectors stay, what is new is computed, and the file is of this version with all its targets."""
    with FeatureStore.open(cache) as store:
        before = store.embeddings("images").copy()
    draw_set(cache.parent, 27, more="comp")
    settings = {"backbone": tiny_backbone, "precision": "fp32", "views": "center", "target": ["composition=comp:image"]}
    result = extract(ExtractConfig(data=str(cache.parent / "set.csv"), out=cache, **settings))
    assert (result.new_images, result.new_texts) == (3, 1)
    with FeatureStore.open(cache) as store:
        assert (store.schema_version, store.num_rows) == (SCHEMA_VERSION, 27)
        assert store.targets == (QUALITY, CONSISTENCY, Target("composition", "image"))
        assert store.rows().numbers["composition"].tolist() == [i % 4 / 4 for i in range(27)]
        np.testing.assert_array_equal(store.embeddings("images")[:24], before)
    assert find_problems(cache) == []


def test_the_same_data_give_the_same_vectors_in_this_version(cache, tiny_backbone):
    draw_set(cache.parent)
    settings = {"backbone": tiny_backbone, "precision": "fp32", "views": "center"}
    result = extract(ExtractConfig(data=str(cache.parent / "set.csv"), out=cache, **settings))
    assert (result.new_images, result.new_texts) == (0, 0)
    with FeatureStore.open(cache) as store, FeatureStore.open(VERSION_TWO) as old:
        assert store.schema_version == SCHEMA_VERSION
        assert labels_of(store.rows().numbers) == labels_of(old.rows().numbers)
        np.testing.assert_array_equal(store.embeddings("images"), old.embeddings("images"))
        np.testing.assert_array_equal(store.embeddings("texts"), old.embeddings("texts"))


def test_it_is_merged_with_one_of_this_version(cache, tiny_backbone):
    draw_set(cache.parent, 3, more="comp")
    settings = {"backbone": tiny_backbone, "precision": "fp32", "views": "center", "target": ["composition=comp:image"]}
    extract(ExtractConfig(data=str(cache.parent / "set.csv"), out=cache.with_name("new.h5"), **settings))
    merge([cache, cache.with_name("new.h5")], cache.with_name("all.h5"))
    with FeatureStore.open(cache.with_name("all.h5")) as store:
        assert store.targets == (QUALITY, CONSISTENCY, Target("composition", "image"))
        # The three rows have one label more than those of version 2: they are others, of the same images.
        assert (store.num_rows, len(store.status())) == (27, 24)
        np.testing.assert_array_equal(store.rows().numbers["composition"], [*[np.nan] * 24, 0, 0.25, 0.5])


def test_it_is_trained_on(cache):
    out = cache.parent / "run"
    train(TrainConfig(cache=cache, out=out, split="column", epochs=2, device="cpu"))
    config = json.loads((out / "config.json").read_text())
    assert set(config["best_epoch"]) == {"quality", "consistency"}
    assert cache.read_bytes() == VERSION_TWO.read_bytes()
