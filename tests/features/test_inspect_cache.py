"""What `inspect` says of a cache, and that `--verify` finds what is wrong with it; judged by h5py and the manifest."""

from __future__ import annotations

import csv
import json
import shutil

import h5py
import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.cli import main
from deltaclip.features.data.views import RECIPES
from deltaclip.features.extract import extract
from deltaclip.features.inspect_cache import FAILURES_SHOWN, inspect_cache
from deltaclip.features.settings import ExtractConfig, InspectConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.tests.features.store.making import ANEW, VERSION_ONE


@pytest.fixture(scope="module")
def place(tmp_path_factory, demo_folder, tiny_backbone):
    """Folder with a cache of 12 rows: one unreadable image, a view that one image lacks, one row without label."""
    folder = tmp_path_factory.mktemp("inspect")
    with (demo_folder / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:12]
    (folder / "images").mkdir()
    for row in rows:
        shutil.copy(demo_folder / row["image"], folder / row["image"])
    (folder / rows[3]["image"]).write_text("no image")
    rows[5]["quality"] = ""
    rows[7]["prompt"] = "cat " * 80
    values = {"data": str(folder / "demo.csv"), "out": folder / "c.h5", "backbone": tiny_backbone, "precision": "fp32"}
    for count, views in ((11, "flip"), (12, "center")):
        with (folder / "demo.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows[:count])
        extract(ExtractConfig(**values, views=views))
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def inspect(*caches, **options):
    return inspect_cache(InspectConfig(caches=list(caches), **options))


def test_report(place):
    rows = json.loads((place / "rows.json").read_text())
    (report,) = inspect(place / "c.h5").reports
    usable = [row for number, row in enumerate(rows) if number != 3]
    texts = {row["prompt"] for row in rows} | {row["explanation"] for row in rows} - {""}
    assert (report.rows, report.usable_rows, report.images, report.texts) == (12, 11, 12, len(texts))
    assert (report.complete, report.schema_version, report.texts_to_do, report.truncated_texts) == (True, 3, 0, 1)
    assert report.size_bytes == (place / "c.h5").stat().st_size
    with h5py.File(place / "c.h5") as file:
        width = file["views/center/embedding"].shape[1]
        assert report.facts == json.loads(file.attrs["facts"])
        assert report.request == json.loads(file.attrs["header"])["request"]
    assert report.views == {
        "center": {"width": width, "recipe": RECIPES["center"], "done": 11, "failed": 1, "to_do": 0},
        "flip": {"width": width, "recipe": RECIPES["flip"], "done": 10, "failed": 1, "to_do": 1},
    }
    expected = {label: sum(row[label] != "" for row in usable) for label in ("quality", "consistency")}
    assert report.labels == expected | {"quality_std": 0, "consistency_std": 0}
    assert report.names["group"] == len({row["prompt"] for row in usable})
    assert report.names["source"] == len({row["source"] for row in usable})
    assert report.failed == [(rows[3]["image"], "not an image in a known format")]
    assert report.problems is None
    assert report.dataset["name"] == "demo"


def test_summary(place):
    rows = json.loads((place / "rows.json").read_text())
    lines = inspect(place / "c.h5", verify=True).summary().splitlines()
    size = (place / "c.h5").stat().st_size / 1e6
    assert lines[0] == f"{place}/c.h5: complete, schema version 3, {size:,.1f} MB"
    assert lines[1] == "  data: demo, 12 rows, 11 of them usable"
    assert lines[2].startswith("  backbone: tiny, D = ")
    assert lines.pop(3) == "  loaded: weights stored in float16"
    assert lines[3].startswith("  view center: 11 of 12 images, 1 could not be read, W = ")
    assert lines[4].startswith("  view flip: 10 of 12 images, 1 could not be read, 1 to do, W = ")
    assert lines[5].endswith(", 1 cut at the context length")
    assert "  quality: 10 rows" in lines
    assert f"  {rows[3]['image']}: not an image in a known format" in lines
    assert lines[-1] == "  verified: every byte is what was written"


def test_json_is_plain(place):
    found = json.loads(json.dumps(inspect(place / "c.h5", place / "c.h5", verify=True).to_json()))
    assert [report["cache"] for report in found["caches"]] == [str(place / "c.h5")] * 2
    assert [report["problems"] for report in found["caches"]] == [[], []]
    assert found["damaged"] == {}


def test_many_failures_are_counted(place):
    (report,) = inspect(place / "c.h5").reports
    lines = type(report)(**report.__dict__ | {"failed": [("x.png", "broken")] * (FAILURES_SHOWN + 2)}).lines()
    assert lines.count("  x.png: broken") == FAILURES_SHOWN
    assert lines[-1] == "  ... and 2 more images that could not be read"


def test_an_interrupted_run(place, tmp_path):
    part = tmp_path / "c.h5.part"
    shutil.copy(place / "c.h5", part)
    with h5py.File(part, "r+") as file:
        file.attrs["complete"] = np.uint8(0)
        file["texts/status"][1] = 0
        file["views/center/status"][:4] = 0
    with part.open("r+b") as file:
        file.write(bytes(4096))
    result = inspect(part, verify=True)
    (report,) = result.reports
    assert (report.complete, report.texts_to_do, report.usable_rows) == (False, 1, 8)
    assert report.views["center"]["to_do"] == 4
    assert result.exit_code == 0
    assert "not complete: give the same `deltaclip extract` again" in result.summary()


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def damage(path, name="views/flip/embedding", row=2):
    with h5py.File(path, "r") as file:
        dataset = file[name]
        offset = dataset.id.get_offset() + row * dataset.id.get_storage_size() // len(dataset)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_damaged_vector_is_a_problem_and_exit_code_2(place, tmp_path, capsys):
    path = tmp_path / "c.h5"
    shutil.copy(place / "c.h5", path)
    assert run("inspect", path, "--verify") == 0
    damage(path)
    assert run("inspect", path) == 0  # nobody asked
    capsys.readouterr()
    assert run("inspect", path, "--verify") == 2
    problem = "views/flip/embedding: 1 of 12 rows are not what was computed, the first is row 2"
    assert capsys.readouterr().out.splitlines()[-1] == f"  PROBLEM: {problem}"
    assert run("inspect", path, "--verify", "--json") == 2
    assert json.loads(capsys.readouterr().out)["caches"][0]["problems"] == [problem]


def test_a_damaged_structure_is_a_problem_too(place, tmp_path, capsys):
    path, good = tmp_path / "c.h5", place / "c.h5"
    shutil.copy(good, path)
    damage(path, "rows/quality")
    line = "is damaged or was changed (checksum of names, labels and structure)"
    assert run("inspect", good, path) == 2
    assert capsys.readouterr().err == f"deltaclip: {path}: {line}; {ANEW}\n"
    assert run("inspect", good, path, "--verify") == 2
    out = capsys.readouterr().out
    assert "  verified: every byte is what was written\n" in out
    assert out.endswith(f"\n{path}: cannot be used\n  PROBLEM: {line}\n")


def test_a_cache_of_version_one_cannot_be_verified(tmp_path):
    (report,) = inspect(VERSION_ONE, verify=True).reports
    assert report.problems == ["schema version 1 has no checksums: extract the same data again, nothing is computed"]
    assert report.views["center"] == {"width": 3, "recipe": RECIPES["center"], "done": 2, "failed": 1, "to_do": 0}


def test_no_such_file(tmp_path):
    for verify in (False, True):
        with pytest.raises(UserError, match="no such cache"):
            inspect(tmp_path / "c.h5", verify=verify)


def test_merge(demo_folder, tiny_backbone, tmp_path, capsys):
    """Two shards of a table, merged, are what one extraction of the whole table gives."""
    with (demo_folder / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:16]
    shards = {"a": rows[:9], "b": rows[7:], "all": rows}
    for name, part in shards.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(part)
        arguments = [
            "--image-root",
            demo_folder,
            "--backbone",
            tiny_backbone,
            "--precision",
            "fp32",
            "--views",
            "center",
        ]
        assert run("extract", tmp_path / f"{name}.csv", *arguments, "--out", tmp_path / f"{name}.h5") == 0
    out = tmp_path / "merged.h5"
    capsys.readouterr()
    assert run("inspect", tmp_path / "a.h5", tmp_path / "b.h5", "--merge", out, "--verify") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{out}: complete, schema version 3")
    assert printed[1] == "  data: a+b, 16 rows, 16 of them usable"
    assert printed[-1] == "  verified: every byte is what was written"
    with FeatureStore.open(out) as merged, FeatureStore.open(tmp_path / "all.h5") as whole:
        assert (merged.facts, merged.header["request"]) == (whole.facts, whole.header["request"])
        ours, theirs = merged.rows(), whole.rows()
        for name, column in theirs.text.items():
            assert list(ours.text[name]) == list(column)
        for name, numbers in theirs.numbers.items():
            np.testing.assert_array_equal(ours.numbers[name], numbers)
        for kind, column in (("images", "image"), ("texts", "prompt")):
            pairs = [store.embeddings(kind)[getattr(rows, column)] for store, rows in ((merged, ours), (whole, theirs))]
            np.testing.assert_allclose(*pairs, atol=1e-5)  # other batches, other order of sums
    # And `extract` goes on from it without computing anything.
    assert run("extract", tmp_path / "all.csv", *arguments, "--out", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["new_images"], result["new_texts"], result["rows"]) == (0, 0, 16)
    assert run("inspect", tmp_path / "a.h5", "--merge", out) == 2
    assert capsys.readouterr().err == f"deltaclip: {out}: already exists; give another --merge or remove it first\n"
