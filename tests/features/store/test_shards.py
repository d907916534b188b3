"""Merging caches: what each holds, once, bit for bit; never caches that do not belong together."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.base.vocabulary import AUTHENTICITY, CONSISTENCY, QUALITY, Target
from deltaclip.features.data.images import ImageContent
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import DONE, PENDING, ViewLayout, make_plan
from deltaclip.features.store.shards import merge
from deltaclip.features.store.verify import find_problems
from deltaclip.features.store.writer import open_writer, part_path
from deltaclip.tests.features.store.making import (
    ANEW,
    FACTS,
    REQUEST,
    VERSION_ONE,
    edited,
    fill,
    key,
    manifest,
    norms_of,
    plan_of,
    small,
    vector_of,
    write,
)

TILES = ViewLayout(width=5, recipe={"pixels": "tiles", "max_tiles": 9})
APART = "merge only caches of one backbone, precision and recipe of each view"


def rows_of(path):
    """Every row as (file, content or None, prompt, explanation, group, source, quality), in order."""
    with FeatureStore.open(path) as store:
        found, keys, texts = store.rows(usable=False), store.keys("images"), [*store.texts(), ""]
        return [
            (
                found.text["file"][row],
                int(keys[found.image[row]][0]) or None,
                texts[found.prompt[row]],
                texts[found.explanation[row]],
                found.text["group"][row],
                found.text["source"][row],
                str(found.numbers["quality"][row]),
            )
            for row in range(len(found))
        ]


def check_vectors(path, contents):
    with FeatureStore.open(path) as store:
        keys, status = store.keys("images"), store.status()
        done = {int(keys[entry][0]) for entry in np.flatnonzero(status == DONE)}
        assert done == contents
        assert len({content.tobytes() for content in keys if content.any()}) == sum(content.any() for content in keys)
        vectors = store.embeddings("images")
        for entry in np.flatnonzero(status == DONE):
            np.testing.assert_array_equal(vectors[entry], vector_of(keys[entry].tobytes()))
            assert store.norms()[entry] == norms_of(vector_of(keys[entry].tobytes())[None])[0]
        texts = store.embeddings("texts")
        for entry, content in enumerate(store.keys("texts")):
            np.testing.assert_array_equal(texts[entry], vector_of(content.tobytes()))
            assert store.truncated()[entry] == (content[0] % 2 == 1)
    assert find_problems(path) == []


CONTENT = st.none() | st.integers(1, 6)
ROW = st.tuples(CONTENT, st.sampled_from("abc"), st.sampled_from(["", "a", "why"]), st.sampled_from("gh"), st.just(0.5))
SHARD = st.lists(ROW, min_size=1, max_size=5)


@given(st.lists(SHARD, min_size=1, max_size=3), st.sets(st.integers(1, 6), max_size=2))
@settings(
    max_examples=25,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_the_shards_hold_is_there_once(tmp_path, shards, fail):
    for entry in tmp_path.iterdir():
        entry.unlink()
    paths = [tmp_path / f"{number}.h5" for number in range(len(shards))]
    for path, rows in zip(paths, shards, strict=True):
        write(path, plan_of(tmp_path, rows), fail=fail)
    merge(paths, tmp_path / "all.h5")
    seen, expected = set(), []
    for path in paths:
        of_shard = rows_of(path)
        expected += [row for row in of_shard if row not in seen]
        seen |= set(of_shard)
    assert rows_of(tmp_path / "all.h5") == expected
    check_vectors(tmp_path / "all.h5", {row[0] for rows in shards for row in rows} - {None} - fail)
    with FeatureStore.open(tmp_path / "all.h5") as store:
        reasons = dict(zip(store.keys("images")[:, 0].tolist(), store.reasons(), strict=True))
        assert {content: reason for content, reason in reasons.items() if reason and content} == {
            content: f"broken {content}" for content in fail & {row[0] for rows in shards for row in rows}
        }
    assert {entry.name for entry in tmp_path.iterdir()} == {"all.h5", *(path.name for path in paths)}


def test_shards_of_a_set_are_the_set(tmp_path):
    rows = [(number, f"p{number % 3}", "", "g", number / 10) for number in range(1, 8)]
    plan = plan_of(tmp_path, rows)
    write(tmp_path / "whole.h5", plan)
    merge([tmp_path / "whole.h5", tmp_path / "whole.h5"], tmp_path / "all.h5")
    assert (tmp_path / "all.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_merged_cache_is_one_that_extract_goes_on_with(tmp_path):
    first, second = [(1, "a", "", "g", 0.5)], [(1, "a", "", "g", 0.5), (2, "b", "", "g", 0.5)]
    write(tmp_path / "a.h5", plan_of(tmp_path, first))
    write(tmp_path / "b.h5", plan_of(tmp_path, second))
    merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "all.h5")
    assert write(tmp_path / "all.h5", plan_of(tmp_path, [*second, (3, "c", "", "g", 0.1)])) == [
        ("texts", plan_of(tmp_path, [(3, "c", "", "g", 0.1)]).text_keys[0].tobytes()),
        ("images", key(3)),
    ]


def test_views_are_those_of_all(tmp_path):
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    tiles = np.arange(5, dtype=np.float32)[None]
    for path, content, views in zip(paths, (1, 2), ({"tiles": TILES}, {}), strict=True):
        plan = plan_of(tmp_path, [(content, "a", "", "g", 0.5)])
        writer = open_writer(path, plan, request=REQUEST, facts=FACTS, views=views)
        fill(writer, plan)
        if views:
            writer.put_images({"tiles": ([0], tiles, np.ones(1))}, [])
        writer.finish(path)
    merge(paths, tmp_path / "all.h5")
    with FeatureStore.open(tmp_path / "all.h5") as store:
        assert store.view_layouts()["tiles"] == TILES
        assert store.status("tiles").tolist() == [DONE, PENDING]
        with pytest.raises(UserError, match="has no view tiles for 1 images"):
            store.embeddings("images", view="tiles")
        np.testing.assert_array_equal(store.group("images", "tiles")["embedding"][0], tiles[0])


def test_one_cache_may_read_what_another_could_not(tmp_path):
    rows = [(1, "a", "", "g", 0.5), (2, "a", "", "g", 0.5)]
    write(tmp_path / "a.h5", plan_of(tmp_path, rows), fail={1, 2})
    write(tmp_path / "b.h5", plan_of(tmp_path, rows), fail={2})
    merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "all.h5")
    with FeatureStore.open(tmp_path / "all.h5") as store:
        assert store.failed() == [("1.png", "broken 2")]
        assert len(store.rows()) == 1
    check_vectors(tmp_path / "all.h5", {1})


def test_labels_and_ranges(tmp_path):
    write(tmp_path / "a.h5", plan_of(tmp_path, [(1, "a", "", "g", 0.5)]))
    write(tmp_path / "b.h5", plan_of(tmp_path, [(1, "a", "", "g", 0.75)]))
    for name, dataset in (("a", "0 to 5 (given)"), ("b", "1 to 5 (given)")):
        with edited(tmp_path / f"{name}.h5") as file:
            file.attrs["dataset"] = json.dumps({"name": name, "label_ranges": {"quality": dataset}})
    merge([tmp_path / "a.h5", tmp_path / "b.h5", tmp_path / "a.h5"], tmp_path / "all.h5")
    with FeatureStore.open(tmp_path / "all.h5") as store:
        assert store.dataset == {
            "name": "a+b",
            "targets": [QUALITY.to_json(), CONSISTENCY.to_json()],
            "label_ranges": {"quality": "0 to 5 (given); 1 to 5 (given)"},
        }
        assert store.rows().numbers["quality"].tolist() == [0.5, 0.75]  # another label is another row


def targets_cache(path, content, targets):
    """A cache of one row that has a label of 0.25, 0.5, ... of each target."""
    given = manifest(path.parent, [(content, "a", "", "g", 0.5)])
    labels = {}
    for place, target in enumerate(targets, 1):
        labels |= {target.name: np.array([place / 4]), target.std: np.array([np.nan])}
    write(path, make_plan(replace(given, targets=targets, labels=labels), [ImageContent(key(content), "")]))


def test_caches_of_unlike_targets(tmp_path):
    composition = Target("composition", "pair")
    targets_cache(tmp_path / "a.h5", 1, (QUALITY, composition))
    targets_cache(tmp_path / "b.h5", 2, (AUTHENTICITY, composition))
    targets_cache(tmp_path / "c.h5", 1, (QUALITY,))
    merge([tmp_path / f"{name}.h5" for name in "abc"], tmp_path / "all.h5")
    with FeatureStore.open(tmp_path / "all.h5") as store:
        assert store.targets == (QUALITY, composition, AUTHENTICITY)
        numbers = store.rows().numbers
        names = ["quality", "composition", "authenticity"]
        assert list(numbers) == [*names, *(f"{name}_std" for name in names)]
        np.testing.assert_array_equal(numbers["quality"], [0.25, np.nan, 0.25])
        np.testing.assert_array_equal(numbers["composition"], [0.5, 0.5, np.nan])
        np.testing.assert_array_equal(numbers["authenticity"], [np.nan, 0.25, np.nan])
        assert store.num_rows == 3  # the third row lacks a label that the first has: it is another one
    targets_cache(tmp_path / "d.h5", 3, (Target("composition", "image"),))
    line = "composition sees the image, in a.h5 the pair; extract one of them again with another --target"
    assert refused([tmp_path / "a.h5", tmp_path / "d.h5"], tmp_path / "more.h5") == f"{tmp_path}/d.h5: {line}"


def test_the_folder_of_the_images_is_kept_where_it_is_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.h5", plan_of(tmp_path / name, [(1, "a", "", "g", 0.5)]))
        write(tmp_path / name / "b.h5", plan_of(tmp_path / name, [(2, "a", "", "g", 0.5)]))
    merge([tmp_path / "one" / "a.h5", tmp_path / "one" / "b.h5"], tmp_path / "same.h5")
    merge([tmp_path / "one" / "a.h5", tmp_path / "two" / "b.h5"], tmp_path / "apart.h5")
    with FeatureStore.open(tmp_path / "same.h5") as same, FeatureStore.open(tmp_path / "apart.h5") as apart:
        assert same.dataset["image_root"] == str(tmp_path / "one")
        assert "image_root" not in apart.dataset


def refused(paths, out):
    before = {path: path.read_bytes() for path in paths if path.exists()}
    listing = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        merge(paths, out)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(out.parent.iterdir()) == listing
    return str(caught.value)


def test_what_does_not_belong_together(tmp_path):
    _, plan = small(tmp_path)
    good, other, recipe = (tmp_path / f"{name}.h5" for name in ("good", "other", "recipe"))
    write(good, plan)
    write(other, plan, request=REQUEST | {"precision": "bf16"}, facts=FACTS | {"precision": "bf16"})
    assert refused([good, other], tmp_path / "all.h5") == (
        f"{other}: was made by another backbone: precision bf16 there, fp32 here; {APART}"
    )
    paths = [tmp_path / "tiles.h5", recipe]
    other_tiles = ViewLayout(width=5, recipe=TILES.recipe | {"max_tiles": 4})
    for path, layout in zip(paths, (TILES, other_tiles), strict=True):
        writer = open_writer(path, plan, request=REQUEST, facts=FACTS, views={"tiles": layout})
        fill(writer, plan)
        writer.finish(path)
    assert refused([good, *paths], tmp_path / "all.h5") == (
        f"{recipe}: has a view tiles of another recipe: max_tiles 4 there, 9 here; {APART}"
    )
    line = f"{tmp_path}/gone.h5: no such cache; make it with `deltaclip extract`"
    assert refused([good, tmp_path / "gone.h5"], tmp_path / "all.h5") == line
    assert refused([good], good) == f"{good}: already exists; give another --merge or remove it first"
    shutil.copy(good, part_path(tmp_path / "x.h5"))
    open_writer(tmp_path / "x.h5", plan, request=REQUEST, facts=FACTS).close()
    assert refused([good, part_path(tmp_path / "x.h5")], tmp_path / "all.h5") == (
        f"{tmp_path}/x.h5.part: is not complete; {ANEW}"
    )


def test_a_damaged_shard_leaves_no_file(tmp_path):
    _, plan = small(tmp_path)
    write(tmp_path / "a.h5", plan)
    write(tmp_path / "b.h5", plan_of(tmp_path, [(7, "a", "", "g", 0.5)]))
    with h5py.File(tmp_path / "b.h5", "r") as file:
        place = file["views/center/embedding"].id.get_offset()
    with (tmp_path / "b.h5").open("r+b") as file:
        file.seek(place)
        file.write(b"\xff")
    line = f"{tmp_path}/b.h5: is damaged (views/center/embedding: 1 of 1 rows, the first is row 0); {ANEW}"
    assert refused([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "all.h5") == line


def test_one_writer_and_no_room(tmp_path, monkeypatch):
    write(tmp_path / "a.h5", small(tmp_path)[1])
    with one_writer(tmp_path / "all.h5"), pytest.raises(UserError, match="another process is writing this file"):
        merge([tmp_path / "a.h5"], tmp_path / "all.h5")
    part_path(tmp_path / "all.h5").write_bytes(b"an interrupted run that is not ours")
    merge([tmp_path / "a.h5"], tmp_path / "all.h5")
    assert part_path(tmp_path / "all.h5").read_bytes() == b"an interrupted run that is not ours"

    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _folder: Full)
    assert "the cache needs" in refused([tmp_path / "a.h5"], tmp_path / "more.h5")


def test_a_kill_while_merging_leaves_nothing_under_the_name(tmp_path):
    write(tmp_path / "a.h5", small(tmp_path)[1])
    child = os.fork()
    if child == 0:
        import deltaclip.features.store.writer as module

        module.publish_new = lambda *_: os.kill(os.getpid(), 9)
        merge([tmp_path / "a.h5"], tmp_path / "all.h5")
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == 9
    assert not (tmp_path / "all.h5").exists()
    merge([tmp_path / "a.h5"], tmp_path / "all.h5")
    assert (tmp_path / "all.h5").read_bytes() == (tmp_path / "a.h5").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.h5", "all.h5"]


def test_a_cache_of_version_one_can_be_merged(tmp_path):
    write(tmp_path / "a.h5", small(tmp_path)[1])
    merge([VERSION_ONE, tmp_path / "a.h5"], tmp_path / "all.h5")
    assert (tmp_path / "all.h5").read_bytes() == (tmp_path / "a.h5").read_bytes()
