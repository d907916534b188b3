"""Tables as programs and people write them, read to the end: pictures found, prompts and labels as they were meant."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import feather

from deltaclip.base.errors import UserError
from deltaclip.features.check_data import check_data
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.settings import CheckConfig
from deltaclip.tests.features.data.odd_images import encoded

ROWS = [{"image": "a.png", "prompt": "ein Hut", "quality": 3.5}, {"image": "b.png", "prompt": "x, y", "quality": 2}]
HEADER = list(ROWS[0])


def rows_as(join, rows=ROWS, header=HEADER, end="\n"):
    """Return rows as text between separators, decimal commas where the separator is none."""
    return end.join([join.join(header), *(join.join(_cell(row[name], join) for name in row) for row in rows), ""])


def _cell(value, join):
    text = str(value) if join == "," or isinstance(value, str) else str(value).replace(".", ",")
    return f'"{text}"' if join in text else text


def workbook(*sheets):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    target = io.BytesIO()
    book.save(target)
    return target.getvalue()


def columnar(write):
    target = io.BytesIO()
    write(pa.Table.from_pylist([row | {"quality": float(row["quality"])} for row in ROWS]), target)
    return target.getvalue()


SHEET = [HEADER, *(list(row.values()) for row in ROWS)]
AS_LINES = "\n".join(map(json.dumps, ROWS))
PARQUET = columnar(pq.write_table)
FILES = {
    "commas.csv": rows_as(","),
    "semicolons, decimal comma.csv": rows_as(";"),
    "tabs.tsv": rows_as("\t"),
    "bars.csv": rows_as("|"),
    "CRLF.csv": rows_as(",", end="\r\n"),
    "BOM.csv": b"\xef\xbb\xbf" + rows_as(";").encode(),
    "UTF-16 as Excel saves it.tsv": b"\xff\xfe" + rows_as("\t", end="\r\n").encode("utf-16-le"),
    "UTF-16 called csv.csv": rows_as("\t", end="\r\n").encode("utf-16"),
    "UTF-16 without a mark.csv": rows_as(";").encode("utf-16-be"),
    "all at once.csv.gz": gzip.compress(rows_as(";", end="\r\n").encode("cp1252")),
    "title above.csv": "Ratings of our study, 2024\n\n" + rows_as(","),
    "title above, padded.csv": "Ratings of our study;;\n;;\n" + rows_as(";"),
    "lines.jsonl": AS_LINES,
    "lines.ndjson": "\ufeff" + AS_LINES,
    "lines.jsonl.gz": gzip.compress(AS_LINES.encode()),
    "lines called json.json": AS_LINES,
    "list.json": json.dumps(ROWS),
    "list.json.gz": gzip.compress(json.dumps(ROWS, indent=1).encode()),
    "under data.json": json.dumps({"version": 2, "data": ROWS}),
    "under rows, indented.json": json.dumps({"rows": ROWS, "about": {"who": "we"}}, indent=2),
    "under data.json.gz": gzip.compress(json.dumps({"about": "x" * 9000, "data": ROWS}).encode()),
    "lists.json": json.dumps({name: [row[name] for row in ROWS] for name in HEADER}),
    "as pandas writes it.json": json.dumps(
        {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in HEADER}
    ),
    "pandas split.json": json.dumps({"columns": HEADER, "index": [0, 1], "data": [list(row.values()) for row in ROWS]}),
    "pandas index.json": json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    "by image.json": json.dumps({row["image"]: {n: row[n] for n in ("prompt", "quality")} for row in ROWS}),
    "sides.json": json.dumps({"train": ROWS[:1], "test": ROWS[1:]}),
    "table.parquet": PARQUET,
    "table.parquet.gz": gzip.compress(PARQUET),
    "table.feather": columnar(lambda table, target: feather.write_feather(table, target, compression="uncompressed")),
    "sheet.xlsx": workbook(("a", SHEET)),
    "sheet.xlsx.gz": gzip.compress(workbook(("a", SHEET))),
    "title above.xlsx": workbook(("a", [["Ratings of our study"], [], ["rater", "anna"], *SHEET])),
    "empty sheet first.xlsx": workbook(("empty", []), ("Ratings", SHEET)),
    "several sheets.xlsx": workbook(("Ratings", SHEET), ("Notes", [["a note"]])),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("people")
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("sub/c d.png", "lime")):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(encoded(Image.new("RGB", (70, 70), colour)))
    return made


def put(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


@pytest.mark.parametrize("name", FILES)
def test_the_same_table(name, folder):
    path = put(folder, name, FILES[name])
    manifest = read_manifest(str(path), label_range="1,5")
    assert manifest.images == ["a.png", "b.png"]
    assert manifest.prompts == ["ein Hut", "x, y"]
    np.testing.assert_allclose(manifest.labels["quality"], [0.625, 0.25])
    checked = check_data(CheckConfig(data=str(path), label_range=["1,5"]))
    assert (checked.rows, checked.images["readable"], checked.exit_code) == (2, 2, 0)


@pytest.mark.parametrize(
    ("name", "note"),
    {
        "title above.csv": "title above.csv: 1 line above the header left out",
        "title above.xlsx": "title above.xlsx: 2 rows above the header left out",
        "several sheets.xlsx": "several sheets.xlsx: the sheet 'Ratings' is read, not 'Notes'",
        "under data.json": "under data.json is one object with its rows under 'data' and is read as that",
        "all at once.csv.gz": "all at once.csv.gz: fields are separated by semicolons",
    }.items(),
)
def test_what_was_understood_is_said(name, note, folder):
    assert note in read_manifest(str(put(folder, name, FILES[name]))).notes


@pytest.mark.parametrize(
    "header",
    [
        "image,prompt,quality",
        "filepath,caption,score",
        "file_path,description,rating",
        "img_name,text,mos",
        "Image Path,Prompt Text,Mean Opinion Score",
        "URL,caption,quality score",
    ],
)
def test_usual_names(header, folder):
    manifest = read_manifest(str(put(folder, "t.csv", f"{header}\na.png,x,4\nb.png,y,2\n")))
    assert (manifest.images, manifest.prompts) == (["a.png", "b.png"], ["x", "y"])
    np.testing.assert_allclose(manifest.labels["quality"], [0.75, 0.25])


@pytest.mark.parametrize(
    "cell",
    [
        "sub\\c d.png",
        ".\\sub\\c d.png",
        "./sub/c d.png",
        "sub/c%20d.png",
        '"""sub/c d.png"""',
        "file://{at}/sub/c d.png",
        "{at}/sub/c d.png",
        "https://host/any/sub/c%20d.png",
    ],
)
def test_paths_as_people_write_them(cell, folder, tmp_path):
    cell = cell.replace("{at}", str(folder))
    for at, root in ((folder, None), (tmp_path, folder)):  # against the table, and against --image-root
        path = put(at, "paths.csv", f"image,prompt\n{cell},x\n")
        checked = check_data(CheckConfig(data=str(path), image_root=root))
        assert (checked.rows, checked.images["readable"]) == (1, 1)


def test_labels_as_people_write_them(folder):
    def labels(cells, **more):
        text = "image,prompt,quality\n" + "".join(f'a.png,p{i},"{cell}"\n' for i, cell in enumerate(cells))
        return read_manifest(str(put(folder, "labels.csv", text)), **more).labels["quality"].tolist()

    assert labels(["80%", "50 %", ""])[:2] == [0.8, 0.5]
    assert labels(["4/5", "2 out of 5"]) == [0.75, 0.25]  # of 1 to 5, the narrowest scale up to 5
    assert labels(["1.000,5", "500,25"], label_range="0,2000") == [0.50025, 0.250125]
    ranges = ["quality=1,10", "consistency=1,5"]
    both = put(folder, "both.csv", "image,prompt,quality,consistency\na.png,x,10,3\nb.png,y,1,5\n")
    found = read_manifest(str(both), label_range=ranges).labels
    assert (found["quality"].tolist(), found["consistency"].tolist()) == ([1.0, 0.0], [0.5, 1.0])


# {at} is the folder.
LINES = {
    "scales.csv": (
        "image,prompt,quality\na.png,x,4/5\nb.png,y,30%\n",
        "{at}/scales.csv, line 3, column quality: '30%' is of another scale than the rest of the column, 5; "
        "write all of "
        "them on one scale",
    ),
    "some scales.csv": (
        "image,prompt,quality\na.png,x,4/5\nb.png,y,30\n",
        "{at}/some scales.csv, line 3, column quality: '30' does not say of what scale it is, as other cells of "
        "the column "
        "do; write all of them on one scale",
    ),
    "both.csv": (
        'image,prompt,quality\na.png,x,"1,5"\nb.png,y,"1,234.5"\n',
        "{at}/both.csv, line 2, column quality: '1,5' may have a decimal comma or separated thousands: the "
        "column writes "
        "numbers in both ways; leave a missing label empty",
    ),
    "list.jsonl": (
        '{"image": "a.png", "prompt": ["x", "y"]}\n',
        "{at}/list.jsonl, line 1, column prompt: holds a list, no text; write texts and numbers",
    ),
    "object.jsonl": (
        '{"image": "a.png", "prompt": {"en": "x"}}\n',
        "{at}/object.jsonl, line 1, column prompt: holds an object, no text; write texts and numbers",
    ),
    "truth.jsonl": (
        '{"image": "a.png", "prompt": "x", "quality": true}\n',
        "{at}/truth.jsonl, line 1, column quality: holds a truth value, no text; write texts and numbers",
    ),
    "object.json": (
        '{"about": {"who": "we"}, "n": 3}',
        "{at}/object.json: is one JSON object, no list of rows; give a list of objects, or one object a line",
    ),
    "readme first.xlsx": (
        workbook(("Read me", [["How to read this"], ["as you like"]]), ("Data", SHEET)),
        "{at}/readme first.xlsx: missing column 'image'; found: How to read this, readme first.xlsx: the sheet "
        "'Read me' is "
        "read, not 'Data'",
    ),
    "ragged.csv": (
        "image,prompt\na.png,x,y\nb.png,x,y\n",
        "{at}/ragged.csv, line 2: 3 fields where the header has 2; quote fields that hold the delimiter",
    ),
    "cut.csv.gz": (
        gzip.compress(rows_as(",").encode() * 50)[:60],
        "{at}/cut.csv.gz: is a damaged gzip file (Compressed file ended before the end-of-stream marker was reached); "
        "compress it again",
    ),
    "cut.parquet.gz": (
        gzip.compress(PARQUET)[:-30],
        "{at}/cut.parquet.gz: is a damaged gzip file (Compressed file ended before the end-of-stream marker was "
        "reached); "
        "compress it again",
    ),
    "pictures.parquet.gz": (
        gzip.compress(
            columnar(lambda _, target: pq.write_table(pa.table({"image": [encoded(Image.new("L", (9, 9)))]}), target))
        ),
        "{at}/pictures.parquet.gz: has pictures inside, which have no place of their own in a compressed file; "
        "unpack it "
        "first",
    ),
    "no bytes.parquet": (
        columnar(
            lambda _, target: pq.write_table(
                pa.table(
                    {
                        "image": pa.array(
                            [{"bytes": None, "path": None}],
                            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                        )
                    }
                ),
                target,
            )
        ),
        "{at}/no bytes.parquet, row 1, column image: has neither bytes nor a path; fill it in or remove the row",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_one_line(name, folder):
    content, line = LINES[name]
    path = put(folder, name, content)
    with pytest.raises(UserError) as caught:
        read_manifest(str(path))
    assert str(caught.value) == line.format(at=folder)


# ---- Cells that are no text, and words for nothing


NOTHING = ["nan", "None", "NULL", "N/A", "-", ""]


def words_table(folder, **columns):
    count = len(next(iter(columns.values())))
    rows = [{"image": f"{row}.png", "prompt": f"p {row}", "quality": row / count} for row in range(count)]
    for row, record in enumerate(rows):
        (folder / record["image"]).write_bytes(encoded(Image.new("RGB", (70, 70), (row, 0, 0))))
        record.update({name: cells[row] for name, cells in columns.items()})
    path = folder / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("name", ["source", "group", "split", "explanation"])
def test_words_for_nothing_are_no_name_that_rows_share(tmp_path, name):
    path = words_table(tmp_path, **{name: [*NOTHING, "x", "x"]})
    found = read_manifest(str(path))
    cells = {"source": found.sources, "split": found.splits, "explanation": found.explanations}.get(name, [])
    assert cells in ([], [""] * 6 + ["x", "x"])
    if name == "group":
        assert found.groups == [f"p {row}" for row in range(6)] + ["x", "x"]
    words = f"5 cells of {name} count as missing (-, N/A, NULL, None, nan)"
    assert words in found.notes
    looked = check_data(CheckConfig(data=str(path), images="none"))
    assert words in [finding.message for finding in looked.findings]
    assert looked.groups == (7 if name == "group" else 8)


def test_words_for_nothing_are_no_rater(tmp_path):
    path = words_table(tmp_path, image=["a.png", "b.png"] * 6, prompt=["p"] * 12, rater=["nan", "nan"] * 3 + ["x"] * 6)
    notes = read_manifest(str(path)).notes
    assert "6 cells of rater count as missing (nan)" in notes
    assert any(note.startswith("12 ratings of 2 images with their prompts by 7 raters") for note in notes)


def test_the_check_looks_at_the_column_of_raters_as_extract_does(tmp_path):
    path = words_table(tmp_path, rater=[{"id": 1}, "x"])
    with pytest.raises(UserError) as caught:
        read_manifest(str(path))
    looked = check_data(CheckConfig(data=str(path), images="none"))
    assert "column rater: holds an object, no text" in str(caught.value)
    assert "1 cells of rater: holds an object, no text" in looked.findings[0].message
    assert looked.unused_columns == []


SPELLED = {"['a cat']": "a list", "{'en': 'a cat'}": "an object", "b'a cat'": "bytes", "('a', 'b')": "a list"}


@pytest.mark.parametrize("prompt", SPELLED)
def test_pythons_spelling_of_a_value_is_said(tmp_path, prompt):
    path = words_table(tmp_path, prompt=[prompt, "[masterpiece], a cat", "(a cat)", "{a|b} dog", "b'"])
    assert any(
        note.startswith(f"1 prompts are Python's spelling of another value, as of {SPELLED[prompt]} in ")
        for note in read_manifest(str(path)).notes
    )
    found = check_data(CheckConfig(data=str(path), images="none")).findings
    assert [finding.examples for finding in found if finding.check == "spelled_value"] == [
        [f"{path}, line 1, column prompt: {prompt!r}"]
    ]


def test_pythons_spelling_of_a_picture_is_no_path(tmp_path):
    path = words_table(tmp_path, image=["0.png", "{'bytes': None, 'path': 'a.png'}"])
    found = check_data(CheckConfig(data=str(path))).findings
    message = "1 rows have an image that cannot be read: no such file, Python's spelling of another value"
    assert message in [finding.message for finding in found]


def test_a_picture_with_neither_bytes_nor_a_path_is_missing(tmp_path):
    path = tmp_path / "t.parquet"
    pictures = [{"bytes": None, "path": None}, {"bytes": None, "path": "a.png"}]
    pq.write_table(pa.table({"image": pictures, "prompt": ["x", "y"]}), path)
    with pytest.raises(UserError) as caught:
        read_manifest(str(path))
    assert str(caught.value) == f"{path}, row 1, column image: empty image; fill it in or remove the row"


def test_a_column_of_lists_is_not_to_be_called_image(tmp_path):
    path = words_table(tmp_path, image=[None, None], images=[["a.png", "b.png"]] * 2)
    path.write_text(path.read_text().replace('"image": null, ', ""))
    with pytest.raises(UserError) as caught:
        read_manifest(str(path))
    assert str(caught.value) == f"{path}: missing column 'image'; found: prompt, quality, images"


def test_numbers_in_place_of_a_prompt_are_counted(tmp_path):
    path = words_table(tmp_path, prompt=["a", 2020, "b", 7])
    assert "2 cells of prompt: 2020 is a number" in check_data(CheckConfig(data=str(path))).findings[0].message


def test_a_sheet_that_nobody_sees_is_read_last(tmp_path):
    book = openpyxl.load_workbook(io.BytesIO(workbook(("lists", [["x"], ["y"]]), ("data", SHEET))))
    book["lists"].sheet_state = "hidden"
    book.active = 1
    book.save(tmp_path / "t.xlsx")
    found = read_manifest(str(tmp_path / "t.xlsx"))
    assert found.images == ["a.png", "b.png"]
    assert "t.xlsx: the sheet 'data' is read, not 'lists'" in found.notes
