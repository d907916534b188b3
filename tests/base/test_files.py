"""Files appear whole or not at all; one writer at a time, and its lock goes with it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys

import pytest

from deltaclip.base import files
from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer, require_space, sha256_file, user_cache, whole_file, whole_folder

HOLD = """
import sys, time
from pathlib import Path
from deltaclip.base.files import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
BUSY = "another process is writing this file; wait for it to end or give another --out"


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_with_ordinary_rights(tmp_path):
    target = tmp_path / "deep" / "a.json"
    with whole_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    plain = tmp_path / "plain"
    plain.touch()
    assert target.read_text() == "new"
    assert target.stat().st_mode == plain.stat().st_mode
    assert names(target.parent) == ["a.json"]


def test_an_error_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail():
        with whole_file(target) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_folder_appears_whole_and_is_never_overwritten(tmp_path):
    target = tmp_path / "runs" / "a"
    with whole_folder(target) as growing:
        (growing.work / "sub").mkdir()
        (growing.work / "sub" / "x").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    with pytest.raises(UserError) as caught, whole_folder(target):
        pass
    assert str(caught.value) == f"{target}: already exists; give another name or remove it first"

    def fail():
        with whole_folder(target.with_name("b")) as growing:
            (growing.work / "x").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(target.parent) == ["a"]


def test_every_name_in_a_folder_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced, sync = [], files.sync_folder

    def record(folder):
        synced.append((folder, (tmp_path / "a").exists()))
        sync(folder)

    monkeypatch.setattr(files, "sync_folder", record)
    with whole_folder(tmp_path / "a") as growing:
        (growing.work / "sub").mkdir()
    assert synced == [(growing.work / "sub", False), (growing.work, False), (tmp_path, True)]


def test_one_writer_until_it_is_killed(tmp_path):
    target = tmp_path / "cache.h5"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, one_writer(target):
            pass
        assert str(caught.value) == f"{target}: {BUSY}"
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with one_writer(target):  # the lock file of the dead process is no obstacle
        assert names(tmp_path) == ["cache.h5.lock"]
    assert names(tmp_path) == []


def test_one_writer_within_a_process(tmp_path):
    with one_writer(tmp_path / "a"):
        with pytest.raises(UserError), one_writer(tmp_path / "a"):
            pass
        with one_writer(tmp_path / "b"):
            pass


@pytest.mark.parametrize("size", [0, 1, 1 << 18, (1 << 18) + 1])
def test_sha256(tmp_path, size):
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_space_is_asked_for_before_the_work(tmp_path):
    require_space(tmp_path / "not" / "there", 1, "the cache")
    with pytest.raises(UserError) as caught:
        require_space(tmp_path / "not" / "there", 10**18, "the cache")
    first, _, rest = str(caught.value).partition(" and ")
    assert first == f"{tmp_path}/not/there: the cache needs 1000000000.00 GB"
    assert rest.endswith(" GB are free; free some space or give another --out")


def test_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTACLIP_CACHE", str(tmp_path))
    assert user_cache() == tmp_path
    monkeypatch.delenv("DELTACLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(user_cache()) == "/x/deltaclip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert str(user_cache()) == "/h/.cache/deltaclip"
