"""The view `statistics` in a cache: what is stored is what the pixels give, whatever the batches."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.data.images import open_image
from deltaclip.features.data.statistics import NAMES, statistics_of
from deltaclip.features.data.views import RECIPES
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.tests.features.killing import read_rows, write_rows


@pytest.fixture
def folder(tmp_path, demo_folder):
    """Nine pictures of the demo, and three of other sizes, one of them grey."""
    rows = read_rows(demo_folder)[:12]
    (tmp_path / "images").mkdir()
    for row in rows:
        shutil.copy(demo_folder / row["image"], tmp_path / row["image"])
    big = Image.open(tmp_path / rows[0]["image"]).resize((640, 410), Image.Resampling.BICUBIC)
    for row, picture in zip(rows[9:], (big, big.convert("L"), big.crop((0, 0, 3, 70))), strict=True):
        row["image"] = row["image"].replace(".png", ".bmp")
        picture.save(tmp_path / row["image"])
    write_rows(tmp_path, rows)
    return tmp_path


def run(folder, tiny_backbone, **options):
    values = {"data": str(folder / "demo.csv"), "out": folder / "c.h5", "backbone": tiny_backbone, "precision": "fp32"}
    return extract(ExtractConfig(**values | {"views": "statistics"} | options))


def test_the_cache_holds_what_the_pixels_give(folder, tiny_backbone):
    result = run(folder, tiny_backbone, precision="bf16")
    assert result.views == {"center": 12, "statistics": 12}
    with FeatureStore.open(result.cache) as store:
        found = store.embeddings("images", view="statistics")
        assert (found.dtype, found.shape) == (np.float32, (12, len(NAMES)))
        assert store.embeddings("images").dtype == np.float16
        pictures = [open_image((folder / row["image"]).read_bytes()) for row in read_rows(folder)]
        # A cache orders pictures as it likes: they are known by content.
        assert sorted(row.tobytes() for row in found) == sorted(statistics_of(each).tobytes() for each in pictures)
        np.testing.assert_allclose(store.norms(view="statistics"), np.linalg.norm(found, axis=1), rtol=1e-6)


@pytest.mark.parametrize("options", [{"batch_size": 1, "workers": 1}, {"batch_size": 5, "workers": 4}])
def test_batches_and_threads_change_no_bit(folder, tiny_backbone, options):
    def stored(**chosen):
        with FeatureStore.open(run(folder, tiny_backbone, **chosen).cache) as store:
            return store.embeddings("images", view="statistics").tobytes()

    assert stored(out=folder / "other.h5", **options) == stored(batch_size=12, workers=2)


def test_statistics_are_added_to_a_cache_and_stay(folder, tiny_backbone, monkeypatch):
    run(folder, tiny_backbone, views="center")
    assert run(folder, tiny_backbone).new_images == 12
    path = folder / "c.h5"
    stat = path.stat()
    assert run(folder, tiny_backbone).new_images == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    at_once = run(folder, tiny_backbone, out=folder / "once.h5").cache
    assert at_once.read_bytes() == path.read_bytes()

    monkeypatch.setitem(RECIPES, "statistics", RECIPES["statistics"] | {"version": 0})
    with pytest.raises(UserError) as caught:
        run(folder, tiny_backbone)
    assert str(caught.value) == (
        f"{path}: has a view statistics of another recipe: version 1 there, 0 here; give another --out"
    )
