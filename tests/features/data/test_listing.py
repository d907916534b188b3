"""What lies in a folder: images by their content, and everything else counted by what it is."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from deltaclip.features.data import pillow
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.listing import count_words, kind_of, list_folder
from deltaclip.tests.features.data.odd_images import animated, encoded, picture, usable_files

TEXT = "an old man on a road, сумерки"


def test_every_usable_image_is_one_without_its_suffix(tmp_path):
    files = usable_files() | {"jp2": encoded(Image.fromarray(picture()), "JPEG2000")}
    files |= {kind: encoded(Image.fromarray(picture()), kind) for kind in ("BMP", "PPM", "ICO", "AVIF")}
    files["comment.ppm"] = b"P3 # a comment\n1 1 255 0 0 0\n"
    for number, content in enumerate(files.values()):
        (tmp_path / f"file {number}").write_bytes(content)
    found = list_folder(tmp_path)
    assert (len(found.images), found.others) == (len(files), {})


KINDS = {
    b"BMW on a road": "text file",
    b"Pyramids of Giza": "text file",
    b"P1 to P6": "text file",
    b"{}": "text file",
    b"\xe9t\xe9": "text file",
    TEXT.encode("utf-16"): "text file",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "SVG image",
    b"<?xml version='1.0'?>\n<!-- a tool -->\n<svg/>": "SVG image",
    b"\0\0\0\x1cftypheic\0\0\0\0mif1heic": "HEIC image",
    b"\xff\x0a\xfa\x01": "JPEG XL image",
    b"8BPS\0\1": "Photoshop image",
    b"%PDF-1.7\n%\xe2\xe3": "page of PDF or PostScript",
    b"\0\0\0\x20ftypisom": "video",
    b"\x1aE\xdf\xa3": "video",
    b"RIFF\0\0\0\0WAVEfmt ": "audio file",
    b"PK\3\4\x14\0": "archive",
    b"\0" * 257 + b"ustar": "archive",
    b"\0\1\2\3": "other file",
    b"": "empty file",
}


@pytest.mark.parametrize("content", KINDS)
def test_what_is_no_image_is_counted_as_what_it_is(tmp_path, content, monkeypatch):
    for words, (place, mark, _, *rest) in list(pillow.PLUGINS.items()):  # as where they are not installed
        monkeypatch.setitem(pillow.PLUGINS, words, (place, mark, "no_such_module", *rest))
    (tmp_path / "file").write_bytes(content)
    assert list_folder(tmp_path).counts() == {KINDS[content]: 1}


def test_hidden_system_and_unfinished_files_are_never_images(tmp_path):
    content = animated("PNG", ["red"])
    hidden = [".a.png", "._a.png", "~$a.png", "Thumbs.db", "desktop.ini", ".DS_Store"]
    unfinished = ["a.png.part", "b.png.crdownload", "c.png~", "d.tmp"]
    folders = [".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails"]
    for name in [*hidden, *unfinished, *(f"{folder}/deep/a.png" for folder in folders), "sub/a.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = list_folder(tmp_path)
    assert found.images == [tmp_path / "sub/a.png"]
    assert found.counts() == {
        "hidden file": len(hidden),
        "hidden folder": len(folders),
        "unfinished or temporary file": len(unfinished),
    }
    # A folder that was asked for may itself be hidden.
    assert len(list_folder(tmp_path / ".git").images) == 1


def test_links_pipes_and_circles_neither_stop_nor_block_nor_lead_out(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(animated("PNG", ["red"]))
    (tmp_path / "secret").write_bytes(animated("PNG", ["red"]))
    os.mkfifo(folder / "pipe")
    (folder / "round").symlink_to("about")
    (folder / "about").symlink_to("round")
    (folder / "self").symlink_to(".")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "inner").symlink_to("a")
    (folder / "gone").symlink_to("nowhere")
    found = list_folder(folder)
    assert found.images == [folder / "a", folder / "inner"]
    assert found.counts() == {
        "broken link": 3,
        "link to a folder": 2,
        "link out of the folder": 1,
        "pipe or device": 1,
    }
    assert count_words(found.counts()) == (
        "3 broken links, 2 links to folders, 1 link out of the folder, 1 pipe or device"
    )


def test_what_has_the_name_of_an_image_is_one_whatever_it_holds(tmp_path):
    (tmp_path / "text.JPG").write_text(TEXT)
    (tmp_path / "empty.png").touch()
    (tmp_path / "gone.png").symlink_to("nowhere")
    assert [path.name for path in list_folder(tmp_path).images] == ["empty.png", "gone.png", "text.JPG"]


def test_used_files_are_not_counted_and_words_are_singular_and_plural(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("x")
    found = list_folder(tmp_path)
    assert count_words(found.counts({tmp_path / "a.txt"})) == "2 text files"
    assert count_words(found.counts({tmp_path / "a.txt", tmp_path / "b.txt"})) == "1 text file"


def test_the_order_is_that_of_the_parts_of_paths(tmp_path):
    for name in ("b.png", "a/z.png", "a.png", "a-b/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    paths = list_folder(tmp_path).images
    assert paths == sorted(paths)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        list_folder(tmp_path / "gone")
    assert kind_of(tmp_path / "gone") == ""


def test_a_hidden_list_of_a_set_is_no_list_of_it(tmp_path):
    (tmp_path / "train.txt").write_text("a.png\t1\t2\t3\ta prompt\n")
    (tmp_path / "._train.txt").write_bytes(b"\0\5\26\7" + b"\t" * 9)
    (tmp_path / "test.txt").mkdir()
    assert read_manifest(f"pku-i2iqa:{tmp_path}").images == ["a.png"]
