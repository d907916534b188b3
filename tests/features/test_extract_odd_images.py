"""A folder with every odd file at once: one run, every row right or refused by its reason, nothing lost."""

from __future__ import annotations

import csv
import hashlib
import json

import h5py
import numpy as np
import pytest

from deltaclip.features.extract import FAILURES_SHOWN, extract
from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.settings import ExtractConfig, InspectConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.tests.features.data.odd_images import refused_files, usable_files, without_count
from deltaclip.tests.features.store.making import edited

MOVING = {"moves.gif", "moves.webp", "moves.png", "pages.tiff"}
ELSEWHERE = {
    "link out.png": "links to a file outside the image root",
    "no such.png": "no such file",
    "folder.png": "Is a directory",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with `set.csv`, one row a file; and one image under two names, and one with two prompts."""
    folder = tmp_path_factory.mktemp("wild") / "the images"
    (folder / "folder.png").mkdir(parents=True)
    usable, refused = usable_files(), {name: content for name, (content, _) in refused_files().items()}
    for name, content in (usable | refused).items():
        (folder / name).write_bytes(content)
    (folder / "same.png").write_bytes(usable["plain.png"])
    (folder.parent / "secret.png").write_bytes(usable["plain.png"])
    (folder / "link out.png").symlink_to(folder.parent / "secret.png")
    (folder / "link in.png").symlink_to("plain.png")
    names = [*usable, *refused, *ELSEWHERE, "same.png", "link in.png", "plain.png"]
    with (folder / "set.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt"])
        writer.writerows([name, "first"] for name in names[:-1])
        writer.writerow([names[-1], "second"])
    return folder


@pytest.fixture(scope="module")
def result(folder, tiny_backbone):
    settings = {
        "data": str(folder / "set.csv"),
        "out": folder.parent / "c.h5",
        "backbone": tiny_backbone,
        "views": "center",
    }
    return extract(ExtractConfig(**settings, precision="fp32"))


def test_every_file_is_counted_once(folder, result):
    usable, reasons = usable_files(), {name: reason for name, (_, reason) in refused_files().items()} | ELSEWHERE
    # The summary has the files in the order in which their images first appear.
    assert [(file, without_count(reason)) for file, reason in result.failed] == list(reasons.items())
    contents = {hashlib.sha256(content).digest() for content in usable.values()}
    assert result.rows == len(usable) + len(reasons) + 3
    assert result.usable_rows == len(usable) + 3
    assert result.images == len(contents) + len(reasons)
    assert result.first_frames == len(MOVING)
    with FeatureStore.open(result.cache) as store:
        rows, status = store.rows(), store.status()
        assert list(rows.text["file"]) == [*usable, "same.png", "link in.png", "plain.png"]
        entry = dict(zip(rows.text["file"], rows.image, strict=True))
        assert entry["same.png"] == entry["link in.png"] == entry["plain.png"]
        assert list(rows.text["prompt"]) == ["first"] * (len(usable) + 2) + ["second"]
        assert {name for name in usable if store.more_frames()[entry[name]]} == MOVING
        vectors = store.embeddings("images").astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(vectors[status == 1], axis=1), 1, atol=1e-5)
        # A picture that lies on its side is the picture: all eight have the vector of the plain one.
        for number in range(1, 9):
            np.testing.assert_allclose(vectors[entry[f"exif{number}.png"]], vectors[entry["plain.png"]], atol=1e-6)
        np.testing.assert_allclose(vectors[entry["profile.png"]], vectors[entry["plain.png"]], atol=1e-6)


def test_the_summaries_say_so(result):
    lines = result.summary().splitlines()
    assert "4 images have several frames or pages; the first was taken" in lines
    start = lines.index(f"{len(result.failed)} images could not be read:")
    shown = [f"  {file}: {reason}" for file, reason in result.failed[:FAILURES_SHOWN]]
    more = len(result.failed) - FAILURES_SHOWN
    assert lines[start + 1 :] == [*shown, f"  ... and {more} more, all listed in the cache"]
    found = inspect_cache(InspectConfig(caches=[result.cache], verify=True))
    assert found.exit_code == 0
    assert found.reports[0].first_frames == 4
    assert "  4 images have several frames or pages; the first was taken" in found.reports[0].lines()
    assert json.loads(json.dumps(result.to_json()))["first_frames"] == 4


def test_again_computes_nothing_and_merging_keeps_the_count(folder, result, tiny_backbone):
    settings = {
        "data": str(folder / "set.csv"),
        "out": result.cache,
        "backbone": tiny_backbone,
        "precision": "fp32",
        "views": "center",
    }
    again = extract(ExtractConfig(**settings))
    assert (again.new_images, again.new_texts, again.failed) == (0, 0, result.failed)
    merged = inspect_cache(InspectConfig(caches=[result.cache, result.cache], merge=folder.parent / "all.h5"))
    assert merged.reports[0].first_frames == 4


def test_a_cache_of_before_the_count_is_read_and_brought_up_to_date(folder, result, tiny_backbone, tmp_path):
    old = tmp_path / "old.h5"
    old.write_bytes(result.cache.read_bytes())
    with edited(old) as file:
        del file["images/more_frames"]
        header = json.loads(file.attrs["header"])
        file.attrs["header"] = json.dumps(header | {"plan": "0" * 64})  # the digest covers the column
    report = inspect_cache(InspectConfig(caches=[old], verify=True)).reports[0]
    assert (report.first_frames, report.problems) == (0, [])
    settings = {
        "data": str(folder / "set.csv"),
        "out": old,
        "backbone": tiny_backbone,
        "precision": "fp32",
        "views": "center",
    }
    grown = extract(ExtractConfig(**settings))
    assert (grown.new_images, grown.first_frames) == (0, 4)


def test_a_column_of_the_wrong_length_is_damage(result, tmp_path):
    broken = tmp_path / "broken.h5"
    broken.write_bytes(result.cache.read_bytes())
    with edited(broken) as file:
        del file["images/more_frames"]
        file["images/more_frames"] = np.zeros(3, np.uint8)
    with h5py.File(broken) as file:
        assert len(file["images/file"]) != 3
    found = inspect_cache(InspectConfig(caches=[broken], verify=True))
    assert found.damaged == {str(broken): ["is damaged (images: no images/more_frames of the right length)"]}
