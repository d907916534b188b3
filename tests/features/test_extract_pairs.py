"""Pairs in a cache: from extraction to inspection, after kills, merged, and none in caches of before there were any."""

from __future__ import annotations

import csv
import shutil

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.extract import extract
from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.settings import ExtractConfig, InspectConfig
from deltaclip.features.store.integrity import break_seal, write_seal
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.shards import merge
from deltaclip.tests.features.killing import Server, kill_often, make_kill_set, read_rows
from deltaclip.tests.features.store.making import VERSION_ONE

HEADER = ["image_a", "image_b", "prompt", "preferred"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, demo_folder):
    """Return a folder with twelve pictures, their ratings, and pairs of six of them and of two others."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = read_rows(demo_folder)[:14]
    (folder / "images").mkdir()
    for row in rows:
        shutil.copyfile(demo_folder / row["image"], folder / row["image"])
    with (folder / "ratings.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", "quality"])
        writer.writerows([row["image"], row["prompt"], row["quality"]] for row in rows[:12])
    pairs = [(0, 1, "a"), (1, 2, "b"), (3, 4, "tie"), (12, 13, "0.75")]
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows([rows[a]["image"], rows[b]["image"], rows[a]["prompt"], said] for a, b, said in pairs)
    return folder


def of(place, out, backbone, **values):
    values = {"data": str(place / "ratings.csv"), "label_range": ["0,1"], "views": "center"} | values
    return extract(ExtractConfig(out=out, backbone=backbone, precision="fp32", **values))


def pairs_of(path):
    with FeatureStore.open(path) as store:
        files, found = store.rows().text["file"], store.preferences()
        names = [store.targets[target].name for target in found.target_P]
        return [
            (str(files[a]), str(files[b]), share, name)
            for a, b, share, name in zip(found.a_P, found.b_P, found.preferred_P.tolist(), names, strict=True)
        ]


def test_pairs_beside_ratings_and_alone(tmp_path, place, tiny_backbone):
    """Pairs use the rows that are there; what has an embedding is not computed again, with or without them."""
    out, pairs = tmp_path / "c.h5", str(place / "pairs.csv")
    assert of(place, out, tiny_backbone).new_images == 12
    done = of(place, out, tiny_backbone, pairs=pairs, pairs_target="quality")
    assert (done.rows, done.images, done.new_images, done.pairs) == (14, 14, 2, 4)
    assert "14 rows of 14 images and 14 texts, 4 pairs" in done.summary().replace(f"{done.texts} texts", "14 texts")
    images = [row["image"] for row in csv.DictReader((place / "ratings.csv").read_text().splitlines())]
    found = pairs_of(out)
    assert [(a, b, share) for a, b, share, _ in found[:3]] == [
        (images[0], images[1], 1.0),
        (images[1], images[2], 0.0),
        (images[3], images[4], 0.5),
    ]
    assert (found[3][2], {name for *_, name in found}) == (0.75, {"quality"})
    before = out.read_bytes()
    assert of(place, out, tiny_backbone, pairs=pairs, pairs_target="quality").new_images == 0
    assert out.read_bytes() == before
    alone = of(place, tmp_path / "alone.h5", tiny_backbone, data=pairs, label_range=None)
    assert (alone.rows, alone.pairs) == (7, 4)
    assert {name for *_, name in pairs_of(tmp_path / "alone.h5")} == {"preference"}
    report = inspect_cache(InspectConfig(caches=[out, tmp_path / "alone.h5"], verify=True))
    assert report.exit_code == 0
    assert [each.pairs for each in report.reports] == [{"quality": 4}, {"preference": 4}]
    assert "  quality: 4 pairs" in report.summary()


def test_an_image_that_cannot_be_read_takes_its_pairs_along(tmp_path, place, tiny_backbone):
    folder = tmp_path / "set"
    shutil.copytree(place, folder)
    gone = next(csv.reader((folder / "pairs.csv").read_text().splitlines()[3:]))[0]
    (folder / gone).unlink()
    pairs = str(folder / "pairs.csv")
    done = of(folder, tmp_path / "c.h5", tiny_backbone, pairs=pairs)
    said = f"1 pair has an image that cannot be read and is left out (at {pairs}, line 4)"
    assert said in done.notes
    assert (done.pairs, len(pairs_of(tmp_path / "c.h5"))) == (4, 3)
    with pytest.raises(UserError, match=r"no such file.*repair or remove it, or give --on-error skip"):
        of(folder, tmp_path / "d.h5", tiny_backbone, pairs=pairs, on_error="fail")


@pytest.mark.slow
def test_caches_with_pairs_merge(tmp_path, place, tiny_backbone):
    """Rows and targets get other numbers; what is in both stands once."""
    pairs = str(place / "pairs.csv")
    of(place, tmp_path / "r.h5", tiny_backbone)
    of(place, tmp_path / "p.h5", tiny_backbone, data=pairs, label_range=None)
    of(place, tmp_path / "q.h5", tiny_backbone, data=pairs, label_range=None, pairs_target="quality")
    merge([tmp_path / f"{name}.h5" for name in "rpq"], tmp_path / "all.h5")
    merged = pairs_of(tmp_path / "all.h5")
    assert merged == [*pairs_of(tmp_path / "p.h5"), *pairs_of(tmp_path / "q.h5")]
    merge([tmp_path / "p.h5", tmp_path / "all.h5"], tmp_path / "again.h5")
    assert sorted(pairs_of(tmp_path / "again.h5")) == sorted(merged)
    assert inspect_cache(InspectConfig(caches=[tmp_path / "all.h5"], verify=True)).exit_code == 0


def test_caches_of_before_there_were_pairs_open():
    with FeatureStore.open(VERSION_ONE) as store:
        assert store.preferences() is None


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("a", 99, "is damaged (pairs/a is out of range)"),
        ("b", -1, "is damaged (pairs/b is out of range)"),
        ("preferred", 1.5, "is damaged (pairs/preferred is out of range)"),
        ("preferred", np.nan, "is damaged (pairs/preferred is out of range)"),
        ("target", 1, "is damaged (pairs/target is out of range)"),
    ],
)
def test_pairs_that_lead_nowhere_are_refused(name, value, problem, *, tmp_path, place, tiny_backbone):
    out = tmp_path / "c.h5"
    of(place, out, tiny_backbone, data=str(place / "pairs.csv"), label_range=None)
    break_seal(out)
    with h5py.File(out, "r+") as file:
        file[f"pairs/{name}"][0] = value
    write_seal(out, [])
    with pytest.raises(UserError) as error:
        FeatureStore.open(out)
    assert error.value.message == problem


def test_pairs_are_of_whole_tables(tmp_path, place, tiny_backbone):
    with pytest.raises(UserError) as error:
        of(place, tmp_path / "c.h5", tiny_backbone, pairs=str(place / "pairs.csv"), shard="1/2")
    assert str(error.value) == (
        "--shard: makes shards, and the images of a pair may lie in two; "
        "extract the images in shards without pairs, merge, then add --pairs"
    )
    for values, said in (
        (
            {"pairs_target": "quality"},
            "--pairs-target: has no effect without pairs; give --pairs TABLE, or leave it out",
        ),
        (
            {"pairs": str(place / "ratings.csv")},
            f"{place / 'ratings.csv'}: holds no pairs; give columns image_a, image_b and preferred; see docs/pairs.md",
        ),
    ):
        with pytest.raises(UserError) as error:
            of(place, tmp_path / "c.h5", tiny_backbone, **values)
        assert str(error.value) == said


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, demo_folder, tiny_backbone):
    """Pick-a-Pic's form, pictures in the file: every kill leaves what counts, and the end is the same byte for byte."""
    folder = make_kill_set(demo_folder, tmp_path / "set")
    rows = read_rows(folder)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    table = {
        "caption": [a["prompt"] for a, _ in pairs],
        "label_0": [float(number % 2) for number in range(len(pairs))],
        "label_1": [float(1 - number % 2) for number in range(len(pairs))],
    }
    for place in (0, 1):
        table[f"jpg_{place}"] = [(folder / pair[place]["image"]).read_bytes() for pair in pairs]
    pq.write_table(pa.table(table), tmp_path / "set" / "train.parquet")
    (tmp_path / "work").mkdir()
    server = Server()
    with server.process:
        found = kill_often(
            server, tmp_path / "set" / "train.parquet", tmp_path / "work", tiny_backbone, kills=6, seed=4
        )
        server.process.stdin.close()
    assert found.kills == 6
