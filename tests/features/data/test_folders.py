"""A folder or tar archives as DATA: prompts beside pictures and in them, tables of metadata, what is left out."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.archives import Archive
from deltaclip.features.data.images import hash_images
from deltaclip.features.data.sources import is_there, read_image_bytes
from deltaclip.tests.features.data.odd_images import noise_pictures

EXPECTING = "Expecting property name enclosed in double quotes"


@pytest.fixture
def folder(tmp_path):
    """Return a folder of five pictures, one of them in a sub-folder."""
    where = tmp_path / "set"
    (where / "more").mkdir(parents=True)
    paths = noise_pictures(where, 5)
    shutil.move(paths[4], where / "more" / "p4.png")
    return where


def refused(data, **options):
    with pytest.raises(UserError) as caught:
        read_manifest(str(data), **options)
    return str(caught.value)


def contents(manifest):
    return [read_image_bytes(manifest.image_path(row), manifest.image_root) for row in range(len(manifest))]


# Loose pictures


def test_prompts_from_everywhere(folder):
    (folder / "p0.txt").write_text("\ufeffof a text\n", encoding="utf-8")
    (folder / "p1.json").write_text(json.dumps({"caption": "of an object", "mos": 4, "model": "sdxl", "tags": ["x"]}))
    (folder / "p2.png.txt").write_text("of the whole name")
    info = PngInfo()
    info.add_text("parameters", "of itself\nNegative prompt: x\nSteps: 20, Sampler: Euler")
    Image.open(folder / "p3.png").save(folder / "p3.png", pnginfo=info)
    (folder / "notes.md").write_text("nothing")
    (folder / "more" / ".hidden.png").write_bytes(b"x")
    manifest = read_manifest(str(folder), label_range="1,5")
    assert manifest.images == ["more/p4.png", "p0.png", "p1.png", "p2.png", "p3.png"]
    assert manifest.prompts == ["", "of a text", "of an object", "of the whole name", "of itself"]
    assert manifest.sources == ["", "", "sdxl", "", ""]
    np.testing.assert_array_equal(manifest.labels["quality"], [np.nan, np.nan, 0.75, np.nan, np.nan])
    assert manifest.places[2] == str(folder / "p1.png")
    assert manifest.notes == (
        "left out: 1 hidden file, 1 text file",
        "prompts: 2 from NAME.txt, 1 from NAME.json, 1 from the pictures themselves (A1111)",
        "1 rows have no prompt: of use for quality alone",
    )


def test_a_text_wins_over_an_object_and_that_is_said(folder):
    (folder / "p0.txt").write_text("a cat")
    (folder / "p0.json").write_text('{"prompt": "a dog"}')
    (folder / "p1.txt").write_text("a cat")
    (folder / "p1.json").write_text('{"caption": "a cat "}')
    manifest = read_manifest(str(folder))
    assert manifest.prompts[1:3] == ["a cat", "a cat"]
    assert "1 pictures have another prompt in NAME.json than in NAME.txt, which counts" in manifest.notes


def test_a_table_among_loose_pictures_is_named(folder):
    (folder / "ratings.csv").write_text("image,quality\np0.png,3\n")
    notes = read_manifest(str(folder)).notes
    assert notes[0] == "left out: 1 text file"
    assert notes[1] == "ratings.csv is not read: give it in place of the folder if it says what the pictures are of"


OTHERS = "save it as UTF-8; it may be in GB18030, Shift-JIS or damaged"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_what_lies_beside_is_read_in_the_encodings_that_tables_are(folder, encoding):
    prompt = "\N{LATIN SMALL LETTER E WITH ACUTE}clair and tea"
    (folder / "p0.txt").write_bytes(prompt.encode(encoding))
    (folder / "p1.json").write_bytes(json.dumps({"caption": f"{prompt} 1"}, ensure_ascii=False).encode(encoding))
    found = read_manifest(str(folder))
    prompts = dict(zip(found.images, found.prompts, strict=True))
    assert (prompts["p0.png"], prompts["p1.png"]) == (prompt, f"{prompt} 1")
    name = "Windows-1252" if encoding == "cp1252" else encoding.upper()
    words = f"2 files beside pictures are read as {name}"
    assert (words in found.notes) == (not encoding.startswith("utf-8"))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("p0.txt", b"\xff\xfe\x00", "{at}/p0.txt: is marked as UTF-16 text and is none; save it as UTF-8"),
        ("p0.json", b"\x8f\x8f", f"{{at}}/p0.json: is no UTF-8 text (byte 0x8F at 0, line 1); {OTHERS}"),
        ("p0.json", b"{'a': 1}", f"{{at}}/p0.json: broken JSON ({EXPECTING}); write it again"),
        ("p0.json", b"[1]", "{at}/p0.json: is no JSON object; give one object with the columns of its picture"),
        ("p0.json", b'{"mos": "good"}', "{at}/p0.png, column mos: 'good' is no number; leave a missing label empty"),
        ("p0.json", b'{"group": [1, 2]}', "{at}/p0.png, column group: holds a list, no text; write texts and numbers"),
    ],
    ids=range(6),
)  # fmt: skip
def test_refusals_of_what_lies_beside(folder, name, content, line):
    (folder / name).write_bytes(content)
    assert refused(folder) == line.replace("{at}", str(folder))


def test_a_name_that_is_no_text_is_counted(folder):
    shutil.copy(folder / "p0.png", folder / os.fsdecode(b"\xe9.png"))
    manifest = read_manifest(str(folder))
    assert len(manifest) == 5
    assert manifest.notes[0] == "left out: 1 picture whose name is no text"


def test_a_link_out_of_the_folder_is_a_reason(folder, tmp_path):
    secret = noise_pictures(tmp_path, 1)[0]
    (folder / "link.png").symlink_to(secret)
    manifest = read_manifest(str(folder))
    found = hash_images([manifest.image_path(row) for row in range(len(manifest))], folder)
    assert [content.reason for content in found if content.reason] == ["links to a file outside the image root"]


# Tables of metadata


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_beside_the_pictures(folder, suffix):
    rows = [{"file_name": f"p{n}.png", "text": f"thing {n}", "mos": n + 1} for n in range(3)]
    path = folder / f"metadata.{suffix}"
    if suffix == "csv":
        path.write_text("\n".join(["file_name,text,mos", *(",".join(map(str, row.values())) for row in rows)]))
    elif suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    manifest = read_manifest(str(folder), label_range="1,5")
    assert manifest.images == ["p0.png", "p1.png", "p2.png"]
    assert manifest.prompts == ["thing 0", "thing 1", "thing 2"]
    np.testing.assert_array_equal(manifest.labels["quality"], [0, 0.25, 0.5])
    assert manifest.notes[0] == "left out: 2 pictures without a row in the metadata"


def test_metadata_in_folders_of_two_sides(tmp_path):
    for side, count in (("train", 4), ("test", 2)):
        where = tmp_path / "set" / side
        where.mkdir(parents=True)
        names = [path.name for path in noise_pictures(where, count)]
        (where / "metadata.csv").write_text("\n".join(["file_name,prompt", *(f"{name},{side}" for name in names)]))
    manifest = read_manifest(str(tmp_path / "set"))
    assert manifest.images == ["test/p0.png", "test/p1.png", *(f"train/p{n}.png" for n in range(4))]
    assert manifest.splits == ["test"] * 2 + ["train"] * 4
    assert manifest.places[3] == f"{tmp_path}/set/train/metadata.csv, line 3"
    assert len(set(contents(manifest))) == 4  # the two sides have two pictures in common


def test_metadata_without_prompts_goes_with_those_beside(folder):
    (folder / "metadata.csv").write_text("file_name,mos\np1.png,3\nmore/p4.png,2\np0.png,1\n")
    (folder / "p0.txt").write_text("of a text")
    manifest = read_manifest(str(folder), label_range="1,5")
    assert manifest.images == ["p1.png", "more/p4.png", "p0.png"]
    assert manifest.prompts == ["", "", "of a text"]
    assert "prompts: 1 from NAME.txt" in manifest.notes


def test_metadata_without_names(folder):
    (folder / "metadata.csv").write_text("prompt,mos\nx,3\n")
    assert refused(folder) == f"{folder}/metadata.csv: missing column 'file_name'; found: prompt, mos"


# Tar archives


def pack(path, members, *, kind=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def samples(tmp_path):
    """Return members of five samples as WebDataset has them."""
    files = noise_pictures(tmp_path, 5)
    parts = []
    for number, path in enumerate(files):
        fields = {"mos": number, "key": f"{number:05}", "url": "https://x/y.png", "status": "success"}
        parts += [
            (f"{number:05}.png", path.read_bytes()),
            (f"{number:05}.txt", f"thing {number}".encode()),
            (f"{number:05}.json", json.dumps(fields).encode()),
        ]
    return parts


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards(tmp_path, samples, kind):
    where = tmp_path / "shards"
    where.mkdir()
    pack(where / "00000.tar", samples[:9], kind=kind)
    pack(where / "00001.tar", [*samples[9:], ("./x/dir.readme", b"text"), ("00004.cls", b"3")], kind=kind)
    (where / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"key": ["00000"], "caption": ["thing 0"]}), where / "00000.parquet")
    of_folder = read_manifest(str(where), label_range="0,4")
    assert of_folder.notes[0] == "left out: 3 text files, 1 other file"
    for data in (f"{where}/{{00000..00001}}.tar", f"{where}/0000?.tar"):
        manifest = read_manifest(data, label_range="0,4")
        assert manifest.images == of_folder.images == [f"0000{n // 3}.tar/{n:05}.png" for n in range(5)]
        assert manifest.prompts == [f"thing {n}" for n in range(5)]
        np.testing.assert_array_equal(manifest.labels["quality"], np.arange(5) / 4)
        assert contents(manifest) == [content for name, content in samples if name.endswith("png")]
        assert manifest.places[4] == f"{where}/00001.tar/00004.png"
        assert manifest.notes[0] == "left out: 2 text files"
    assert read_manifest(f"{where}/00000.tar", label_range="0,4").prompts == ["thing 0", "thing 1", "thing 2"]
    assert is_there(where / "00000.tar" / "00000.png")
    assert not is_there(where / "00000.tar" / "7.png")


def test_names_of_members(tmp_path):
    """Long names, dots in them, several pictures of one key, one name twice, names that lead out, links."""
    one, two, three = (path.read_bytes() for path in noise_pictures(tmp_path, 3))
    long = f"{'d' * 90}/{'n' * 120}"
    path = pack(
        tmp_path / "t.tar",
        [
            ("./sd1.5_a.png", one),
            ("./sd1.5_a.txt", b"of the whole stem"),
            ("sd1.txt", b"of nobody"),
            ("7.left.png", one),
            ("7.right.png", two),
            ("7.txt", b"of a key"),
            (f"{long}.png", two),
            (f"{long}.txt", "lang \u00e4".encode()),
            ("twice.png", one),
            ("twice.png", three),
            ("../../out.png", one),
            ("/abs/a b%20.png", three),
            ("._7.left.png", b"\0\5\26\7"),
            ("bare", two),
        ],
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    manifest = read_manifest(str(path))
    found = dict(zip(manifest.images, zip(manifest.prompts, contents(manifest), strict=True), strict=True))
    assert found == {
        "t.tar/sd1.5_a.png": ("of the whole stem", one),
        "t.tar/7.left.png": ("of a key", one),
        "t.tar/7.right.png": ("of a key", two),
        f"t.tar/{long}.png": ("lang \u00e4", two),
        "t.tar/twice.png": ("", three),
        "t.tar/abs/a b%20.png": ("", three),
        "t.tar/bare": ("", two),
    }
    assert set(manifest.notes[0].removeprefix("left out: ").split(", ")) == {
        "1 earlier member of the same name",
        "1 member whose name leads out of the archive",
        "1 link or device",
        "1 hidden file",
        "1 text file",
    }


def test_a_cut_archive_is_refused_at_every_place(tmp_path, samples):
    whole = pack(tmp_path / "t.tar", samples).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # where the zeros begin that end it
    path = tmp_path / "cut.tar"
    for length in sorted({*np.random.default_rng(5).integers(513, end, 25).tolist(), *range(512, end + 1, 512)}):
        path.write_bytes(whole[:length])
        assert refused(path).startswith(f"{path}: is cut or damaged at byte "), length
    path.write_bytes(whole[: end + 512])  # one block of zeros is enough
    assert len(read_manifest(str(path))) == 5


def test_the_place_of_the_cut_is_told(tmp_path, samples):
    whole = pack(tmp_path / "t.tar", samples).read_bytes()
    second = whole.index(b"00001.png")
    (tmp_path / "cut.tar").write_bytes(whole[:second])
    line = f"{tmp_path}/cut.tar: is cut or damaged at byte {second:,}, behind 00000.json; copy or pack it again"
    assert refused(tmp_path / "cut.tar") == line
    damaged = whole[:second] + b"\x55" * 512 + whole[second + 512 :]
    (tmp_path / "cut.tar").write_bytes(damaged)
    assert refused(tmp_path / "cut.tar") == line
    (tmp_path / "cut.tar").write_bytes(whole)
    archive = Archive(tmp_path / "cut.tar")  # its headers are known, then it loses its end
    (tmp_path / "cut.tar").write_bytes(whole[: second + 600])
    with pytest.raises(UserError, match=r"is cut or damaged at byte .*, behind 00001.png; copy or pack it again"):
        archive.read("00001.png")


def test_archives_that_are_none(tmp_path, samples):
    packed = tmp_path / "t.tar.gz"
    packed.write_bytes(gzip.compress(pack(tmp_path / "t.tar", samples).read_bytes()))
    message = "is a compressed archive, in which no picture has a place of its own"
    assert refused(packed) == f"{packed}: {message}; unpack it to .tar first: pictures hardly get smaller"
    texts = pack(tmp_path / "texts.tar", [("a.txt", b"x"), ("b.txt", b"y")])
    assert refused(texts) == f"{texts}: holds no pictures, only 2 text files; give archives of pictures"
    empty = pack(tmp_path / "empty.tar", [])
    assert refused(empty) == f"{empty}: is no tar archive but empty; copy or pack it again"
    empty.write_text("<html>")
    assert refused(empty) == f"{empty}: is no tar archive but a page of HTML; copy or pack it again"


def test_something_beside_a_picture_is_named_in_its_archive(tmp_path, samples):
    path = pack(tmp_path / "t.tar", [*samples[:1], ("00000.json", b"{")])
    assert refused(path) == f"{path}/00000.json: broken JSON ({EXPECTING}); write it again"
    path = pack(tmp_path / "t.tar", [*samples[:1], ("00000.json", b'{"quality": "good"}')])
    line = f"{path}/00000.png, column quality: 'good' is no number; leave a missing label empty"
    assert refused(path) == line


def test_files_of_two_forms_are_one_set(tmp_path, samples):
    """A pattern may name an archive and a table: rows stand one after another."""
    pack(tmp_path / "a.tar", samples)
    Path(tmp_path / "b.csv").write_text("image,prompt,mos\np0.png,x,4\n")
    manifest = read_manifest(f"{tmp_path}/{{a.tar,b.csv}}", label_range="0,4")
    assert manifest.images[4:] == ["a.tar/00004.png", "p0.png"]
    assert [manifest.places[row] for row in (4, 5)] == [f"{tmp_path}/a.tar/00004.png", f"{tmp_path}/b.csv, line 2"]
