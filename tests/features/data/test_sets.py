"""Adapters of the public sets, each on small files of exactly the published format."""

from __future__ import annotations

import io
import json

import numpy as np
import openpyxl
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import AUTHENTICITY, CONSISTENCY, QUALITY
from deltaclip.features.data.adapters import FOLDER_ADAPTERS, read_manifest
from deltaclip.features.data.adapters.agiqa_1k import prompt_of
from deltaclip.features.data.adapters.aigciqa2023 import read_vector
from deltaclip.features.data.adapters.evalmuse_40k import explanation_of
from deltaclip.features.data.adapters.pku_i2iqa import source_of


def write_xlsx(path, rows):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def write_lines(path, lines, end="\r\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


def draw(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)


def refused(data, **options):
    with pytest.raises(UserError) as caught:
        read_manifest(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ranges(manifest):
    return {label: str(known) for label, known in manifest.label_ranges.items()}


# AGIQA-1K

ONE_K = [
    ["deepai_1_1_0_1.jpg", "cat driving bike, city, realistic style", 3.25],
    ["dreamStudio_8_9_1_0.jpg", "woman using CD, wild, anime style", 0],
]


def test_agiqa_1k(tmp_path):
    write_xlsx(tmp_path / "AIGC_MOS_Zscore.xlsx", [["Image", "Prompt", "MOS"], *ONE_K])
    draw(tmp_path / "file", ["deepai_1_1_0_1.jpg"])
    found = read_manifest(f"agiqa-1k:{tmp_path}")
    assert (found.name, found.image_root, found.images) == ("agiqa-1k", tmp_path / "file", [row[0] for row in ONE_K])
    assert found.prompts == [row[1] for row in ONE_K]
    assert found.sources == ["stable-diffusion-v2.0", "stable-inpainting-v1.0"]
    np.testing.assert_allclose(found.labels["quality"], [0.65, 0])
    assert found.targets == (QUALITY,)
    assert ranges(found) == {"quality": "0 to 5 (adapter)"}
    assert found.notes == ()


def test_agiqa_1k_without_prompts(tmp_path):
    write_lines(tmp_path / "AIGC_all.csv", ["Image,Score", *(f"{row[0]},{row[2]}" for row in ONE_K), "odd_8_.jpg,5"])
    found = read_manifest(f"agiqa-1k:{tmp_path}")
    assert found.prompts == [*(row[1] for row in ONE_K), ""]
    assert found.image_root == tmp_path
    assert found.notes == (
        "AIGC_all.csv has no prompts: they are put together from the names of the images",
        "1 rows have no prompt: of use for quality alone",
    )
    np.testing.assert_allclose(found.labels["quality"], [0.65, 0, 1])
    assert prompt_of("deepai_12_0_0_0.jpg") == prompt_of("deepai_1_1_0.jpg") == prompt_of("x_²_1_1_1.jpg") == ""


# AIGCIQA2023

PROMPTS = [["Style", "Object", "prompt"], ["abstract", "animal", '"a blue cat"'], ["realism", "tool", "“a hammer”"]]


@pytest.fixture
def aigciqa(tmp_path):
    """Three models, two prompts, four images of each."""
    rng = np.random.default_rng(0)
    scores = {i: rng.uniform(26, 72, (24, 1)) for i in (1, 2, 3)}
    (tmp_path / "DATA" / "MOS").mkdir(parents=True)
    for i, values in scores.items():
        scipy.io.savemat(tmp_path / "DATA" / "MOS" / f"mosz{i}.mat", {"MOSz": values})
    write_xlsx(tmp_path / "AIGCIQA2023_Prompts.xlsx", PROMPTS)
    index = [[model, f"{p:03d}-{k}.png"] for model in ("DALLE", "Glide", "LDM") for p in (0, 1) for k in range(4)]
    write_xlsx(tmp_path / "pic-index.xlsx", index)
    draw(tmp_path / "Image" / "allimg", ["0.png"])
    return tmp_path, scores


def test_aigciqa2023(aigciqa):
    folder, scores = aigciqa
    found = read_manifest(f"aigciqa2023:{folder}")
    assert (len(found), found.image_root) == (24, folder / "Image" / "allimg")
    assert found.images == [f"{i}.png" for i in range(24)]
    assert found.prompts == (["a blue cat"] * 4 + ["a hammer"] * 4) * 3
    assert found.sources == ["DALLE"] * 8 + ["Glide"] * 8 + ["LDM"] * 8
    np.testing.assert_allclose(found.labels["quality"], scores[1][:, 0] / 100, rtol=1e-12)
    np.testing.assert_allclose(found.labels["consistency"], scores[3][:, 0] / 100, rtol=1e-12)
    np.testing.assert_allclose(found.labels["authenticity"], scores[2][:, 0] / 100, rtol=1e-12)
    assert np.isnan(found.labels["quality_std"]).all()
    assert found.targets == (QUALITY, CONSISTENCY, AUTHENTICITY)
    assert ranges(found) == dict.fromkeys(("quality", "consistency", "authenticity"), "0 to 100 (adapter)")


@pytest.mark.slow
def test_aigciqa2023_without_authenticity_or_with_one_of_another_length(aigciqa):
    folder, _ = aigciqa
    path = folder / "DATA" / "MOS" / "mosz2.mat"
    scipy.io.savemat(path, {"MOSz": np.full((23, 1), 50.0)})
    assert refused(f"aigciqa2023:{folder}") == (
        f"{path.parent}: 23 values of authenticity and 24 of quality; unpack the set again"
    )
    path.unlink()
    assert read_manifest(f"aigciqa2023:{folder}").targets == (QUALITY, CONSISTENCY)


@pytest.mark.slow
def test_aigciqa2023_with_deviations_and_prompts_counted_from_one_in_any_order(aigciqa):
    folder, scores = aigciqa
    (folder / "DATA" / "STD").mkdir()
    for i in (1, 2, 3):
        scipy.io.savemat(folder / "DATA" / "STD" / f"SD{i}.mat", {"SD": np.full((24, 1), 2.0 * i)})
    index = [[model, f"{p:03d}-{k}.png"] for k in range(4) for p in (2, 1) for model in ("DALLE", "Glide", "LDM")]
    write_xlsx(folder / "pic-index.xlsx", index)
    found = read_manifest(f"aigciqa2023:{folder}")
    assert found.prompts == (["a hammer"] * 3 + ["a blue cat"] * 3) * 4
    assert found.sources == ["DALLE", "Glide", "LDM"] * 8
    np.testing.assert_allclose(found.labels["quality_std"], 0.02)
    np.testing.assert_allclose(found.labels["authenticity_std"], 0.04)
    np.testing.assert_allclose(found.labels["consistency_std"], 0.06)
    np.testing.assert_allclose(found.labels["quality"], scores[1][:, 0] / 100, rtol=1e-12)


@pytest.mark.slow
def test_aigciqa2023_without_an_index(aigciqa):
    folder, _ = aigciqa
    with_index = read_manifest(f"aigciqa2023:{folder}")
    (folder / "pic-index.xlsx").unlink()
    found = read_manifest(f"aigciqa2023:{folder}")
    assert found.prompts == with_index.prompts
    assert found.sources == ["model-1"] * 8 + ["model-2"] * 8 + ["model-3"] * 8
    assert found.notes == ("pic-index.xlsx is missing: models and prompts follow from the order of the images",)
    write_xlsx(folder / "AIGCIQA2023_Prompts.xlsx", [*PROMPTS, ["a", "b", "c"], ["a", "b", "d"]])
    assert refused(f"aigciqa2023:{folder}") == (
        f"{folder}/AIGCIQA2023_Prompts.xlsx: 24 images are no whole number of models with 4 images of 4 prompts; "
        "add pic-index.xlsx, which says what each image shows"
    )


@pytest.mark.slow
def test_aigciqa2023_refusals(aigciqa):
    folder, _ = aigciqa
    data = f"aigciqa2023:{folder}"
    write_xlsx(folder / "pic-index.xlsx", [["DALLE", "cat.png"]])
    assert refused(data) == (
        f"{folder}/pic-index.xlsx, row 1, column image: 'cat.png' does not name a prompt; expected PPP-k.png"
    )
    write_xlsx(folder / "pic-index.xlsx", [["DALLE", "000-0.png"], ["DALLE", "007-0.png"]])
    assert refused(data) == f"{folder}/pic-index.xlsx: prompt 7 is none of 2; unpack the set again"
    write_xlsx(folder / "pic-index.xlsx", [["DALLE", "000-0.png"]])
    assert refused(data) == f"{folder}/pic-index.xlsx: 1 rows for 24 scores; unpack the set again"
    other = folder / "DATA" / "MOS" / "mosz3.mat"
    scipy.io.savemat(other, {"MOSz": np.ones((23, 1))})
    assert refused(data) == f"{folder}/DATA/MOS: 23 values of consistency and 24 of quality; unpack the set again"
    scipy.io.savemat(other, {"MOS": np.ones((24, 1)), "SD": np.ones((2, 1))})
    assert refused(data) == f"{other}: has no numbers called 'MOSz'; found: MOS, SD"
    scipy.io.savemat(other, {"MOSz": np.array(["a", "b"], dtype=object)})
    assert refused(data) == f"{other}: has no numbers called 'MOSz'; found: MOSz"
    other.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(600))
    assert refused(data) == f"{other}: is of MATLAB 7.3; save it with -v7"
    other.unlink()
    assert refused(data) == (
        f"{folder}: mosz3.mat is missing (scores of correspondence); expected DATA/MOS/mosz3.mat or MOS/mosz3.mat or "
        "DATA/mosz3.mat or mosz3.mat; give the folder of the set as it was unpacked"
    )


# AIGIQA-20K

TRAIN = [["DALLE2_0000.png", "a tray, of sushi", 2.5], ["SD1.5_0001.png", "a city", 5]]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("suffix", ["csv", "xlsx"])
def test_aigiqa_20k(tmp_path, header, suffix):
    rows = [*([["name", "prompt", "mos"]] if header else []), *TRAIN]
    if suffix == "xlsx":
        write_xlsx(tmp_path / "info_train.xlsx", rows)
    else:
        write_lines(tmp_path / "info_train.csv", [f'{name},"{prompt}",{mos}' for name, prompt, mos in rows])
    write_lines(tmp_path / "info_val.csv", [*(["name,prompt"] if header else []), "Midjourney_0002.png,a lake"])
    write_lines(tmp_path / "info_test.csv", [*(["name,prompt,mos"] if header else []), "PG2_0003.png,a hill,"])
    draw(tmp_path, ["train/DALLE2_0000.png", "val/Midjourney_0002.png"])
    found = read_manifest(f"aigiqa-20k:{tmp_path}")
    assert found.images == ["train/DALLE2_0000.png", "train/SD1.5_0001.png"]
    assert (found.prompts, found.sources) == (["a tray, of sushi", "a city"], ["DALLE2", "SD1.5"])
    assert (found.splits, found.image_root) == (["train", "train"], tmp_path)
    np.testing.assert_allclose(found.labels["quality"], [0.5, 1])
    assert found.targets == (QUALITY,)
    assert ranges(found)["quality"] == "0 to 5 (adapter)"
    assert found.notes == (
        "info_val.csv: 1 rows have no score and are left out",
        "info_test.csv: 1 rows have no score and are left out",
    )
    unlabelled = read_manifest(f"aigiqa-20k:{tmp_path}", read_labels=False)
    assert unlabelled.images[2:] == ["val/Midjourney_0002.png", "PG2_0003.png"]  # of test there is no folder
    assert unlabelled.splits == ["train", "train", "val", "test"]
    assert unlabelled.notes == ()


def test_aigiqa_20k_with_scores_everywhere_or_nowhere(tmp_path):
    write_lines(tmp_path / "info_train.csv", ["name,prompt,mos", "A_0.png,p,1", "A_1.png,p,"])
    write_lines(tmp_path / "info_test.csv", ["name,prompt,mos", "B_2.png,q,3"])
    found = read_manifest(f"aigiqa-20k:{tmp_path}")
    assert (found.images, found.splits) == (["A_0.png", "B_2.png"], ["train", "test"])
    assert found.places == [f"{tmp_path}/info_train.csv, line 2", f"{tmp_path}/info_test.csv, line 2"]
    assert found.notes == ("info_train.csv: 1 rows have no score and are left out",)
    (tmp_path / "info_train.csv").unlink()
    write_lines(tmp_path / "info_test.csv", ["name,prompt", "B_2.png,q"])
    assert refused(f"aigiqa-20k:{tmp_path}") == (
        f"{tmp_path}/info_test.csv: no row has a score; take the part of the set that is published with them"
    )
    (tmp_path / "info_test.csv").unlink()
    assert refused(f"aigiqa-20k:{tmp_path}") == (
        f"{tmp_path}: info_train.csv is missing (the table of images, prompts and scores); "
        "expected info_train, info_val or info_test as .csv or .xlsx; give the folder of the set"
    )


# PKU-I2IQA

PKU = ["Midjourney/dog_1.png\t4.5\t3\t2\ta dog, running", "SD\\cat_0.png\t1\t2\t5\ta cat"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", [True, False])
def test_pku_i2iqa(tmp_path, header, end):
    first = ["path\tquality\tauthenticity\tconsistency\tprompt"] if header else []
    write_lines(tmp_path / "PKU-I2IQA.txt", [*first, *PKU], end)
    (tmp_path / "README.txt").write_text("not a table\n")
    draw(tmp_path / "images", ["Midjourney/dog_1.png"])
    found = read_manifest(f"pku-i2iqa:{tmp_path}")
    assert (found.images, found.image_root) == (["Midjourney/dog_1.png", "SD/cat_0.png"], tmp_path / "images")
    assert (found.prompts, found.splits) == (["a dog, running", "a cat"], ["", ""])
    assert found.sources == ["Midjourney", "Stable Diffusion V1.5"]
    np.testing.assert_allclose(found.labels["quality"], [0.875, 0])
    np.testing.assert_allclose(found.labels["consistency"], [0.25, 1])
    np.testing.assert_allclose(found.labels["authenticity"], [0.5, 0.25])
    assert found.targets == (QUALITY, CONSISTENCY, AUTHENTICITY)
    assert ranges(found) == dict.fromkeys(("quality", "consistency", "authenticity"), "1 to 5 (adapter)")


def test_pku_i2iqa_in_parts_and_as_annotations(tmp_path):
    write_lines(tmp_path / "train.txt", PKU[:1])
    write_lines(tmp_path / "test.txt", PKU[1:])
    assert read_manifest(f"pku-i2iqa:{tmp_path}").splits == ["test", "train"]
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).unlink()
    write_lines(tmp_path / "annotations.csv", ["name,mos_quality", "mj_1.png,3", "other/x.png,5"])
    found = read_manifest(f"pku-i2iqa:{tmp_path}")
    assert found.prompts == [""] * 2
    assert found.groups == ["", ""]
    assert found.notes == ("no row has a prompt: of use for quality alone",)
    assert found.sources == ["Midjourney", "other"]
    np.testing.assert_allclose(found.labels["quality"], [0.5, 1])
    assert source_of("summer.png") == source_of("sdk_tool.png") == ""
    (tmp_path / "annotations.csv").unlink()
    assert refused(f"pku-i2iqa:{tmp_path}") == (
        f"{tmp_path}: annotations.csv is missing (the table of images and scores); "
        "expected it, or .txt with path, quality, authenticity, consistency and prompt between tabs"
    )


# EvalMuse-40K


def entry(**changed):
    return {
        "prompt_id": "00012",
        "prompt": "a cat in a hat",
        "type": "real",
        "img_path": "SDXL/00012.png",
        "total_score": [3, 4, 5],
        "element_score": "{'cat (animal)': [1, 1, 0], 'hat (object)': 0.0}",
        "promt_meaningless": [0, 0, 0],
    } | changed


def write_json(path, records):
    path.write_text(json.dumps(records))


def test_evalmuse_40k(tmp_path):
    rows = [entry(), entry(img_path="PixArt/7.png", total_score=[2], element_score="", prompt="snow")]
    write_json(tmp_path / "train_list.json", [*rows, entry(total_score=[])])
    write_json(tmp_path / "test.json", [{"prompt": "x", "img_path": "SDXL/9.png", "prompt_id": 3}])
    draw(tmp_path / "images", ["SDXL/00012.png"])
    found = read_manifest(f"evalmuse-40k:{tmp_path}")
    assert (found.images, found.image_root) == (["SDXL/00012.png", "PixArt/7.png"], tmp_path / "images")
    assert (found.prompts, found.sources) == (["a cat in a hat", "snow"], ["SDXL", "PixArt"])
    assert found.explanations == ["shows cat; lacks hat", ""]
    assert found.groups == ["a cat in a hat", "snow"]
    np.testing.assert_allclose(found.labels["consistency"], [0.75, 0.25])
    np.testing.assert_allclose(found.labels["consistency_std"], [np.std([3, 4, 5], ddof=1) / 4, np.nan])
    assert found.targets == (CONSISTENCY,)
    assert ranges(found) == {"consistency": "1 to 5 (adapter)"}
    assert found.places[1] == f"{tmp_path}/train_list.json, entry 2"
    assert found.notes == (
        "train_list.json: 1 rows have no score and are left out",
        "test.json: 1 rows have no score and are left out",
    )


def test_what_raters_saw_is_read_and_never_run(tmp_path):
    place = "list, entry 1"
    for hostile in (
        "__import__('os').system('touch pwned')",
        "{'cat': __import__('os').system('touch pwned')}",
        "[1, 2]",
        "{" * 5000,
        "9" * 30_000,
    ):
        with pytest.raises(UserError, match=r"list, entry 1: element_score .* holds no dict"):
            explanation_of(hostile, place)
    assert not list(tmp_path.iterdir())
    assert explanation_of(None, place) == explanation_of("{}", place) == explanation_of("{'cat': []}", place) == ""
    assert explanation_of({"red cat (attribute)": [0, 0, 1], "hat": 1}, place) == "shows hat; lacks red cat"
    assert explanation_of("{'cat': 'yes', 'age': 7}", place) == ""


@pytest.mark.parametrize(
    ("records", "line"),
    [
        ({}, ": is no list of objects; expected [{prompt, img_path, total_score, ...}]"),
        ([], ": is no list of objects; expected [{prompt, img_path, total_score, ...}]"),
        ([entry(), 3], ", entry 2: is no object; expected {prompt, img_path, total_score, ...}"),
        ([entry(prompt=None)], ", entry 1: has no text 'prompt'; add it or remove the entry"),
        ([entry(total_score=[3, 6])], ", entry 1: total_score holds '6'; expected a list of integers from 1 to 5"),
        ([entry(total_score="x")], ", entry 1: total_score holds 'x'; expected a list of integers from 1 to 5"),
        ([entry(element_score="cat")], ", entry 1: element_score 'cat' holds no dict; correct it or leave it out"),
        ([entry(prompt="")], ", entry 1: has no text 'prompt'; add it or remove the entry"),
    ],
)
def test_evalmuse_40k_refusals(tmp_path, records, line):
    write_json(tmp_path / "train_list.json", records)
    assert refused(f"evalmuse-40k:{tmp_path}") == f"{tmp_path}/train_list.json{line}"


# KonIQ-10k

KONIQ = "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,MOS_zscore"


@pytest.mark.parametrize("quoted", [True, False])
def test_koniq_10k(tmp_path, quoted):
    header = ",".join(f'"{name}"' for name in KONIQ.split(",")) if quoted else KONIQ
    rows = ["10004473376.jpg,0,0,25,73,7,105,3.828571429,0.5,63.3", "10007357496.jpg,0,3,45,47,1,96,1,1,4.7"]
    write_lines(tmp_path / "koniq10k_scores_and_distributions.csv", [header, *rows], "\n")
    draw(tmp_path / "512x384", ["10004473376.jpg"])
    found = read_manifest(f"koniq-10k:{tmp_path}")
    assert (found.image_root, found.images) == (tmp_path / "512x384", ["10004473376.jpg", "10007357496.jpg"])
    assert (found.prompts, found.groups) == ([""] * 2, [""] * 2)
    np.testing.assert_allclose(found.labels["quality"], [(3.828571429 - 1) / 4, 0])
    np.testing.assert_allclose(found.labels["quality_std"], [0.125, 0.25])
    assert ranges(found) == {"quality": "1 to 5 (adapter)"}
    draw(tmp_path / "1024x768", ["10004473376.jpg"])
    assert read_manifest(f"koniq-10k:{tmp_path}").image_root == tmp_path / "1024x768"


def test_koniq_10k_with_sets(tmp_path):
    lines = [f"{KONIQ},set", "a.jpg,0,0,0,0,1,1,5,0,99,training", "b.jpg,1,0,0,0,0,1,1,0,0,test"]
    write_lines(tmp_path / "koniq10k_scores_and_distributions.csv", lines)
    assert read_manifest(f"koniq-10k:{tmp_path}").splits == ["training", "test"]
    write_lines(tmp_path / "koniq10k_scores_and_distributions.csv", ["image_name,c1", "a.jpg,0"])
    assert refused(f"koniq-10k:{tmp_path}") == (
        f"{tmp_path}/koniq10k_scores_and_distributions.csv: missing column 'mos'; found: image_name, c1"
    )


# All of them


def test_another_folder_of_images(tmp_path):
    write_lines(tmp_path / "data.csv", ["name,prompt,mos_quality", "a_0.jpg,p,1"])
    assert read_manifest(f"agiqa-3k:{tmp_path}", image_root=tmp_path / "x").image_root == tmp_path / "x"


def mat(**options):
    content = io.BytesIO()
    scipy.io.savemat(content, {"MOSz": np.full((8, 1), 50.0)}, **options)
    return content.getvalue()


SMALL = {
    "agiqa-1k": ("AIGC_all.csv", b"Image,Score\ndeepai_1_1_0_1.jpg,3\n"),
    "agiqa-3k": ("data.csv", b"name,prompt,mos_quality\r\na_0.jpg,p,1\r\n"),
    "aigiqa-20k": ("info_train.csv", b"A_0.png,p,1\n"),
    "evalmuse-40k": ("train_list.json", json.dumps([entry()]).encode()),
    "koniq-10k": ("koniq10k_scores_and_distributions.csv", f"{KONIQ}\na.jpg,0,0,0,0,1,1,5,0,99\n".encode()),
    "pku-i2iqa": ("list.txt", "\n".join(PKU).encode()),
    "aigciqa2023": ("mosz1.mat", mat()),
}
MATLAB = {"plain": ("mosz1.mat", mat()), "compressed": ("mosz3.mat", mat(do_compression=True))}


def test_every_adapter_meets_hostile_bytes():
    assert SMALL.keys() == FOLDER_ADAPTERS.keys()


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"aigciqa2023"}))
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_bytes_are_rows_or_one_line(tmp_path, name, data):
    meets_hostile_bytes(tmp_path, name, *SMALL[name], data=data)


@pytest.mark.slow
@pytest.mark.parametrize("small", MATLAB.values(), ids=MATLAB.keys())
@given(data=st.data())
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # a process each
def test_hostile_bytes_of_matlab_are_rows_or_one_line(tmp_path, small, data):
    for i in (1, 3):
        (tmp_path / f"mosz{i}.mat").write_bytes(mat())
    write_lines(tmp_path / "prompts.csv", ["Style,Object,prompt", "a,b,c", "d,e,f"])
    meets_hostile_bytes(tmp_path, "aigciqa2023", *small, data=data)


def test_a_reader_that_crashes_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "deltaclip.features.data.adapters.aigciqa2023.READER", "import os, signal; os.kill(os.getpid(), signal.SIGBUS)"
    )
    with pytest.raises(UserError) as caught:
        read_vector(tmp_path / "a.mat", "MOSz")
    assert str(caught.value) == f"{tmp_path / 'a.mat'}: is no readable MATLAB file (signal 7); unpack it again"


def meets_hostile_bytes(tmp_path, name, file, content, *, data):
    content = bytearray(content)
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / file).write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    line = ""
    try:
        assert len(read_manifest(f"{name}:{tmp_path}"))
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert line.startswith(str(tmp_path)) or not line
