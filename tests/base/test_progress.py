"""A bar on a terminal (a real one: pty) says rate and time left; elsewhere there is not a byte of it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

PROGRAM = """
import time
from deltaclip.base.progress import Progress
with Progress(40, "checking", unit="files") as bar:
    for _ in range(40):
        time.sleep(0.02)
        bar.advance(note="SROCC 0.5")
print("done")
"""


def test_a_terminal_sees_rate_time_left_and_note():
    ours, theirs = pty.openpty()
    run = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    out, _ = run.communicate(timeout=60)
    assert (run.returncode, out) == (0, b"done\n")
    shown = seen.decode()
    assert "checking" in shown
    assert "files/s" in shown
    assert "SROCC 0.5" in shown
    assert "<00:" in shown  # time left


def test_a_pipe_sees_nothing():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"done\n", b"")
