"""What one system alone has stands in one place, with a way round it; taken away, the commands still work."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import deltaclip
from deltaclip.base import files
from deltaclip.base.errors import UserError
from deltaclip.base.files import is_abandoned, one_writer, prove_space, reserve, sync_file, sync_folder
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.serve import listen

ROOT = Path(deltaclip.__file__).parent
# Modules and functions that Linux has and macOS or Windows lacks; `posix_fallocate` and the like.
MODULES = {"fcntl", "grp", "msvcrt", "pwd", "resource", "select", "termios", "tty", "winreg"}
NAMES = {
    "chroot", "copy_file_range", "fchmod", "fchown", "fork", "forkpty", "geteuid", "getgid", "getpriority", "getpgid",
    "getuid", "kill", "killpg", "lchown", "link", "mkfifo", "nice", "posix_fadvise", "posix_fallocate", "posix_spawn",
    "pread", "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sendfile", "setpriority",
    "setsid", "statvfs", "sync", "sysconf", "uname", "wait", "waitpid", "O_DIRECTORY", "O_NOFOLLOW", "SIGALRM",
    "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm", "setitimer", "pthread_kill", "pause", "WTERMSIG", "epoll",
    "poll",
}  # fmt: skip
ALLOWED = {("base/files.py", "posix_fallocate"), ("base/files.py", "link"), ("base/device.py", "sched_getaffinity")}
ALLOWED |= {("base/files.py", "getuid"), ("base/files.py", "kill")}


def modules():
    folders = ("base", "features", "pipeline")
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


def used(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "signal") and node.attr in NAMES:
            yield node.attr


def test_what_one_system_alone_has_stands_in_one_place():
    found = {(path.relative_to(ROOT).as_posix(), name) for path in modules() for name in used(path)}
    assert found == ALLOWED


def test_text_files_say_their_encoding():
    """The default of Windows is no UTF-8."""
    silent = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = {keyword.arg for keyword in node.keywords}
            is_text = node.func.attr in ("read_text", "write_text")
            if is_text and "encoding" not in given:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []


WITHOUT = """
import os, sys, signal, json
sys.modules["fcntl"] = sys.modules["pwd"] = None
for name in ("posix_fallocate", "sched_getaffinity", "sched_setaffinity", "O_DIRECTORY", "O_NOFOLLOW", "link",
             "symlink", "fork", "getuid", "sync", "posix_fadvise"):
    delattr(os, name)
for name in ("SIGHUP", "SIGALRM", "SIGUSR1"):
    delattr(signal, name)
from deltaclip.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.mark.slow
def test_the_whole_path_without_what_linux_alone_has(demo_folder, tmp_path, demo_cache):
    data = str(demo_folder / "demo.csv")
    calls = [
        ["extract", data, "--out", "c.h5"],
        ["extract", data, "--out", "c.h5"],  # finds its own lock file no obstacle
        ["train", "c.h5", "--epochs", "1", "--out", "run"],
        ["inspect", "c.h5", "--verify", "--merge", "m.h5", "--export", "out"],
        ["predict", "run", data, "--out", "s.csv"],
        ["share", "run", "shared"],
        ["predict", "shared", data, "--out", "again.csv"],
    ]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", WITHOUT, json.dumps(calls)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "again.csv", "c.h5", "m.h5", "out", "run", "s.csv", "shared",
    ]  # fmt: skip
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "s.csv").read_bytes()
    with FeatureStore.open(tmp_path / "c.h5") as found, FeatureStore.open(demo_cache) as wanted:
        assert (found.status() == wanted.status()).all()
        assert (found.embeddings("images") == wanted.embeddings("images")).all()


def take_away(monkeypatch, *names):
    for name in names:
        monkeypatch.delattr(os, name)


@pytest.mark.parametrize("size", [0, 1, files._BLOCK_BYTES, files._BLOCK_BYTES + 1])
def test_room_is_made_by_writing_where_nothing_else_makes_it(tmp_path, monkeypatch, size):
    take_away(monkeypatch, "posix_fallocate")
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(b"head")
        file.truncate(size + 4)
    before = path.read_bytes()
    reserve(path, size + 4)
    assert path.read_bytes() == before
    assert path.stat().st_blocks * 512 >= size + 4  # no hole is left
    prove_space(tmp_path / "b", size)
    assert not (tmp_path / "b").exists()


def test_a_file_system_that_cannot_reserve_is_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    (tmp_path / "a").touch()
    reserve(tmp_path / "a", 5000)
    assert (tmp_path / "a").read_bytes() == bytes(5000)


def test_folders_are_not_synced_where_that_cannot_be(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    sync_file_before = os.fsync
    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)  # some network file systems
    monkeypatch.setattr(os, "fsync", sync_file_before)
    take_away(monkeypatch, "O_DIRECTORY")
    sync_folder(tmp_path / "not there")  # Windows: not even opened
    (tmp_path / "a").touch()
    sync_file(tmp_path / "a")


def test_what_a_process_left_is_known_by_its_number_where_that_can_be_asked(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert is_abandoned(tmp_path, ended.pid)
    assert not is_abandoned(tmp_path, os.getpid())
    take_away(monkeypatch, "getuid", "kill")
    assert not is_abandoned(tmp_path, ended.pid)


HOLD = """
import sys, time
sys.modules["fcntl"] = None
from pathlib import Path
from deltaclip.base.files import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_one_writer_where_there_are_no_locks_of_the_system(tmp_path):
    target = str(tmp_path / "cache.h5")
    command = [sys.executable, "-c", HOLD, target]
    holder = subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        second = subprocess.run([*command, "0"], capture_output=True, text=True, check=False)
        assert second.stderr.splitlines()[-1].endswith(
            "another process is writing this file; wait for it to end or give another --out"
        )
    finally:
        holder.kill()
        holder.communicate()
    assert subprocess.run([*command, "0"], capture_output=True, text=True, check=True).stdout == "held\n"


def test_a_lock_that_cannot_be_made_is_an_error_of_the_disk(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises((OSError, UserError)) as caught, one_writer(tmp_path / "file" / "c.h5"):
        pass
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize(("system", "reused"), [("posix", True), ("nt", False)])
def test_an_address_is_not_taken_from_another_program(monkeypatch, system, reused):
    """On Windows two programs may listen on one address, where one asks for it so."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "name", system)
        bound = listen("127.0.0.1", 0)
    with bound:
        assert bool(bound.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)) is reused
