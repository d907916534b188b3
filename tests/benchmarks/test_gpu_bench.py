"""The command for a GPU: figures, time limits, refusals, and all of it dry; speeds are measured, not tested."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import decoding
from benchmarks.gpu.figures import as_line
from benchmarks.gpu.scene import SMALL, Check, Scene, Shape, pictures
from benchmarks.models import drawn_jpegs
from deltaclip.features.backbone.device_decoding import DeviceDecoder
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.weights import find_weights

ROOT = Path(command.__file__).parents[2]


@pytest.mark.parametrize(
    ("limit", "value", "ratio", "verdict"),
    [
        ({"floor": 2.0}, 2.0, 1.0, "met"),
        ({"floor": 2.0}, 1.0, 0.5, "NOT MET"),
        ({"most": 2.0}, 2.0, 1.0, "met"),
        ({"most": 2.0}, 3.0, 1.5, "NOT MET"),
        ({"most": 0.0}, 0.0, None, "met"),
        ({"most": 0}, 1, None, "NOT MET"),
    ],
)
def test_a_figure_says_what_is_asked_of_it(limit, value, ratio, verdict):
    line = json.loads(as_line("heads", "speed", value, "x", **limit))
    assert line == {"part": "heads", "name": "speed", "value": value, "unit": "x", "ratio": ratio, **limit} | {
        "verdict": verdict
    }


def test_a_figure_that_is_no_number_meets_nothing():
    for limit in ("floor", "most"):
        assert json.loads(as_line("heads", "speed", float("nan"), **{limit: 1.0}))["verdict"] == "NOT MET"
    assert "verdict" not in json.loads(as_line("heads", "speed", 1.0))


def test_speeds_are_not_judged_dry(tmp_path, capsys):
    for dry in (False, True):
        Scene(part="heads", folder=tmp_path, dry=dry).speed("speed", 1.0, "x", floor=2.0)
    judged = ["verdict" in json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert judged == [True, False]


def test_an_error_is_a_figure_and_the_others_go_on(tmp_path, capsys):
    scene = Scene(part="heads", folder=tmp_path, dry=True)
    with Check(scene, "train"):
        raise ValueError("no such thing")
    line = json.loads(capsys.readouterr().out)
    assert (line["name"], line["verdict"]) == ("train: ValueError: no such thing", "NOT MET")
    assert "Traceback" in (tmp_path / "heads.errors").read_text()
    with pytest.raises(KeyboardInterrupt), Check(scene, "train"):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_part_that_hangs_is_cut_off_with_what_it_started(capsys):
    program = "import subprocess as s; print('{\"part\": 1}', flush=True); s.run(['sleep', '60'])"
    started = time.monotonic()
    lines = [json.loads(line) for line in command.run_limited([sys.executable, "-c", program], "heads", 1.5)]
    assert time.monotonic() - started < 30
    assert lines[0] == {"part": 1}
    assert (lines[1]["name"], lines[1]["verdict"]) == ("seconds, then cut off", "NOT MET")
    assert len(capsys.readouterr().out.splitlines()) == len(lines) == 3


def test_a_part_that_ends_wrongly_is_not_met(capsys):
    lines = command.run_limited([sys.executable, "-c", "import sys; sys.exit('full')"], "heads", 60)
    assert (json.loads(lines[0])["name"], json.loads(lines[0])["verdict"]) == ("exit code", "NOT MET")
    assert capsys.readouterr().err == "full\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert command.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "deltaclip: no CUDA GPU is present (give DRY=1, or --dry: every part on the CPU, small)\n"


def test_parts_have_names_and_end_in_time(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--only", "heads,tails"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "unknown: tails; there are correct, extract, finetune, heads, ceilings" in capsys.readouterr().err
    assert sum(command.LIMITS_S.values()) <= command.IN_ALL_S < 600


def test_operations_are_those_that_torch_counts():
    shape, model = Shape(SMALL["vision_cfg"], SMALL["text_cfg"]), open_clip.CLIP(**SMALL).eval()
    # Plain attention: the counter knows no fused kernel of a CPU.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, 64, 64))
    assert counter.get_total_flops() == pytest.approx(shape.image_flops, rel=0.02)  # the projection is left out
    large = Shape(*(open_clip.get_model_config("ViT-L-14")[name] for name in ("vision_cfg", "text_cfg")))
    assert large.image_flops == pytest.approx(162e9, rel=0.01)
    assert (large.frozen, Shape(SMALL["vision_cfg"], SMALL["text_cfg"]).frozen) == (18, 3)


def test_pictures_are_distinct_and_drawn_once(tmp_path):
    scene = Scene(part="extract", folder=tmp_path, dry=True)
    table = pictures(scene, 5, side=32)
    files = sorted(table.parent.glob("*.jpg"))
    assert len({file.read_bytes() for file in files}) == 5
    before = files[0].stat().st_mtime_ns
    assert len(pictures(scene, 6, side=32).read_text().splitlines()) == 7
    assert files[0].stat().st_mtime_ns == before


def test_decoding_is_measured(tmp_path, capsys, monkeypatch):
    scene = Scene(part="ceilings", folder=tmp_path, dry=True)
    monkeypatch.setattr(decoding, "decode_rate", lambda: 100.0)
    decoding.measure(scene)
    found = {line["name"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    for kind in ("4:2:0", "4:2:2", "4:4:4", "grey"):
        assert found[f"decoding {kind} on cpu: levels apart from exact, most"]["value"] <= 2
        assert found[f"decoding {kind} on cpu: cosine with exact, least"]["verdict"] == "met"
    asked = {name.removeprefix("decoding on cpu: "): line["value"] for name, line in found.items() if "most" in line}
    assert asked == {
        "whole files that it did not decode": 0,
        "of 24 files cut short, taken for whole": 0,
        "of 8 damaged files, those with another verdict than by exact": 0,
    }


def test_a_cut_file_that_is_taken_for_whole_is_not_met(tmp_path, capsys, monkeypatch):
    """What the figure is for: without the host's look at files it would say so."""
    scene = Scene(part="ceilings", folder=tmp_path, dry=True)
    monkeypatch.setattr(decoding, "_verdict", lambda *_: True)
    backbone = load_backbone(find_weights("tiny", None), device="cpu", precision="fp32", decode="gpu")
    decoding._cut_short(scene, DeviceDecoder(backbone), drawn_jpegs(1, side=96))
    taken, alone = map(json.loads, capsys.readouterr().out.splitlines())
    assert (taken["value"], taken["verdict"]) == (len(decoding.CUTS), "NOT MET")
    assert "verdict" not in alone


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_part_dry():
    line = [sys.executable, "-m", "benchmarks.gpu", "--dry"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"part"')]
    assert {each["part"] for each in figures} == set(command.LIMITS_S)
    assert {each.get("verdict") for each in figures} == {"met", None}
    assert len(figures) > 50
