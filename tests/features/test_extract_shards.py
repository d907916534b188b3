"""Extraction in parts: together they are the whole, each is as safe as it, and none that does not fit goes in."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import QUALITY, Target
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.data.sharding import Shard, shard_of
from deltaclip.features.extract import _extraction, extract
from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.settings import ExtractConfig, InspectConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import DONE
from deltaclip.features.store.shards import find_sibling, open_cache, read_mark
from deltaclip.tests.features.killing import read_rows, write_rows

COUNT = 3
TARGET = ["fit=consistency:pair"]


@pytest.fixture(scope="module")
def table(tmp_path_factory, demo_folder):
    """Write 27 rows of the demo set: one image has two prompts, one is a copy of another, one cannot be read."""
    folder = tmp_path_factory.mktemp("table")
    rows = read_rows(demo_folder)[:24]
    shutil.copytree(demo_folder / "images", folder / "images", copy_function=os.link)
    shutil.copy(folder / rows[0]["image"], folder / "images" / "copy.png")
    (folder / "images" / "no.png").write_text("no image")
    rows.insert(3, rows[1] | {"prompt": "another prompt"})
    rows += [rows[0] | {"image": "images/copy.png"}, rows[0] | {"image": "images/no.png"}]
    rows.append(rows[5] | {"source": "another"})  # no further rating, but a row of its own
    assert shard_of(rows[0]["image"], COUNT) != shard_of("images/copy.png", COUNT)
    write_rows(folder, rows)
    return folder


def run(folder, out, **options):
    values = {"data": str(folder / "demo.csv"), "out": out, "precision": "fp32", "views": "center", "target": TARGET}
    return extract(ExtractConfig(**values | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, table):
    out = tmp_path_factory.mktemp("whole") / "c.h5"
    run(table, out)
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory, table):
    out = tmp_path_factory.mktemp("shards") / "c.h5"
    return [run(table, out, shard=f"{number}/{COUNT}").cache for number in range(1, COUNT + 1)]


def merged(paths, out):
    inspect_cache(InspectConfig(caches=paths, merge=out))
    return out


def datasets(path):
    found = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, entry: found.update({name: entry[()]} if isinstance(entry, h5py.Dataset) else {}))
    return found


def check_equal(path, whole):
    """Every dataset is the same bit for bit, but vectors within the rounding of batches of other sizes."""
    there, wanted = datasets(path), datasets(whole)
    assert there.keys() == wanted.keys()
    for name, values in wanted.items():
        assert there[name].dtype == values.dtype
        if name.endswith(("embedding", "norm")):
            np.testing.assert_allclose(there[name], values, atol=2e-6, err_msg=name)
        elif not name.endswith("crc32"):
            assert there[name].tolist() == values.tolist() or np.array_equal(there[name], values, equal_nan=True), name
    with FeatureStore.open(path) as one, FeatureStore.open(whole) as other:
        assert one.header["request"] == other.header["request"]
        # A plan has no reason where a file could be hashed; one that is put together of caches has what they found.
        assert one.header == other.header or other.failed()
        assert one.dataset == other.dataset


def test_shards_together_are_the_whole(shards, whole, tmp_path):
    check_equal(merged(shards, tmp_path / "all.h5"), whole)
    check_equal(merged(shards[::-1], tmp_path / "backwards.h5"), whole)


def test_each_shard_is_a_cache_by_itself(shards, table):
    assert [path.name for path in shards] == [f"c.shard-{number}-of-3.h5" for number in (1, 2, 3)]
    names = [row["image"] for row in read_rows(table)]
    for number, path in enumerate(shards, 1):
        report = inspect_cache(InspectConfig(caches=[path], verify=True)).reports[0]
        assert (report.problems, report.complete) == ([], True)
        assert report.rows == sum(shard_of(name, COUNT) == number for name in names) > 0
        with FeatureStore.open(path) as store:
            assert [names[place] for place in store.positions()] == list(store.rows(usable=False).text["file"])


def test_result_and_second_run(table, shards):
    before = shards[1].stat()
    again = run(table, shards[1].with_name("c.h5"), shard="2/3")
    assert (again.new_images, again.new_texts, again.shard, again.cache) == (0, 0, "2/3", shards[1])
    assert f"shard 2/3 of {shards[1].with_name('c.h5')}" in again.summary().splitlines()
    assert again.to_json()["shard"] == "2/3"
    assert (shards[1].stat().st_ino, shards[1].stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_launcher_names_the_shard(table, shards, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    result = run(table, shards[2].with_name("c.h5"), shard="auto")
    assert (result.cache, result.new_images) == (shards[2], 0)
    assert capsys.readouterr().err == "shard 3/3, by RANK=2 and WORLD_SIZE=3\n"


def copied(shards, folder):
    return [shutil.copy(path, folder / path.name) for path in shards]


def test_rows_that_are_added_are_all_that_is_computed(table, shards, tmp_path):
    shutil.copytree(table, tmp_path / "t", copy_function=os.link)
    (tmp_path / "t" / "demo.csv").unlink()
    rows = read_rows(table)
    new = read_rows_of_demo(table)[30]
    write_rows(tmp_path / "t", [new, *rows])
    paths = copied(shards, tmp_path)
    number = shard_of(new["image"], COUNT)
    computed = {n: run(tmp_path / "t", tmp_path / "c.h5", shard=f"{n}/3").new_images for n in (1, 2, 3)}
    assert computed == {n: int(n == number) for n in (1, 2, 3)}
    run(tmp_path / "t", tmp_path / "whole.h5")
    check_equal(merged(paths, tmp_path / "all.h5"), tmp_path / "whole.h5")


def test_shards_that_were_asked_for_unlike_targets_are_of_two_tables(table, shards, tmp_path):
    """The target is in all of them or in none, and sees the same in all."""
    with open_cache(shards[0].with_name("c.h5")) as store:
        assert store.targets == (QUALITY, Target("fit", "pair"))
        assert np.isfinite(store.rows().numbers["fit"]).all()
    for targets in (None, ["fit=consistency:image"]):
        paths = copied(shards, tmp_path)
        result = run(table, tmp_path / "c.h5", shard="2/3", target=targets)
        assert (result.new_images, result.new_texts) == (0, 0)
        line = "is a shard of another table, or of another state of it, than c.shard-1-of-3.h5"
        assert refused(paths, tmp_path / "all.h5").startswith(f"{tmp_path}/c.shard-2-of-3.h5: {line}; ")


def read_rows_of_demo(table):
    names = sorted(path.name for path in (table / "images").iterdir())
    row = read_rows(table)[0]
    return [row | {"image": f"images/{name}", "prompt": f"of {name}"} for name in names]


def refused(paths, out):
    with pytest.raises(UserError) as caught:
        merged(paths, out)
    assert not out.exists()
    return str(caught.value)


def test_missing_and_foreign_shards(table, shards, whole, tmp_path):
    folder = shards[0].parent
    assert refused([shards[0], shards[2]], tmp_path / "all.h5") == (
        f"{folder}/c.shard-2-of-3.h5: shard 2/3 is missing; make it by the same `deltaclip extract` with --shard 2/3"
    )
    assert refused([whole, shards[1]], tmp_path / "all.h5") == (
        f"{folder}/c.shard-1-of-3.h5: shard 1/3 and 1 more is missing; "
        "make it by the same `deltaclip extract` with --shard 1/3"
    )
    shutil.copytree(table, tmp_path / "t", copy_function=os.link)
    (tmp_path / "t" / "demo.csv").unlink()
    write_rows(tmp_path / "t", read_rows(table)[:-1])
    paths = copied(shards, tmp_path)
    run(tmp_path / "t", tmp_path / "c.h5", shard="1/3")
    assert refused(paths, tmp_path / "all.h5") == (
        f"{tmp_path}/c.shard-1-of-3.h5: is a shard of another table, or of another state of it, than "
        "c.shard-2-of-3.h5; give the same `deltaclip extract` with each --shard from 1/3: only what is new is computed"
    )


def test_a_shard_that_would_not_fit_is_not_begun(table, shards, tmp_path):
    copied(shards[:1], tmp_path)
    with pytest.raises(UserError) as caught:
        run(table, tmp_path / "c.h5", shard="2/3", precision="bf16")
    assert str(caught.value) == (
        f"{tmp_path}/c.shard-1-of-3.h5: was made by another backbone: precision fp32 there, bf16 here; "
        "give another --out, or the backbone that made it"
    )
    # What `auto` comes to is then not for this process to say.
    assert run(table, tmp_path / "c.h5", shard="2/3", precision="auto").facts["precision"] == "fp32"


def test_a_backbone_of_another_precision_is_not_taken_over(table, tmp_path):
    run(table, tmp_path / "c.h5", shard="1/3")
    config = ExtractConfig(data=str(table / "demo.csv"), out=tmp_path / "c.h5", device="cpu", views="center")
    work = _extraction(config, tmp_path / "c.h5")
    work.backbone = load_backbone(work.source, device="cpu", precision="bf16")  # as an actor has it from another shard
    work.run(Shard(2, 3))
    assert work.backbone.precision == "fp32"
    with FeatureStore.open(tmp_path / "c.shard-2-of-3.h5") as store:
        assert store.facts["precision"] == store.header["request"]["precision"] == "fp32"


def test_a_shard_that_is_finished_while_another_looks(shards, tmp_path):
    paths = copied(shards, tmp_path)
    for number in range(40):
        part = paths[0].rename(f"{paths[0]}.part")
        finishing = threading.Timer(number * 5e-5, part.rename, [paths[0]])
        finishing.start()
        store = find_sibling(tmp_path / "c.h5", Shard(3, 3))
        finishing.join()
        assert store is not None
        with store:
            assert read_mark(store).shard == Shard(1, 3)


def test_a_shard_without_rows(demo_folder, tmp_path):
    shutil.copytree(demo_folder / "images", tmp_path / "images", copy_function=os.link)
    row = read_rows(demo_folder)[0]
    write_rows(tmp_path, [row])
    own = shard_of(row["image"], 2)
    results = {n: run(tmp_path, tmp_path / "c.h5", shard=f"{n}/2", precision="auto") for n in (3 - own, own)}
    assert (results[own].rows, results[3 - own].rows) == (1, 0)
    assert results[own].facts["precision"] == results[3 - own].facts["precision"]
    assert run(tmp_path, tmp_path / "c.h5", shard=f"{3 - own}/2", precision="auto").new_images == 0
    run(tmp_path, tmp_path / "whole.h5", precision=results[own].facts["precision"])
    check_equal(merged([results[n].cache for n in (1, 2)], tmp_path / "all.h5"), tmp_path / "whole.h5")


@pytest.mark.slow
def test_a_shard_whose_images_are_all_broken(demo_folder, tmp_path):
    shutil.copytree(demo_folder / "images", tmp_path / "images")
    rows = read_rows(demo_folder)[:6]
    write_rows(tmp_path, rows)
    images = {row["image"]: (tmp_path / row["image"]).read_bytes() for row in rows}
    assert {shard_of(name, 2) for name in images} == {1, 2}
    broken = [name for name in images if shard_of(name, 2) == 1]
    for is_empty in (True, False):  # cannot be hashed; can be, and is no image
        for name in broken:
            (tmp_path / name).write_bytes(b"" if is_empty else name.encode())
        result = run(tmp_path, tmp_path / "c.h5", shard="1/2")
        assert (result.usable_rows, sorted(name for name, _ in result.failed)) == (0, sorted(broken))
    assert run(tmp_path, tmp_path / "c.h5", shard="2/2").usable_rows == len(images) - len(broken)
    run(tmp_path, tmp_path / "whole.h5")
    check_equal(
        merged([tmp_path / "c.shard-1-of-2.h5", tmp_path / "c.shard-2-of-2.h5"], tmp_path / "all.h5"),
        tmp_path / "whole.h5",
    )
    for name in broken:
        (tmp_path / name).write_bytes(images[name])
    assert run(tmp_path, tmp_path / "c.h5", shard="1/2").new_images == len(broken)
    for name in images:
        (tmp_path / name).write_bytes(name.encode())
    with pytest.raises(UserError, match=f"none of the {len(broken)} images can be read"):
        run(tmp_path, tmp_path / "other.h5", shard="1/2")


@pytest.mark.slow
def test_a_killed_shard_goes_on(table, shards, tmp_path):
    command = [sys.executable, "-m", "deltaclip", "extract", str(table / "demo.csv"), "--out", str(tmp_path / "c.h5")]
    child = subprocess.Popen(
        [
            *command,
            "--shard",
            "1/3",
            "--target",
            *TARGET,
            "--batch-size",
            "1",
            "--precision",
            "fp32",
            "--views",
            "center",
        ]
    )
    part, done = tmp_path / "c.shard-1-of-3.h5.part", 0
    while done < 2 and child.poll() is None:
        time.sleep(0.002)
        if part.exists():
            with FeatureStore.open(part, unfinished=True) as store:
                done = int((store.status() == DONE).sum())
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert done >= 2
    result = run(table, tmp_path / "c.h5", shard="1/3", batch_size=1)
    assert result.new_images <= result.images - len(result.failed) - done
    check_equal(shards[0], result.cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.shard-1-of-3.h5"]


def test_names_of_shards_follow_the_cache(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = extract(ExtractConfig(data=str(table / "demo.csv"), shard="1/40", precision="fp32", views="center"))
    name = result.cache.name
    assert result.cache.parent.name == "cache"
    assert name.startswith("demo-")
    assert name.endswith("_tiny.shard-01-of-40.h5")
    assert Shard(1, 40).path(result.cache.with_name(name.replace(".shard-01-of-40", ""))) == result.cache


def test_shards_read_as_one(shards, whole):
    for name in ("c.h5", "c.shard-*-of-3.h5"):
        with open_cache(shards[0].with_name(name)) as one, FeatureStore.open(whole) as other:
            assert one.header["request"] == other.header["request"]
            for kind in ("images", "texts"):
                assert one.keys(kind).tolist() == other.keys(kind).tolist()
                everything = np.arange(len(other.keys(kind)))
                np.testing.assert_allclose(one.embeddings(kind), other.embeddings(kind), atol=2e-6)
                some = everything[1::3]
                np.testing.assert_array_equal(one.take(kind, some), one.embeddings(kind)[some])
                assert one.size_bytes(kind) == other.size_bytes(kind)
            there, wanted = one.rows(), other.rows()
            assert there.image.tolist() == wanted.image.tolist()
            assert there.prompt.tolist() == wanted.prompt.tolist()
            assert list(there.text["file"]) == list(wanted.text["file"])
            assert there.numbers["quality"].tolist() == wanted.numbers["quality"].tolist()
            assert one.failed() == other.failed()
            assert one.truncated().tolist() == other.truncated().tolist()
            assert one.view_layouts() == other.view_layouts()
            np.testing.assert_allclose(one.norms(), other.norms(), atol=2e-6)


def test_two_sets_of_shards_are_open_at_once(shards, tmp_path):
    copied(shards, tmp_path)
    with open_cache(shards[0].with_name("c.h5")) as one, open_cache(tmp_path / "c.h5") as other:
        np.testing.assert_array_equal(one.embeddings("images"), other.embeddings("images"))


def test_inspect_reads_shards_as_one(shards, whole, tmp_path):
    (report,) = inspect_cache(InspectConfig(caches=[shards[0].with_name("c.h5")], verify=True)).reports
    (wanted,) = inspect_cache(InspectConfig(caches=[whole])).reports
    for name in ("rows", "usable_rows", "images", "texts", "views", "labels", "names", "failed"):
        assert getattr(report, name) == getattr(wanted, name), name
    assert report.problems == []
    assert report.size_bytes == sum(path.stat().st_size for path in shards)
    merged([shards[0].with_name("c.shard-*-of-3.h5")], tmp_path / "all.h5")
    check_equal(tmp_path / "all.h5", whole)


def test_a_damaged_shard_is_found_and_refused(shards, tmp_path):
    paths = copied(shards, tmp_path)
    with h5py.File(paths[1], "r") as file:
        place = file["views/center/embedding"].id.get_offset()
    with open(paths[1], "r+b") as file:  # noqa: PTH123 - a path of text
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    (report,) = inspect_cache(InspectConfig(caches=[tmp_path / "c.h5"], verify=True)).reports
    assert [problem.partition(": ")[0] for problem in report.problems] == ["c.shard-2-of-3.h5"]
    with open_cache(tmp_path / "c.h5") as store, pytest.raises(UserError, match=r"c\.shard-2-of-3\.h5: is damaged"):
        store.embeddings("images")


def test_which_shards_a_name_stands_for(shards, tmp_path):
    copied(shards, tmp_path)
    (tmp_path / "c.shard-1-of-2.h5").write_bytes(b"")
    line = f"{tmp_path}/c.h5: there are shards of several sets (1/2 and 1/3); name one set: c.shard-*-of-N.h5"
    with pytest.raises(UserError) as caught:
        open_cache(tmp_path / "c.h5")
    assert str(caught.value) == line
    open_cache(tmp_path / "c.shard-*-of-3.h5").close()
    with pytest.raises(UserError) as caught:
        open_cache(tmp_path / "c.shard-*-of-4.h5")
    assert str(caught.value) == (
        f"{tmp_path}/c.shard-*-of-4.h5: no such shards; make them with `deltaclip extract --shard I/N`"
    )
    (tmp_path / "c.shard-2-of-3.h5").unlink()
    with pytest.raises(UserError, match=r"c\.shard-2-of-3\.h5: shard 2/3 is missing; make it by the same"):
        open_cache(tmp_path / "c.shard-*-of-3.h5")


def test_a_strict_extraction_names_the_line_of_the_table(table, tmp_path):
    rows = read_rows(table)
    line = 2 + next(n for n, row in enumerate(rows) if row["image"] == "images/no.png")
    shard = f"{shard_of('images/no.png', COUNT)}/{COUNT}"
    shutil.copytree(table, tmp_path / "t", copy_function=os.link)
    (tmp_path / "t" / "images" / "no.png").unlink()
    with pytest.raises(UserError) as caught:
        run(tmp_path / "t", tmp_path / "c.h5", shard=shard, on_error="fail")
    assert str(caught.value) == (
        f"{tmp_path}/t/demo.csv, line {line}: image 'images/no.png': no such file; "
        "repair or remove it, or give --on-error skip"
    )


def test_what_lies_in_shards_is_not_computed_again_in_one_file(table, shards, tmp_path):
    for path in shards:
        shutil.copy(path, tmp_path)
    with pytest.raises(UserError, match=f"in shards of {COUNT}") as refused:
        run(table, tmp_path / "c.h5")
    assert f"--shard I/{COUNT}" in str(refused.value.remedy)
    assert not (tmp_path / "c.h5.part").exists()
    assert run(table, tmp_path / "c.h5", shard=f"1/{COUNT}").new_images == 0
    assert run(table, tmp_path / "other.h5").new_images > 0  # another name
    (tmp_path / "alone").mkdir()
    shutil.copy(shards[0], tmp_path / "alone")
    assert run(table, tmp_path / "alone" / "c.h5").new_images > 0  # one shard of three is not read by that name
    merged(shards, tmp_path / "c.h5")
    assert run(table, tmp_path / "c.h5").new_images == 0  # the one file is there
