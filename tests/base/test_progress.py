"""A bar on a terminal (a real one: pty) says rate and time left; elsewhere there is not a byte of it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

PROGRAM = """
import time
from deltaclip.base.progress import Progress
with Progress(40, "checking", unit="files") as bar:
    for _ in range(40):
        time.sleep(0.02)
        bar.advance(note="SROCC 0.5")
print("done")
"""


READING = """
import sys
from pathlib import Path
from deltaclip.base import progress
from deltaclip.features.data.table import read_table
progress.DELAY_S = 0
print(len(read_table(Path(sys.argv[1])).lines))
"""


EVALUATING = """
import sys
from pathlib import Path
from deltaclip.base import progress
from deltaclip.pipeline.compare import compare
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.settings import CompareConfig, EvaluateConfig, TrainConfig
from deltaclip.pipeline.train import train
progress.DELAY_S = 0
run = train(TrainConfig(cache=Path(sys.argv[1]), out=Path(sys.argv[2]), epochs=1)).run
print("trained", file=sys.stderr)
evaluate(EvaluateConfig(run=run))
print("evaluated", file=sys.stderr)
compare(CompareConfig(runs=[run, run]))
"""


def on_a_terminal(*arguments):
    """Run a program whose stderr is a terminal; return what it prints and what the terminal shows."""
    ours, theirs = pty.openpty()
    run = subprocess.Popen([sys.executable, "-c", *arguments], stdout=subprocess.PIPE, stderr=theirs)
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
    assert run.returncode == 0, seen
    return out, seen.decode()


def test_a_terminal_sees_rate_time_left_and_note():
    out, shown = on_a_terminal(PROGRAM)
    assert out == b"done\n"
    assert "checking" in shown
    assert "files/s" in shown
    assert "SROCC 0.5" in shown
    assert "<00:" in shown  # time left


def test_what_is_done_at_once_has_no_bar():
    assert on_a_terminal(PROGRAM.replace("0.02", "0")) == (b"done\n", "")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_table_is_read_with_a_bar(tmp_path, name):
    path, line = tmp_path / name, 'a.png,"a, b"\n' if name.endswith("csv") else '{"image": "a.png", "prompt": "b"}\n'
    path.write_text(("image,prompt\n" if name.endswith("csv") else "") + line * 3, encoding="utf-8")
    out, shown = on_a_terminal(READING, str(path))
    assert out == b"3\n"
    assert f"reading {name}" in shown
    assert "characters/s" in shown


@pytest.mark.slow
def test_rows_are_scored_and_runs_compared_with_a_bar(demo_cache, tmp_path):
    out, shown = on_a_terminal(EVALUATING, str(demo_cache), str(tmp_path / "run"))
    assert out == b""
    trained, evaluated, compared = re.split("trained\\r\\n|evaluated\\r\\n", shown)
    for part in (trained, evaluated):
        assert re.search(r"scoring: 100%.* 240/240 .*rows/s", part), part
    assert re.search(r"comparing: 100%.* 4/4 .*intervals/s", compared), compared


def test_a_pipe_sees_nothing():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"done\n", b"")
