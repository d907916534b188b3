"""What a file is, by its first bytes; real files of real writers are the judges."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import kind_of, refuse_other


def saved(write, array):
    file = io.BytesIO()
    write(file, array)
    return file.getvalue()


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"), io.BytesIO())


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "x")


FILES = {
    "lfs": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "html": lambda path: path.write_text("\n <!DOCTYPE HTML><html><title>Sign in</title>"),
    "xml": lambda path: path.write_text('<?xml version="1.0"?><Workbook/>'),
    "empty": lambda path: path.touch(),
    "json": lambda path: path.write_text(json.dumps([{"a": 1}])),
    "parquet": lambda path: pq.write_table(pa.table({"a": [1]}), path),
    "hdf5": lambda path: h5py.File(path, "w").close(),
    "npy": lambda path: path.write_bytes(saved(np.save, np.zeros(3))),
    "npz": lambda path: path.write_bytes(saved(np.savez, np.zeros(3))),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "torch": lambda path: torch.save({"a": torch.zeros(1)}, path),
    "safetensors": lambda path: save_file({"a": np.zeros(3)}, path),
    "tar": tar,
    "zip": archive,
    "image": lambda path: Image.new("RGB", (2, 2)).save(path, "WEBP"),
    None: lambda path: path.write_text("image,prompt\n[a],{b}\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_kinds(tmp_path, name):
    path = tmp_path / "file"
    FILES[name](path)
    found = kind_of(path)
    assert (found.name if found else None) == name


@pytest.mark.parametrize("content", [struct.pack("<Q", 2**40) + b"{", b"\x80", b"PK\x03\x04", b"RIFF", b"\0" * 300])
def test_bytes_that_only_begin_like_something(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert kind_of(path) is None or kind_of(path).name == "zip"


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    FILES["safetensors"](path)
    refuse_other(path, {"safetensors"}, what="safetensors file")
    FILES["lfs"](path)
    with pytest.raises(UserError) as caught:
        refuse_other(path, {"safetensors"}, what="safetensors file")
    line = "is a Git LFS pointer, not the file itself, no safetensors file; run `git lfs pull` where it came from"
    assert str(caught.value) == f"{path}: {line}"


def test_text_in_place_of_a_file_without_a_mark_of_its_own(tmp_path):
    (tmp_path / "a").write_text("Entry not found")
    with pytest.raises(UserError) as caught:
        refuse_other(tmp_path / "a", {"hdf5"}, what="HDF5 file")
    remedy = "download it again: what a server answers in place of a file is often text"
    assert str(caught.value) == f"{tmp_path / 'a'}: is text, no HDF5 file; {remedy}"
    refuse_other(tmp_path / "a", {"text"})
    for content in (b"\0binary", "\N{EURO SIGN}".encode("cp1252"), b"\x1bcontrol"):
        (tmp_path / "a").write_bytes(content)
        refuse_other(tmp_path / "a", {"hdf5"})
    (tmp_path / "a").write_bytes(b"x" * 4095 + "\N{EURO SIGN}".encode())  # cut inside a letter by the look
    with pytest.raises(UserError, match="is text"):
        refuse_other(tmp_path / "a", {"hdf5"})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    assert kind_of(tmp_path / "a.csv") is None
