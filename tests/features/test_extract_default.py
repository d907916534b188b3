"""The views that `extract` caches when nobody names any: what it can of four, what it cannot with the reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.anchors import ANCHOR_TEXTS
from deltaclip.features.data.views import DEFAULT_VIEWS
from deltaclip.features.extract import extract
from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.settings import ExtractConfig, InspectConfig
from deltaclip.features.store.integrity import break_seal
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.shards import merge, open_cache
from deltaclip.features.store.writer import part_path
from deltaclip.pipeline.rows.cached_rows import views_there
from deltaclip.tests.features.backbone.small_models import as_folder
from deltaclip.tests.features.killing import content, read_rows, write_rows
from deltaclip.tests.features.store.making import edited

ALL = {"center": 12, "stages": 12, "statistics": 12}
NO_BLOCKS = (
    "without stages: the backbone has no blocks that can be read: its TimmModel has none of transformer.resblocks, "
    "trunk.blocks, trunk.stages and layer1 to layer4"
)
DRAFT = "without stages and statistics: --decode draft reads JPEG files at a reduced size"


@pytest.fixture
def twelve(tmp_path, demo_folder):
    """The first twelve rows of the demo."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    rows = read_rows(demo_folder)[:12]
    for row in rows:
        shutil.copy(demo_folder / row["image"], folder / row["image"])
    write_rows(folder, rows)
    return folder


@pytest.fixture(scope="module")
def regnet(tmp_path_factory):
    """A tower whose blocks have names that nobody knows."""
    return as_folder("regnet", tmp_path_factory.mktemp("models") / "regnet")


def run(folder, backbone="tiny", **options):
    values = {"data": str(folder / "demo.csv"), "out": folder / "c.h5", "backbone": backbone, "precision": "fp32"}
    return extract(ExtractConfig(**values | options))


def inspected(path):
    (report,) = inspect_cache(InspectConfig(caches=[path], verify=True)).reports
    assert report.problems == []
    return report.lines()


def test_it_is_what_the_names_give(twelve):
    found = run(twelve)
    assert (found.views, found.anchors) == (ALL, len(ANCHOR_TEXTS))
    named = run(twelve, out=twelve / "named.h5", views=",".join(DEFAULT_VIEWS))
    assert found.cache.read_bytes() == named.cache.read_bytes()
    assert not any("without" in line for line in [*found.summary().splitlines(), *inspected(found.cache)])
    assert f"views: center 12, stages 12, statistics 12, anchors of {len(ANCHOR_TEXTS)} prompts" in found.summary()


def test_a_cache_of_before_gains_them_and_stays_as_it_is_in_the_rest(twelve):
    whole = run(twelve, out=twelve / "whole.h5").cache
    run(twelve, views="center")
    with FeatureStore.open(twelve / "c.h5") as store:
        before = store.group("images")["embedding"][:]
    found = run(twelve)
    assert (found.new_images, found.new_texts, found.views) == (12, 0, ALL)
    assert found.cache.read_bytes() == whole.read_bytes()
    with FeatureStore.open(found.cache) as store:
        assert store.group("images")["embedding"][:].tobytes() == before.tobytes()
    written = found.cache.stat().st_mtime_ns
    for options in ({}, {"views": "center"}, {"views": "statistics,anchors"}):
        again = run(twelve, **options)
        assert (again.new_images, again.new_texts, again.views) == (0, 0, ALL)
        assert found.cache.stat().st_mtime_ns == written


def test_no_picture_goes_through_the_tower_twice(twelve):
    """What is there is kept: `center` is set to another vector, and would be put right if it were computed again."""
    run(twelve, views="center")
    with edited(twelve / "c.h5") as file:
        file["views/center/embedding"][...] = file["views/center/embedding"][...][::-1]
        file["views/center/crc32"][...] = file["views/center/crc32"][...][::-1]
        marked = file["views/center/embedding"][:].tobytes()
    run(twelve)
    with FeatureStore.open(twelve / "c.h5") as store:
        assert store.group("images")["embedding"][:].tobytes() == marked


def test_new_rows_get_all_of_them(twelve):
    rows = read_rows(twelve)
    write_rows(twelve, rows[:9])
    run(twelve)
    write_rows(twelve, rows)
    found = run(twelve)
    assert (found.new_images, found.views) == (3, ALL)


SPARE = """
import json, sys
from pathlib import Path
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
data, out, backbone, views = sys.argv[1:]
done = extract(ExtractConfig(data=data, out=Path(out), backbone=backbone, precision="fp32", views=views or None))
print(json.dumps([done.new_images, [name for name in ("torch", "open_clip", "timm") if name in sys.modules]]))
"""


def spare(folder, backbone, views=""):
    """Extract in a process of its own; return how many images were computed and which heavy modules it took."""
    arguments = [str(folder / "demo.csv"), str(folder / "c.h5"), backbone, views]
    done = subprocess.run([sys.executable, "-c", SPARE, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("before", [{}, {"views": "center"}, {"views": "center,statistics,anchors"}])
def test_a_tower_without_known_blocks_has_the_others(twelve, regnet, before):
    if before:
        run(twelve, regnet, **before)
    found = run(twelve, regnet)
    assert (found.views, found.anchors) == ({"center": 12, "statistics": 12}, len(ANCHOR_TEXTS))
    assert NO_BLOCKS in found.summary().splitlines()
    assert f"  {NO_BLOCKS}" in inspected(found.cache)
    assert list(found.to_json()["facts"]["views_left_out"]) == ["stages"]
    written = found.cache.stat().st_mtime_ns
    assert spare(twelve, regnet) == [0, []]
    again = run(twelve, regnet)
    assert (again.new_images, found.cache.stat().st_mtime_ns) == (0, written)
    assert NO_BLOCKS in again.summary().splitlines()
    place = find_weights(regnet, None).name
    with pytest.raises(UserError) as caught:
        run(twelve, regnet, views="stages")
    why = NO_BLOCKS.removeprefix("without stages: the backbone ")
    assert str(caught.value) == f"{place}: {why}; leave stages out of --views"


def test_new_rows_where_a_view_is_left_out(twelve, regnet):
    rows = read_rows(twelve)
    write_rows(twelve, rows[:9])
    run(twelve, regnet)
    write_rows(twelve, rows)
    found = run(twelve, regnet)
    assert (found.new_images, found.views) == (3, {"center": 12, "statistics": 12})
    assert NO_BLOCKS in found.summary().splitlines()


def test_what_an_interrupted_run_left_is_taken_up(twelve, regnet):
    """It knew no reason where its views had been named; one is found all the same."""
    whole = run(twelve, regnet, out=twelve / "whole.h5").cache
    out = run(twelve, regnet, views="center,statistics,anchors").cache
    break_seal(out)
    out.rename(part_path(out))
    found = run(twelve, regnet)
    assert found.new_images == 0
    assert content(out) == content(whole)


def test_a_view_that_somebody_adds_is_left_out_no_more(twelve):
    """As where an earlier release did not know the blocks of a tower."""
    run(twelve, views="center,statistics,anchors")
    with edited(twelve / "c.h5") as file:
        facts = json.loads(file.attrs["facts"])
        file.attrs["facts"] = json.dumps(facts | {"views_left_out": {"stages": "nobody knew how"}})
    found = run(twelve)
    assert found.new_images == 0
    assert "without stages: nobody knew how" in found.summary().splitlines()
    named = run(twelve, views="stages")
    assert (named.new_images, named.views) == (12, ALL)
    assert "views_left_out" not in named.facts
    assert run(twelve).new_images == 0


@pytest.mark.parametrize("before", [None, "center", "center,anchors"])
def test_draft_leaves_out_what_needs_every_pixel(twelve, before):
    if before:
        run(twelve, decode="draft", views=before)
    for _ in range(2):
        found = run(twelve, decode="draft")
        assert (found.views, found.anchors) == ({"center": 12}, len(ANCHOR_TEXTS))
        assert DRAFT in found.summary().splitlines()
        assert f"  {DRAFT}" in inspected(found.cache)
    with pytest.raises(UserError) as caught:
        run(twelve, decode="draft", views="statistics")
    line = "--decode: draft reads JPEG files at a reduced size, and view statistics needs more"
    assert str(caught.value).startswith(line)


def test_a_text_tower_that_is_too_short_has_no_anchors(twelve, tmp_path):
    backbone = as_folder("few words", tmp_path / "few")
    found = run(twelve, backbone)
    assert (found.views, found.anchors) == (ALL, 0)
    words = "reads 7 tokens, too few for the prompts of anchors ('a noisy, grainy image')"
    assert f"without anchors: the backbone {words}" in found.summary().splitlines()
    assert run(twelve, backbone).new_images == 0
    with pytest.raises(UserError) as caught:
        run(twelve, backbone, views="anchors")
    assert str(caught.value) == f"{find_weights(backbone, None).name}: {words}; leave anchors out of --views"


@pytest.mark.slow
def test_statistics_alone_need_no_backbone(twelve):
    run(twelve, views="stages")
    computed, modules = spare(twelve, "tiny", "statistics")
    assert computed == 12
    assert "open_clip" not in modules
    found = run(twelve, out=twelve / "once.h5", views="stages,statistics")
    assert found.cache.read_bytes() == (twelve / "c.h5").read_bytes()


@pytest.mark.slow
def test_shards_of_before_and_of_now_read_as_one(twelve):
    run(twelve, shard="1/2", views="center")
    run(twelve, shard="2/2")
    with open_cache(twelve / "c.h5") as store:
        assert store.view_names() == ["center", "stages", "statistics"]
    assert views_there(twelve / "c.h5") == []  # of no use to bases before all pictures have them
    run(twelve, shard="1/2")
    assert sorted(views_there(twelve / "c.h5")) == ["stages", "statistics"]
    merged = merge([twelve / f"c.shard-{number}-of-2.h5" for number in (1, 2)], twelve / "m.h5")
    with FeatureStore.open(merged) as store, FeatureStore.open(run(twelve, out=twelve / "w.h5").cache) as whole:
        for name in ALL:
            assert store.embeddings("images", view=name).tobytes() == whole.embeddings("images", view=name).tobytes()


def test_shards_say_what_is_left_out(twelve, regnet):
    for number in (1, 2):
        found = run(twelve, regnet, shard=f"{number}/2")
        assert NO_BLOCKS in found.summary().splitlines()
    assert f"  {NO_BLOCKS}" in inspected(twelve / "c.h5")
