"""Embeddings from elsewhere: in and out of a cache unchanged, checked first, and never mixed with our own."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import Target
from deltaclip.features import import_embeddings as stage
from deltaclip.features.extract import extract
from deltaclip.features.import_embeddings import import_embeddings
from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.settings import ExtractConfig, ImportConfig, InspectConfig
from deltaclip.features.store.integrity import row_checksums
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train
from deltaclip.tests.features.store.making import edited

MADE_BY = {"backbone": "ViT-Test", "pretrained": "them", "precision": "fp16"}
AGAIN = "write it again"


def unit(count, width=8, seed=0, dtype=np.float16):
    vectors = np.random.default_rng(seed).standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(dtype)


def clip_retrieval(folder, images, texts, columns, *, part_rows=1000):
    """A folder as clip-retrieval writes it: parts of float16 rows, numbers padded with zeros to one length."""
    starts = range(0, max(1, len(images)), part_rows)
    digits = len(str(len(starts)))
    for kind in ("img_emb", "text_emb", "metadata"):
        (folder / kind).mkdir(parents=True)
    for number, start in enumerate(starts):
        name, rows = str(number).zfill(digits), slice(start, start + part_rows)
        np.save(folder / "img_emb" / f"img_emb_{name}.npy", images[rows])
        np.save(folder / "text_emb" / f"text_emb_{name}.npy", texts[rows])
        table = pa.table({key: column[rows] for key, column in columns.items()})
        pq.write_table(table, folder / "metadata" / f"metadata_{name}.parquet")
    return folder


def columns_of(count):
    return {
        "image_path": [f"/elsewhere/{row}.jpg" for row in range(count)],
        "caption": [f"p{row}" for row in range(count)],
    }


def bring(source, out, **options):
    return import_embeddings(ImportConfig(source=source, out=out, **MADE_BY | options))


def refused(source, tmp_path, **options):
    with pytest.raises(UserError) as caught:
        bring(source, tmp_path / "refused.h5", **options)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("refused.h5")]
    return str(caught.value)


def export(cache, out, **options):
    return inspect_cache(InspectConfig(caches=[cache], export=out, **options))


def content_of(path):
    """Every row of a cache: names, labels where a column has any, and the bytes of both vectors."""
    with FeatureStore.open(path) as store:
        rows = store.rows()
        images, texts = store.embeddings("images"), store.embeddings("texts")
        text = [rows.text[name].tolist() for name in rows.text]
        said = {name: values for name, values in rows.numbers.items() if np.isfinite(values).any()}
        numbers = {name: np.nan_to_num(values, nan=-1).tolist() for name, values in said.items()}
        return [*text, numbers, images[rows.image].tobytes(), texts[rows.prompt].tobytes()]


# Around one part (4 rows) and around two; 0 is refused below.
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9, 41])
def test_parts_of_clip_retrieval_in_numeric_order(tmp_path, count):
    images, texts = unit(count), unit(count, seed=1)
    columns = columns_of(count) | {"quality": [row / 100 for row in range(count)], "metadata": ["{}"] * count}
    source = clip_retrieval(tmp_path / "e", images, texts, columns, part_rows=4)
    result = bring(source, tmp_path / "c.h5")
    assert (result.rows, result.images, result.texts, result.dim) == (count, count, count, 8)
    assert result.were_unit == {"images": True, "texts": True}
    with FeatureStore.open(tmp_path / "c.h5") as store:
        rows = store.rows()
        assert list(rows.text["file"]) == columns["image_path"]
        assert list(rows.text["prompt"]) == columns["caption"]
        np.testing.assert_array_equal(rows.numbers["quality"], np.float32(columns["quality"]))
        np.testing.assert_array_equal(store.embeddings("images")[rows.image], images)
        np.testing.assert_array_equal(store.embeddings("texts")[rows.prompt], texts)
        assert store.header["request"] == {
            "imported": True,
            "model": "ViT-Test",
            "pretrained": "them",
            "precision": "fp16",
        }
        assert store.facts["imported"]["layout"] == "clip-retrieval"
    assert inspect_cache(InspectConfig(caches=[tmp_path / "c.h5"], verify=True)).exit_code == 0


def test_numbers_without_zeros_before_them(tmp_path):
    images = unit(12)
    source = clip_retrieval(tmp_path / "e", images, images, columns_of(12), part_rows=1)
    for path in [path for kind in ("img_emb", "text_emb", "metadata") for path in (source / kind).iterdir()]:
        stem, _, number = path.stem.rpartition("_")
        path.rename(path.with_name(f"{stem}_{int(number)}{path.suffix}"))
    bring(source, tmp_path / "c.h5")
    with FeatureStore.open(tmp_path / "c.h5") as store:
        np.testing.assert_array_equal(store.embeddings("images")[store.rows().image], images)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    layout=st.sampled_from(["clip-retrieval", "npy", "safetensors"]),
    block=st.integers(1, 5),
)
def test_out_and_in_again_changes_nothing(tmp_path_factory, sizes, layout, block):
    count, distinct = sizes
    tmp_path = tmp_path_factory.mktemp("round")
    entry, prompt = np.arange(count) % distinct, (np.arange(count) * 7) % max(1, distinct // 2)
    columns = {
        "image_path": [f"a b/{number}.png" for number in entry],
        "caption": [f'prompt "{number}",\nét' for number in prompt],
        "mos_quality": [0.1 * (row % 9) if row % 3 else None for row in range(count)],
        "generator": [f"g{row % 2}" for row in range(count)],
        "split": ["train" if row % 2 else None for row in range(count)],
    }
    source = clip_retrieval(tmp_path / "e", unit(distinct)[entry], unit(distinct, seed=1)[prompt], columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "BLOCK_ROWS", block)
        result = bring(source, tmp_path / "c.h5", label_range="0,1")
        assert result.images == len(set(entry.tolist()))
        assert result.texts == len(set(prompt.tolist()))
        export(tmp_path / "c.h5", tmp_path / "out", export_format=layout)
        bring(tmp_path / "out", tmp_path / "again.h5", label_range="0,1")
    assert content_of(tmp_path / "again.h5") == content_of(tmp_path / "c.h5")


@pytest.mark.parametrize("layout", ["clip-retrieval", "npy"])
def test_targets_that_were_asked_for_come_out_and_in_again(tmp_path, layout):
    columns = columns_of(4) | {"comp_score": [1.0, 2.0, 4.0, 5.0], "realism": [1.0, 3.0, 5.0, None]}
    source = clip_retrieval(tmp_path / "e", unit(4), unit(4, seed=1), columns, part_rows=3)
    asked = ["composition=comp_score:pair", "realism:image"]
    result = bring(source, tmp_path / "c.h5", target=asked, label_range=["realism=1,9"])
    assert result.label_ranges == {"composition": "1 to 5 (detected)", "realism": "1 to 9 (given)"}
    export(tmp_path / "c.h5", tmp_path / "out", export_format=layout)
    bring(tmp_path / "out", tmp_path / "again.h5", label_range="0,1")
    for name in ("c", "again"):
        with FeatureStore.open(tmp_path / f"{name}.h5") as store:
            assert store.targets == (Target("composition", "pair"), Target("realism", "image"))
            np.testing.assert_array_equal(store.rows().numbers["composition"], [0, 0.25, 0.75, 1])
            np.testing.assert_array_equal(store.rows().numbers["realism"], [0, 0.25, 0.5, np.nan])
    assert content_of(tmp_path / "again.h5") == content_of(tmp_path / "c.h5")
    line = "has no column 'comp_scor' for composition; did you mean 'comp_score'?"
    place = source / "metadata" / "metadata_0.parquet"
    assert refused(source, tmp_path, target=["composition=comp_scor:pair"]) == f"{place}: {line}"
    about = tmp_path / "out" / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"dataset": {"targets": [{"name": "x", "see": 1}]}}))
    line = f"{about}: does not say which targets it has; export it again"
    assert refused(tmp_path / "out", tmp_path) == line


def test_lengths_are_kept_and_taken_away(tmp_path):
    images = unit(5, dtype=np.float32) * np.float32([[3], [1], [0.5], [10], [2]])
    np.save(tmp_path / "v.npy", images)
    np.save(tmp_path / "t.npy", unit(5, seed=1, dtype=np.float64))
    (tmp_path / "rows.csv").write_text("image,prompt\n" + "".join(f"{row}.png,p{row % 5}\n" for row in range(5)))
    options = {"texts": tmp_path / "t.npy", "manifest": tmp_path / "rows.csv", "precision": "fp32"}
    result = bring(tmp_path / "v.npy", tmp_path / "c.h5", **options)
    assert result.were_unit == {"images": False, "texts": True}
    assert "images: were not normalised; they are now, their lengths are kept" in result.summary().splitlines()
    with FeatureStore.open(tmp_path / "c.h5") as store:
        entries = store.rows().image
        lengths = np.linalg.norm(images.astype(np.float64), axis=1)
        np.testing.assert_allclose(store.norms()[entries], lengths, rtol=1e-6)
        np.testing.assert_allclose(store.embeddings("images")[entries], images / lengths[:, None], atol=1e-7)


def test_copies_are_one_image_by_embedding_or_by_file(tmp_path):
    images = unit(3)[[0, 0, 1, 2]]
    for number, colour in enumerate(("red", "blue", "red", "lime")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{number}.png")
    columns = {"image_path": [f"{number}.png" for number in range(4)], "caption": ["p"] * 4}
    source = clip_retrieval(tmp_path / "e", images, unit(1)[[0] * 4], columns)
    assert bring(source, tmp_path / "c.h5").images == 3
    with FeatureStore.open(tmp_path / "c.h5") as store:
        keys = [hashlib.sha256(images[row].tobytes()).digest() for row in (0, 2, 3)]
        assert [key.tobytes() for key in store.keys("images")] == keys
    # By the files 0 and 2 are one image, and their vectors differ: the table does not belong to these rows.
    line = refused(source, tmp_path, image_root=tmp_path)
    assert line.startswith(
        f"{source}/img_emb/img_emb_0.npy, row 3: has another vector than row 1, which the table says"
    )
    (tmp_path / "3.png").unlink()
    assert refused(source, tmp_path, image_root=tmp_path) == (
        f"{source}/metadata, row 4: image '3.png': no such file; leave --image-root out to do without files"
    )


def test_rows_out_of_step_are_seen(tmp_path):
    texts = unit(3, seed=1)[[0, 1, 2, 0, 2, 1]]
    columns = columns_of(6) | {"caption": ["a", "b", "c", "a", "b", "c"]}
    source = clip_retrieval(tmp_path / "e", unit(6), texts, columns, part_rows=4)
    cosine = float(texts[1].astype(float) @ texts[4].astype(float))
    assert refused(source, tmp_path).startswith(
        f"{source}/text_emb/text_emb_1.npy, row 1: has another vector than row 2, "
        f"which the table says is of the same (cosine {cosine:.3f}"
    )


def broken_row(value):
    vectors = unit(2)
    vectors[1] = value
    return vectors


def with_text_of_width_7(folder):
    for number, count in ((0, 4), (1, 2)):
        np.save(folder / f"text_emb/text_emb_{number}.npy", unit(count, 7))


PAIR = "rows of one number must be of one pair"
BITS = "rows of vectors in 16, 32 or 64 bits are needed"
LEAVE = "compute it again, or leave the row out"
IMAGE, TEXT, TABLE = "img_emb/img_emb_1.npy", "text_emb/text_emb_1.npy", "metadata/metadata_1.parquet"
# What happens to a folder with parts of 4 and 2 rows, and the line; {at} is the folder.
DAMAGE = {
    "text part shorter": (
        lambda at: np.save(at / TEXT, unit(1)),
        "{at}/text_emb/text_emb_1.npy: has 1 rows, {at}/img_emb/img_emb_1.npy has 2; " + PAIR,
    ),
    "table longer": (
        lambda at: pq.write_table(pa.table(columns_of(3)), at / TABLE),
        "{at}/metadata/metadata_1.parquet: has 3 rows, {at}/img_emb/img_emb_1.npy has 2; " + PAIR,
    ),
    "no text part": (
        lambda at: (at / TEXT).unlink(),
        "{at}/text_emb: no part 1, which {at}/img_emb/img_emb_1.npy has; " + AGAIN,
    ),
    "one text part more": (
        lambda at: shutil.copy(at / TEXT, at / "text_emb/text_emb_2.npy"),
        "{at}/text_emb/text_emb_2.npy: is a part that {at}/img_emb lacks; " + AGAIN,
    ),
    "two parts of one number": (
        lambda at: shutil.copy(at / IMAGE, at / "img_emb/img_emb_01.npy"),
        "{at}/img_emb/img_emb_1.npy: has the number of img_emb_01.npy; remove one",
    ),
    "no texts at all": (
        lambda at: shutil.rmtree(at / "text_emb"),
        "{at}/text_emb: no text_emb_0.npy; images and texts are both needed",
    ),
    "no metadata": (
        lambda at: shutil.rmtree(at / "metadata"),
        "{at}/metadata: no metadata_0.parquet; give --manifest with one line a row",
    ),
    "width of a part": (
        lambda at: np.save(at / IMAGE, unit(2, 9)),
        "{at}/img_emb/img_emb_1.npy: has vectors of width 9, {at}/img_emb/img_emb_0.npy of 8; " + AGAIN,
    ),
    "width of all texts": (
        with_text_of_width_7,
        "{at}: has vectors of width 8, the texts of 7; both must come from one model",
    ),
    "nan": (
        lambda at: np.save(at / IMAGE, broken_row(np.nan)),
        "{at}/img_emb/img_emb_1.npy, row 2: vector is not finite (1 in this block); " + LEAVE,
    ),
    "infinite": (
        lambda at: np.save(at / TEXT, broken_row(np.inf)),
        "{at}/text_emb/text_emb_1.npy, row 2: vector is not finite (1 in this block); " + LEAVE,
    ),
    "zero": (
        lambda at: np.save(at / TEXT, broken_row(0)),
        "{at}/text_emb/text_emb_1.npy, row 2: vector has length zero (1 in this block); " + LEAVE,
    ),
    "integers": (
        lambda at: np.save(at / IMAGE, np.ones((2, 8), np.int64)),
        "{at}/img_emb/img_emb_1.npy: holds int64 of shape (2, 8); " + BITS,
    ),
    "one dimension": (
        lambda at: np.save(at / TEXT, np.ones(16, np.float16)),
        "{at}/text_emb/text_emb_1.npy: holds float16 of shape (16,); " + BITS,
    ),
    "pickle": (
        lambda at: np.save(at / IMAGE, np.array([{}, {}]), allow_pickle=True),
        "{at}/img_emb/img_emb_1.npy: is no readable npy file (Array can't be memory-mapped: "
        "Python objects in dtype.); " + AGAIN,
    ),
    "columns": (
        lambda at: pq.write_table(pa.table({"image_path": ["a", "b"], "text": ["a", "b"]}), at / TABLE),
        "{at}/metadata/metadata_1.parquet: has the columns image_path, text, "
        "metadata_0.parquet has image_path, caption; " + AGAIN,
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_one_line(tmp_path, how):
    source = clip_retrieval(tmp_path / "e", unit(6), unit(6, seed=1), columns_of(6), part_rows=4)
    spoil, line = DAMAGE[how]
    spoil(source)
    assert refused(source, tmp_path) == line.format(at=source)


def test_no_rows_are_refused(tmp_path):
    source = clip_retrieval(tmp_path / "e", unit(0), unit(0), {"image_path": pa.array([], pa.string())})
    table = source / "metadata" / "metadata_0.parquet"
    assert refused(source, tmp_path) == f"{table}: has no rows; a manifest needs a header and at least one row"
    (tmp_path / "rows.csv").write_text("image,prompt\na.png,x\n")
    line = refused(source, tmp_path, manifest=tmp_path / "rows.csv")
    first = source / "img_emb" / "img_emb_0.npy"
    assert line == f"{first}: has no rows; give embeddings of at least one image"


def test_cut_off_files_are_refused(tmp_path):
    source = clip_retrieval(tmp_path / "e", unit(6), unit(6), columns_of(6))
    for path in (source / "img_emb" / "img_emb_0.npy", source / "metadata" / "metadata_0.parquet"):
        whole = path.read_bytes()
        for end in (0, 5, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:end])
            assert refused(source, tmp_path).startswith(f"{path}: is ")
        path.write_bytes(whole)
    assert bring(source, tmp_path / "c.h5").rows == 6


def test_plain_files_need_what_they_lack(tmp_path):
    np.save(tmp_path / "v.npy", unit(2))
    save_file({"images": unit(2), "text": unit(2)}, tmp_path / "e.safetensors")
    (tmp_path / "rows.csv").write_text("image,prompt\na.png,x\nb.png,y\nc.png,z\n")
    (tmp_path / "bad.safetensors").write_bytes(b"\0no tensors")
    (tmp_path / "empty").mkdir()
    table, here = tmp_path / "rows.csv", tmp_path
    known = "give a folder with img_emb/, an .npy or a .safetensors file"
    for name, options, line in [
        ("v.npy", {}, "v.npy: says not what its rows are of; give --manifest with one line a row"),
        ("v.npy", {"manifest": table}, "v.npy: holds images alone; give --texts with the npy file of the texts"),
        ("v.npy", {"manifest": table, "texts": here / "no.npy"}, "no.npy: no such file; check the path"),
        (
            "v.npy",
            {"manifest": table, "texts": here / "v.npy"},
            f"rows.csv: has 3 rows, {here}/v.npy has 2; rows of one number must be of one pair",
        ),
        (
            "e.safetensors",
            {"manifest": table},
            "e.safetensors: has no tensor 'texts', only images, text; call them images and texts",
        ),
        ("empty", {}, f"empty: holds no embeddings in a known layout; {known}"),
        ("gone", {}, f"gone: no such file or folder; {known}"),
    ]:
        assert refused(here / name, tmp_path, **options) == f"{here}/{line}"
    assert refused(here / "bad.safetensors", tmp_path, manifest=table).startswith(
        f"{here}/bad.safetensors: is no readable"
    )
    line = f"--texts: {here}/e.safetensors has texts of its own; leave the option out"
    assert refused(here / "e.safetensors", tmp_path, manifest=table, texts=here / "v.npy") == line
    (here / "c.h5").touch()
    with pytest.raises(UserError, match=r"c\.h5: already exists; give another --out or remove it first"):
        bring(here / "v.npy", here / "c.h5")


@pytest.fixture(scope="module")
def demo_again(tmp_path_factory, demo_cache):
    """Folder with `e/`, the demo cache as clip-retrieval would have it, and `c.h5`, that imported."""
    folder = tmp_path_factory.mktemp("demo_again")
    export(demo_cache, folder / "e")
    with FeatureStore.open(demo_cache) as store:
        precision = store.facts["precision"]
    bring(folder / "e", folder / "c.h5", backbone="tiny", pretrained=None, precision=precision)
    return folder


def test_exported_files_are_what_their_readers_expect(tmp_path, demo_cache, demo_again):
    with FeatureStore.open(demo_cache) as store:
        rows, images, texts = store.rows(), store.embeddings("images"), store.embeddings("texts")
    found = np.load(demo_again / "e" / "img_emb" / "img_emb_0.npy")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, images[rows.image].astype(np.float16))
    np.testing.assert_array_equal(
        np.load(demo_again / "e" / "text_emb" / "text_emb_0.npy"), texts[rows.prompt].astype(np.float16)
    )
    table = pq.read_table(demo_again / "e" / "metadata" / "metadata_0.parquet").to_pydict()
    assert table["image_path"] == list(rows.text["file"])
    assert table["caption"] == list(rows.text["prompt"])
    assert np.float32(table["quality"]).tolist() == rows.numbers["quality"].tolist()
    assert "quality_std" not in table  # the demo set has none
    for layout in ("npy", "safetensors"):
        result = export(demo_cache, tmp_path / layout, export_format=layout)
        line = f"{tmp_path / layout}: {len(rows)} rows, view center, as {layout}"
        assert (result.exported, result.summary().splitlines()[-1]) == (line, line)
        about = json.loads((tmp_path / layout / "about.json").read_text())
        assert (about["view"], about["facts"]["backbone"]) == ("center", "tiny")
        with (tmp_path / layout / "table.csv").open(newline="") as file:
            assert [row["image"] for row in csv.DictReader(file)] == list(rows.text["file"])
    vectors = load_file(tmp_path / "safetensors" / "embeddings.safetensors")
    np.testing.assert_array_equal(vectors["images"], images[rows.image])
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "texts.npy"), texts[rows.prompt])


def test_export_is_whole_or_not_at_all(tmp_path, demo_cache):
    (tmp_path / "there").mkdir()
    for options, line in [
        ({"out": tmp_path / "there"}, f"{tmp_path}/there: already exists; give another name or remove it first"),
        (
            {"out": tmp_path / "x", "export_view": "flip"},
            f"{demo_cache}: has no view flip for 240 images; give --views flip to `deltaclip extract`",
        ),
        ({"out": tmp_path / "x", "export_view": "flap"}, f"{demo_cache}: has no view 'flap'; known: center"),
    ]:
        with pytest.raises(UserError) as caught:
            export(demo_cache, **options)
        assert str(caught.value) == line
    with pytest.raises(UserError) as caught:
        inspect_cache(InspectConfig(caches=[demo_cache, demo_cache], export=tmp_path / "x"))
    assert str(caught.value) == "--export: 2 caches are given; give one, or --merge them first"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_imported_cache_trains_and_does_not_predict(tmp_path, demo_again):
    result = train(TrainConfig(cache=demo_again / "c.h5", epochs=1, out=tmp_path / "run"))
    assert 0 < result.to_json()["test"]["quality"]["srocc"] <= 1
    with pytest.raises(UserError) as caught:
        Scorer.load(tmp_path / "run", device="cpu")
    assert str(caught.value) == (
        f"{tmp_path}/run: was trained on imported embeddings: nothing says which weights of tiny made them; "
        "extract the images with `deltaclip extract` and train on that cache"
    )
    assert "imported: nothing vouches for that" in inspect_cache(InspectConfig(caches=[demo_again / "c.h5"])).summary()


def test_an_imported_cache_is_never_mixed_with_our_own(tmp_path, demo_folder, demo_cache, demo_again):
    with pytest.raises(UserError) as caught:
        inspect_cache(InspectConfig(caches=[demo_cache, demo_again / "c.h5"], merge=tmp_path / "all.h5"))
    line = str(caught.value)
    assert line.startswith(
        f"{demo_again}/c.h5: was made by another backbone: "
        "imported True there, None here; model tiny there, None here; "
    )
    assert line.endswith("; merge only caches of one backbone, precision and recipe of each view")
    assert not (tmp_path / "all.h5").exists()
    before = (demo_again / "c.h5").read_bytes()
    with pytest.raises(UserError, match="was made by another backbone: imported True there, None here"):
        extract(
            ExtractConfig(data=str(demo_folder / "demo.csv"), out=demo_again / "c.h5", backbone="tiny", views="center")
        )
    assert (demo_again / "c.h5").read_bytes() == before
    # Two imports that are said to be of one model are one cache.
    merged = inspect_cache(InspectConfig(caches=[demo_again / "c.h5"] * 2, merge=tmp_path / "all.h5"))
    assert merged.reports[0].usable_rows == 240


def test_another_view_goes_out_and_not_in_again(tmp_path, demo_folder):
    rows = (demo_folder / "demo.csv").read_text().splitlines()[:5]
    (tmp_path / "four.csv").write_text("\n".join(rows) + "\n")
    four = {"data": str(tmp_path / "four.csv"), "out": tmp_path / "c.h5", "precision": "fp32"}
    extract(ExtractConfig(**four, image_root=demo_folder, views="flip"))
    export(tmp_path / "c.h5", tmp_path / "e", export_view="flip", export_format="npy")
    with FeatureStore.open(tmp_path / "c.h5") as store:
        flipped = store.embeddings("images", view="flip")[store.rows().image]
    np.testing.assert_array_equal(np.load(tmp_path / "e" / "images.npy"), flipped)
    about = tmp_path / "e" / "about.json"
    assert refused(tmp_path / "e", tmp_path) == f"{about}: says that this is the view flip; export the view center"
    about.write_text("{}")
    assert refused(tmp_path / "e", tmp_path) == f"{about}: does not say which view it is of; export it again"


def test_what_float16_cannot_hold_is_not_exported_as_such(tmp_path):
    source = clip_retrieval(tmp_path / "e", unit(3, dtype=np.float32), unit(3), columns_of(3))
    bring(source, tmp_path / "c.h5", precision="fp32")
    with edited(tmp_path / "c.h5") as file:
        view = file["views/center"]
        view["embedding"][0] = 7e4
        view["crc32"][:] = row_checksums(view["embedding"][:])
    with pytest.raises(UserError) as caught:
        export(tmp_path / "c.h5", tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/c.h5: has vectors that float16, clip-retrieval's format, cannot hold; give --export-format npy"
    )
    export(tmp_path / "c.h5", tmp_path / "out", export_format="npy")
    assert np.load(tmp_path / "out" / "images.npy").max() == 7e4


def test_a_damaged_cache_is_not_exported(tmp_path):
    bring(clip_retrieval(tmp_path / "e", unit(3), unit(3), columns_of(3)), tmp_path / "c.h5")
    with edited(tmp_path / "c.h5") as file:
        file["texts/embedding"][1, 0] += 1
    with pytest.raises(UserError, match="texts/embedding"):
        export(tmp_path / "c.h5", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scale", "expected"), [("1,5", [0, 0.5, 1]), ("0,5", [0.2, 0.6, 1])])
def test_labels_on_another_scale(tmp_path, scale, expected):
    columns = columns_of(3) | {"mos_quality": [1.0, 3.0, 5.0]}
    source = clip_retrieval(tmp_path / "e", unit(3), unit(3), columns)
    result = bring(source, tmp_path / "c.h5", label_range=scale)
    with FeatureStore.open(result.cache) as store:
        np.testing.assert_array_equal(store.rows().numbers["quality"], np.float32(expected))


def test_explanations_are_left_out_and_said(tmp_path):
    columns = columns_of(3) | {"explanation": ["why", None, "so"]}
    result = bring(clip_retrieval(tmp_path / "e", unit(3), unit(3), columns), tmp_path / "c.h5")
    assert result.texts == 3
    assert "2 explanations are left out: there are no embeddings of them" in result.summary().splitlines()
    assert json.loads(json.dumps(result.to_json()))["explanations_left_out"] == 2
