"""Every problem of a manifest is found, with its rows; clean data gives none."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.check_data import check_data
from deltaclip.features.checking.columns import CONTEXT, _least_tokens
from deltaclip.features.data.manifest import field_like
from deltaclip.features.settings import CheckConfig


def check(data, **options):
    return check_data(CheckConfig(data=str(data), **options))


def kinds(result, level):
    return {finding["check"]: finding for finding in result.to_json()[f"{level}s"]}


@pytest.fixture
def pictures(tmp_path):
    """Twelve readable images a0.png to a11.png of 80 x 80, all different."""
    for i in range(12):
        Image.effect_noise((80, 80), 10 + i).convert("RGB").save(tmp_path / f"a{i}.png")
    return tmp_path


def write(folder, lines, name="t.csv"):
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


GOOD = ["image,prompt,quality,source", *(f"a{i}.png,prompt {i},0.{i % 9},{'xy'[i % 2]}" for i in range(12))]


def test_clean_data(pictures):
    result = check(write(pictures, GOOD))
    assert (result.findings, result.exit_code) == ([], 0)
    assert (result.rows, result.groups, result.sources, result.split) == (12, 12, 2, None)
    assert result.labels == {"quality": {"labels": 12, "range": "0 to 1 (detected)", "lowest": 0.0, "highest": 0.8}}
    assert result.images == {
        "files": 12,
        "readable": 12,
        "depth": "header",
        "smallest": "80 x 80",
        "largest": "80 x 80",
    }
    assert result.summary() == (
        f"{pictures}/t.csv: 12 rows, 12 groups (prompts), 2 sources\n"
        "quality: 12 labels from 0 to 0.8, range 0 to 1 (detected)\n"
        "images: 12 of 12 readable (by their headers), 80 x 80 pixels\n\n"
        "no errors, no warnings"
    )
    json.dumps(result.to_json())


def test_the_demo_set_is_clean(demo_folder):
    assert check(demo_folder / "demo.csv", images="full").findings == []


def test_every_error_at_once(pictures):
    (pictures / "text.png").write_text("no picture")
    (pictures / "empty.png").touch()
    data = write(
        pictures,
        [
            "image,prompt,quality,consistency,consistency_std",
            "a0.png,one,0.5,3,0.1",
            "gone.png,two,1.5,3,0.1",  # missing
            "text.png,three,good,4,-1",  # no image, no number, negative
            "empty.png,,0.5,inf,0.1",  # empty file, empty prompt, infinite
            "../a1.png,five,0.5,120,0.1",  # outside, range of nothing known
            ",six,0.5,-3,0.1",  # no image
            "gone.png,seven,-7,3,0.1",
        ],
    )
    result = check(data, label_range="0,1")
    assert result.exit_code == 2
    found = result.to_json()["errors"]
    assert {(f["check"], f["count"]) for f in found} == {
        *(("empty_image", 1), ("outside_root", 1), ("negative_std", 1)),
        *(("not_a_number", 1), ("label_out_of_range", 2), ("label_out_of_range", 6), ("unreadable_image", 2)),
        ("unreadable_image", 1),
    }
    lines = result.summary()
    for line in (
        f"error: 2 rows have an image that cannot be read: no such file\n    {data}, line 3, column image: 'gone.png'\n"
        f"    {data}, line 8, column image: 'gone.png'\n  check the paths or give --image-root; extract would",
        f"error: 1 cells of quality are no finite number\n    {data}, line 4, column quality: 'good'",
        f"error: 1 cells of consistency are no finite number\n    {data}, line 5, column consistency: 'inf'",
        f"error: 2 labels of quality are outside 0 to 1 (given)\n    {data}, line 3, column quality: '1.5'",
        f"error: 1 image paths leave {pictures}\n    {data}, line 6, column image: '../a1.png'",
        "cannot be read: not an image in a known format",
        "cannot be read: empty file",
        "    ... and 1 more\n",
        "\n\n10 errors, 2 warnings",
    ):
        assert line in lines
    detected = kinds(check(data, images="none"), "error")
    assert detected["label_range"]["examples"] == [
        f"{data}, line 7, column consistency: '-3'",
        f"{data}, line 6, column consistency: '120'",
    ]
    assert "unreadable_image" not in detected
    assert "outside_root" not in kinds(check(data, allow_outside=True, images="none"), "error")


def test_paths_of_windows_are_understood_and_each_cause_is_told_by_itself(pictures):
    (pictures / "sub").mkdir()
    (pictures / "a0.png").rename(pictures / "sub" / "a0.png")
    rows = ["sub\\a0.png,x", "C:\\data\\sub\\a0.png,y", "ftp://host/a.png,z", "ftp://host/b.png,z", "sub/A0.PNG,v"]
    result = check(write(pictures, ["image,prompt", *rows]))
    assert "1 image paths were understood by taking backslashes for slashes" in result.notes
    found = [(f.message, f.remedy) for f in result.findings if f.check == "unreadable_image"]
    words = "rows have an image that cannot be read: no such file"
    assert found == [
        (
            f"1 {words}, a path of Windows",
            "sub/a0.png is there: leave out what stands before it; extract would skip them",
        ),
        (
            f"2 {words}, a web address",
            "download the images and give their folder with --image-root; extract would skip them",
        ),
        (f"1 {words}, another name", "there is a0.png in sub; extract would skip them"),
    ]


def test_columns(pictures):
    data = write(pictures, ["img,promt,qualty,rater,consistncy", "a0.png,x,1,anna,2"])
    result = check(data)
    assert kinds(result, "error")["missing_column"] == {
        "level": "error",
        "check": "missing_column",
        "message": "there is no column 'prompt'",
        "count": 1,
        "examples": [],
        "remedy": "rename 'promt' to 'prompt'",
    }
    assert [f.message for f in result.findings if f.check == "unknown_column"] == [
        "column 'qualty' is not used",
        "column 'consistncy' is not used",
    ]
    assert result.unused_columns == ["promt", "qualty", "consistncy"]
    assert "no_labels" in kinds(result, "warning")


LONG_PROMPT = "word " * 80


def test_every_warning_at_once(pictures):
    shutil.copyfile(pictures / "a2.png", pictures / "copy.png")
    Image.new("RGB", (20, 20)).save(pictures / "small.png")
    Image.new("RGB", (900, 100)).save(pictures / "long.png")
    frames = [Image.new("RGB", (70, 70), color) for color in ("red", "blue")]
    frames[0].save(pictures / "moving.gif", save_all=True, append_images=frames[1:])
    data = write(
        pictures,
        [
            "image,prompt,quality,consistency,source,split",
            "a0.png,cat,0.5,1,x,train",
            "a0.png,cat,0.5,1,x,train",  # twice
            "a0.png,cat,0.5,2,x,test",  # twice, another label, on two sides
            "a2.png,cat,0.5,2,x,val",
            "copy.png,dog,0.5,2,z,train",  # the image of another side under another name, a source of one row
            "small.png,cat,0.5,2,x,training",
            "long.png,cat,0.5,2,x,holdout",  # no side
            "moving.gif,Cat,0.5,2,x,",
            "a4.png,cat/photo_1.jpeg,0.5,2,x,train",  # a file name
            f"a5.png,{LONG_PROMPT},0.5,2,x,train",
        ],
    )
    for depth in ("header", "full"):
        result = check(data, images=depth)
        assert result.exit_code == 0
        found = {name: (f["count"], f["examples"]) for name, f in kinds(result, "warning").items()}
        assert found == {
            "long_prompt": (1, [f"{data}, line 11, column prompt: '{LONG_PROMPT[:57]}...'"]),
            "prompt_is_file_name": (1, [f"{data}, line 10, column prompt: 'cat/photo_1.jpeg'"]),
            "several_ratings": (2, [f"{data}, line {n}, column image: 'a0.png'" for n in (3, 4)]),
            "constant_label": (1, []),
            "small_image": (1, [f"{data}, line 7, column image: 'small.png'"]),
            "long_image": (1, [f"{data}, line 8, column image: 'long.png'"]),
            "animated_image": (1, [f"{data}, line 9, column image: 'moving.gif'"]),
            "same_image": (2, [f"{data}, line {n}, column image: {v!r}" for n, v in ((5, "a2.png"), (6, "copy.png"))]),
            "few_groups": (1, []),
            "dominant_group": (7, found["dominant_group"][1]),
            "single_source": (1, [f"{data}, line 6, column source: 'z'"]),
            "unknown_split": (2, [f"{data}, line 8, column split: 'holdout'", f"{data}, line 9, column split: ''"]),
            "leaking_group": (5, found["leaking_group"][1]),
            "leaking_image": (5, found["leaking_image"][1]),
        }
        assert result.split == {"train": 6, "val": 1, "test": 1}
        assert result.summary().endswith("no errors, 14 warnings")


def test_a_split_column_without_leaks(pictures):
    lines = [GOOD[0] + ",split", *(f"{line},{'train' if i < 8 else 'valid'}" for i, line in enumerate(GOOD[1:]))]
    found = kinds(check(write(pictures, lines)), "warning")
    assert found.keys() == {"missing_side"}
    assert found["missing_side"]["message"] == "no row is marked test"


def test_one_prompt_for_all_rows_leaks_nothing(pictures):
    lines = ["image,prompt,quality,split", *(f"a{i}.png,x,0.{i % 9},{'train' if i % 2 else 'test'}" for i in range(12))]
    assert kinds(check(write(pictures, lines)), "warning").keys() == {"few_groups"}


def test_an_adapters_set(pictures):
    lines = ["name,prompt,mos", "a0.png,x,3", "gone.png,y,7"]
    write(pictures, lines, "info_train.csv")
    write(pictures, ["name,prompt", "a1.png,x"], "info_test.csv")
    result = check(f"aigiqa-20k:{pictures}")
    assert (result.rows, result.notes) == (2, ["1 rows have no score and are left out"])
    assert kinds(result, "error").keys() == {"label_out_of_range", "unreadable_image"}
    assert result.unused_columns == []
    with pytest.raises(UserError, match="is missing"):
        check(f"koniq-10k:{pictures}")


def test_links_out_of_the_root_are_no_readable_images(pictures, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "a.png"
    Image.new("RGB", (80, 80)).save(elsewhere)
    (pictures / "link.png").symlink_to(elsewhere)
    data = write(pictures, [*GOOD, "link.png,out,0.5,x"])
    (found,) = kinds(check(data), "error").values()
    assert found["message"].endswith("cannot be read: links to a file outside the image root")
    assert kinds(check(data, allow_outside=True), "error") == {}


def test_a_truncated_image_is_found_by_decoding_alone(pictures):
    whole = (pictures / "a3.png").read_bytes()
    (pictures / "a3.png").write_bytes(whole[: len(whole) // 2])
    data = write(pictures, GOOD)
    assert kinds(check(data), "error") == {}
    (found,) = kinds(check(data, images="full"), "error").values()
    assert found["examples"] == [f"{data}, line 5, column image: 'a3.png'"]


# The bundled tokenizer is CLIP's own: a lower bound must never be above what it gives, or fitting prompts were accused.
@pytest.mark.parametrize(
    "text", ["a cat", "it's 2024, isn't it?!", "größer 猫 🙂 ...", "x_1__y", "", LONG_PROMPT, "A-B-C 'll", "12 345"]
)
def test_the_least_number_of_tokens(text):
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    assert _least_tokens(text) <= len(tokenizer.encode(text)) + 2
    assert tokenizer.context_length == CONTEXT


# Advice that would be wrong, had only names or only one column been looked at

NUMBERS, WORDS = ["1", "2", "3"], ["one thing", "another", "a third"]


@pytest.mark.parametrize("column", ["score", "rating", "rating_mean", "mean_opinion_score", "MOS Score", "Mean-Rating"])
def test_usual_names_of_ratings_are_labels(pictures, column):
    data = write(pictures, [f"image,prompt,{column}", *(f"a{i}.png,p{i},{i % 5}" for i in range(12))])
    result = check(data)
    assert (result.findings, result.labels["quality"]["labels"]) == ([], 12)


@pytest.mark.parametrize("column", ["filepath", "file_path", "img_name", "Image Path", "imageFile"])
def test_usual_names_of_images(pictures, column):
    data = write(pictures, [f"{column},description,quality", *(f"a{i}.png,p{i},{i % 5}" for i in range(12))])
    assert check(data).findings == []


@pytest.mark.parametrize(
    ("name", "cells", "field"),
    [
        ("scores", NUMBERS, "quality"),
        ("scores", WORDS, None),
        ("ratings", NUMBERS, "quality"),
        ("sources", NUMBERS, None),
        ("sources", WORDS, "source"),
        ("qualty", NUMBERS, "quality"),
        ("qualty", WORDS, None),
        ("promptt", WORDS, "prompt"),
        ("promptt", NUMBERS, None),
        ("resolution", NUMBERS, None),
        ("seed", NUMBERS, None),
        ("spilt", WORDS, "split"),
        ("models", WORDS, "source"),
        ("models", NUMBERS, None),
        ("negative_prompt", WORDS, None),
        ("resource", WORDS, None),
        ("season", WORDS, None),
        ("images", ["", ""], None),
    ],
)
def test_a_column_is_proposed_for_what_it_can_be(name, cells, field):
    assert field_like(name, cells) == field


def test_targets_that_were_asked_for(pictures):
    rows = [f"a{i}.png,p{i},{i % 5},{9 if i else 'x'},{-i}" for i in range(12)]
    data = write(pictures, ["image,prompt,Comp Score,fit,fit_std", *rows])
    unasked = check(data)
    assert (unasked.labels, unasked.unused_columns) == ({}, ["Comp Score", "fit", "fit_std"])
    found = check(data, target=["composition=comp_score:image", "fit:pair"], label_range=["fit=0,5"])
    assert found.unused_columns == []
    assert found.labels == {
        "composition": {"labels": 12, "range": "0 to 5 (detected)", "lowest": 0.0, "highest": 4.0},
        "fit": {"labels": 11, "range": "0 to 5 (given)", "lowest": 9.0, "highest": 9.0},
    }
    errors, warnings = kinds(found, "error"), kinds(found, "warning")
    assert errors["not_a_number"]["examples"] == [f"{data}, line 2, column fit: 'x'"]
    assert errors["label_out_of_range"]["message"] == "11 labels of fit are outside 0 to 5 (given)"
    assert errors["negative_std"]["count"] == 11
    assert set(errors) == {"not_a_number", "negative_std", "label_out_of_range"}
    assert "no_labels" not in warnings
    with pytest.raises(UserError) as caught:
        check(data, target=["fit=comp:pair"])
    assert str(caught.value).startswith(f"{data}: has no column 'comp' for fit; ")


def test_rows_without_a_prompt_serve_the_targets_of_the_image(pictures):
    data = write(
        pictures, ["image,prompt,comp,fit", *(f"a{i}.png,{'p' if i else ''},{i % 5},{i % 5}" for i in range(12))]
    )
    found = kinds(check(data, target=["composition=comp:image", "fit:pair"]), "warning")["empty_prompt"]
    assert found["message"] == "1 rows have no prompt: they serve composition alone"
    assert found["remedy"] == "fill it in where there was one; labels of fit are not used without"


def test_a_column_of_ratings_is_proposed_for_any_label(pictures):
    data = write(pictures, ["image,prompt,qualty", *(f"a{i}.png,p{i},{i % 5}" for i in range(12))])
    (found,) = [f for f in check(data).findings if f.check == "unknown_column"]
    names = "quality, consistency or authenticity"
    assert found.remedy == f"if it has ratings, call it {names}, whichever people were asked for"


@pytest.mark.parametrize(
    ("header", "rows", "kind", "column"),
    [
        ("rater,image,prompt,quality", ["w1,a0.png,x,5", "w2,a0.png,x,5"], "several_ratings", ", by column 'rater'"),
        (
            "WorkerId,image,prompt,quality",
            ["1,a0.png,x,5", "2,a0.png,x,5"],
            "several_ratings",
            ", by column 'WorkerId'",
        ),
        ("image,prompt,quality", ["a0.png,x,5", "a0.png,x,5", "a0.png,x,4"], "several_ratings", ""),
        ("image,quality", ["a0.png,5", "a0.png,4"], "several_ratings", ""),
        ("image,prompt,quality", ["a0.png,x,5", "a0.png,x,5"], "duplicate_row", None),
    ],
)
def test_equal_ratings_are_no_copies(pictures, header, rows, *, kind, column):
    more = ["a1.png", "a2.png"]
    fill = [",".join({"image": name, "quality": "3"}.get(field, "y") for field in header.split(",")) for name in more]
    result = check(write(pictures, [header, *rows, *fill]))
    found = {f.check: f for f in result.findings}
    assert kind in found
    assert not {"several_ratings", "duplicate_row"} - {kind} & set(found)
    if column is not None:
        count = len(rows) - 1
        assert found[kind].message == (
            f"{count:,} rows are further ratings of an image and prompt{column}: extract takes the mean of each"
        )
        assert "do not leave out equal ratings" in found[kind].remedy
    else:
        assert found[kind].remedy.startswith("nothing needs to be done if they are ratings of several people")


def test_a_range_for_each_label(pictures):
    lines = ["image,prompt,quality,consistency", *(f"a{i}.png,p{i},{i % 10 + 1},{i % 5 + 1}" for i in range(12))]
    data = write(pictures, lines)
    (found,) = check(data, label_range=["1,10"]).findings
    assert (found.check, found.message, found.remedy) == (
        "range_half_empty",
        "consistency lies from 1 to 5, 44% of the given range",
        "give --label-range consistency=LO,HI if it has its own",
    )
    result = check(data, label_range=["quality=1,10", "consistency=1,5"])
    assert result.findings == []
    assert {label: known["range"] for label, known in result.labels.items()} == {
        "quality": "1 to 10 (given)",
        "consistency": "1 to 5 (given)",
    }


def test_labels_without_values_and_prompts_that_are_none(pictures):
    lines = ["image,prompt,quality,consistency", *(f"a{i}.png,p{i},,{i % 5}" for i in range(10))]
    result = check(write(pictures, [*lines, "a10.png,nan,,1", "a11.png,None,,2"]))
    found = {f.check: f for f in result.findings}
    assert set(found) == {"empty_label", "missing_word"}
    assert found["empty_label"].message == "the column of quality is there, and none of its cells has a value"
    assert found["missing_word"].message == "2 prompts are None, nan, which programs write for an empty cell"
    assert len(found["missing_word"].examples) == 2


def test_data_without_prompts_is_clean(pictures):
    result = check(write(pictures, ["image,mos", *(f"a{i}.png,{i % 5}" for i in range(12))]))
    assert (result.findings, result.groups) == ([], 12)


def test_values_that_are_no_text_are_errors(pictures):
    rows = [{"image": f"a{i}.png", "prompt": ["x", "y"] if i else "z", "quality": i % 5} for i in range(12)]
    result = check(write(pictures, [json.dumps(row) for row in rows], "t.jsonl"))
    (found,) = [f for f in result.findings if f.check == "no_text"]
    assert found.message.startswith("11 cells of prompt: holds a list, no text, the first at ")
