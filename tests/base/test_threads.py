"""How many threads numerical libraries take and how they wait: what a process may use, unless the user has said it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deltaclip.base.device import THREAD_SETTINGS, WAITING, _quota, usable_processors

# What a command and the first public name leave in the environment, with what was there before.
PROGRAM = """
import os, sys
if sys.argv[1] == "command":
    from deltaclip.cli import share_processors
    share_processors()
else:
    import deltaclip
    deltaclip.Scorer
assert sys.argv[1] == "name" or "torch" not in sys.modules
names = %r
print({name: os.environ[name] for name in sorted(names) if name in os.environ})
"""


def asked(how, **given):
    kept = {name: value for name, value in os.environ.items() if name not in THREAD_SETTINGS}
    command = [sys.executable, "-c", PROGRAM % (THREAD_SETTINGS,), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=kept | given)
    return eval(done.stdout)  # noqa: S307 - our own program's


@pytest.mark.slow
@pytest.mark.parametrize("how", ["command", "name"])
def test_threads_sleep_while_they_wait(how):
    found = asked(how)
    assert {name: found[name] for name in WAITING} == WAITING


@pytest.mark.parametrize(
    "given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "infinite"}]
)
def test_what_the_user_has_set_stays_alone(given):
    found = asked("command", OMP_NUM_THREADS="3", **given)
    assert found == {"OMP_NUM_THREADS": "3", **given}


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),  # inside a container
        ({"cpu.max": "max 100000"}, "0::/\n", None),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 2.0),  # the service around it
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b\n", 0.5),
        (
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            "5:memory:/x\n4:cpu,cpuacct:/x\n",
            4.0,
        ),
        (
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            "4:cpu,cpuacct:/x\n",
            None,
        ),
        ({"cpu.max": "nonsense"}, "0::/\n", None),
        ({}, "", None),
    ],
)
def test_the_quota_of_a_container_counts(tmp_path, files, own, expected):
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content, encoding="utf-8")
    (tmp_path / "own").write_text(own, encoding="utf-8")
    assert _quota(tmp_path / "groups", tmp_path / "own") == expected


def test_a_system_without_control_groups_or_affinity(tmp_path, monkeypatch):
    assert _quota(tmp_path / "nothing", tmp_path / "nothing") is None
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_processors() == 1
