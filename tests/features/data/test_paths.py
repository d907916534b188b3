"""Paths as people write them: understood where one file alone can be meant, else with the cause; never a way out."""

from __future__ import annotations

import unicodedata

import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.images import UnreadableFile, read_image_bytes
from deltaclip.features.data.paths import explained, understood, understood_all, why_gone

COMPOSED, APART = (unicodedata.normalize(form, "é/ü 1.png") for form in ("NFC", "NFD"))


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    for name in ("img/a.png", "b b.png", "100%.png", "été.png", APART, "sub/c.png", "sub/d.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"x")
    return root


MEANT = {
    r"img\a.png": ("img/a.png", "taking backslashes for slashes"),
    r".\img\a.png": ("./img/a.png", "taking backslashes for slashes"),
    " img/a.png": ("img/a.png", "leaving out spaces or quotes around them"),
    '"img/a.png"': ("img/a.png", "leaving out spaces or quotes around them"),
    "'b b.png' ": ("b b.png", "leaving out spaces or quotes around them"),
    "b%20b.png": ("b b.png", "percent-encoding"),
    "100%25.png": ("100%.png", "percent-encoding"),
    "%C3%A9t%C3%A9.png": ("été.png", "percent-encoding"),
    COMPOSED: (APART, "another Unicode form"),
    unicodedata.normalize("NFD", "été.png"): ("été.png", "another Unicode form"),
    '"img\\a.png"': (
        "img/a.png",
        "leaving out spaces or quotes around them and taking backslashes for slashes",
    ),
    COMPOSED.replace("/", "\\"): (APART, "taking backslashes for slashes and another Unicode form"),
    # As they stand: they are there, or nothing is.
    "100%.png": ("100%.png", ""),
    "b b.png": ("b b.png", ""),
    r"img\none.png": (r"img\none.png", ""),
    "http://host/a%20b.png": ("http://host/a%20b.png", ""),
    r"C:\data\a.png": (r"C:\data\a.png", ""),
    "a.PNG": ("a.PNG", ""),
}


@pytest.mark.parametrize("written", MEANT)
def test_what_is_meant(root, written):
    assert understood(written, root) == MEANT[written]


def test_a_name_that_is_there_is_never_read_in_another_way(root):
    for name in (r"img\a.png", " b b.png", "b%20b.png", "~"):
        (root / name).write_bytes(b"x")
        assert understood(name, root) == (name, "")


def test_addresses_and_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    for written, how in (
        (f"file://{root}/img/a.png", "their file: address"),
        (f"file://localhost{root}/img/a.png", "their file: address"),
        ("~/img/a.png", "the home folder for ~"),
    ):
        assert understood(written, root) == (f"{root}/img/a.png", how)
    assert understood(f"file://{root}/b%20b.png", root)[0] == f"{root}/b b.png"


OUTSIDE = (
    *(r"..\secret.png", "%2e%2e/secret.png", r"img\..\..\secret.png", "%2Fetc%2Fpasswd", "file:///etc/passwd"),
    *("~/x.png", r"\\host\share\a.png", '"../secret.png"', " ../secret.png", "file://localhost/etc/passwd"),
)


@pytest.mark.parametrize("written", OUTSIDE)
def test_no_reading_leads_out_of_the_root(root, written, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("image,prompt\n" + '"' + written.replace('"', '""') + '",x\n')
    with pytest.raises(UserError, match="lies outside"):
        read_manifest(str(table), image_root=root)
    with pytest.raises(UnreadableFile, match=r"outside the image root|no such file"):
        read_image_bytes(root / understood(written, root)[0], root)


def test_what_is_written_twice_over_is_not_undone_twice(root):
    assert understood("%252e%252e/secret.png", root) == ("%252e%252e/secret.png", "")
    assert understood(r"..\secret.png", root, allow_outside=True) == (
        "../secret.png",
        "taking backslashes for slashes",
    )


def test_a_manifest_says_how_its_paths_were_read(root, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("image,prompt\nimg\\a.png,x\nsub\\c.png,x\nb%20b.png,y\nsub/d.jpg,z\n")
    manifest = read_manifest(str(table), image_root=root)
    assert manifest.images == ["img/a.png", "sub/c.png", "b b.png", "sub/d.jpg"]
    assert manifest.notes[:2] == (
        "2 image paths were understood by taking backslashes for slashes",
        "1 image paths were understood by percent-encoding",
    )
    assert understood_all(["plain.png"], root, allow_outside=False) == (["plain.png"], [])


CAUSES = {
    "http://host/a.png": "download the images and give their folder with --image-root",
    "s3://bucket/a.png": "download the images and give their folder with --image-root",
    r"C:\data\img\a.png": "img/a.png is there: leave out what stands before it",
    r"D:\pictures\z.png": "give --image-root and paths below it",
    "/home/somebody/sub/c.png": "sub/c.png is there: leave out what stands before it",
    "/home/somebody/z.png": "give --image-root and paths below it",
    "root/sub/c.png": "sub/c.png is there: leave out what stands before it",
    "IMG/a.png": "there is img",
    "img/A.PNG": "there is a.png in img",
    "img/a": "there is a.png in img",
    "sub/d.png": "there is d.jpg in sub",
    "sub/e/f.png": "there is no folder e in sub",
    "img": "give the image in it",
    "secret.png": "give --image-root {above}",
    "bb.png": "there is b b.png",
    "link.png": "what it links to is not there",
}


@pytest.mark.parametrize("image", CAUSES)
def test_why_there_is_no_such_file(root, image):
    (root / "link.png").symlink_to("nowhere")
    cause = why_gone(image, root)
    assert cause is not None
    assert cause.words == CAUSES[image].format(above=root.parent)
    assert explained("no such file", image, root) == f"no such file: {cause.words}"
    assert explained("empty file", image, root) == "empty file"


def test_nothing_is_said_where_nothing_tells(root):
    assert why_gone("qqqqqqqqqqqqqqqqqq.webp", root) is None
    assert why_gone("../x/y.png", root) is None
    assert why_gone("a.png", root / "nowhere") is None
    for name in ("gone.png", "101.png", "e.png"):  # near by its suffix alone, another number, another letter
        assert why_gone(name, root) is None, name
