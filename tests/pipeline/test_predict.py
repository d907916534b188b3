"""Prediction: one pair, folders, manifests; tables; what cannot be scored."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.weights import find_weights, fingerprint
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.settings import PredictConfig, TrainConfig
from deltaclip.pipeline.train import train
from deltaclip.tests.features.file_server import serving
from deltaclip.tests.features.forms import write_form
from deltaclip.tests.pipeline.conftest import read_csv, write_csv

PARTS = ("", "_base", "_delta")
WHOLE = (*PARTS, "_low", "_high")
SCORES = (*(f"{target}{part}" for target in ("quality", "consistency") for part in PARTS), "q", "c")
# A batch of another size takes other kernels, whose bf16 sums differ in the last of 8 bits; the slope of the base
# (about 4 on this data) multiplies what is left of that in a cosine. Measured: 4e-4.
BATCH_NOISE = 5e-3


@pytest.fixture(scope="module")
def recorded(demo_run):
    return {row["image"]: row for row in read_csv(demo_run / "predictions.csv")}


@pytest.fixture
def pictures(tmp_path, demo_folder, demo_rows):
    """Folder with three demo images, one of them deeper, and the rows of the manifest that they come from."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    chosen = [demo_rows[0], demo_rows[7], demo_rows[100]]
    places = ("a.png", "b.png", "more/c.png")
    for row, place in zip(chosen, places, strict=True):
        shutil.copyfile(demo_folder / row["image"], folder / place)
    return folder, dict(zip(places, chosen, strict=True))


@pytest.fixture
def scored(demo_run):
    def run(target, **settings):
        return predict(PredictConfig(**{"run": demo_run, "target": str(target), "device": "cpu", **settings}))

    return run


def assert_recorded(result, recorded, row_of, *, scores=SCORES):
    for i, name in enumerate(result.columns["image"]):
        expected = recorded[row_of[name]["image"]]
        for score in scores:
            assert result.columns[score][i] == pytest.approx(float(expected[score]), abs=BATCH_NOISE), (name, score)


def test_one_image_scores_what_its_row_of_the_cache_scores(scored, recorded, demo_folder, demo_rows):
    row = demo_rows[31]
    result = scored(demo_folder / row["image"], prompt=row["prompt"])
    name = row["image"].removeprefix("images/")
    assert result.columns["image"] == [name]
    assert_recorded(result, recorded, {name: row})
    other = scored(demo_folder / row["image"], prompt="nothing of the kind")
    assert other.columns["quality"] == pytest.approx(
        result.columns["quality"], abs=1e-6
    )  # quality never reads the prompt
    assert abs(other.columns["consistency"] - result.columns["consistency"]) > 10 * BATCH_NOISE


def test_manifest_scores_as_the_cache(scored, recorded, demo_folder, demo_rows):
    result = scored(demo_folder / "demo.csv")
    assert result.columns["image"] == [row["image"] for row in demo_rows]
    assert result.columns["prompt"] == [row["prompt"] for row in demo_rows]
    assert_recorded(result, recorded, {row["image"]: row for row in demo_rows})
    assert result.failed == 0
    lines = result.summary().splitlines()
    assert len(lines) == 25
    assert lines[-4] == "... 220 more: give --out FILE.csv for all"
    assert lines[-3].startswith("the intervals of quality are all of 0 to 1: 4 groups to learn from allow")
    assert " of 240 pairs " in lines[-1]


def test_three_targets_are_predicted_one_of_a_name_of_its_own(
    scored, colour_run, colour_table, *, demo_folder, tmp_path
):
    recorded, out = read_csv(colour_run / "predictions.csv"), tmp_path / "scores.csv"
    result = scored(colour_table, run=colour_run, image_root=demo_folder, out=out)
    names = [f"{target}{part}" for target in ("quality", "consistency", "colour") for part in PARTS]
    whole = [f"{target}{part}" for target in ("quality", "consistency", "colour") for part in WHOLE]
    assert (
        list(result.columns)
        == list(read_csv(out)[0])
        == ["image", "prompt", "source", *whole, "q", "c", "flag", "error"]
    )
    assert result.labels == ("quality", "consistency", "colour")
    for name in names:
        assert result.columns[name] == pytest.approx([float(row[name]) for row in recorded], abs=BATCH_NOISE), name
    assert np.ptp(result.columns["colour"]) > BATCH_NOISE
    one = scored(demo_folder / recorded[0]["image"], run=colour_run, prompt="x")
    assert one.summary().splitlines()[0].split() == ["image", "quality", "consistency", "colour"]


def test_folder_with_a_table_of_prompts(scored, recorded, pictures, tmp_path):
    folder, rows = pictures
    table = tmp_path / "prompts.csv"
    write_csv(table, [{"image": place, "prompt": rows[place]["prompt"]} for place in ("more/c.png", "a.png")])
    result = scored(folder, prompts=table)
    assert result.columns["image"] == ["more/c.png", "a.png"]
    assert_recorded(result, recorded, rows)
    assert result.note == f"1 images of the folder have no row in {table} and were not scored"
    assert result.note in result.summary().splitlines()


def test_folder_with_a_text_file_beside_each_image(scored, recorded, pictures):
    folder, rows = pictures
    for place, row in rows.items():
        (folder / place).with_suffix(".txt").write_text(row["prompt"] + "\n")
    result = scored(folder)
    assert result.columns["image"] == ["a.png", "b.png", "more/c.png"]
    assert_recorded(result, recorded, rows)


def test_folder_with_one_prompt(scored, recorded, pictures):
    folder, rows = pictures
    result = scored(folder, prompt=rows["b.png"]["prompt"])
    assert result.columns["prompt"] == [rows["b.png"]["prompt"]] * 3
    assert_recorded(result, recorded, rows, scores=("quality", "quality_base"))
    assert result.columns["consistency"][1] == pytest.approx(
        float(recorded[rows["b.png"]["image"]]["consistency"]), abs=BATCH_NOISE
    )


def test_batch_size_changes_nothing(scored, pictures):
    folder, rows = pictures
    first, second = (scored(folder, prompt=rows["a.png"]["prompt"], batch_size=size) for size in (1, 64))
    for score in SCORES:
        assert first.columns[score] == pytest.approx(second.columns[score], abs=BATCH_NOISE)


def test_tables_of_every_format_hold_the_same(scored, pictures, tmp_path):
    folder, rows = pictures
    (folder / "broken.png").write_bytes(b"no picture")
    outs = [tmp_path / "scores" / f"scores{suffix}" for suffix in (".csv", ".jsonl", ".parquet")]
    results = [scored(folder, prompt=rows["a.png"]["prompt"], out=out) for out in outs]
    with outs[0].open(newline="") as file:
        from_csv = [{name: cell or None for name, cell in row.items()} for row in csv.DictReader(file)]
    from_jsonl = [json.loads(line) for line in outs[1].read_text().splitlines()]
    from_parquet = pq.read_table(outs[2]).to_pylist()
    whole = (f"{target}{part}" for target in ("quality", "consistency") for part in WHOLE)
    names = ["image", "prompt", *whole, "q", "c", "flag", "error"]
    assert list(from_csv[0]) == list(from_jsonl[0]) == list(from_parquet[0]) == names
    assert len(from_csv) == len(from_jsonl) == len(from_parquet) == 4
    for in_csv, in_jsonl, in_parquet in zip(from_csv, from_jsonl, from_parquet, strict=True):
        for name in ("image", "prompt", "error"):
            assert (in_csv[name] or "") == in_jsonl[name] == in_parquet[name]
        for name in SCORES:
            if in_jsonl[name] is None:
                assert in_csv[name] is in_parquet[name] is None
            else:
                assert float(in_csv[name]) == in_jsonl[name]
                assert in_parquet[name] == pytest.approx(in_jsonl[name], rel=1e-5)  # text has six digits
    assert results[0].summary().splitlines()[0] == f"{outs[0]}: 4 rows"


def test_what_else_lies_in_a_folder_is_left_out_and_counted(scored, pictures):
    folder, rows = pictures
    for place, row in rows.items():
        (folder / place).with_suffix(".txt").write_text(row["prompt"], encoding="utf-8-sig")
    plain = scored(folder)
    assert (plain.left_out, "left out" in plain.summary()) == ({}, False)
    for junk in (".ipynb_checkpoints/a.png", "__MACOSX/a.png", "@eaDir/a.png/THUMB.jpg"):
        (folder / junk).parent.mkdir(parents=True)
        shutil.copyfile(folder / "a.png", folder / junk)
    (folder / "._b.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "d.png.crdownload").write_bytes(b"\x89PNG")
    (folder / "notes.txt").write_text("BMW, and no prompt of a picture")
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (folder / "placeholder").touch()
    result = scored(folder)
    assert result.columns["image"] == ["a.png", "b.png", "more/c.png"]
    for score in SCORES:
        assert result.columns[score] == pytest.approx(plain.columns[score], abs=BATCH_NOISE)
    assert result.to_json()["left_out"] == {
        "hidden folder": 3,
        "hidden file": 2,
        "unfinished or temporary file": 1,
        "text file": 1,
        "video": 1,
        "empty file": 1,
    }
    words = "left out: 3 hidden folders, 2 hidden files, "
    assert any(line.startswith(words) for line in result.summary().splitlines())


def test_images_are_known_by_their_content_also_one_by_itself(scored, recorded, pictures):
    folder, rows = pictures
    content = (folder / "a.png").read_bytes()
    for name in ("picture", "picture.jpg_large", "PICTURE.PNG", "picture.v2"):
        (folder / name).write_bytes(content)
        one = scored(folder / name, prompt=rows["a.png"]["prompt"])
        assert one.columns["image"] == [name]
        assert_recorded(one, recorded, {name: rows["a.png"]})
    found = scored(folder, prompt=rows["a.png"]["prompt"])
    names = ["PICTURE.PNG", "a.png", "b.png", "more/c.png", "picture", "picture.jpg_large", "picture.v2"]
    assert found.columns["image"] == names
    heic = folder / "photo.heic"
    heic.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert refused(scored, heic, prompt="x").startswith(f"{heic}: broken image data")  # the plug-in is there


def test_names_that_are_no_text(scored, pictures, tmp_path):
    folder, _ = pictures
    odd = os.fsdecode(b"\xe9t\xe9.png")
    shutil.copyfile(folder / "a.png", folder / odd)
    shutil.copyfile(folder / "a.png", folder / "two\nlines.png")
    out = tmp_path / "scores.csv"
    names = ["a.png", "b.png", "more/c.png", "two\nlines.png", r"\xe9t\xe9.png"]
    assert scored(folder, prompt="x", out=out).columns["image"] == names
    assert [row["image"] for row in read_csv(out)] == names
    lines = scored(folder, prompt="x").summary().splitlines()
    assert len(lines) == 9
    assert lines[-5].startswith(r"two\nlines.png ")


def test_what_cannot_be_read_is_listed_never_dropped(scored, pictures):
    folder, rows = pictures
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.jpg").write_bytes(b"")
    result = scored(folder, prompt=rows["a.png"]["prompt"])
    assert result.columns["image"] == ["a.png", "b.png", "broken.png", "empty.jpg", "more/c.png"]
    assert result.columns["error"] == ["", "", "not an image in a known format", "empty file", ""]
    assert result.failed == 2
    assert np.isnan(result.columns["quality"]).tolist() == [False, False, True, True, False]
    line = "2 images could not be read, the first: broken.png: not an image in a known format"
    assert line in result.summary().splitlines()
    printed = json.loads(json.dumps(result.to_json()))
    assert printed["failed"] == 2
    assert printed["rows"][2]["quality"] is None
    assert printed["rows"][2]["error"] == "not an image in a known format"
    with pytest.raises(UserError) as error:
        scored(folder, prompt=rows["a.png"]["prompt"], on_error="fail")
    assert str(error.value) == (
        f"{folder / 'broken.png'}: not an image in a known format; give an image that can be read"
    )


def test_long_prompts_are_cut_and_counted(scored, pictures):
    folder, _ = pictures
    result = scored(folder, prompt="a red circle above a blue square and " * 40)
    assert result.truncated_prompts == 1
    assert "1 prompts were cut at the context length" in result.summary().splitlines()
    assert np.isfinite(result.columns["consistency"]).all()


def test_a_head_without_labels_says_nothing(scored, train_demo, relabelled, pictures):
    def drop(rows):
        for row in rows:
            del row["consistency"]

    folder, rows = pictures
    without, unweighted = train_demo(cache=relabelled(drop)).run, train_demo(weight="0.5,consistency=0").run
    for run, has_head in ((without, False), (unweighted, True)):
        result = scored(folder, prompt=rows["a.png"]["prompt"], run=run)
        assert [name for name in SCORES if name in result.columns] == list(SCORES if has_head else (*SCORES[:3], "q"))
        if has_head:
            assert np.isnan([result.columns["consistency"], result.columns["c"]]).all()
        assert np.isfinite(result.columns["quality"]).all()
        assert result.summary().splitlines()[0].split() == ["image", "quality"]
        assert result.note == "the prompts are not used: the run scores quality alone"


@pytest.mark.slow
def test_direct_heads_have_no_parts(scored, train_demo, pictures):
    folder, rows = pictures
    run = train_demo(residual_learning=False).run
    result = scored(folder, prompt=rows["a.png"]["prompt"], run=run)
    assert np.isfinite(result.columns["quality"]).all()
    for name in ("quality_base", "consistency_base", "quality_delta", "consistency_delta"):
        assert np.isnan(result.columns[name]).all()


# What is refused, in full


def refused(scored, target, **settings):
    with pytest.raises(UserError) as error:
        scored(target, **settings)
    return str(error.value)


def test_an_image_needs_a_prompt(scored, pictures):
    image = pictures[0] / "a.png"
    assert refused(scored, image) == f"{image}: has no prompt to be scored against; give --prompt 'TEXT'"


def test_an_image_that_is_not_there(scored, pictures):
    image = pictures[0] / "z.png"
    assert refused(scored, image, prompt="x") == f"{image}: no such file; give an image that can be read"


def test_one_image_that_cannot_be_read(scored, pictures):
    image = pictures[0] / "z.png"
    image.write_bytes(b"no picture")
    line = f"{image}: not an image in a known format; give an image that can be read"
    assert refused(scored, image, prompt="x") == line


def test_a_missing_text_file_is_named(scored, pictures):
    folder, rows = pictures
    (folder / "a.txt").write_text(rows["a.png"]["prompt"])
    remedy = "give --prompts TABLE (.csv/.tsv/.jsonl/.ndjson/.json/.parquet/.arrow/.xlsx) or --prompt 'TEXT'"
    assert refused(scored, folder) == f"{folder / 'b.png'}: no prompt in b.txt, nor in the picture; {remedy}"
    (folder / "b.txt").write_text(" \n")
    assert refused(scored, folder) == f"{folder / 'b.png'}: no prompt in b.txt, nor in the picture; {remedy}"


def test_a_folder_without_images(scored, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    remedy = f"give a table, or ADAPTER:{tmp_path} for a public set"
    assert refused(scored, tmp_path, prompt="x") == f"{tmp_path}: holds no pictures: 1 text file; {remedy}"
    (tmp_path / "notes.txt").unlink()
    assert refused(scored, tmp_path, prompt="x") == f"{tmp_path}: holds no pictures: it is empty; {remedy}"


def test_a_run_that_is_not_there(scored, pictures, tmp_path):
    line = f"{tmp_path / 'gone'}: no such run directory; make one with `deltaclip train`"
    assert refused(scored, pictures[0], prompt="x", run=tmp_path / "gone") == line


def test_an_output_of_unknown_format(scored, pictures, tmp_path):
    out = tmp_path / "scores.xlsx"
    line = f"{out}: unknown suffix '.xlsx'; use one of .csv, .jsonl, .parquet"
    assert refused(scored, pictures[0], prompt="x", out=out) == line


def test_a_prompt_table_that_leaves_the_folder(scored, pictures, tmp_path):
    folder, _ = pictures
    table = tmp_path / "prompts.csv"
    write_csv(table, [{"image": "../secret.png", "prompt": "x"}])
    assert refused(scored, folder, prompts=table) == (
        f"{table}, line 2, column image: image '../secret.png' lies outside {folder}; "
        "give --image-root, or --allow-outside to permit it"
    )


def test_other_weights_are_refused_with_the_difference(scored, pictures, *, demo_run, other_weights, tiny_backbone):
    there = fingerprint(find_weights(tiny_backbone, None).weights)[:12]
    here = fingerprint(find_weights(other_weights, None).weights)[:12]
    assert refused(scored, pictures[0], prompt="x", backbone=other_weights) == (
        f"{demo_run}: was trained on another backbone: weights_sha256 {there} there, {here} here; "
        "give --backbone and --pretrained of the run's own backbone"
    )


def test_a_backbone_that_moved(scored, pictures, *, recorded, tiny_backbone, demo_run, tmp_path):
    source = find_weights(tiny_backbone, None)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (source.config, source.weights):
        shutil.copyfile(file, moved / file.name)
    folder, rows = pictures
    result = scored(folder, prompt=rows["a.png"]["prompt"], backbone=f"local-dir:{moved}")
    assert_recorded(result, recorded, rows, scores=("quality",))
    # A run whose backbone lay in a folder that is gone says which.
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    config = json.loads((run / "config.json").read_text())
    config["backbone"]["backbone"] = f"local-dir:{tmp_path / 'gone'}"
    (run / "config.json").write_text(json.dumps(config))
    line = f"{tmp_path / 'gone'}: no such folder; give local-dir:PATH of a folder with open_clip_config.json"
    assert refused(scored, folder, prompt="x", run=run) == line


UNUSED = {
    "demo.csv": ({"prompt": "x"}, "--prompt", "a manifest, which has its own prompts"),
    "images": ({"image_root": Path("/x"), "prompt": "x"}, "--image-root", "a folder"),
    "images/0000_0.png": ({"prompt": "x", "prompts": Path("p.csv")}, "--prompts", "one image"),
}


@pytest.mark.parametrize("target", UNUSED)
def test_an_option_that_would_change_nothing_is_refused(demo_run, demo_folder, target):
    options, name, what = UNUSED[target]
    with pytest.raises(UserError) as error:
        predict(PredictConfig(run=demo_run, target=str(demo_folder / target), **options))
    assert str(error.value) == f"{name}: would not be used; leave it out: the target is {what}"


def test_scores_never_overwrite_the_input_or_the_run(demo_run, tmp_path, demo_folder):
    table = tmp_path / "ratings.csv"
    table.write_text((demo_folder / "demo.csv").read_text())
    before = table.read_bytes()
    with pytest.raises(UserError) as error:
        predict(PredictConfig(run=demo_run, target=str(table), image_root=demo_folder, out=table))
    assert str(error.value) == f"{table}: is an input; give another --out"
    assert table.read_bytes() == before
    inside = demo_run / "predictions.csv"
    with pytest.raises(UserError) as error:
        predict(PredictConfig(run=demo_run, target=str(demo_folder / "demo.csv"), out=inside))
    assert str(error.value) == f"{inside}: lies in the run; give a file outside: a finished run stays as it is"


def test_labels_that_no_range_fits_do_not_stop_a_prediction(demo_run, demo_folder, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("image,prompt,quality\nimages/0000_0.png,a red circle,-2.394\n")
    found = predict(PredictConfig(run=demo_run, target=str(table), image_root=demo_folder))
    assert 0 <= found.columns["quality"][0] <= 1


# How far to trust a score


def test_intervals_are_those_of_the_run_and_widen_with_coverage(scored, recorded, demo_folder):
    found = {coverage: scored(demo_folder / "demo.csv", coverage=coverage) for coverage in (0.5, 0.9)}
    names = found[0.9].columns["image"]
    test = [row for row, name in enumerate(names) if recorded[name]["split"] == "test"]  # others are left out there
    for target in ("quality", "consistency"):
        for end in ("_low", "_high"):
            expected = [float(recorded[names[row]][f"{target}{end}"]) for row in test]
            # Scores that are off by the noise of a batch move their expected error too.
            assert found[0.9].columns[f"{target}{end}"][test] == pytest.approx(expected, abs=4 * BATCH_NOISE)
        score, low, high = (found[0.5].columns[f"{target}{part}"] for part in ("", "_low", "_high"))
        assert np.all((low <= score) & (score <= high))
        wide = found[0.9].columns[f"{target}_high"] - found[0.9].columns[f"{target}_low"]
        assert np.mean(wide) > np.mean(high - low)


def test_flat_pictures_are_unlike_the_training_and_the_last_line_says_so(
    scored, demo_folder, demo_rows, *, demo_cache, tiny_backbone, tmp_path
):
    cache, folder = tmp_path / "statistics.h5", tmp_path / "flat"
    shutil.copyfile(demo_cache, cache)
    views = "center,statistics"
    extract(ExtractConfig(data=str(demo_folder / "demo.csv"), out=cache, backbone=tiny_backbone, views=views))
    run = train(TrainConfig(cache=cache, out=tmp_path / "run", epochs=1)).run
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (96, 96), (20 * number, 250 - 20 * number, 100)).save(folder / f"{number:02}.png")
    shutil.copyfile(demo_folder / demo_rows[0]["image"], folder / "usual.png")
    result = scored(folder, run=run, prompt=demo_rows[0]["prompt"])
    assert [flag.partition(":")[0] for flag in result.columns["flag"]] == ["unlike"] * 12 + [""]
    assert result.unlike == 12
    assert result.summary().splitlines()[-2].startswith("together the pairs are unlike every source that the run was ")
    assert result.summary().splitlines()[-1].startswith("12 of 13 pairs are unlike those that the run was trained on (")
    assert result.to_json()["rows"][0]["flag"] == result.columns["flag"][0]


def test_a_run_of_before_scores_without_intervals_and_says_so_once(
    scored, demo_run, demo_folder, *, demo_rows, tmp_path
):
    run = tmp_path / "old"
    shutil.copytree(demo_run, run)
    (run / "trust.safetensors").unlink()
    result = scored(demo_folder / demo_rows[0]["image"], run=run, prompt="a red circle")
    assert not {"quality_low", "flag"} & set(result.columns)
    assert (result.coverage, result.unlike) == (None, None)
    lines = result.summary().splitlines()
    assert [line for line in lines if "intervals" in line] == [
        f"no intervals: {run} is of an earlier release; train again for them"
    ]


@pytest.mark.parametrize("coverage", [0, 1, -0.1, 90, float("nan")])
def test_a_coverage_that_is_no_share_is_refused(coverage, demo_run, demo_folder):
    with pytest.raises(UserError) as refused:
        PredictConfig(run=demo_run, target=str(demo_folder), coverage=coverage)
    assert str(refused.value).startswith("--coverage: ")


@pytest.mark.parametrize(
    "form", ["parquet", *(pytest.param(form, marks=pytest.mark.slow) for form in ("saved", "shards", "metadata"))]
)
def test_pictures_inside_files_score_as_files_do(scored, demo_folder, demo_rows, *, tmp_path, form):
    rows = demo_rows[:6]
    of_files = scored(write_form("metadata", demo_folder, rows, tmp_path / "files") / "metadata.csv")
    result = scored(write_form(form, demo_folder, rows, tmp_path / form))
    assert result.failed == 0
    for score in SCORES:
        assert result.columns[score] == pytest.approx(of_files.columns[score], abs=BATCH_NOISE)
    one = scored(tmp_path / form / result.columns["image"][2], prompt=rows[2]["prompt"])
    assert one.columns["quality"] == pytest.approx(of_files.columns["quality"][2:3], abs=BATCH_NOISE)


def test_a_picture_at_an_address_scores_what_its_file_does(scored, demo_folder, demo_rows):
    pytest.importorskip("aiohttp", reason="the extra remote is not installed")
    name = demo_rows[0]["image"]
    with serving(demo_folder) as server:
        found = scored(f"http://127.0.0.1:{server.server_port}/{name}", prompt="a red circle")
    here = scored(demo_folder / name, prompt="a red circle")
    for column in SCORES:
        assert found.columns[column] == here.columns[column]
