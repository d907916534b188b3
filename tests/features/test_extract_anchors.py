"""Anchors: the embeddings of a fixed list of prompts, once a cache, kept through everything that caches go through."""

from __future__ import annotations

import csv
import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.anchors import ANCHOR_TEXTS, LEVELS, PAIRS
from deltaclip.features.data.views import RECIPES
from deltaclip.features.extract import extract
from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.settings import ExtractConfig, InspectConfig
from deltaclip.features.store.integrity import break_seal
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.shards import merge, open_cache
from deltaclip.features.store.writer import part_path
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.tests.features.store.making import edited


@pytest.fixture(scope="module")
def table(demo_folder, tmp_path_factory):
    """A table of six pictures."""
    folder = tmp_path_factory.mktemp("anchors")
    with (demo_folder / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:6]
    for row in rows:
        row["image"] = str(demo_folder / row["image"])
    with (folder / "six.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "six.csv"


@pytest.fixture(scope="module")
def with_anchors(table, tiny_backbone):
    run(table, tiny_backbone, table.with_name("with.h5"))
    return table.with_name("with.h5")


def run(table, backbone, out, views="anchors", **options):
    values = {"data": str(table), "out": out, "backbone": backbone, "allow_outside": True, "precision": "fp32"}
    return extract(ExtractConfig(**values | {"views": views} | options))


def test_the_list_says_each_thing_once_and_in_pairs():
    assert 20 <= len(ANCHOR_TEXTS) == len(set(ANCHOR_TEXTS)) <= 30
    assert all(better != worse for better, worse in PAIRS)
    assert ANCHOR_TEXTS[-len(LEVELS) :] == LEVELS


def test_they_are_what_open_clip_makes_of_the_list(with_anchors, tiny_backbone):
    backbone = load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")
    with torch.inference_mode():
        expected = backbone.model.encode_text(backbone.tokenizer(list(ANCHOR_TEXTS)), normalize=True).numpy()
    with FeatureStore.open(with_anchors) as store:
        texts, vectors = store.anchors()
        assert texts == list(ANCHOR_TEXTS)
        # run to the last token in use, so sums in another order: 1e-5 of a unit vector
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert store.view_names() == ["center"]
        images = store.embeddings("images")
    rows = load_rows(with_anchors, "cpu")
    assert rows.anchors.dtype == torch.float32
    np.testing.assert_array_equal(rows.anchors, vectors)
    cosines = rows.inputs()["anchors"][torch.arange(len(rows.rows))].numpy()
    np.testing.assert_allclose(cosines, images[rows.rows.image] @ vectors.T, atol=1e-6)


def test_a_cache_of_before_gains_them_and_nothing_is_computed_twice(table, tiny_backbone, tmp_path, with_anchors):
    out = tmp_path / "c.h5"
    run(table, tiny_backbone, out, views="center")
    with FeatureStore.open(out) as store:
        assert store.anchors() is None
    assert load_rows(out, "cpu").anchors is None
    found = run(table, tiny_backbone, out)
    assert (found.new_images, found.new_texts, found.anchors) == (0, 0, len(ANCHOR_TEXTS))
    assert f"views: center 6, anchors of {len(ANCHOR_TEXTS)} prompts" in found.summary().splitlines()
    assert out.read_bytes() == with_anchors.read_bytes()
    before = out.stat().st_mtime_ns
    for views in ("anchors", "center"):
        assert "nothing to compute" in run(table, tiny_backbone, out, views=views).summary()
    assert out.stat().st_mtime_ns == before


def test_they_are_finished_though_the_command_that_goes_on_does_not_name_them(table, tiny_backbone, tmp_path):
    out = tmp_path / "c.h5"
    run(table, tiny_backbone, out)
    out.rename(part_path(out))
    break_seal(part_path(out))
    with h5py.File(part_path(out), "r+") as file:  # as a kill before they were encoded leaves it
        file["anchors/status"][...] = 0
        file["anchors/embedding"][...] = 0
        file.attrs.modify("complete", np.uint8(0))
    run(table, tiny_backbone, out, views="center")
    with FeatureStore.open(out) as store:
        np.testing.assert_allclose(np.linalg.norm(store.anchors()[1], axis=1), 1, atol=1e-6)


def test_another_list_is_refused_with_the_difference(table, tiny_backbone, tmp_path, with_anchors, *, monkeypatch):
    out = tmp_path / "c.h5"
    shutil.copy(with_anchors, out)
    other = RECIPES["anchors"] | {"texts_sha256": "f" * 64}
    monkeypatch.setitem(RECIPES, "anchors", other)
    with pytest.raises(UserError) as caught:
        run(table, tiny_backbone, out)
    here = f"texts_sha256 {json.loads(h5py.File(out)['anchors'].attrs['recipe'])['texts_sha256'][:12]} there"
    assert str(caught.value) == (
        f"{out}: has a view anchors of another recipe: {here}, ffffffffffff here; give another --out"
    )


def test_shards_and_merged_caches_have_them(table, tiny_backbone, tmp_path, with_anchors):
    for number in (1, 2):
        run(table, tiny_backbone, tmp_path / "s.h5", shard=f"{number}/2", views="anchors" if number == 1 else "center")
    with open_cache(tmp_path / "s.h5") as shards, FeatureStore.open(with_anchors) as whole:
        expected = whole.anchors()
        texts, vectors = shards.anchors()
    assert texts == expected[0]
    np.testing.assert_array_equal(vectors, expected[1])
    merged = merge([tmp_path / f"s.shard-{number}-of-2.h5" for number in (2, 1)], tmp_path / "m.h5")
    with FeatureStore.open(merged) as store:
        np.testing.assert_array_equal(store.anchors()[1], expected[1])


@pytest.mark.parametrize("layout", ["npy", "clip-retrieval", "safetensors"])
def test_exports_have_them(with_anchors, tmp_path, layout):
    inspect_cache(InspectConfig(caches=[with_anchors], export=tmp_path / "e", export_format=layout))
    about = json.loads((tmp_path / "e" / "about.json").read_text())
    assert about["anchors"] == list(ANCHOR_TEXTS)
    if layout == "safetensors":
        found = load_file(tmp_path / "e" / "embeddings.safetensors")["anchors"]
    else:
        found = np.load(tmp_path / "e" / "anchors.npy")
    with FeatureStore.open(with_anchors) as store:
        np.testing.assert_array_equal(found, store.anchors()[1])


def test_damage_is_found_wherever_they_are_read(with_anchors, tmp_path, table, tiny_backbone):
    cache = tmp_path / "c.h5"
    shutil.copy(with_anchors, cache)
    with edited(cache) as file:
        file["anchors/embedding"][3, 2] += 0.5
    line = f"{cache}: is damaged (anchors/embedding: 1 of {len(ANCHOR_TEXTS)} rows, the first is row 3)"
    for read in (lambda: load_rows(cache, "cpu"), lambda: run(table, tiny_backbone, cache, views="anchors,flip")):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).startswith(line)
    (report,) = inspect_cache(InspectConfig(caches=[cache], verify=True)).reports
    words = f"anchors/embedding: 1 of {len(ANCHOR_TEXTS)} rows are not what was computed, the first is row 3"
    assert report.problems == [words]
    assert f"  anchors: {len(ANCHOR_TEXTS)} prompts" in report.lines()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.__delitem__("anchors/crc32"), "anchors: no anchors/crc32 of the right length"),
        (lambda file: file["anchors"].attrs.__delitem__("recipe"), "recipe of the view anchors"),
        (
            lambda file: (
                file.__delitem__("anchors/embedding"),
                file["anchors"].create_dataset("embedding", data=np.zeros((len(ANCHOR_TEXTS), 3), np.float32)),
            ),
            "width of the anchors",
        ),
    ],
)
def test_a_file_that_is_not_laid_out_so_is_refused(with_anchors, tmp_path, change, words):
    cache = tmp_path / "c.h5"
    shutil.copy(with_anchors, cache)
    with edited(cache) as file:
        change(file)
    with pytest.raises(UserError) as caught:
        FeatureStore.open(cache)
    assert f"is damaged ({words})" in str(caught.value)


def test_they_are_no_view_of_an_image(with_anchors, tmp_path):
    with pytest.raises(UserError) as caught:
        inspect_cache(InspectConfig(caches=[with_anchors], export=tmp_path / "e", export_view="anchors"))
    assert str(caught.value) == f"{with_anchors}: has no view 'anchors'; known: center"
