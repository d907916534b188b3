"""The bench itself: rows, verdicts, parts that are missing, files of the soak; figures are measured, not tested."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image

from benchmarks import heads, ranking, run, trust
from benchmarks.caches import random_cache
from benchmarks.measuring import Row, at_least, at_most, not_measured, peak_bytes
from benchmarks.models import drawn_jpegs, drawn_prompts
from benchmarks.soak import with_comment, write_files
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.scoring.agreement import srocc

ROOT = Path(run.__file__).parent.parent


@pytest.mark.parametrize(
    ("row", "met", "goal"),
    [
        (at_least(0.8, name="a", value=0.8, unit="x"), True, "at least 0.8"),
        (at_least(0.8, name="a", value=0.79, unit="x"), False, "at least 0.8"),
        (at_most(2, name="a", value=2.0, unit="s"), True, "at most 2"),
        (at_most(2, name="a", value=2.01, unit="s"), False, "at most 2"),
        (at_most(2, name="a", value=float("nan"), unit="s"), False, "at most 2"),
        (not_measured("a", "at most 2", "no GPU"), False, "at most 2"),
    ],
)
def test_verdicts(row, met, goal):
    assert (row.met, row.goal) == (met, goal)
    assert ("NOT MET" in row.line()) is not met


def test_a_line_says_all():
    row = Row(name="speed", value=12.3456, unit="x", goal="at least 4", met=True, ceiling_share=0.5, note="decode 3 %")
    assert " ".join(row.line().split()) == "speed 12.35 x at least 4 met 50 % decode 3 %"
    missing = not_measured("speed", "at least 4", "no GPU")
    assert " ".join(missing.line().split()) == "speed - at least 4 NOT MET no GPU"


def test_a_part_that_is_not_there_is_a_goal_that_is_not_met(monkeypatch):
    monkeypatch.setitem(run.GOALS, "teleport", ("teleportation", "at most 1"))
    (row,) = run.measured("teleport")
    assert (row.name, row.value, row.met) == ("teleportation", None, False)


def test_every_part_exists_or_has_a_goal():
    for part in run.PARTS:
        assert (ROOT / "benchmarks" / f"{part}.py").exists() or part in run.GOALS


@pytest.mark.slow
def test_prompts_are_distinct_and_as_long_as_peoples():
    prompts = drawn_prompts(200)
    assert len(set(prompts)) == 200
    lengths = [len(open_clip.tokenizer.SimpleTokenizer().encode(prompt)) + 2 for prompt in prompts]
    assert 5 <= min(lengths) < 12
    assert 20 < max(lengths) < 32


def test_a_comment_changes_the_bytes_alone(tmp_path):
    (content,) = drawn_jpegs(1, side=64)
    other = with_comment(content, "copy 7")
    assert other != content
    images = [Image.open(io.BytesIO(part)) for part in (content, other)]
    np.testing.assert_array_equal(*(np.asarray(image) for image in images))
    assert images[1].info["comment"] == b"copy 7"
    assert write_files(tmp_path, 5, tmp_path / "nowhere") == "5 drawn pictures repeated"
    assert len({path.read_bytes() for path in tmp_path.glob("*.jpg")}) == 5


def test_a_random_cache_has_labels_that_follow_from_its_vectors(tmp_path):
    rows = load_rows(random_cache(tmp_path / "random.h5", rows=400, dim=16), "cpu")
    assert [target.name for target in rows.targets] == ["quality", "consistency"]
    assert rows.v_ID.shape == (400, 16)
    assert srocc(rows.label("quality"), rows.label("consistency")) > 0.3  # both follow the image


@pytest.mark.slow
def test_trainings_and_sweeps_are_measured_at_any_size(monkeypatch):
    for name, value in {"ROWS": 300, "DIM": 32, "SINGLES": 2, "REPEATS": 1, "EPOCHS": 1}.items():
        monkeypatch.setattr(heads, name, value)
    monkeypatch.setattr(heads.subprocess, "run", lambda *_, **__: None)
    found = {row.name: row.value for row in heads.measure()}
    assert max(value for name, value in found.items() if "difference" in name and "fp32" in name) < 1e-3


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--only"]
    wrong = subprocess.run([*command, "nothing"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "unknown: nothing" in wrong.stderr
    done = subprocess.run(
        [*command, "machine"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "0 of 0 goals met" in done.stdout  # what the machine can do is shown, not judged
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["machine"]["cores"] >= 1
    rows = {row["name"]: row["value"] for row in written["rows"]}
    assert rows["machine: matrix products, fp32"] > 1
    assert {name.partition(":")[0] for name in rows} == {"machine"}


def test_memory_is_that_of_this_process():
    code = """
from benchmarks.measuring import peak_bytes
before = peak_bytes()
block = bytearray(b"x") * (100 << 20)
print(before, peak_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 90e6 < after - before < 300e6
    assert before < 100e6 < peak_bytes()  # and not that of the process which started it


@pytest.mark.slow
def test_trust_counts_labels_inside_and_leaves_every_source_out(demo_cache, capsys):
    trust.main([str(demo_cache), "--splits", "1", "--base", "identity", "--left-out"])
    printed = capsys.readouterr().out
    for target in ("quality", "consistency"):
        for asked in ("0.8", "0.9", "0.95"):
            (line,) = [each for each in printed.splitlines() if f"{target}, asked {asked}, sources told" in each]
            # Of 20 groups that calibrate and 40 that test, coverage of a draw has an SD of about .05.
            assert abs(float(line.split()[5]) - float(asked)) < 0.2
    rows = load_rows(demo_cache, "cpu")
    for source in set(rows.rows.text["source"]):
        assert f"without {source}: flagged 0." in printed


@pytest.mark.slow
def test_ranking_draws_prompts_of_a_run_and_counts_what_holds(tmp_path, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    lines = ["split,group,source,quality,quality_label,consistency,consistency_label"]
    for prompt, (source, level) in itertools.product(range(30), {"a_x": 0.7, "a_y": 0.6, "b": 0.4, "c": 0.2}.items()):
        label, score = level + rng.normal(0, 0.1, 2)
        lines.append(f"test,{prompt},{source},{score},{label},{score},{label}")
    (tmp_path / "predictions.csv").write_text("\n".join([*lines, "train,x,a_x,0,1,0,1"]) + "\n")
    monkeypatch.setattr(ranking, "LABELLED", (40,))
    ranking.main([str(tmp_path), "--draws", "30", "--label-draws", "30"])
    printed = capsys.readouterr().out
    assert "quality: 120 test rows, 30 prompts" in printed
    assert printed.count("4 generators") == printed.count("3 generators") == 2
    assert printed.count("Spearman 1.000, Kendall 1.000") == 4
    found = [float(line.split()[2]) for line in printed.splitlines() if line.startswith(f"    {40:8} ")]
    assert len(found) == 6  # three scorers of two targets
    assert all(share > 0.8 for share in found)  # 90 intervals each
