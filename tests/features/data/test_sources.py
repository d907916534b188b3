"""Pictures inside Parquet and Arrow files: the same bytes as those of the file, whatever is asked in what order."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from deltaclip.base.errors import UserError
from deltaclip.features.data import columnar
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.images import hash_images, read_header
from deltaclip.features.data.sources import UnreadableFile, container_of, is_there, read_image_bytes
from deltaclip.features.data.table import read_table
from deltaclip.tests.features.data.odd_images import noise_pictures

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return 70 small PNG files, each of its own noise and size."""
    return noise_pictures(tmp_path_factory.mktemp("files"), 70)


def columns(files, kind=STRUCT, *, paths=True):
    """Return a table of the files, pictures in a column of this type."""
    cells = [{"bytes": path.read_bytes(), "path": path.name if paths else None} for path in files]
    if not pa.types.is_struct(kind):
        cells = [cell["bytes"] for cell in cells]
    numbers = list(range(len(files)))
    texts = {"prompt": [f"thing {n // 3}" for n in numbers], "quality": [n % 5 + 1.0 for n in numbers]}
    return pa.table({"image": pa.array(cells, type=kind), **texts})


def write_stream(table, path, chunk=9):
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)


def write_file(table, path, chunk=9, compression=None):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=chunk)


FORMS = {
    "one row group": ("t.parquet", pq.write_table),
    "groups of 9": ("t.parquet", lambda table, path: pq.write_table(table, path, row_group_size=9)),
    "plain pages": ("t.parquet", lambda table, path: pq.write_table(table, path, compression="none")),
    "version 2": ("t.parquet", lambda table, path: pq.write_table(table, path, data_page_version="2.0")),
    "no statistics": ("t.parquet", lambda table, path: pq.write_table(table, path, write_statistics=False)),
    "stream": ("t.arrow", write_stream),
    "file": ("t.arrow", write_file),
    "compressed file": ("t.arrow", lambda table, path: write_file(table, path, compression="zstd")),
    "feather": ("t.feather", lambda table, path: feather.write_feather(table, str(path))),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary()], ids=["struct", "binary", "large"])
def test_every_cell_is_the_file_in_any_order(tmp_path, files, form, kind):
    name, write = FORMS[form]
    write(columns(files, kind), tmp_path / name)
    manifest = read_manifest(str(tmp_path / name), label_range="1,5")
    tails = [f"/{path.name}" if kind is STRUCT else "" for path in files]
    assert manifest.images == [f"{name}/image/{row}{tail}" for row, tail in enumerate(tails, start=1)]
    paths = [manifest.image_path(row) for row in range(len(manifest))]
    wanted = [path.read_bytes() for path in files]
    assert [read_image_bytes(path, tmp_path) for path in paths] == wanted
    order = np.random.default_rng(3).permutation(len(paths)).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: read_image_bytes(paths[row], tmp_path), order))
    assert found == [wanted[row] for row in order]
    of_files = [content.sha256 for content in hash_images(files, None)]
    assert [content.sha256 for content in hash_images(paths, tmp_path)] == of_files
    assert read_header(paths[7], tmp_path) == read_header(files[7], None)


def test_cells_are_read_forward_and_held_in_a_window(tmp_path, files, monkeypatch):
    """One row group larger than what is held: a pass in order decodes each cell once, a jump back begins again."""
    monkeypatch.setattr(columnar, "STEP_ROWS", 4)
    monkeypatch.setattr(columnar, "WINDOW_BYTES", 3 * max(path.stat().st_size for path in files))
    pq.write_table(columns(files), tmp_path / "t.parquet")
    cells = columnar.PictureCells(tmp_path / "t.parquet")
    started = []
    blocks = columnar._ParquetFile.blocks
    monkeypatch.setattr(
        columnar._ParquetFile, "blocks", lambda *given: started.append(given[-1]) or blocks(*given)
    )  # counts, and reads as ever
    wanted = [path.read_bytes() for path in files]
    assert [cells.read(f"image/{row + 1}") for row in range(70)] == wanted
    assert started == [0]
    window = cells._windows["image"]
    assert sum(len(block) for _, block in window._blocks) <= 8
    assert cells.read("image/70") == wanted[69]
    assert started == [0]
    assert cells.read("image/2") == wanted[1]
    assert started == [0, 0]


def test_struct_without_bytes_has_files(tmp_path, files):
    """Of one column, some rows have bytes, some only the path of a file, which is relative to the image root."""
    cells = [
        {"bytes": path.read_bytes(), "path": None} if row % 2 else {"bytes": None, "path": path.name}
        for row, path in enumerate(files[:6])
    ]
    pq.write_table(pa.table({"image": pa.array(cells, type=STRUCT), "prompt": ["x"] * 6}), tmp_path / "t.parquet")
    for path in files[:6:2]:
        shutil.copy(path, tmp_path)
    manifest = read_manifest(str(tmp_path / "t.parquet"))
    assert manifest.images[:2] == [files[0].name, "t.parquet/image/2"]
    assert [read_image_bytes(manifest.image_path(row), tmp_path) for row in range(6)] == [
        path.read_bytes() for path in files[:6]
    ]
    assert manifest.notes == ("3 rows have the path of their picture and no bytes: it is looked for as a file",)


@pytest.mark.parametrize(
    "cell", [{"bytes": None, "path": None}, None, {"bytes": None, "path": " "}], ids=["null fields", "null", "blank"]
)
def test_a_row_with_nothing_is_refused(tmp_path, files, cell):
    cells = [{"bytes": files[0].read_bytes(), "path": None}, cell]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pa.array(cells, type=STRUCT), "prompt": ["x", "y"]}), path)
    with pytest.raises(UserError) as caught:
        read_manifest(str(path))
    line = f"{path}, row 2, column image: has neither bytes nor a path; fill it in or remove the row"
    assert str(caught.value) == line


def test_empty_bytes_are_an_empty_file(tmp_path, files):
    cells = [{"bytes": b"", "path": "a.png"}, {"bytes": files[0].read_bytes(), "path": "a.png"}]
    pq.write_table(pa.table({"image": pa.array(cells, type=STRUCT)}), tmp_path / "t.parquet")
    found = hash_images([tmp_path / f"t.parquet/image/{row}/a.png" for row in (1, 2, 3)], tmp_path)
    assert [content.reason for content in found] == ["empty file", "", "no row 3 in t.parquet"]


def test_columns_of_several_pictures_and_of_any_name(tmp_path, files):
    path, table = tmp_path / "t.parquet", columns(files[:3])
    pictures = table.column("image")
    pq.write_table(table.append_column("mask", pictures), path)
    manifest = read_manifest(str(path), label_range="1,5")
    assert manifest.images[0].startswith("t.parquet/image/1")
    assert "the pictures of column 'image' are taken, not mask" in manifest.notes
    pq.write_table(table.rename_columns(["photo", "prompt", "quality"]), path)
    manifest = read_manifest(str(path), label_range="1,5")
    assert manifest.images[0].startswith("t.parquet/photo/1/")
    assert "the pictures of column 'photo' are taken" in manifest.notes
    odd = "my pictures/\u00e4 %20"
    pq.write_table(table.rename_columns([odd, "prompt", "quality"]), path)
    manifest = read_manifest(str(path), label_range="1,5")
    assert read_image_bytes(manifest.image_path(2), tmp_path) == files[2].read_bytes()


def test_names_inside_lead_nowhere(tmp_path, files):
    """A path beside the bytes is a name for people: it never becomes a way to another file."""
    names = ["../../etc/passwd", "/etc/passwd", "C:\\x\\y.png", "..", "a\0b", ""]
    content = files[0].read_bytes()
    cells = [{"bytes": content, "path": name} for name in names]
    pq.write_table(pa.table({"image": pa.array(cells, type=STRUCT)}), tmp_path / "t.parquet")
    manifest = read_manifest(str(tmp_path / "t.parquet"))
    tails = ["/passwd", "/passwd", "/y.png", "", "", ""]
    assert manifest.images == [f"t.parquet/image/{row}{tail}" for row, tail in enumerate(tails, start=1)]
    assert {read_image_bytes(manifest.image_path(row), tmp_path) for row in range(6)} == {content}


def test_a_link_to_a_file_with_pictures_may_not_leave_the_root(tmp_path, files):
    (tmp_path / "root").mkdir()
    pq.write_table(columns(files[:2]), tmp_path / "t.parquet")
    (tmp_path / "root" / "t.parquet").symlink_to(tmp_path / "t.parquet")
    path = tmp_path / "root" / "t.parquet" / "image" / "1"
    assert read_image_bytes(path, None) == files[0].read_bytes()
    with pytest.raises(UnreadableFile, match=r"^links to a file outside the image root$"):
        read_image_bytes(path, tmp_path / "root")


def test_whether_it_is_there(tmp_path, files):
    pq.write_table(columns(files[:2]), tmp_path / "t.parquet")
    (tmp_path / "x.txt").write_text("text")
    assert [is_there(tmp_path / name) for name in ("t.parquet", "t.parquet/image/2", "x.txt")] == [True] * 3
    absent = ["t.parquet/image/3", "t.parquet/image/0", "t.parquet/prompt/1", "t.parquet/x/1", "x.txt/1", "no/1"]
    assert not any(is_there(tmp_path / name) for name in absent)
    assert container_of(tmp_path / "no" / "1") is None
    for name, reason in (
        ("t.parquet/x/1", "no such picture in t.parquet"),
        ("x.txt/1", "Not a directory"),
        ("no/1", "no such file"),
    ):
        with pytest.raises(UnreadableFile) as caught:
            read_image_bytes(tmp_path / name, tmp_path)
        assert str(caught.value) == reason


def test_a_file_that_was_replaced_is_another(tmp_path, files):
    path = tmp_path / "t.parquet"
    pq.write_table(columns(files[:2]), path)
    assert read_image_bytes(path / "image" / "1", None) == files[0].read_bytes()
    pq.write_table(columns(files[2:5]), path)
    assert read_image_bytes(path / "image" / "1", None) == files[2].read_bytes()


@pytest.mark.parametrize("form", ["groups of 9", "stream", "file"])
def test_damage_is_said_of_the_file(tmp_path, files, form):
    """Cut at any place: either the file is refused as it is opened, or the cell gives a reason; never other bytes."""
    name, write = FORMS[form]
    write(columns(files), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in np.random.default_rng(1).integers(1, len(whole) - 1, 12).tolist():
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{name}: is "):
            read_table(tmp_path / name)
        with pytest.raises(UnreadableFile):
            read_image_bytes(tmp_path / name / "image" / "1", None)


def test_damage_inside_is_a_reason_of_its_rows(tmp_path, files):
    path = tmp_path / "t.parquet"
    pq.write_table(columns(files), path, row_group_size=10, write_page_checksum=False)
    damaged = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    damaged[start : start + 40] = bytes(40)  # the header of the page of the fourth group
    path.write_bytes(damaged)
    found = hash_images([path / "image" / str(row) for row in range(1, 71)], None)
    assert [row for row, content in enumerate(found) if content.reason] == [*range(30, 40)]
    assert found[30].reason.startswith("t.parquet is no readable Parquet file (")


def test_threads_share_one_opened_file(tmp_path, files):
    pq.write_table(columns(files), tmp_path / "t.parquet", row_group_size=9)
    started = threading.Barrier(6)

    def wrong(seed):
        started.wait()
        rows = np.random.default_rng(seed).integers(0, 70, 60).tolist()
        paths = {row: tmp_path / f"t.parquet/image/{row + 1}" for row in rows}
        return [row for row in rows if read_image_bytes(paths[row], None) != files[row].read_bytes()]

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(wrong, range(6))) == [[]] * 6


# Several files as one set


def saved(folder, table, *, parts=2):
    """Write a folder as `datasets` does with `save_to_disk`."""
    folder.mkdir(parents=True)
    size, names = -(-table.num_rows // parts), []
    for number in range(parts):
        names.append(f"data-{number:05}-of-{parts:05}.arrow")
        write_stream(table.slice(number * size, size), folder / names[-1])
    (folder / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in names], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps(state))


def hub(folder, table):
    """Write a folder as the Hub has it."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("a card")
    (folder / "preview.png").write_bytes(b"no picture of the set")
    for number, start in enumerate((0, 30)):
        pq.write_table(table.slice(start, 30), folder / "data" / f"train-{number:05}-of-00002.parquet")
    pq.write_table(table.slice(60), folder / "data" / "test-00000-of-00001.parquet")


def contents(manifest):
    paths = [manifest.image_path(row) for row in range(len(manifest))]
    return [read_image_bytes(path, manifest.image_root) for path in paths]


def test_a_folder_of_parquet(tmp_path, files):
    hub(tmp_path / "set", columns(files))
    manifest = read_manifest(str(tmp_path / "set"), label_range="1,5")
    order = [*range(60, 70), *range(60)]  # by the names of the files
    assert contents(manifest) == [files[row].read_bytes() for row in order]
    assert manifest.images[10] == f"data/train-00000-of-00002.parquet/image/1/{files[0].name}"
    assert manifest.splits == ["test"] * 10 + ["train"] * 60
    assert manifest.places[45] == f"{tmp_path}/set/data/train-00001-of-00002.parquet, row 6"
    assert manifest.notes[:2] == (
        "the split is that of the files' names: test 10, train 60",
        "left out: 1 picture, 1 text file",
    )
    (tmp_path / "set" / "data" / "train-00000-of-00002.parquet").unlink()
    manifest = read_manifest(str(tmp_path / "set"), label_range="1,5")
    said = "1 of 2 files of train are not there (the first: train-00000-of-00002)"
    assert said in manifest.notes


def test_a_saved_data_set(tmp_path, files):
    saved(tmp_path / "set", columns(files))
    manifest = read_manifest(str(tmp_path / "set"), label_range="1,5")
    assert contents(manifest) == [path.read_bytes() for path in files]
    assert (manifest.name, manifest.splits[0]) == ("set", "")
    assert (
        read_manifest(f"{tmp_path}/set/data-00001-of-00002.arrow", label_range="1,5").prompts == manifest.prompts[35:]
    )


def test_a_saved_data_set_of_two_sides(tmp_path, files):
    table = columns(files)
    saved(tmp_path / "set" / "train", table.slice(0, 50))
    saved(tmp_path / "set" / "test", table.slice(50), parts=1)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    manifest = read_manifest(str(tmp_path / "set"), label_range="1,5")
    assert contents(manifest) == [path.read_bytes() for path in files]
    assert manifest.splits == ["train"] * 50 + ["test"] * 20


NO_FILES = "{at}/state.json: names no files; save the data set again"
BROKEN_STATES = {
    "{": "{at}/state.json: broken JSON (Expecting property name enclosed in double quotes); save the data set again",
    "[]": "{at}/state.json: is no JSON object; save the data set again",
    "{}": NO_FILES,
    '{"_data_files": [{"filename": 7}]}': NO_FILES,
    '{"_data_files": [{"filename": "x.arrow"}]}': (
        "{at}/x.arrow: no such file; state.json names it: copy the whole folder"
    ),
    '{"_indices_files": [{"filename": "x"}]}': (
        "{at}/state.json: is a choice of rows by their numbers; call flatten_indices() and save it again"
    ),
}
BROKEN_SIDES = {
    '{"splits": ["test"]}': "{at}/test/state.json: No such file or directory; copy the whole folder",
    "{}": "{at}/dataset_dict.json: names no splits; save the data set again",
}


@pytest.mark.parametrize(("name", "lines"), [("state.json", BROKEN_STATES), ("dataset_dict.json", BROKEN_SIDES)])
def test_refusals_of_saved_data_sets(tmp_path, files, name, lines):
    saved(tmp_path / "set", columns(files[:4]), parts=1)
    for content, line in lines.items():
        (tmp_path / "set" / name).write_text(content)
        with pytest.raises(UserError) as caught:
            read_manifest(str(tmp_path / "set"))
        assert str(caught.value) == line.replace("{at}", str(tmp_path / "set"))


def test_one_range_for_a_label_in_all_files(tmp_path, files):
    """The first file alone would be read as 0 to 1."""
    table = columns(files[:8])
    for number, quality in enumerate(([0.5, 1.0, 0.0, 1.0], [4.0, 2.0, 5.0, 3.0])):
        part = table.slice(4 * number, 4).drop_columns(["quality"]).append_column("quality", pa.array(quality))
        pq.write_table(part, tmp_path / f"p-{number}.parquet")
    for data in (f"{tmp_path}/p-{{0..1}}.parquet", f"{tmp_path}/p-*.parquet", f"{tmp_path}/p-{{0,1}}.parquet"):
        manifest = read_manifest(data)
        assert str(manifest.label_ranges["quality"]) == "0 to 5 (detected)"
        np.testing.assert_allclose(manifest.labels["quality"] * 5, [0.5, 1, 0, 1, 4, 2, 5, 3])
        assert contents(manifest) == [path.read_bytes() for path in files[:8]]
    with pytest.raises(UserError) as caught:
        read_manifest(f"{tmp_path}/p-{{00..02}}.parquet")
    line = "p-00.parquet: no such file, one of 3 that the pattern names; check the pattern, and keep it in quotes"
    assert str(caught.value) == f"{tmp_path}/{line}"


def test_files_of_different_columns_are_said(tmp_path, files):
    pq.write_table(columns(files[:3]), tmp_path / "a.parquet")
    pq.write_table(columns(files[3:6]).drop_columns(["quality"]), tmp_path / "b.parquet")
    manifest = read_manifest(f"{tmp_path}/*.parquet", label_range="1,5")
    assert manifest.notes[0] == "1 of 2 files lack the column quality (the first: b.parquet)"
    assert np.isnan(manifest.labels["quality"]).tolist() == [False] * 3 + [True] * 3


def test_another_image_root_must_hold_the_pictures(tmp_path, files):
    pq.write_table(columns(files[:3]), tmp_path / "t.parquet")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError) as caught:
        read_manifest(str(tmp_path / "t.parquet"), image_root=tmp_path / "other")
    message = "--image-root: is another folder than that of the pictures, which lie in the data itself; "
    assert str(caught.value) == f"{message}leave it out, or give {tmp_path} or one above"
    manifest = read_manifest(str(tmp_path / "t.parquet"), image_root=tmp_path.parent, label_range="1,5")
    assert manifest.images[0] == f"{tmp_path.name}/t.parquet/image/1/{files[0].name}"
    assert contents(manifest) == [path.read_bytes() for path in files[:3]]


def test_data_that_is_no_picture_stays_text(tmp_path):
    """Bytes that are text, as some programs write prompts, are no pictures."""
    pq.write_table(pa.table({"image": [b"a.png"], "prompt": [b"a cat"]}), tmp_path / "t.parquet")
    manifest = read_manifest(str(tmp_path / "t.parquet"))
    assert (manifest.images, manifest.prompts) == (["a.png"], ["a cat"])
