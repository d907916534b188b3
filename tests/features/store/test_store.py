"""The cache file: what goes in comes out, what was there is taken over, what is no cache is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deltaclip.base.errors import UserError
from deltaclip.features.data.sharding import Part, Shard
from deltaclip.features.data.views import RECIPES
from deltaclip.features.store.integrity import SEAL_BYTES
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import (
    DONE,
    FAILED,
    MISSING_KEY,
    PENDING,
    REASON_BYTES,
    SCHEMA_VERSION,
    StoredPairs,
    ViewLayout,
)
from deltaclip.features.store.writer import (
    COPY_ROWS,
    StoreWriter,
    check_data,
    check_recipes,
    check_request,
    differences,
    open_interrupted,
    open_writer,
    part_path,
)
from deltaclip.tests.features.store.making import (
    ANEW,
    FACTS,
    REQUEST,
    VERSION_ONE,
    check,
    edited,
    fill,
    key,
    norms_of,
    plan_of,
    small,
    vector_of,
    write,
)

CONTENT = st.none() | st.integers(1, 9)
PROMPT = st.sampled_from(["a cat", "a dog", "größer 猫", "x" * 300]) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=9
)
ROW = st.tuples(CONTENT, PROMPT, st.just("") | PROMPT, st.sampled_from(["g", "h"]), st.floats(0, 1) | st.just(np.nan))
FOLDER_IS_SHARED = [HealthCheck.function_scoped_fixture]
# Without shrinking: a file is synced many times per example, which would make minutes of a failure.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@given(st.lists(ROW, min_size=1, max_size=9), st.integers(1, 4), st.sets(st.integers(0, 9), max_size=4))
@settings(max_examples=15, deadline=None, phases=PHASES, suppress_health_check=FOLDER_IS_SHARED)
def test_what_goes_in_comes_out(tmp_path, rows, batch, fail):
    path = tmp_path / "c.h5"
    path.unlink(missing_ok=True)
    plan = plan_of(tmp_path, rows)
    log = write(path, plan, batch=batch, fail=fail)
    assert len(log) == len(set(log)) == len({row[0] for row in rows} - {None}) + len(plan.texts)
    check(path, rows, fail=fail)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.h5"]


@given(st.lists(ROW, min_size=1, max_size=9), st.lists(ROW, min_size=1, max_size=9), st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None, phases=PHASES, suppress_health_check=FOLDER_IS_SHARED)
def test_only_new_content_is_asked_for(tmp_path, rows, more, random):
    path = tmp_path / "c.h5"
    path.unlink(missing_ok=True)
    first = write(path, plan_of(tmp_path, rows))
    mixed = rows + more
    random.shuffle(mixed)
    mixed = mixed[: max(1, len(mixed) - 2)]
    plan = plan_of(tmp_path, mixed)
    second = write(path, plan)
    wanted = {("texts", k.tobytes()) for k in plan.text_keys} | {("images", k.tobytes()) for k in plan.image_keys}
    assert set(second) == wanted - set(first) - {("images", MISSING_KEY)}
    check(path, mixed)


@given(st.lists(ROW, min_size=1, max_size=9), st.lists(ROW, min_size=1, max_size=9), st.integers(0, 12))
@settings(max_examples=15, deadline=None, phases=PHASES, suppress_health_check=FOLDER_IS_SHARED)
def test_an_interrupted_run_is_taken_over_whatever_its_rows(tmp_path, rows, more, stop):
    path = tmp_path / "c.h5"
    for name in (path, part_path(path)):
        name.unlink(missing_ok=True)
    plan = plan_of(tmp_path, rows)
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS)
    done = []
    for kind, keys in (("texts", plan.text_keys), ("images", plan.image_keys)):
        for entry in writer.todo(kind)[: max(0, stop - len(done))]:
            content = keys[entry].tobytes()
            vectors = vector_of(content)[None]
            writer.put(kind, np.array([entry]), vectors, norms_of(vectors))
            if kind == "texts":
                writer.put_tokens(
                    np.array([entry]), np.array([content[0] % 2 == 1]), np.array([content[1] + 1], np.uint64)
                )
            done.append((kind, content))
    writer.close()
    assert not path.exists()
    for target in (rows, more):
        if path.exists():
            path.unlink()
        asked = write(path, plan_of(tmp_path, target))
        if target is rows:
            assert not set(asked) & set(done)
        check(path, target)


def test_plan_of_duplicates_and_missing_files(tmp_path):
    _, plan = small(tmp_path)
    assert plan.row_image.tolist() == [0, 1, 2, 0]
    assert plan.image_files == ["0.png", "1.png", "2.png"]
    assert plan.image_reasons == ["", "", "no such file"]
    assert plan.texts == ["a", "b", "c", "why"]
    assert plan.row_prompt.tolist() == [0, 1, 0, 2]
    assert plan.row_explanation.tolist() == [-1, 3, -1, -1]
    assert plan.names == {"group": ["g", "h"], "source": ["s0", "s1"], "split": []}
    assert plan.codes["source"].tolist() == [-1, 1, 0, -1]


def test_digest_sees_every_field(tmp_path):
    _, plan = small(tmp_path)
    changed = {
        "image_keys": plan.image_keys ^ 1,
        "image_files": ["0.png", "1.pn", "g2.png"],
        "image_reasons": ["", "", "empty file"],
        "image_frames": plan.image_frames ^ 1,
        "text_keys": plan.text_keys ^ 1,
        "texts": ["a", "b", "cw", "hy"],
        "row_files": plan.row_files[::-1],
        "row_image": plan.row_image + 1,
        "row_prompt": plan.row_prompt + 1,
        "row_explanation": plan.row_explanation + 1,
        "numbers": plan.numbers | {"quality": plan.numbers["quality"] + 1},
        "codes": plan.codes | {"group": plan.codes["group"] + 1},
        "names": plan.names | {"group": ["gh", ""]},
        "dataset": plan.dataset | {"name": "other"},
        "preferences": StoredPairs(
            a_P=np.array([0]), b_P=np.array([1]), preferred_P=np.float32([1]), target_P=np.int32([0])
        ),
        "part": Part(shard=Shard(number=1, count=2), table="0" * 64, num_rows=8, position=np.arange(4)),
    }
    assert set(changed) == {field.name for field in dataclasses.fields(plan)}
    digests = {dataclasses.replace(plan, **{name: value}).digest() for name, value in changed.items()}
    assert len(digests | {plan.digest()}) == len(changed) + 1
    assert small(tmp_path)[1].digest() == plan.digest()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("bf16", np.float16), ("fp16", np.float16)])
def test_stored_type(tmp_path, precision, dtype):
    rows, plan = small(tmp_path)
    write(tmp_path / "c.h5", plan, facts=FACTS | {"precision": precision})
    with FeatureStore.open(tmp_path / "c.h5") as store:
        assert store.embeddings("images").dtype == store.embeddings("texts").dtype == dtype
        assert store.norms().dtype == np.float32
        found = store.embeddings("images")[0]
        np.testing.assert_allclose(found, vector_of(key(rows[0][0])), rtol=1e-3)  # fp16 has 11 bits
        assert not store.embeddings("images")[2].any()


def test_a_long_reason_is_cut_between_characters_or_shown_as_cut(tmp_path):
    _, plan = small(tmp_path)
    writer = open_writer(tmp_path / "c.h5", plan, request=REQUEST, facts=FACTS)
    writer.put_images({}, [(0, "ü" * 200), (1, "short")])
    texts = writer.todo("texts")
    writer.put("texts", texts, np.ones((4, 3)), np.ones(4))
    writer.finish(tmp_path / "c.h5")
    with FeatureStore.open(tmp_path / "c.h5") as store:
        assert store.reasons() == ["ü" * (REASON_BYTES // 2), "short", "no such file"]
        assert len(store.rows()) == 0


def test_status_counts_from_one_write_per_batch(tmp_path):
    rows = [(number, "a", "", "g", 0.5) for number in range(1, 7)]
    plan = plan_of(tmp_path, rows)
    writer = open_writer(tmp_path / "c.h5", plan, request=REQUEST, facts=FACTS)
    writer.put_images({"center": ([1, 4], np.ones((2, 3)), np.ones(2))}, [(2, "broken")])
    writer.close()
    with FeatureStore.open(part_path(tmp_path / "c.h5"), unfinished=True) as store:
        assert store.group("images")["status"][:].tolist() == [PENDING, DONE, FAILED, PENDING, DONE, PENDING]
        assert store.embeddings("images")[:, 0].tolist() == [0, 1, 0, 0, 1, 0]


def test_finish_before_the_end_is_a_bug_of_ours(tmp_path):
    writer = open_writer(tmp_path / "c.h5", small(tmp_path)[1], request=REQUEST, facts=FACTS)
    with pytest.raises(AssertionError, match="before every image was stored"):
        writer.finish(tmp_path / "c.h5")
    writer.close()
    writer.close()  # twice is once
    assert not (tmp_path / "c.h5").exists()


def refused(path, **options):
    with pytest.raises(UserError) as caught:
        FeatureStore.open(path, **options)
    return str(caught.value)


def test_what_is_no_cache(tmp_path):
    path = tmp_path / "c.h5"
    assert refused(path) == f"{path}: no such cache; make it with `deltaclip extract`"
    path.write_text("image,prompt\n")
    assert refused(path) == f"{path}: is a text, no cache; make a cache of it: deltaclip extract {path}"
    path.write_bytes(bytes(9))
    line = "is no readable HDF5 file (Unable to synchronously open file (file signature not found))"
    assert refused(path) == f"{path}: {line}; {ANEW}"
    with h5py.File(path, "w") as file:
        file["x"] = 1
    assert refused(path) == f"{path}: is no deltaclip cache; {ANEW}"


def test_other_versions_and_unfinished_files(tmp_path):
    path = tmp_path / "c.h5"
    _, plan = small(tmp_path)
    open_writer(path, plan, request=REQUEST, facts=FACTS).close()
    part = part_path(path)
    assert refused(part) == f"{part}: is not complete; {ANEW}"
    FeatureStore.open(part, unfinished=True).close()
    write(path, plan)
    for version in (0, 4, 99):
        with edited(path) as file:
            file.attrs["schema_version"] = version
        assert refused(path) == f"{path}: has schema version {version}, this release reads 1, 2 and 3; {ANEW}"
    with edited(path) as file:
        del file.attrs["schema_version"]
    assert refused(path) == f"{path}: has schema version 0, this release reads 1, 2 and 3; {ANEW}"


def test_truncated_files_are_refused_at_every_length(tmp_path):
    path, cut = tmp_path / "c.h5", tmp_path / "cut.h5"
    write(path, small(tmp_path)[1])
    size = path.stat().st_size
    for length in (0, 1, 8, 26, 27, 95, 512, SEAL_BYTES - 1, SEAL_BYTES, SEAL_BYTES + 8, size // 2, size - 1):
        shutil.copy(path, cut)
        os.truncate(cut, length)
        for unfinished in (False, True):
            line = refused(cut, unfinished=unfinished)
            what = dict.fromkeys((0, 1, 8, 26), "is no readable HDF5 file (") | dict.fromkeys(
                (27, 95), "is damaged (seal)"
            )
            assert line.startswith(f"{cut}: {what.get(length, f'is cut off ({length:,} of {size:,} bytes)')}")
            assert line.endswith(f"; {ANEW}")
            assert "\n" not in line


def test_a_damaged_interrupted_run_is_refused_by_name(tmp_path):
    path = tmp_path / "c.h5"
    _, plan = small(tmp_path)
    assert open_interrupted(path) is None
    open_writer(path, plan, request=REQUEST, facts=FACTS).close()
    os.truncate(part_path(path), 300)
    with pytest.raises(UserError) as caught:
        open_writer(path, plan, request=REQUEST, facts=FACTS)
    assert str(caught.value).startswith(f"{path}.part: is no readable HDF5 file (")
    assert str(caught.value).endswith(f"; {ANEW}")
    part_path(path).unlink()
    write(path, plan)


def test_a_draft_that_a_kill_left_is_no_obstacle(tmp_path):
    path = tmp_path / "c.h5"
    rows, plan = small(tmp_path)
    (tmp_path / "c.h5.part.new").write_bytes(b"half a layout")
    write(path, plan)
    check(path, rows)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.h5"]


def test_differences_are_all_named(tmp_path):
    here = REQUEST | {"precision": "bf16", "weights_sha256": "b" * 64, "tag": "openai"}
    assert differences(REQUEST, REQUEST) == []
    path = tmp_path / "c.h5"
    write(path, small(tmp_path)[1])
    with FeatureStore.open(path) as store:
        check_request(store, dict(REQUEST))
        with pytest.raises(UserError) as caught:
            check_request(store, here)
    assert str(caught.value) == (
        f"{path}: was made by another backbone: weights_sha256 aaaaaaaaaaaa there, bbbbbbbbbbbb here; "
        "precision fp32 there, bf16 here; tag None there, openai here; give another --out, or the backbone that made it"
    )


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _folder: Full)
    with pytest.raises(UserError) as caught:
        open_writer(tmp_path / "c.h5", small(tmp_path)[1], request=REQUEST, facts=FACTS)
    assert str(caught.value) == (
        f"{tmp_path}: the cache needs 0.00 GB and 0.00 GB are free; free some space or give another --out"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [COPY_ROWS - 1, COPY_ROWS, COPY_ROWS + 1])
def test_taking_over_more_than_one_block(tmp_path, count):
    keys = np.random.default_rng(0).integers(0, 256, (count, 32), dtype=np.uint8)
    plan = dataclasses.replace(
        plan_of(tmp_path, [(1, "a", "", "g", 0.5)]),
        image_keys=keys,
        image_files=["x.png"] * count,
        image_reasons=[""] * count,
        image_frames=np.zeros(count, np.uint8),
    )
    path = tmp_path / "c.h5"
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS)
    writer.put("texts", np.array([0]), np.ones((1, 3)), np.ones(1))
    vectors = np.arange(3 * count, dtype=np.float32).reshape(count, 3)
    writer.put_images({"center": (range(count), vectors, vectors[:, 0])}, [])
    writer.finish(path)
    order = np.random.default_rng(1).permutation(count)
    shuffled = dataclasses.replace(plan, image_keys=keys[order])
    writer = open_writer(path, shuffled, request=REQUEST, facts=FACTS)
    assert isinstance(writer, StoreWriter)
    assert not writer.todo("images").size
    writer.finish(path)
    with FeatureStore.open(path) as store:
        np.testing.assert_array_equal(store.embeddings("images"), vectors[order])


def put_json(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def put_value(name, value):
    return lambda file: file[name].__setitem__(0, value)


def shorten(name):
    def change(file):
        values = file[name][:-1]
        del file[name]
        file[name] = values

    return change


DAMAGE = [
    (put_json("header", "{"), "header"),
    (put_json("header", '{"plan": "x"}'), "header"),
    (put_json("facts", "[1]"), "facts"),
    (put_json("dataset", "{}"), "dataset"),
    (lambda file: file.attrs.__delitem__("facts"), "facts"),
    (put_value("rows/image", 3), "rows/image is out of range"),
    (put_value("rows/image", -1), "rows/image is out of range"),
    (put_value("rows/prompt", 4), "rows/prompt is out of range"),
    (put_value("rows/explanation", -2), "rows/explanation is out of range"),
    (put_value("rows/group", 2), "rows/group is out of range"),
    (shorten("rows/quality"), "rows: no rows/quality of the right length"),
    (shorten("images/reason"), "images: no images/reason of the right length"),
    (shorten("texts/norm"), "texts: no texts/norm of the right length"),
    (lambda file: file.__delitem__("views/center/norm"), "images: no views/center/norm of the right length"),
    (lambda file: file["views/center"].attrs.__setitem__("recipe", "[]"), "recipe of the view center"),
    (lambda file: file["views/center"].attrs.__delitem__("recipe"), "recipe of the view center"),
    (lambda file: file.create_group("views/tiles"), "images: no views/tiles/embedding of the right length"),
    (lambda file: file.__delitem__("views"), "images: no views/center/embedding of the right length"),
    (lambda file: file.__delitem__("rows"), "rows: no rows/image of the right length"),
    (lambda file: file.__delitem__("names/split"), "no names/split"),
]


@pytest.mark.parametrize(("change", "what"), DAMAGE)
def test_a_damaged_cache_is_refused_by_name(tmp_path, change, what):
    path = tmp_path / "c.h5"
    write(path, small(tmp_path)[1])
    with edited(path) as file:
        change(file)
    assert refused(path) == f"{path}: is damaged ({what}); {ANEW}"


def test_no_precision_mixes_into_another(tmp_path):
    path, other = tmp_path / "c.h5", REQUEST | {"precision": "bf16"}
    _, plan = small(tmp_path)
    write(path, plan)
    write(tmp_path / "bf16.h5", plan, request=other, facts=FACTS | {"precision": "bf16"})
    for there, request in ((path, other), (part_path(path), REQUEST)):
        shutil.copy(tmp_path / "bf16.h5", part_path(path))
        with pytest.raises(UserError) as caught:
            open_writer(path, plan, request=request, facts=FACTS)
        assert str(caught.value).startswith(f"{there}: was made by another backbone: precision ")
    assert not (tmp_path / "c.h5.part.new").exists()


def test_a_cache_of_other_images_is_another_data_set(tmp_path):
    path = tmp_path / "c.h5"
    write(path, small(tmp_path)[1])
    with FeatureStore.open(path) as store:
        check_data(store, plan_of(tmp_path, [(2, "x", "", "g", 0.1), (7, "x", "", "g", 0.1)]))
        with pytest.raises(UserError) as caught:  # both lack a file: that is nothing in common
            check_data(store, plan_of(tmp_path, [(None, "a", "", "g", 0.1), (7, "a", "", "g", 0.1)]))
    assert str(caught.value) == f"{path}: holds another data set (set, 4 rows); give another --out or remove it"


TILES = ViewLayout(width=5, recipe={"pixels": "tiles", "max_tiles": 9})
EDGES = ViewLayout(width=2, recipe={"pixels": "edges"})


def view_vector(content, width):
    return np.random.default_rng([7, *list(content)]).standard_normal(width).astype(np.float32)


def write_views(path, plan, views, *, fill_views=None):
    """Write a cache with views; return what was asked for of each."""
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS, views=views)
    asked = {name: writer.todo("images", name).tolist() for name in writer.view_names()}
    fill(writer, plan)
    for name in views if fill_views is None else fill_views:
        todo = writer.todo("images", name)
        if todo.size:
            vectors = np.array([view_vector(plan.image_keys[entry].tobytes(), views[name].width) for entry in todo])
            writer.put_images({name: (todo.tolist(), vectors, norms_of(vectors))}, [])
    writer.finish(path)
    return asked


def raw(path):
    """Bytes and recipe of every view by image and name."""
    with h5py.File(path, "r") as file:
        keys = [key.tobytes() for key in file["images/sha256"][:]]
        return {
            name: (
                json.loads(view.attrs["recipe"]),
                {
                    key: (view["embedding"][entry].tobytes(), view["norm"][entry].tobytes(), int(view["status"][entry]))
                    for entry, key in enumerate(keys)
                },
            )
            for name, view in file["views"].items()
        }


def test_views_of_their_own_width_come_and_stay(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    assert write_views(path, plan, {})["center"] == [0, 1]
    first = raw(path)
    assert list(first) == ["center"]
    assert write_views(path, plan, {"tiles": TILES}) == {"center": [], "tiles": [0, 1]}
    second = raw(path)
    assert second["center"] == first["center"]
    assert second["tiles"][0] == TILES.recipe
    with FeatureStore.open(path) as store:
        assert store.view_names() == ["center", "tiles"]
        assert store.view_layouts()["tiles"] == TILES
        expected = [view_vector(key.tobytes(), 5) for key in plan.image_keys[:2]]
        np.testing.assert_array_equal(store.embeddings("images", view="tiles"), [*expected, np.zeros(5)])
        np.testing.assert_array_equal(store.norms(view="tiles")[:2], norms_of(np.array(expected)))
        assert store.status("tiles").tolist() == [DONE, DONE, FAILED]
        assert store.holds_views(["center", "tiles"])
        assert store.dim == 3
    # A third view; the second is not named and stays as it is, in new rows it is left to do.
    more = plan_of(tmp_path, [(5, "a", "", "g", 0.5), (2, "b", "", "g", 0.1), (1, "a", "", "g", 0.5)])
    assert write_views(path, more, {"edges": EDGES}) == {"center": [0], "edges": [0, 1, 2], "tiles": [0]}
    third = raw(path)
    for name in ("center", "tiles"):
        for content in plan.image_keys[:2]:
            assert third[name][1][content.tobytes()] == second[name][1][content.tobytes()]
    with FeatureStore.open(path) as store:
        assert store.view_names() == ["center", "edges", "tiles"]
        assert store.status("tiles").tolist() == [PENDING, DONE, DONE]
        assert store.holds_views(["center", "edges"])
        assert not store.holds_views(["tiles"])
        assert not store.holds_views(["flip"])
        assert len(store.rows()) == 3
        line = f"{path}: has no view tiles for 1 images; give --views tiles to `deltaclip extract`"
        for read in (lambda: store.embeddings("images", view="tiles"), lambda: store.norms(view="tiles")):
            with pytest.raises(UserError) as caught:
                read()
            assert str(caught.value) == line
    assert write_views(path, more, {"tiles": TILES}) == {"center": [], "edges": [], "tiles": [0]}
    with FeatureStore.open(path) as store:
        store.check_view("tiles")


def test_a_view_that_is_not_there_is_refused_by_name(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    write_views(path, plan, {"tilez": TILES})
    remedies = {
        "flip": "has no view flip for 2 images; give --views flip to `deltaclip extract`",
        "tile": "has no view 'tile'; did you mean 'tilez'?",
        "x": "has no view 'x'; known: center, tilez",
    }
    with FeatureStore.open(path) as store:
        for name, line in remedies.items():
            with pytest.raises(UserError) as caught:
                store.embeddings("images", view=name)
            assert str(caught.value) == f"{path}: {line}"


def test_a_recipe_may_ask_for_32_bits(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    large = ViewLayout(width=2, recipe={"pixels": "large", "dtype": "float32"})
    vectors = np.array([[70_000, 1e-9], [1, 2]], dtype=np.float32)  # neither of the first two has a place in 16 bits
    for views in ({"large": large}, {"large": large, "edges": EDGES}):  # the second moves what the first wrote
        writer = open_writer(path, plan, request=REQUEST, facts=FACTS | {"precision": "fp16"}, views=views)
        fill(writer, plan)
        for name in views:
            if (todo := writer.todo("images", name)).size:
                given = vectors if name == "large" else np.ones_like(vectors)
                writer.put_images({name: (todo.tolist(), given, norms_of(given))}, [])
        writer.finish(path)
        with FeatureStore.open(path) as store:
            assert store.view_layouts()["large"] == large
            found = store.embeddings("images", view="large")
            np.testing.assert_array_equal(found[:2], vectors)
            assert found.dtype == np.float32
            assert store.embeddings("images").dtype == store.embeddings("texts").dtype == np.float16


def test_what_follows_from_the_backbone_may_be_left_out_of_a_recipe(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    recipe = {"pixels": "blocks", "tower": {"blocks": ["a", "b"]}}
    write_views(path, plan, {"blocks": ViewLayout(width=2, recipe=recipe)})
    with FeatureStore.open(path) as store:
        check_recipes(store, {"blocks": {"pixels": "blocks"}})
        for other, line in (
            ({"pixels": "stones"}, "pixels blocks there, stones here"),
            ({"pixels": "blocks", "tower": 1}, "tower {'blocks': ['a', 'b']} there, 1 here"),
        ):
            with pytest.raises(UserError) as caught:
                check_recipes(store, {"blocks": other})
            assert str(caught.value) == f"{path}: has a view blocks of another recipe: {line}; give another --out"


def test_another_recipe_is_another_cache(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    write_views(path, plan, {"tiles": TILES})
    before = path.read_bytes()
    other = ViewLayout(width=5, recipe={"pixels": "tiles", "max_tiles": 4, "overlap": 0.5})
    line = "has a view tiles of another recipe: max_tiles 9 there, 4 here; overlap None there, 0.5 here"
    with pytest.raises(UserError) as caught:
        open_writer(path, plan, request=REQUEST, facts=FACTS, views={"tiles": other})
    assert str(caught.value) == f"{path}: {line}; give another --out"
    assert path.read_bytes() == before
    # The interrupted run beside it, too; and the two must agree with each other.
    path.rename(part_path(path))
    with pytest.raises(UserError) as caught:
        open_writer(path, plan, request=REQUEST, facts=FACTS, views={"tiles": other})
    assert str(caught.value) == f"{path}.part: {line}; give another --out"
    write_views(tmp_path / "other.h5", plan, {"tiles": other})
    (tmp_path / "other.h5").rename(path)
    with pytest.raises(UserError) as caught:
        open_writer(path, plan, request=REQUEST, facts=FACTS)
    assert str(caught.value).startswith(f"{path}.part: has a view tiles of another recipe: max_tiles 9 there, 4 here")


def test_an_interrupted_run_goes_on_with_more_views(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS, views={"edges": EDGES})
    vectors = {name: np.full((1, width), 3, np.float32) for name, width in (("center", 3), ("edges", 2))}
    writer.put_images({name: ([0], vectors[name], np.ones(1)) for name in vectors}, [(1, "broken")])
    writer.close()
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS, views={"tiles": TILES})
    assert writer.view_names() == ["center", "edges", "tiles"]
    assert {name: writer.todo("images", name).tolist() for name in writer.view_names()} == {
        "center": [1],  # what failed is tried again under another layout
        "edges": [1],
        "tiles": [0, 1],
    }
    writer.close()
    again = open_writer(path, plan, request=REQUEST, facts=FACTS)  # fewer are asked for: the layout stays
    assert again.view_names() == ["center", "edges", "tiles"]
    again.close()


def test_a_failed_image_keeps_the_views_that_it_has(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    write_views(path, plan, {})
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS, views={"tiles": TILES})
    writer.put_images({}, [(1, "broken")])
    writer.close()
    with FeatureStore.open(part_path(path), unfinished=True) as store:
        assert store.status().tolist() == [DONE, DONE, FAILED]
        assert store.status("tiles").tolist() == [PENDING, FAILED, FAILED]
        assert store.reasons() == ["", "broken", "no such file"]


def test_a_cache_of_version_one_is_one_with_center_alone(tmp_path):
    path, (rows, plan) = tmp_path / "c.h5", small(tmp_path)
    shutil.copy(VERSION_ONE, path)
    with h5py.File(path, "r") as file:
        before = {name: file[f"views/center/{name}"][:] for name in ("embedding", "norm", "status")}
    check(path, rows)
    with FeatureStore.open(path) as store:
        assert (store.schema_version, store.view_names()) == (1, ["center"])
        assert store.view_layouts() == {"center": ViewLayout(width=3, recipe=RECIPES["center"])}
    assert write_views(path, plan, {"tiles": TILES}) == {"center": [], "tiles": [0, 1]}
    check(path, rows)
    with FeatureStore.open(path) as store:
        assert store.schema_version == SCHEMA_VERSION
        assert store.header["plan"] == plan.digest()
    with h5py.File(path, "r") as file:
        for name, values in before.items():
            np.testing.assert_array_equal(file[f"views/center/{name}"][:], values)


def test_an_interrupted_run_of_version_one_is_laid_out_anew(tmp_path):
    path, (rows, plan) = tmp_path / "c.h5", small(tmp_path)
    shutil.copy(VERSION_ONE, part_path(path))
    with h5py.File(part_path(path), "r+") as file:
        file.attrs["complete"] = np.uint8(0)
        file["views/center/status"][1] = PENDING
    assert write(path, plan) == [("images", plan.image_keys[1].tobytes())]
    check(path, rows)
    with FeatureStore.open(path) as store:
        assert store.schema_version == SCHEMA_VERSION
