"""Extraction as users run it: what is computed, what is kept after a kill, what is refused and how."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.images import hash_images
from deltaclip.features.data.views import RECIPES
from deltaclip.features.extract import default_cache, extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import DONE
from deltaclip.features.store.verify import find_problems
from deltaclip.tests.features.killing import Server, content, kill_often, make_kill_set, read_rows, write_rows


def run(folder, tiny_backbone, **options):
    values = {"data": str(folder / "demo.csv"), "out": folder / "c.h5", "backbone": tiny_backbone, "precision": "fp32"}
    return extract(ExtractConfig(**values | {"views": "center"} | options))


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        run(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def twelve(tmp_path, demo_folder):
    """Copy the first twelve rows of the demo set, two prompts, with their images."""
    rows = read_rows(demo_folder)[:12]
    (tmp_path / "images").mkdir()
    for row in rows:
        shutil.copy(demo_folder / row["image"], tmp_path / row["image"])
    write_rows(tmp_path, rows)
    return tmp_path


def vectors_by_content(path):
    with FeatureStore.open(path) as store:
        pairs = zip(store.keys("images"), store.embeddings("images"), strict=True)
        return {key.tobytes(): vector.tobytes() for key, vector in pairs}


def test_result_and_summary(demo_cache, demo_folder):
    rows = read_rows(demo_folder)
    with FeatureStore.open(demo_cache) as store:
        found = store.rows()
        assert list(found.text["file"]) == [row["image"] for row in rows]
        assert list(found.text["prompt"]) == [row["prompt"] for row in rows]
        np.testing.assert_array_equal(found.numbers["quality"], np.float32([float(row["quality"]) for row in rows]))
        for kind in ("images", "texts"):
            lengths = np.linalg.norm(store.embeddings(kind).astype(np.float64), axis=1)
            np.testing.assert_allclose(lengths, 1, atol=2e-3)  # fp16 where the processor has bf16 units
        facts = store.facts
        assert {"weights_sha256", "quick_gelu", "preprocessing", "precision", "precision_reason", "normalised"} <= set(
            facts
        )
        assert {"dim", "context_length", "backbone", "versions"} <= set(facts)


def test_first_second_and_changed_run(twelve, tiny_backbone):
    first = run(twelve, tiny_backbone)
    texts = len({row["prompt"] for row in read_rows(twelve)} | {row["explanation"] for row in read_rows(twelve)} - {""})
    assert (first.rows, first.usable_rows, first.images, first.new_images) == (12, 12, 12, 12)
    assert (first.texts, first.new_texts, first.truncated_texts, first.failed) == (texts, texts, 0, [])
    assert json.loads(json.dumps(first.to_json()))["cache"] == str(twelve / "c.h5")
    assert f"{twelve}/c.h5: 12 rows of 12 images and {texts} texts" in first.summary()
    assert f"computed 12 images and {texts} texts in " in first.summary()
    before, there = (twelve / "c.h5").stat(), vectors_by_content(twelve / "c.h5")

    again = run(twelve, tiny_backbone)
    assert (again.new_images, again.new_texts, again.images_per_s) == (0, 0, None)
    assert "nothing to compute" in again.summary()
    after = (twelve / "c.h5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    rows = read_rows(twelve)
    for row in rows:
        row["quality"] = "0.5"
    write_rows(twelve, rows)
    relabelled = run(twelve, tiny_backbone)
    assert (relabelled.new_images, relabelled.new_texts) == (0, 0)
    with FeatureStore.open(twelve / "c.h5") as store:
        assert set(store.rows().numbers["quality"].tolist()) == {0.5}

    # One new image, the same bytes under another name, a new prompt for an old image, and one row less.
    Image.new("RGB", (30, 30), "red").save(twelve / "images" / "new.png")
    shutil.copy(twelve / rows[0]["image"], twelve / "images" / "copy.png")
    rows += [rows[0] | {"image": "images/new.png"}, rows[0] | {"image": "images/copy.png"}]
    rows += [rows[1] | {"prompt": "never seen before"}]
    write_rows(twelve, rows[1:])
    grown = run(twelve, tiny_backbone)
    assert (grown.rows, grown.images, grown.new_images, grown.new_texts) == (14, 13, 1, 1)
    now = vectors_by_content(twelve / "c.h5")
    assert {key: now[key] for key in there if key in now} == {key: there[key] for key in there if key in now}
    assert len(now) == 13
    assert sorted(entry.name for entry in twelve.iterdir()) == ["c.h5", "demo.csv", "images"]


def test_a_new_prompt_alone_needs_no_image(twelve, tiny_backbone):
    run(twelve, tiny_backbone, views="flip")
    before = views_by_content(twelve / "c.h5")
    rows = read_rows(twelve)
    rows[4]["prompt"] = "never seen before"
    write_rows(twelve, rows)
    result = run(twelve, tiny_backbone, views="flip")
    assert (result.new_images, result.new_texts) == (0, 1)
    assert views_by_content(twelve / "c.h5") == before


def views_by_content(path):
    """Bytes of every view of every image, by view and content."""
    with h5py.File(path, "r") as file:
        keys = [key.tobytes() for key in file["images/sha256"][:]]
        return {
            name: {
                key: (view["embedding"][entry].tobytes(), view["norm"][entry].tobytes(), int(view["status"][entry]))
                for entry, key in enumerate(keys)
            }
            for name, view in file["views"].items()
        }


def test_views_are_added_without_touching_what_is_there(twelve, tiny_backbone):
    path = twelve / "c.h5"
    first = run(twelve, tiny_backbone)
    assert first.views == {"center": 12}
    assert "views:" not in first.summary()
    before = views_by_content(path)
    flipped = run(twelve, tiny_backbone, views="flip")
    assert (flipped.new_images, flipped.new_texts, flipped.views) == (12, 0, {"center": 12, "flip": 12})
    assert "views: center 12, flip 12" in flipped.summary().splitlines()
    after = views_by_content(path)
    assert after["center"] == before["center"]
    stat = path.stat()
    for names in ("center", "flip,center"):
        assert run(twelve, tiny_backbone, views=names).new_images == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)

    # A new image without naming `flip`: its row has none until a command names it.
    rows = read_rows(twelve)
    Image.new("RGB", (300, 200), "red").save(twelve / "images" / "new.png")
    write_rows(twelve, [*rows, rows[0] | {"image": "images/new.png"}])
    grown = run(twelve, tiny_backbone)
    assert (grown.new_images, grown.views) == (1, {"center": 13, "flip": 12})
    with FeatureStore.open(path) as store, pytest.raises(UserError) as caught:
        store.embeddings("images", view="flip")
    assert str(caught.value) == f"{path}: has no view flip for 1 images; give --views flip to `deltaclip extract`"
    everything = run(twelve, tiny_backbone, views="tiles,flip")
    assert (everything.new_images, everything.views) == (13, {"center": 13, "flip": 13, "tiles": 13})
    last = views_by_content(path)
    for view in ("center", "flip"):
        assert {key: last[view][key] for key in after[view]} == after[view]
    assert sorted(entry.name for entry in twelve.iterdir()) == ["c.h5", "demo.csv", "images"]


def test_views_of_one_run_are_those_of_several(twelve, tiny_backbone):
    damage(twelve)
    run(twelve, tiny_backbone, views="center,flip,tiles,stages", batch_size=5, out=twelve / "at_once.h5")
    for names in ("center", "tiles", "stages", "flip"):
        run(twelve, tiny_backbone, views=names, batch_size=5)
    # Not bit by bit: one run meets the unreadable images in its batches, a later one knows of them.
    with FeatureStore.open(twelve / "c.h5") as store, FeatureStore.open(twelve / "at_once.h5") as reference:
        assert (store.header, store.failed()) == (reference.header, reference.failed())
        for name in store.view_names():
            np.testing.assert_array_equal(store.status(name), reference.status(name))
            ours, theirs = (cache.embeddings("images", view=name) for cache in (store, reference))
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
            np.testing.assert_allclose(store.norms(view=name), reference.norms(view=name), rtol=1e-5)


def as_version_one(path):
    """Write a cache as the release before views had it: no recipes, no checksums, no seal."""
    path.rename(path.with_suffix(".new"))
    with h5py.File(path.with_suffix(".new"), "r") as new, h5py.File(path, "w") as old:
        old.attrs.update(new.attrs)
        old.attrs["schema_version"] = 1
        for name in new:
            new.copy(name, old)
        for group in (old["views/center"], old["texts"]):
            del group["crc32"]
        del old["views/center"].attrs["recipe"]
    path.with_suffix(".new").unlink()


def test_a_cache_of_version_one_gets_checksums_and_keeps_its_vectors(twelve, tiny_backbone):
    path = twelve / "c.h5"
    run(twelve, tiny_backbone)
    before, now = views_by_content(path), content(path)
    as_version_one(path)
    result = run(twelve, tiny_backbone)
    assert (result.new_images, result.new_texts) == (0, 0)
    assert views_by_content(path) == before
    assert content(path) == now
    assert find_problems(path) == []


def test_stages_are_added_to_a_cache_and_stay(twelve, tiny_backbone, monkeypatch):
    path = twelve / "c.h5"
    run(twelve, tiny_backbone, precision="bf16")
    before = views_by_content(path)
    added = run(twelve, tiny_backbone, precision="bf16", views="stages")
    assert (added.new_images, added.new_texts, added.views) == (12, 0, {"center": 12, "stages": 12})
    after = views_by_content(path)
    assert after["center"] == before["center"]
    with FeatureStore.open(path) as store:
        vectors = store.embeddings("images", view="stages")
        assert (vectors.shape, vectors.dtype, store.embeddings("images").dtype) == ((12, 768), np.float32, np.float16)
        np.testing.assert_allclose(store.norms(view="stages"), np.linalg.norm(vectors, axis=1), rtol=1e-6)
        assert store.view_layouts()["stages"].recipe["tower"]["widths"] == [128] * 6
    stat = path.stat()
    assert run(twelve, tiny_backbone, precision="bf16", views="stages").new_images == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)

    rows = read_rows(twelve)
    Image.new("RGB", (300, 4), "red").save(twelve / "images" / "new.png")
    write_rows(twelve, [*rows, rows[0] | {"image": "images/new.png"}])
    assert run(twelve, tiny_backbone, precision="bf16").views == {"center": 13, "stages": 12}
    assert run(twelve, tiny_backbone, precision="bf16", views="stages").views == {"center": 13, "stages": 13}
    last = views_by_content(path)
    assert {key: last["stages"][key] for key in after["stages"]} == after["stages"]

    monkeypatch.setitem(RECIPES, "stages", RECIPES["stages"] | {"max_blocks": 6})
    assert refused(twelve, tiny_backbone, precision="bf16", views="stages") == (
        f"{path}: has a view stages of another recipe: max_blocks 12 there, 6 here; give another --out"
    )


def test_unknown_views_are_refused_before_anything_is_read(twelve, tiny_backbone):
    line = "--views: 'tile' is no view; did you mean 'tiles'?"
    assert refused(twelve, tiny_backbone, views="center,tile", data="no such.csv") == line


def test_truncated_prompts_are_counted(twelve, tiny_backbone):
    rows = read_rows(twelve)
    rows[3]["prompt"] = "cat " * 76
    write_rows(twelve, rows)
    result = run(twelve, tiny_backbone)
    assert result.truncated_texts == 1
    assert "1 texts were cut at 77 tokens" in result.summary()


def damage(folder):
    rows = read_rows(folder)
    (folder / rows[2]["image"]).unlink()
    (folder / rows[5]["image"]).write_bytes(b"")
    (folder / rows[7]["image"]).write_text("no image")
    broken = folder / rows[9]["image"]
    broken.write_bytes(broken.read_bytes()[:200])
    return [rows[number]["image"] for number in (2, 5, 7, 9)]


def test_unreadable_images_are_listed(twelve, tiny_backbone):
    files = damage(twelve)
    result = run(twelve, tiny_backbone, batch_size=3)
    assert (result.rows, result.usable_rows, result.new_images, len(result.failed)) == (12, 8, 8, 4)
    assert [file for file, _ in result.failed] == files
    reasons = [reason for _, reason in result.failed]
    assert reasons[:3] == ["no such file", "empty file", "not an image in a known format"]
    assert reasons[3].startswith("broken image data (")
    assert "4 images could not be read:\n" in result.summary()
    assert f"\n  {files[0]}: no such file\n" in result.summary()
    again = run(twelve, tiny_backbone)
    assert (again.new_images, again.failed) == (0, result.failed)


def test_on_error_fail(twelve, tiny_backbone):
    files = damage(twelve)
    remedy = "repair or remove it, or give --on-error skip"
    line = f"{twelve}/demo.csv, line 4: image {files[0]!r}: no such file; {remedy}"
    assert refused(twelve, tiny_backbone, on_error="fail") == line
    assert sorted(entry.name for entry in twelve.iterdir()) == ["demo.csv", "images"]
    rows = read_rows(twelve)
    write_rows(twelve, [row for number, row in enumerate(rows) if number not in (2, 5)])
    line = f"{twelve}/demo.csv: image {files[2]!r}: not an image in a known format; {remedy}"
    assert refused(twelve, tiny_backbone, on_error="fail") == line
    assert not (twelve / "c.h5").exists()


def test_nothing_readable(twelve, tiny_backbone):
    shutil.rmtree(twelve / "images")
    assert refused(twelve, tiny_backbone) == (
        f"{twelve}/demo.csv: none of the 12 images can be read (no such file: there is no folder images); "
        f"check the paths or give --image-root (now {twelve})"
    )
    (twelve / "images").mkdir()
    for row in read_rows(twelve):
        (twelve / row["image"]).write_text("no image")
    assert refused(twelve, tiny_backbone) == (
        f"{twelve}/demo.csv: none of the 1 images can be read (not an image in a known format); "
        f"check the paths or give --image-root (now {twelve})"
    )
    assert not (twelve / "c.h5").exists()


def test_links_out_of_the_root(twelve, tiny_backbone, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    first = twelve / read_rows(twelve)[0]["image"]
    shutil.move(first, outside)
    first.symlink_to(outside)
    result = run(twelve, tiny_backbone)
    assert [reason for _, reason in result.failed] == ["links to a file outside the image root"]
    allowed = run(twelve, tiny_backbone, allow_outside=True)
    assert (allowed.failed, allowed.new_images) == ([], 1)


def test_another_backbone_is_another_cache(twelve, tiny_backbone, tmp_path_factory):
    run(twelve, tiny_backbone)
    path = twelve / "c.h5"
    remedy = "give another --out, or the backbone that made it"
    difference = "precision fp32 there, bf16 here"
    assert refused(twelve, tiny_backbone, precision="bf16") == (
        f"{path}: was made by another backbone: {difference}; {remedy}"
    )
    assert refused(twelve, tiny_backbone, quick_gelu=True) == (
        f"{path}: was made by another backbone: quick_gelu_asked None there, True here; {remedy}"
    )
    assert run(twelve, tiny_backbone, precision="auto").facts["precision"] == "fp32"
    with FeatureStore.open(path) as store:
        request = store.header["request"]
    source = find_weights(tiny_backbone, None)
    other = tmp_path_factory.mktemp("other")
    shutil.copy(source.weights, other)
    config = json.loads(source.config.read_text())
    config["preprocess_cfg"]["interpolation"] = "bilinear"
    (other / "open_clip_config.json").write_text(json.dumps(config))
    here = find_weights(f"local-dir:{other}", None).identity()["config_sha256"]
    difference = f"config_sha256 {request['config_sha256'][:12]} there, {here[:12]} here"
    before = path.read_bytes()
    assert refused(twelve, f"local-dir:{other}") == f"{path}: was made by another backbone: {difference}; {remedy}"
    assert path.read_bytes() == before


def test_a_second_writer_is_refused(twelve, tiny_backbone):
    with one_writer(twelve / "c.h5"):
        assert refused(twelve, tiny_backbone) == (
            f"{twelve}/c.h5: another process is writing this file; wait for it to end or give another --out"
        )


@pytest.mark.slow
def test_two_processes_at_once(kill_set, tiny_backbone, tmp_path):
    """The second is refused while the first works, and does the first no harm."""
    out, lock = tmp_path / "c.h5", tmp_path / "c.h5.lock"
    arguments = ["extract", str(kill_set / "demo.csv"), "--out", str(out), "--backbone", tiny_backbone]
    arguments += ["--precision", "fp32", "--batch-size", "1", "--views", "center"]
    command = [sys.executable, "-m", "deltaclip", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            while not lock.exists():
                assert first.poll() is None
                time.sleep(0.01)
            assert refused(kill_set, tiny_backbone, out=out) == (
                f"{out}: another process is writing this file; wait for it to end or give another --out"
            )
            assert first.poll() is None
            printed, _ = first.communicate(timeout=120)
        finally:
            first.kill()
    assert first.returncode == 0
    assert json.loads(printed)["new_images"] == 116
    assert find_problems(out) == []
    assert run(kill_set, tiny_backbone, out=out).new_images == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.h5"]


def test_a_file_that_is_no_cache_is_not_overwritten(twelve, tiny_backbone):
    (twelve / "c.h5").write_text("my thesis")
    assert refused(twelve, tiny_backbone).endswith("; give another path, or remove it and extract again")
    assert (twelve / "c.h5").read_text() == "my thesis"


@pytest.mark.parametrize(
    ("data", "backbone", "pretrained", "name"),
    [
        ("demo", "tiny", None, "demo_tiny.h5"),
        ("agiqa-3k:/no/such/my.set", "ViT-L-14", "openai", "agiqa-3k-my-set-DIGITS_ViT-L-14_openai.h5"),
        ("/no/such/my set.csv", "local-dir:/x/mobile net", None, "my-set-DIGITS_mobile-net.h5"),
        ("/no/such/評価.JSONL", "hf-hub:org/name", None, "評価-DIGITS_name.h5"),
        ("/no/such/v1.2", "tiny", "weights/a.pt", "v1-2-DIGITS_tiny_a.pt.h5"),
    ],
)
def test_default_cache(data, backbone, pretrained, name):
    digits = hashlib.sha256(data.removeprefix("agiqa-3k:").encode()).hexdigest()[:6]
    assert default_cache(data, backbone, pretrained) == Path("cache") / name.replace("DIGITS", digits)


def test_default_caches_of_two_tables_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["A/data.csv", "B/data.csv", "評価.csv", "評点.csv"]
    assert len({default_cache(name, "tiny", None) for name in names}) == 4
    assert default_cache("A/../t.csv", "tiny", None) == default_cache(str(tmp_path / "t.csv"), "tiny", None)


def while_reading(monkeypatch, change):
    """Let `change` happen once all images are hashed."""

    def hash_then_change(*arguments):
        found = hash_images(*arguments)
        change()
        return found

    monkeypatch.setattr("deltaclip.features.extraction.cache_job.hash_images", hash_then_change)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_passing_read_error_is_tried_again(twelve, tiny_backbone, monkeypatch, batch_size):
    rows = read_rows(twelve)
    (twelve / rows[9]["image"]).write_text("no image")
    run(twelve, tiny_backbone, out=twelve / "reference.h5")
    first, second = (twelve / rows[number]["image"] for number in (2, 7))

    def change():
        first.rename(twelve / "away")
        shutil.copy(second, twelve / "kept")
        second.write_bytes(b"half")

    while_reading(monkeypatch, change)
    assert refused(twelve, tiny_backbone, batch_size=batch_size) == (
        f"2 images could not be read just now (first: {rows[2]['image']}: no such file); give the same command again"
    )
    monkeypatch.undo()
    assert not (twelve / "c.h5").exists()
    with FeatureStore.open(twelve / "c.h5.part", unfinished=True) as store:
        assert [file for file, _ in store.failed()] == [rows[9]["image"]]
        assert (store.group("images")["status"][:] == DONE).sum() == 9
    (twelve / "away").rename(first)
    (twelve / "kept").rename(second)
    assert run(twelve, tiny_backbone, batch_size=batch_size).new_images == 2
    with FeatureStore.open(twelve / "c.h5") as store, FeatureStore.open(twelve / "reference.h5") as reference:
        assert (store.header, store.failed()) == (reference.header, reference.failed())
        np.testing.assert_allclose(store.embeddings("images"), reference.embeddings("images"), atol=1e-5)


def test_on_error_fail_sees_what_a_cache_or_an_interrupted_run_lists(twelve, tiny_backbone, monkeypatch):
    rows = read_rows(twelve)
    (twelve / rows[5]["image"]).write_text("no image")
    line = (
        f"{twelve}/demo.csv: image {rows[5]['image']!r}: not an image in a known format; "
        "repair or remove it, or give --on-error skip"
    )
    gone = twelve / rows[7]["image"]
    while_reading(monkeypatch, lambda: gone.rename(twelve / "away"))
    assert "just now" in refused(twelve, tiny_backbone)
    monkeypatch.undo()
    (twelve / "away").rename(gone)
    assert (twelve / "c.h5.part").exists()
    assert refused(twelve, tiny_backbone, on_error="fail") == line
    run(twelve, tiny_backbone)
    assert refused(twelve, tiny_backbone, on_error="fail") == line


def test_a_cache_of_another_data_set_is_not_replaced(twelve, tiny_backbone):
    run(twelve, tiny_backbone)
    before = (twelve / "c.h5").read_bytes()
    Image.new("RGB", (30, 30), "red").save(twelve / "other.png")
    (twelve / "other.csv").write_text("image,prompt\nother.png,a cat\n")
    remedy = "give another --out or remove it"
    line = f"{twelve}/c.h5: holds another data set (demo, 12 rows); {remedy}"
    assert refused(twelve, tiny_backbone, data=str(twelve / "other.csv")) == line
    assert (twelve / "c.h5").read_bytes() == before
    # One image in common is the same set, grown and shrunk.
    (twelve / "other.csv").write_text(f"image,prompt\nother.png,a cat\n{read_rows(twelve)[0]['image']},a dog\n")
    assert run(twelve, tiny_backbone, data=str(twelve / "other.csv")).new_images == 1


def test_out_that_is_a_folder(twelve, tiny_backbone):
    line = f"{twelve}: is a folder; give --out the name of a file in it"
    assert refused(twelve, tiny_backbone, out=twelve, data="no such.csv") == line


@pytest.mark.parametrize("part", ["visual.", "token_embedding"])
def test_embeddings_that_are_not_finite_are_not_stored(twelve, tiny_backbone, tmp_path_factory, part):
    source = find_weights(tiny_backbone, None)
    broken = tmp_path_factory.mktemp("broken")
    shutil.copy(source.config, broken)
    state = load_file(source.weights)
    hit = {
        name: tensor.fill_(float("nan"))
        for name, tensor in state.items()
        if name.removeprefix("text.").startswith(part)
    }
    assert hit
    save_file(state, broken / source.weights.name)
    assert refused(twelve, f"local-dir:{broken}") == (
        f"local-dir:{broken}: the backbone gives embeddings that are not finite; "
        "check the weights, or give --precision fp32"
    )
    assert not (twelve / "c.h5").exists()


def test_the_summary_says_how_images_are_prepared(twelve, tiny_backbone):
    result = run(twelve, tiny_backbone)
    config = json.loads(find_weights(tiny_backbone, None).config.read_text())
    cfg, side = config["preprocess_cfg"], config["model_cfg"]["vision_cfg"]["image_size"]
    mean, std = (" ".join(f"{value:.4g}" for value in cfg[name]) for name in ("mean", "std"))
    mode = f"{cfg.get('resize_mode', 'shortest')}, {cfg.get('interpolation', 'bicubic')}"
    line = f"preprocessing: {side} x {side} pixels, {mode}, mean {mean}, std {std}"
    assert line in result.summary().splitlines()
    assert "give --quick-gelu" not in result.summary()
    # What the backbone's loading assumed; of caches from before there were several notes, the one of that time.
    noted = dataclasses.replace(result, facts=result.facts | {"notes": ["a note"], "quick_gelu_note": "an old one"})
    assert {"loaded: a note", "loaded: an old one"} <= set(noted.summary().splitlines())
    assert result.to_json()["facts"]["notes"] == ["weights stored in float16"]


NO_OP = """
import sys
from pathlib import Path
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
result = extract(ExtractConfig(data=sys.argv[1], out=Path(sys.argv[2]), backbone=sys.argv[3], views="center"))
assert (result.new_images, result.new_texts) == (0, 0)
print([name for name in ("torch", "open_clip", "torchvision", "timm", "sklearn", "pyarrow") if name in sys.modules])
"""


def test_nothing_to_do_imports_nothing_heavy(demo_folder, demo_cache, tiny_backbone):
    arguments = [str(demo_folder / "demo.csv"), str(demo_cache), tiny_backbone]
    done = subprocess.run([sys.executable, "-c", NO_OP, *arguments], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.fixture
def kill_set(tmp_path_factory, demo_folder):
    return make_kill_set(demo_folder, tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def server():
    found = Server()
    with found.process:
        yield found
        found.process.stdin.close()


# Files may not grow over some sizes: less than a header, less than a cache, less than is asked for beforehand.
@pytest.mark.slow
@pytest.mark.parametrize("limit", [4_096, 60_000, 1_000_000])
def test_a_full_disk_is_one_line_and_no_file(server, twelve, tiny_backbone, limit):
    out, errors = twelve / "c.h5", twelve / "errors"
    arguments = ["extract", str(twelve / "demo.csv"), "--out", str(out), "--backbone", tiny_backbone]
    _, status, _ = server.run([arguments, limit, str(errors)])
    line = f"deltaclip: {out}.part.new: File too large; check the disk and your rights on it\n"
    assert (os.waitstatus_to_exitcode(status), errors.read_text()) == (1, line)
    assert sorted(entry.name for entry in twelve.iterdir()) == ["demo.csv", "errors", "images"]


@pytest.mark.slow
def test_killed_at_random_moments(server, kill_set, tmp_path, tiny_backbone):
    assert kill_often(server, kill_set / "demo.csv", tmp_path, tiny_backbone, kills=6, seed=0).kills == 6


@pytest.mark.slow
def test_killed_at_random_moments_with_views(server, kill_set, tmp_path, tiny_backbone):
    views = "center,flip,tiles,stages,statistics"
    data = kill_set / "demo.csv"
    assert kill_often(server, data, tmp_path, tiny_backbone, kills=4, seed=2, views=views).kills == 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
# With tiles an uninterrupted run takes some 15 s here, and each kill up to that.
@pytest.mark.parametrize(("views", "seed", "kills"), [("center", 1, 30), ("center,flip,tiles", 3, 10)])
def test_killed_at_random_moments_often(server, kill_set, tmp_path, tiny_backbone, *, views, seed, kills):
    tally = kill_often(server, kill_set / "demo.csv", tmp_path, tiny_backbone, kills=kills, seed=seed, views=views)
    assert tally.kills == kills
    assert tally.left_part >= kills // 3


def test_near_copies_are_said(tmp_path, demo_folder):
    names = [f"images/{number:04d}_0.png" for number in range(8)]
    rows = "".join(f"{name},prompt {place}\n" for place, name in enumerate([*names, "images/again.png"]))
    (tmp_path / "t.csv").write_text("image,prompt\n" + rows)
    (tmp_path / "images").mkdir()
    for name in names:
        shutil.copyfile(demo_folder / name, tmp_path / name)
    Image.open(tmp_path / names[2]).save(tmp_path / "images/again.png", compress_level=9)
    config = ExtractConfig(
        data=str(tmp_path / "t.csv"), out=tmp_path / "c.h5", backbone="tiny", device="cpu", views="center"
    )
    found = extract(config)
    assert found.images == 9
    assert found.near_copies == [(names[2], "images/again.png")]
    line = f"two images are near copies ({names[2]} and images/again.png): a grouped split keeps few on one side"
    assert line in found.summary().splitlines()
    assert extract(config).near_copies == []  # nothing was computed


def test_texts_of_equal_tokens_are_known(tmp_path, demo_folder):
    prompts = ["a cat", "A  CAT", "a &amp; b", "a & b", "cat " * 90, "cat " * 100, "a cat."]
    rows = [{"image": "images/0000_0.png", "prompt": prompt} for prompt in prompts]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    config = ExtractConfig(
        data=str(tmp_path / "t.csv"), out=tmp_path / "c.h5", backbone="tiny", image_root=demo_folder, views="center"
    )
    with FeatureStore.open(extract(config).cache) as store:
        key = dict(zip(store.texts(), store.tokens(), strict=True))
    keys = [key[text] for text in key]
    assert keys[0] == keys[1] != 0
    assert keys[2] == keys[3]
    assert keys[4] == keys[5]
    assert len(set(keys)) == 4
