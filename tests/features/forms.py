"""One set of pictures in every form that it may come in."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import PurePath

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("prompt", "quality", "consistency", "explanation", "source")
FORMS = ("parquet", "one group", "hub", "saved", "shards", "folder", "metadata")


def write_form(form, folder, rows, out):
    """Write rows of a demo set in a form, and return what to give as DATA.

    Args:
        form: one of `FORMS`.
        folder: that the images of the rows are relative to.
        rows: as `read_rows` returns them.
        out: folder to write to.
    """
    out.mkdir(parents=True)
    half = len(rows) // 2
    if form in {"parquet", "one group"}:
        size = 7 if form == "parquet" else len(rows)
        pq.write_table(table(folder, rows), out / "t.parquet", row_group_size=size)
        return out / "t.parquet"
    if form == "hub":
        for number, part in enumerate((rows[:half], rows[half:])):
            pq.write_table(table(folder, part), out / f"train-{number:05}-of-00002.parquet")
    elif form == "saved":
        _save(out, [table(folder, rows[:half]), table(folder, rows[half:])])
    elif form == "shards":
        for number, part in enumerate((rows[:half], rows[half:])):
            _pack(out / f"{number:05}.tar", folder, part, first=number * half)
        return out / "{00000..00001}.tar"
    else:
        _copy(form, folder, rows, out)
    return out


def table(folder, rows):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [{"bytes": (folder / row["image"]).read_bytes(), "path": PurePath(row["image"]).name} for row in rows]
    return pa.table({"image": pa.array(pictures, type=kind), **{name: [row[name] for row in rows] for name in COLUMNS}})


def _save(out, tables):
    names = [f"data-{number:05}-of-{len(tables):05}.arrow" for number in range(len(tables))]
    for name, part in zip(names, tables, strict=True):
        with pa.ipc.new_stream(str(out / name), part.schema) as writer:
            writer.write_table(part, max_chunksize=10)
    (out / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def _pack(path, folder, rows, *, first):
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows, start=first):
            fields = {name: row[name] for name in COLUMNS[1:]}
            for suffix, content in (
                (PurePath(row["image"]).suffix, (folder / row["image"]).read_bytes()),
                (".txt", row["prompt"].encode()),
                (".json", json.dumps(fields).encode()),
            ):
                member = tarfile.TarInfo(f"{number:05}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _copy(form, folder, rows, out):
    """Copy pictures under names in the order of the rows, with files beside them or one table."""
    names = [f"{number:05}{PurePath(row['image']).suffix}" for number, row in enumerate(rows)]
    for name, row in zip(names, rows, strict=True):
        shutil.copyfile(folder / row["image"], out / name)
        if form == "folder":
            (out / name).with_suffix(".txt").write_text(row["prompt"])
            (out / name).with_suffix(".json").write_text(json.dumps({field: row[field] for field in COLUMNS[1:]}))
    if form == "metadata":
        with (out / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", *COLUMNS])
            writer.writeheader()
            writer.writerows(
                {"file_name": name, **{field: row[field] for field in COLUMNS}}
                for name, row in zip(names, rows, strict=True)
            )
