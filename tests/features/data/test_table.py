"""Four formats, one table; each mistake in one line that names its place."""

from __future__ import annotations

import csv
import datetime as dt
import decimal
import gzip
import json
import zipfile

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import AGAIN, LFS, PICKLE
from deltaclip.features.data import sheets as xlsx
from deltaclip.features.data.manifest import manifest_from_table
from deltaclip.features.data.numbers import says_nothing
from deltaclip.features.data.table import read_table

HEADER = ["image", "prompt", "quality", "source"]
ROWS = [
    ["a.png", "a cat, sitting", 0.25, "x"],
    ["b/b.png", 'it says "hi"', None, ""],
    ["c.png", "first\nsecond", 1.0, "y"],
    ["d.png", "größer 猫 🙂", 0.0, "x"],
]


def write_csv(path, rows, *, delimiter=",", end="\n", encoding="utf-8"):
    # Python's writer leaves a bare carriage return unquoted where lines end in another way.
    quoting = csv.QUOTE_ALL if any("\r" in str(cell) for row in rows for cell in row) else csv.QUOTE_MINIMAL
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writerow(HEADER)
        writer.writerows([["" if cell is None else cell for cell in row] for row in rows])


def write_jsonl(path, rows):
    records = [{k: v for k, v in zip(HEADER, row, strict=True) if v is not None} for row in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_parquet(path, rows):
    pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(HEADER)}), path)


def write_xlsx(path, rows):
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in [HEADER, *rows]:
        sheet.append(row)
    book.save(path)


FORMATS = {
    "lf.csv": write_csv,
    "crlf.csv": lambda path, rows: write_csv(path, rows, end="\r\n"),
    "bom.csv": lambda path, rows: write_csv(path, rows, encoding="utf-8-sig"),
    "tabs.tsv": lambda path, rows: write_csv(path, rows, delimiter="\t"),
    "lines.jsonl": write_jsonl,
    "columns.parquet": write_parquet,
    "sheet.xlsx": write_xlsx,
    "UPPER.CSV": write_csv,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_columns(tmp_path, name):
    FORMATS[name](tmp_path / name, ROWS)
    table = read_table(tmp_path / name)
    for i, column in enumerate(HEADER[:2] + HEADER[3:]):
        place = HEADER.index(column)
        assert table.columns[column] == [row[place] for row in ROWS], i
    assert [float(cell) if cell else None for cell in table.columns["quality"]] == [0.25, None, 1.0, 0.0]


def test_lines_of_a_file_with_quoted_newlines_and_blank_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('image,prompt\na.png,"one\ntwo\nthree"\n\nb.png,"x, y"\n\n\nc.png,z')
    table = read_table(path)
    assert table.lines == [2, 6, 9]
    assert table.columns["prompt"] == ["one\ntwo\nthree", "x, y", "z"]
    assert table.place(1, "prompt") == f"{path}, line 6, column prompt"
    path.write_bytes(b'image,prompt\r\na.png,"one\r\ntwo"\r\n\r\nb.png,x\r\n')
    assert read_table(path).lines == [2, 5]


def test_places_in_the_other_formats(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('\ufeff{"image": "a"}\n\n{"image": "b", "late": 1}\r\n', encoding="utf-8")
    table = read_table(path)
    assert table.lines == [1, 3]
    assert table.columns == {"image": ["a", "b"], "late": ["", "1"]}
    write_parquet(tmp_path / "t.parquet", ROWS)
    assert read_table(tmp_path / "t.parquet").place(2, "image") == f"{tmp_path}/t.parquet, row 3, column image"


def test_cells_are_stripped_and_unnamed_columns_dropped(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(" image , prompt,,\n a.png ,  a cat ,1,\n")
    assert read_table(path).columns == {"image": ["a.png"], "prompt": ["a cat"]}


def test_missing_numbers_of_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    numbers = pa.array([0.1, None, float("nan")], type=pa.float32())
    pq.write_table(pa.table({"quality": numbers, "count": pa.array([1, 2, None])}), path)
    columns = read_table(path).columns
    assert [float(cell) if cell else None for cell in columns["quality"]] == [float(np.float32(0.1)), None, None]
    assert columns["count"] == ["1", "2", ""]


OLD = "an old Excel workbook (.xls)"
NO_TEXT = "holds a character that is no text (U+0000 or half of a surrogate pair); remove it"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("t.csv", b"", "t.csv: has no rows; a manifest needs a header and at least one row"),
        ("t.csv", b"image,prompt\n", "t.csv: has no rows; a manifest needs a header and at least one row"),
        ("t.jsonl", b"\n \n", "t.jsonl: has no rows; a manifest needs a header and at least one row"),
        (
            "t.csv",
            b'image,prompt\n"a\nb",x\nc.png,one, two\n',
            "t.csv, line 4: 3 fields where the header has 2; quote fields that hold the delimiter",
        ),
        (
            "t.tsv",
            b"image\tprompt\na.png\n",
            "t.tsv, line 2: 1 fields where the header has 2; quote fields that hold the delimiter",
        ),
        (
            "t.csv",
            b'image,prompt\na.png,"never closed\nb.png,x\n',
            "t.csv, line 3: broken CSV (unexpected end of data); quote fields that hold commas or quotes",
        ),
        (
            "t.csv",
            b'image,prompt\na.png,"x" y\n',
            "t.csv, line 2: broken CSV (',' expected after '\"'); quote fields that hold commas or quotes",
        ),
        (
            "t.csv",
            "image,prompt\na.png,红色的狐狸\n".encode("gb18030"),
            "t.csv: is no UTF-8 text (byte 0xBA at 19, line 2); save it as UTF-8; it may be in GB18030, Shift-JIS or "
            "damaged",
        ),
        (
            "t.jsonl",
            b'{"image": "\x81"}\n',
            "t.jsonl: is no UTF-8 text (byte 0x81 at 11, line 1); save it as UTF-8; it may be in GB18030, Shift-JIS or "
            "damaged",
        ),
        ("t.csv", b"<!DOCTYPE html><html>", f"t.csv: is a page of HTML, no table; {AGAIN}"),
        ("t.csv", b"version https://git-lfs.github.com/spec/v1\n", f"t.csv: is {LFS.words}, no table; {LFS.remedy}"),
        ("t.parquet", b"", "t.parquet: is empty, no Parquet file; write or download it again"),
        (
            "t.xlsx",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
            f"t.xlsx: is {OLD}, no Excel workbook; save it as .xlsx or .csv",
        ),
        ("t.csv", b"\x89PNG\r\n\x1a\n", "t.csv: is a picture, no table; give the file that belongs here"),
        ("t.csv", b"\x80\x04K\x01.", f"t.csv: is a Python pickle, no table; {PICKLE.remedy}"),
        ("t.csv.gz", gzip.compress(b"PAR1"), "t.csv.gz: is gzip-compressed; unpack it first"),
        (
            "t.csv.gz",
            gzip.compress(b"image,prompt\n" * 9)[:20],
            "t.csv.gz: is a damaged gzip file (Compressed file ended before the end-of-stream marker was reached); "
            "compress it again",
        ),
        (
            "t.json",
            b'{"images": [{"id": 1}], "annotations": []}',
            "t.json: is one JSON object, no list of rows; give a list of objects, or one object a line",
        ),
        ("t.json", b'[{"image": "a"}, 3]', "t.json, entry 2: 3 is no JSON object; one object an entry"),
        ("t.csv", b"image,prompt,image\na,b,c\n", "t.csv: two columns are called 'image'; rename or remove one"),
        ("t.tsv", b"image\tmos\tmos \na\tb\tc\n", "t.tsv: two columns are called 'mos'; rename or remove one"),
        (
            "t.jsonl",
            b'{"image": "a"}\n\n{"image": \n',
            "t.jsonl, line 3: broken JSON (Expecting value); one object a line",
        ),
        ("t.jsonl", b'["image", "a"]\n', 't.jsonl, line 1: \'["image", "a"]\' is no JSON object; one object a line'),
        ("t.csv", b"image,prompt\na.png,x\0y\n", f"t.csv, line 2, column prompt: {NO_TEXT}"),
        ("t.jsonl", b'{"image": "a"}\n{"image": "\\ud83d"}', f"t.jsonl, line 2, column image: {NO_TEXT}"),
        (
            "t.xlsx",
            b"PK",
            "t.xlsx: is no readable Excel workbook (File is not a zip file); save it again, as .xlsx or .csv",
        ),
        (
            "t",
            b"image\n",
            "t: unknown suffix ''; use one of .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .arrow, .xlsx",
        ),
        (
            "t.jsonl",
            b"[" * 100_000,
            "t.jsonl, line 1: broken JSON (brackets too deep); one object a line",
        ),
    ],
)
def test_refusals(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / name)
    assert str(caught.value) == f"{tmp_path}/{line}"


def test_refusals_of_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(UserError) as caught:
        read_table(path)
    start = f"{path}: is no readable Parquet file ("
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith("); write it again")
    assert "\n" not in str(caught.value)
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["image", "image"]), path)
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert str(caught.value) == f"{path}: two columns are called 'image'; rename or remove one"


def test_no_such_file(tmp_path):
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / "t.csv")
    assert str(caught.value) == f"{tmp_path}/t.csv: no such file; check the path of the manifest"


# Any text that a cell can hold: no NUL, no lone surrogate; spaces around a cell are not kept.
CELL = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12).map(str.strip)
# A quoted name is understood where something of the plain name is there, as the folder itself is.
NAME = (
    st.text("abcäß.,'\" -", min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda name: name and name.strip("'\" ") not in {"", ".", ".."})
)
LABEL = st.none() | st.floats(0, 1)


def pair_of(row):
    """Return what makes two rows ratings of one image and prompt, which become one row."""
    return row[0].strip(), row[1].strip()


@given(st.lists(st.tuples(NAME, CELL.filter(bool), LABEL, CELL), min_size=1, max_size=6, unique_by=pair_of))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_manifests_come_back_equal_from_every_format(tmp_path, rows):
    come_back(tmp_path, rows, set(FORMATS) - {"sheet.xlsx"})


# A workbook cannot hold control characters, ends every line alike, and takes = for the start of a formula.
SHEET_CELL = CELL.filter(
    lambda text: not text.startswith("=") and all(c >= " " and c not in "\ufffe\uffff" for c in text)
)


@given(st.lists(st.tuples(NAME, SHEET_CELL.filter(bool), LABEL, SHEET_CELL), min_size=1, max_size=6, unique_by=pair_of))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_manifests_come_back_equal_from_a_workbook(tmp_path, rows):
    come_back(tmp_path, rows, ["sheet.xlsx"])


def come_back(tmp_path, rows, names):
    for name in names:
        FORMATS[name](tmp_path / name, rows)
        table = read_table(tmp_path / name)
        found = manifest_from_table(table, name="t", image_root=tmp_path)
        assert (found.images, found.prompts) == tuple([row[i] for row in rows] for i in (0, 1)), name
        assert found.sources == ["" if says_nothing(row[3]) else row[3] for row in rows], name
        # A workbook keeps 16 digits of a number, one less than would bring back every one exactly: half a unit of the
        # last is 5e-16 of 1.000000000000000, and reading it as binary adds 1.1e-16.
        quality = [np.nan if r[2] is None else r[2] for r in rows]
        # JSON leaves a key out where there is no value, and so a column and its target where there is none at all.
        labels = found.labels.get("quality", np.full(len(rows), np.nan))
        np.testing.assert_allclose(labels, quality, rtol=6.2e-16 if name.endswith("xlsx") else 0)


def test_a_sheet_with_gaps_and_other_types(tmp_path):
    path = tmp_path / "t.xlsx"
    book = openpyxl.Workbook()
    for row in (["image", "prompt", "mos", None], [7, " a cat ", 3, None], [], ["b.png", "a dog", 2.5], ["c.png", "x"]):
        book.active.append(row)
    book.create_sheet("other").append(["not", "read"])
    book.save(path)
    table = read_table(path)
    assert table.columns == {
        "image": ["7", "b.png", "c.png"],
        "prompt": ["a cat", "a dog", "x"],
        "mos": ["3", "2.5", ""],
    }
    assert table.place(1, "mos") == f"{path}, row 4, column mos"
    book.active.append(["d.png", "y", 1, "", "stray"])
    book.save(path)
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert str(caught.value) == f"{path}, row 6: 5 fields where the header has 3; give every column a name"


def test_a_file_without_a_header(tmp_path):
    names = ("name", "prompt", "mos")
    path = tmp_path / "t.csv"
    for text, lines in (("a.png,a cat,3\r\n", [1]), ("NAME,Prompt,mos\na.png,a cat,3\n", [2])):
        path.write_bytes(text.encode())
        table = read_table(path, names=names)
        assert [cells[0] for cells in table.columns.values()] == ["a.png", "a cat", "3"]
        assert table.lines == lines
    path.write_text("a.png,a cat\n")  # the last column is not there
    assert read_table(path, names=names).columns == {"name": ["a.png"], "prompt": ["a cat"]}
    path.write_text("a.png,a cat,3,more\n")  # one more than is known
    assert list(read_table(path, names=names).columns) == list(names)
    (tmp_path / "t.txt").write_text("a.png|a cat|3\n")
    assert read_table(tmp_path / "t.txt", names=names, delimiter="|").columns["mos"] == ["3"]


def test_a_workbook_larger_than_a_table_of_ratings(tmp_path, monkeypatch):
    monkeypatch.setattr(xlsx, "MAX_BYTES", 2**20)
    path = tmp_path / "bomb.xlsx"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", bytes(2**21))
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert str(caught.value) == f"{path}: unpacks to 2 MB, more than a table of ratings has; save as .csv"


def test_a_row_number_beyond_every_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(xlsx, "MAX_ROWS", 1000)
    path = tmp_path / "far.xlsx"
    write_xlsx(path, ROWS)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    files[sheet] = files[sheet].replace(b'<row r="5"', b'<row r="99999999999"').replace(b'"A5"', b'"A99999999999"')
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(UserError) as caught:
        read_table(path)
    assert str(caught.value) == f"{path}: has more than 1,000 rows; save it as .csv or .parquet"


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.xlsx"])
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_bytes_are_a_table_or_one_line(tmp_path, name, data):
    path = tmp_path / name
    whole = tmp_path / f"whole_{name}"
    if not whole.exists():  # once, as a workbook holds the time and is then of another length
        next(write for known, write in FORMATS.items() if known.endswith(path.suffix))(whole, ROWS)
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans()):
        content = bytearray(data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 6))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    line = ""
    try:
        assert read_table(path).lines
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert line.startswith(str(path)) or not line


# How people write tables

WIDE = "image,prompt,mos\na.png,größer; höher,3\nb.png,x,4\n"


@pytest.mark.parametrize(
    ("name", "content", "notes"),
    [
        ("t.csv", WIDE.encode(), []),
        ("t.csv", WIDE.encode("utf-16"), []),
        ("t.csv", WIDE.encode("utf-16-le"), ["t.csv is read as UTF-16-LE, which it does not say itself"]),
        ("t.csv", WIDE.encode("utf-16-be"), ["t.csv is read as UTF-16-BE, which it does not say itself"]),
        ("t.csv", WIDE.encode("utf-32"), []),
        (
            "t.csv",
            WIDE.encode("cp1252"),
            ["t.csv is no UTF-8 text (byte 0xF6 at 25, line 2) and is read as Windows-1252"],
        ),
        ("t.csv.gz", gzip.compress(WIDE.encode()), []),
        ("t.tsv", WIDE.encode(), ["t.tsv: fields are separated by commas"]),
        ("t.csv", WIDE.replace(",", "\t").encode(), ["t.csv: fields are separated by tabs"]),
        ("t.csv", WIDE.replace(",", "|").encode(), ["t.csv: fields are separated by bars"]),
        (
            "t.csv",
            WIDE.replace("größer; höher", '"größer; höher"').replace(",", ";").encode(),
            ["t.csv: fields are separated by semicolons"],
        ),
        (
            "t.csv",
            ("sep=|\n" + WIDE.replace(",", "|")).encode(),
            ["t.csv: fields are separated by bars, as its first line says"],
        ),
        (
            "t.csv",
            ("# made by hand\n#\n" + WIDE).encode(),
            ["t.csv: 2 lines of comments at the beginning are left out"],
        ),
        ("t.csv", ("#" + WIDE).encode(), []),
        ("t.csv", (WIDE.replace("\n", ",,\n") + ",,,,\n").encode(), []),
        ("t.csv", WIDE.replace("\n", "\r").encode(), []),
        ("t.xlsx", WIDE.encode(), ["t.xlsx is text between separators and is read as that"]),
        ("t.parquet", WIDE.encode(), ["t.parquet is text between separators and is read as that"]),
    ],
)
def test_separators_and_encodings(tmp_path, name, content, notes):
    (tmp_path / name).write_bytes(content)
    table = read_table(tmp_path / name)
    assert list(table.columns.values()) == [
        ["a.png", "b.png"],
        ["größer; höher", "x"],
        ["3", "4"],
    ]
    assert list(table.notes) == notes


@pytest.mark.parametrize(
    ("name", "made_as", "words"),
    [
        ("t.csv", "sheet.xlsx", "an Excel workbook"),
        ("t.csv", "columns.parquet", "a Parquet file"),
        ("t.csv", "lines.jsonl", "JSON"),
        ("t.jsonl", "columns.parquet", "a Parquet file"),
        ("t.xlsx", "columns.parquet", "a Parquet file"),
    ],
)
def test_files_that_are_not_what_their_names_say(tmp_path, name, made_as, words):
    FORMATS[made_as](tmp_path / name, ROWS[:1])
    table = read_table(tmp_path / name)
    assert table.columns["prompt"] == ["a cat, sitting"]
    assert table.notes == (f"{name} is {words} and is read as that",)


def test_a_list_of_objects(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"image": "a", "mos": 1}, {"image": "b"}], indent=1))
    table = read_table(path)
    assert (table.columns, table.place(1, "image")) == (
        {"image": ["a", "b"], "mos": ["1", ""]},
        f"{path}, entry 2, column image",
    )


# Values that are no text

ODD = {
    "a list": ["a", "b"],
    "an object": {"en": "a"},
    "a truth value": True,
    "bytes": b"\xff\xfe",
    "a date or time": dt.date(2024, 5, 4),
}


def parquet_with(path, values):
    pq.write_table(pa.table({"image": ["a.png"] * len(values), "prompt": values}), path)
    return path


@pytest.mark.parametrize("words", ODD)
@pytest.mark.parametrize("column", ["image", "prompt", "explanation", "group", "source", "split", "quality"])
def test_what_is_no_text_is_refused_in_every_column(tmp_path, words, column):
    path = tmp_path / "t.parquet"
    cells = {"image": ["a.png"], "prompt": ["x"]} | {column: [ODD[words]], "unused": [ODD[words]]}
    pq.write_table(pa.table(cells), path)
    with pytest.raises(UserError) as caught:
        manifest_from_table(read_table(path), name="t", image_root=tmp_path)
    assert str(caught.value) == f"{path}, row 1, column {column}: holds {words}, no text; write texts and numbers"


@pytest.mark.parametrize("column", ["prompt", "explanation", "group", "source", "split", "quality"])
def test_a_picture_is_refused_where_a_text_belongs(tmp_path, column):
    path = tmp_path / "t.parquet"
    picture = {"bytes": b"\x89PNG", "path": None}
    cells = {"image": ["a.png"] * 2, "prompt": ["x"] * 2} | {column: [{"bytes": None, "path": None}, picture]}
    pq.write_table(pa.table(cells), path)
    with pytest.raises(UserError) as caught:
        manifest_from_table(read_table(path), name="t", image_root=tmp_path)
    line = f"{path}, row 2, column {column}: holds a picture, no text; call the column image, or remove it"
    assert str(caught.value) == line


@pytest.mark.parametrize("value", [1984, 1.0, decimal.Decimal("1.5"), np.float32(2.5)])
def test_a_number_is_no_prompt(tmp_path, value):
    path = parquet_with(tmp_path / "t.parquet", [value])
    with pytest.raises(UserError, match=r", row 1, column prompt: [\d.]+ is a number, no text; write texts, or see"):
        manifest_from_table(read_table(path), name="t", image_root=tmp_path)


def test_a_number_is_a_name(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": ["a.png", "b.png"], "prompt": ["x", "y"], "prompt_id": [7.0, None]}), path)
    assert manifest_from_table(read_table(path), name="t", image_root=tmp_path).groups == ["7", "y"]


@pytest.mark.parametrize(
    "values",
    [
        [["a cat"]],
        [b"a cat"],
        pa.array(["a cat"]).dictionary_encode(),
        pa.array(["a cat"], pa.large_string()),
        pa.array(["a cat"], pa.string_view()),
        pa.array([b"a cat"], pa.large_binary()),
        [{"bytes": None, "path": "a cat"}],
    ],
)
def test_what_can_be_but_one_text_is_that_text(tmp_path, values):
    path = parquet_with(tmp_path / "t.parquet", values)
    assert manifest_from_table(read_table(path), name="t", image_root=tmp_path).prompts == ["a cat"]


def test_odd_values_of_json_and_workbooks(tmp_path):
    for name, lines in (
        ("t.jsonl", '{"image": "a", "prompt": "x"}\n{"image": "b", "prompt": ["x", "y"]}\n'),
        ("t.json", '[{"image": "a", "prompt": "x"}, {"image": "b", "prompt": ["x", "y"]}]'),
    ):
        (tmp_path / name).write_text(lines)
        with pytest.raises(UserError, match=r" 2, column prompt: holds a list, no text; write texts and numbers"):
            manifest_from_table(read_table(tmp_path / name), name="t", image_root=tmp_path)
    book = openpyxl.Workbook()
    for row in (["image", "prompt"], ["a.png", dt.datetime(2024, 5, 4)]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(UserError, match=r", row 2, column prompt: holds a date or time, no text"):
        manifest_from_table(read_table(tmp_path / "t.xlsx"), name="t", image_root=tmp_path)


def test_words_for_nothing_as_prompts_are_counted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("image,prompt\na,nan\nb,N/A\nc,nan\nd,nanny\n")
    assert manifest_from_table(read_table(path), name="t", image_root=tmp_path).notes == (
        "3 prompts are N/A, nan, as of an empty cell; `deltaclip data check` shows the rows",
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_json_in_a_wide_encoding(tmp_path, encoding, name):
    rows = [{"image": "a.png", "prompt": "\N{LATIN SMALL LETTER E WITH ACUTE}clair"}, {"image": "b.png", "prompt": "x"}]
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    if name == "t.jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / name).write_bytes(text.encode(encoding))
    found = read_table(tmp_path / name)
    assert found.columns["prompt"] == [row["prompt"] for row in rows]
    assert not any("between separators" in note for note in found.notes)
