"""The same pictures in every form give the same cache but for names, also after kills."""

from __future__ import annotations

import json

import h5py
import pyarrow.parquet as pq
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.check_data import check_data
from deltaclip.features.extract import extract
from deltaclip.features.settings import CheckConfig, ExtractConfig
from deltaclip.features.store.shards import merge
from deltaclip.tests.features.forms import FORMS, write_form
from deltaclip.tests.features.killing import Server, kill_often, make_kill_set, read_rows

NAMES = {"rows/file", "images/file"}


def without_names(path):
    """Return the bytes of every dataset of a cache but those of names, and what its attributes say but for them."""
    found = {}
    with h5py.File(path, "r") as file:

        def add(name, entry):
            if isinstance(entry, h5py.Dataset) and name not in NAMES:
                values = entry[()]
                found[name] = values.tolist() if values.dtype == object else values.tobytes()

        file.visititems(add)
        facts, dataset = (json.loads(file.attrs[name]) for name in ("facts", "dataset"))
        request = json.loads(file.attrs["header"])["request"]
    return found, facts, request, {name: dataset[name] for name in ("targets", "label_ranges")}


@pytest.fixture(scope="module")
def rows(demo_folder):
    """Return 30 rows of the demo set, one of whose pictures stands twice."""
    chosen = read_rows(demo_folder)[:29]
    return [*chosen, chosen[3] | {"prompt": "another"}]


@pytest.fixture(scope="module")
def of_files(tmp_path_factory, demo_folder, rows, tiny_backbone):
    """Return the cache of the pictures as files, in a table beside them."""
    folder = tmp_path_factory.mktemp("files")
    data = write_form("metadata", demo_folder, rows, folder / "set") / "metadata.csv"
    extract(
        ExtractConfig(data=str(data), out=folder / "c.h5", backbone=tiny_backbone, label_range=["0,1"], views="center")
    )
    return without_names(folder / "c.h5")


@pytest.mark.parametrize("form", FORMS)
def test_one_cache_whatever_the_form(form, tmp_path, demo_folder, *, rows, of_files, tiny_backbone):
    data = str(write_form(form, demo_folder, rows, tmp_path / "set"))
    config = ExtractConfig(
        data=data, out=tmp_path / "c.h5", backbone=tiny_backbone, label_range=["0,1"], views="center"
    )
    first = extract(config)
    assert (first.rows, first.images, first.new_images, first.failed) == (30, 29, 29, [])
    assert without_names(tmp_path / "c.h5") == of_files
    before = (tmp_path / "c.h5").read_bytes()
    assert extract(config).new_images == 0
    assert (tmp_path / "c.h5").read_bytes() == before
    checked = check_data(CheckConfig(data=data, images="full", label_range=["0,1"]))
    assert (checked.rows, checked.images["readable"], checked.exit_code) == (30, checked.images["files"], 0)


def test_another_form_of_the_same_pictures_computes_nothing(tmp_path, demo_folder, rows, tiny_backbone):
    """They are known by content, so that a cache goes on from any form to any other."""
    out = tmp_path / "c.h5"
    for number, form in enumerate(("shards", "parquet", "saved")):
        data = write_form(form, demo_folder, rows, tmp_path / form)
        done = extract(
            ExtractConfig(data=str(data), out=out, backbone=tiny_backbone, label_range=["0,1"], views="center")
        )
        assert done.new_images == (0 if number else 29)


def test_shards_of_a_cache_from_pictures_in_a_file(tmp_path, demo_folder, rows, *, of_files, tiny_backbone):
    data = write_form("hub", demo_folder, rows, tmp_path / "set")
    config = {"data": str(data), "out": tmp_path / "c.h5", "backbone": tiny_backbone, "label_range": ["0,1"]}
    config |= {"views": "center", "precision": "fp32"}
    paths = [extract(ExtractConfig(**config, shard=f"{number}/3")).cache for number in (1, 2, 3)]
    merge(paths, tmp_path / "whole.h5")
    found = without_names(tmp_path / "whole.h5")[0]
    assert found["rows/image"] == of_files[0]["rows/image"]
    assert found["images/sha256"] == of_files[0]["images/sha256"]


def test_damage_in_a_file_of_pictures(tmp_path, demo_folder, rows, tiny_backbone):
    """Rows behind the damage are failures with a reason; the others are extracted."""
    data = write_form("parquet", demo_folder, rows, tmp_path / "set")
    about = pq.ParquetFile(data).metadata.row_group(1).column(0)
    content = bytearray(data.read_bytes())
    start = about.dictionary_page_offset or about.data_page_offset
    content[start : start + 60] = bytes(60)
    data.write_bytes(content)
    config = ExtractConfig(
        data=str(data), out=tmp_path / "c.h5", backbone=tiny_backbone, label_range=["0,1"], views="center"
    )
    done = extract(config)
    assert [name for name, _ in done.failed] == [
        f"t.parquet/image/{row}/{_name(rows[row - 1])}" for row in range(8, 15)
    ]
    assert all(reason.startswith("t.parquet is no readable Parquet file (") for _, reason in done.failed)
    with pytest.raises(UserError, match=r"t\.parquet is no readable Parquet file"):
        extract(
            ExtractConfig(
                data=str(data), out=tmp_path / "d.h5", backbone=tiny_backbone, on_error="fail", views="center"
            )
        )


def _name(row):
    return row["image"].rpartition("/")[2]


@pytest.fixture(scope="module")
def server():
    """Return a process that forks an extraction at a time."""
    found = Server()
    with found.process:
        yield found
        found.process.stdin.close()


@pytest.fixture(scope="module")
def kill_set(demo_folder, tmp_path_factory):
    """Return 120 rows of the demo set, four of whose pictures cannot be read."""
    return make_kill_set(demo_folder, tmp_path_factory.mktemp("kill"))


@pytest.mark.parametrize(
    ("form", "kills"),
    [
        pytest.param("one group", 3, marks=pytest.mark.slow),
        pytest.param("hub", 6, marks=pytest.mark.slow),
        pytest.param("saved", 6, marks=pytest.mark.slow),
        pytest.param("shards", 6, marks=pytest.mark.slow),
        pytest.param("metadata", 6, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(form, kills, server, *, kill_set, tmp_path, tiny_backbone):
    data = write_form(form, kill_set, read_rows(kill_set), kill_set.parent / f"kill {form}")
    assert kill_often(server, data, tmp_path, tiny_backbone, kills=kills, seed=4).kills == kills
