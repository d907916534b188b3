"""Columns, aliases, groups, and the paths an image may have."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.manifest import ALIASES


def write(path, text):
    path.write_text(text)
    return str(path)


def refused(data, **options):
    with pytest.raises(UserError) as caught:
        read_manifest(data, **options)
    return str(caught.value)


def test_all_columns(tmp_path):
    text = "image,prompt,quality,consistency,quality_std,consistency_std,explanation,group,source,split\n"
    found = read_manifest(write(tmp_path / "set.csv", text + "a.png,a cat,1,5,0.4,0.8,no tail,g1,gan,test\n"
                                + "b.png,a dog,5,,,,,,,\n"))  # fmt: skip
    assert (found.name, found.path, found.image_root) == ("set", tmp_path / "set.csv", tmp_path)
    assert found.image_path(1) == tmp_path / "b.png"
    assert {k: str(v) for k, v in found.label_ranges.items()} == {
        "quality": "1 to 5 (detected)",
        "consistency": "1 to 5 (detected)",
    }
    expected = {"quality": [0, 1], "consistency": [1, np.nan], "quality_std": [0.1, np.nan]}
    for column, values in (expected | {"consistency_std": [0.2, np.nan]}).items():
        np.testing.assert_allclose(found.labels[column], values, rtol=1e-12)
    assert (found.explanations, found.sources, found.splits) == (["no tail", ""], ["gan", ""], ["test", ""])
    assert found.groups == ["g1", "a dog"]
    assert list(found.places) == [f"{tmp_path}/set.csv, line 2", f"{tmp_path}/set.csv, line 3"]


def test_every_alias_in_any_case(tmp_path):
    path = tmp_path / "t.csv"
    values = dict.fromkeys(ALIASES, "0.5") | {"image": "a.png", "prompt": "p"}
    seen = 0
    for column, aliases in ALIASES.items():
        for alias in itertools.chain(aliases, map(str.upper, aliases)):
            header = [alias if name == column else name for name in values]
            found = read_manifest(write(path, ",".join(header) + "\n" + ",".join(values.values()) + "\n"))
            texts = (found.images, found.prompts, found.explanations, found.groups, found.sources, found.splits)
            assert texts == (["a.png"], ["p"], *[["0.5"]] * 4), alias
            assert [float(label[0]) for label in found.labels.values()] == [0.5] * 6
            seen += 1
    assert seen == 2 * sum(map(len, ALIASES.values()))


def test_the_best_alias_wins(tmp_path):
    found = read_manifest(write(tmp_path / "t.csv", "name,image,prompt,mos,mos_quality\nold,new,p,0.1,0.9\n"))
    assert found.images == ["new"]
    assert found.labels["quality"] == [0.9]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("imgae,prompt\na,b\n", ": missing column 'image'; rename 'imgae' to 'image'"),
        ("image,prompts\na,b\n", ": missing column 'prompt'; rename 'prompts' to 'prompt'"),
        ("x,y\na,b\n", ": missing column 'image'; found: x, y"),
        ("image,prompt\na,b\n ,c\n", ", line 3, column image: empty image; fill it in or remove the row"),
        (
            "img,consistency\na,1\nc,\n",
            ": has 1 labels of consistency and no prompts to go with them; add a column prompt",
        ),
        (
            "image,prompt,mos\na,b,1\nc,d,\ne,f,x\n",
            ", line 4, column mos: 'x' is no number; leave a missing label empty",
        ),
    ],
)
def test_refusals(tmp_path, text, line):
    assert refused(write(tmp_path / "t.csv", text)) == f"{tmp_path}/t.csv{line}"


@pytest.mark.parametrize("image", ["../a.png", "sub/../../a.png", "/etc/passwd", "..", "."])
def test_paths_that_leave_the_root(tmp_path, image):
    data = write(tmp_path / "t.csv", f"image,prompt\nfine.png,p\n{image},p\n")
    place = f"{tmp_path}/t.csv, line 3, column image"
    remedy = "give --image-root, or --allow-outside to permit it"
    assert refused(data) == f"{place}: image {image!r} lies outside {tmp_path}; {remedy}"
    assert read_manifest(data, allow_outside=True).images == ["fine.png", image]


@pytest.mark.parametrize("image", ["a.png", "./a.png", "sub/../a.png", "..a.png", "sub/..png", "a b/ü.png"])
def test_paths_that_stay(tmp_path, image):
    assert read_manifest(write(tmp_path / "t.csv", f"image,prompt\n{image},p\n")).images == [image]


def test_another_root_is_what_paths_are_measured_by(tmp_path):
    (tmp_path / "lists").mkdir()
    data = write(tmp_path / "lists" / "t.csv", f"image,prompt\n{tmp_path}/pictures/a.png,p\n")
    assert refused(data).startswith(f"{data}, line 2, column image: image '{tmp_path}/pictures/a.png' lies outside")
    found = read_manifest(data, image_root=tmp_path / "pictures")
    assert found.image_path(0) == tmp_path / "pictures" / "a.png"
    # A sibling whose name merely begins with the root's is outside.
    assert "lies outside" in refused(data, image_root=tmp_path / "pict")


def test_a_relative_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.csv", "image,prompt\na.png,p\n")
    assert read_manifest("t.csv").images == ["a.png"]
    write(tmp_path / "t.csv", "image,prompt\n../a.png,p\n")
    assert "lies outside" in refused("t.csv")


def test_groups_are_prompts_without_case_and_spacing(tmp_path):
    data = write(tmp_path / "t.csv", "image,prompt\na,A  Cat\nb,a cat\nc,a\tCAT \nd,acat\ne,STRASSE\nf,straße\n")
    groups = read_manifest(data).groups
    assert groups[0] == groups[1] == groups[2] == "a cat"
    assert groups[4] == groups[5]
    assert len(set(groups)) == 3


def test_the_root_of_the_file_system_as_root(tmp_path):
    data = write(tmp_path / "t.csv", f"image,prompt\n{tmp_path}/a.png,p\n../b.png,q\n")
    assert read_manifest(data, image_root=Path("/")).image_path(0) == tmp_path / "a.png"


def test_labels_that_are_not_read_may_be_anything(tmp_path):
    data = write(tmp_path / "t.csv", "image,prompt,mos,quality_std\na.png,p,good,x\nb.png,q,-7,-1\n")
    assert "is no number" in refused(data)
    found = read_manifest(data, read_labels=False)
    assert found.images == ["a.png", "b.png"]
    assert (found.targets, found.labels, found.label_ranges) == ((), {}, {})
