"""Ranking of generators: builds that are better, the same and worse, what a build server gets, what is left out."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image, ImageFilter

from deltaclip.cli import main
from deltaclip.features.data.manifest import LabelRange
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.comparing.generators import _recorded
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.rank import rank
from deltaclip.pipeline.settings import PredictConfig, RankConfig, TrainConfig
from deltaclip.pipeline.train import train
from deltaclip.tests.pipeline.conftest import read_csv, write_csv

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory, demo_folder, tiny_backbone) -> Path:
    """Return a run that knows a blurred picture from a sharp one, by its statistics."""
    folder = tmp_path_factory.mktemp("ranked")
    config = ExtractConfig(
        data=str(demo_folder / "demo.csv"), out=folder / "c.h5", backbone=tiny_backbone, views="center,statistics"
    )
    extract(config)
    return train(TrainConfig(cache=folder / "c.h5", out=folder / "run", epochs=1)).run


@pytest.fixture(scope="module")
def builds(tmp_path_factory, demo_folder, demo_rows) -> Path:
    """Return folders of three builds, NAME.png with NAME.txt, and a table of all with a column source.

    Prompts are new to the run: its own would do, but then the pictures are.
    """
    folder = tmp_path_factory.mktemp("builds")
    changes = {
        "old": lambda image: image,
        "same": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "worse": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
    }
    clean = [row for row in demo_rows if float(row["quality"]) > 0.7][:PROMPTS]
    assert len(clean) == PROMPTS
    rows = []
    for name, change in changes.items():
        (folder / name).mkdir()
        for place, row in enumerate(clean):
            picture = folder / name / f"{place:02}.png"
            with Image.open(demo_folder / row["image"]) as image:
                change(image.convert("RGB").crop((1, 1, *image.size))).save(picture)
            picture.with_suffix(".txt").write_text(f"{place} {row['prompt']}")
            rated = {"quality": f"{float(row['quality']) - 0.5 * (name == 'worse'):.3f}"}
            rows.append(
                {"image": f"{name}/{place:02}.png", "prompt": f"{place} {row['prompt']}", "source": name, **rated}
            )
    write_csv(folder / "all.csv", rows)
    return folder


def named(builds, *names):
    return [f"{name}={builds / name}" for name in names]


def test_each_build_is_judged_against_the_baseline(run, builds, tmp_path):
    outputs = {name: tmp_path / f"gate.{name}" for name in ("xml", "md", "html")}
    result = rank(
        RankConfig(
            run=run,
            data=named(builds, "old", "same", "worse"),
            baseline="old",
            max_drop=0.1,
            only=["quality"],
            junit=outputs["xml"],
            markdown=outputs["md"],
            page=outputs["html"],
            fell=3,
        )
    )
    assert result.exit_code == 3
    checks = {check["generator"]: check for check in result.ranking["gate"]["checks"]}
    assert (checks["same"]["verdict"], checks["worse"]["verdict"]) == ("passed", "dropped")
    assert checks["worse"]["lo"] > 0.1 >= checks["same"]["hi"]

    # What a build server reads.
    suite = suite_of(outputs["xml"])
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["2", "1", "0", "0"]
    (failed,) = suite.findall("testcase/failure")
    assert failed.get("message").startswith("worse against old in quality: drop +0.")
    assert failed.get("message").endswith("surely more than 0.1")

    # What a person reads.
    lines = result.summary().splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert lines[-1] == "gate: a drop is larger than allowed, exit code 3"
    assert any(line.startswith(("  old > worse", "  same > worse")) for line in lines)
    assert "| worse | 24 | 24 |" in outputs["md"].read_text()
    pictures = Pictures()
    pictures.feed(outputs["html"].read_text())
    assert len(pictures.found) == 2 * 3  # each that fell, and beside it the baseline's
    assert all(address.startswith("data:image/webp;base64,") for address in pictures.found)
    fell = result.ranking["fell"]
    assert {row["generator"] for row in fell} == {"worse"}
    assert [row["drop"] for row in fell] == sorted((row["drop"] for row in fell), reverse=True)


def suite_of(path):
    return ET.parse(path).getroot().find("testsuite")  # noqa: S314 - written just now


class Pictures(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append(dict(attrs)["src"])


def test_means_and_differences_are_those_of_the_scores_that_predict_gives(run, builds, tmp_path):
    found = rank(RankConfig(run=run, data=named(builds, "old", "worse")))
    scores = {}
    for name in ("old", "worse"):
        predict(PredictConfig(run=run, target=str(builds / name), out=tmp_path / f"{name}.csv"))
        scores[name] = np.array([float(row["quality"]) for row in read_csv(tmp_path / f"{name}.csv")])
    table = found.ranking["targets"]["quality"]
    assert [one["generator"] for one in table["means"]] == ["old", "worse"]
    for one in table["means"]:
        assert one["scores"]["value"] == pytest.approx(scores[one["generator"]].mean(), abs=1e-5)
    (pair,) = table["differences"]
    assert pair["scores"]["value"] == pytest.approx((scores["old"] - scores["worse"]).mean(), abs=1e-5)
    assert (pair["better"], pair["paired"], pair["people"]) == ("old", True, None)
    assert set(found.ranking["targets"]) == {"quality", "consistency"}
    assert found.exit_code == 0  # nothing was asked of it
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["exit_code"] == 0
    assert [one["unlike"] for one in found.ranking["generators"]] != [None, None]


@pytest.mark.slow
def test_a_table_with_sources_is_ranked_by_people_where_they_rated(run, builds):
    data, gate = [str(builds / "all.csv")], {"baseline": "old", "max_drop": 0.45}
    found = rank(RankConfig(run=run, data=data, label_range=["0,1"], only=["quality"], **gate))
    table = found.ranking["targets"]["quality"]
    assert table["ordered_by"] == "people"
    rated = {row["image"]: float(row["quality"]) for row in read_csv(builds / "all.csv")}
    for one in table["means"]:
        own = [value for image, value in rated.items() if image.startswith(one["generator"])]
        assert one["people"]["value"] == pytest.approx(np.mean(own))
        assert one["labels"] == PROMPTS
    worse = next(pair for pair in table["differences"] if (pair["first"], pair["second"]) == ("old", "worse"))
    assert worse["people"]["value"] == pytest.approx(0.5, abs=1e-3)
    assert worse["judged_by"] == "people"
    checks = {check["generator"]: check for check in found.ranking["gate"]["checks"]}
    assert (checks["worse"]["judged_by"], checks["worse"]["verdict"]) == ("people", "dropped")
    assert checks["worse"]["drop"] == pytest.approx(0.5, abs=1e-3)
    assert "quality: human scores of 0 to 1 (given)" in found.ranking["notes"]
    without = rank(RankConfig(run=run, data=data, labels=False, only=["quality"]))
    assert {one["people"] for one in without.ranking["targets"]["quality"]["means"]} == {None}
    assert {pair["judged_by"] for pair in without.ranking["targets"]["quality"]["differences"]} == {"scores"}
    assert "by scores alone" in without.summary()


def test_what_the_data_cannot_tell_is_said_and_strict_stops_it(run, builds, tmp_path):
    data = [f"{name}={table_of(builds, name, tmp_path, 8)}" for name in ("old", "worse")]
    gate = {"run": run, "data": data, "baseline": "old", "only": ["quality"]}
    drop = rank(RankConfig(**gate, max_drop=0.0)).ranking["gate"]["checks"][0]["drop"]
    for strict in (False, True):
        out = tmp_path / f"{strict}.xml"
        result = rank(RankConfig(**gate, max_drop=round(drop, 3), strict=strict, junit=out))
        assert result.ranking["gate"]["verdict"] == "unclear"
        assert result.exit_code == (3 if strict else 0)
        suite = suite_of(out)
        assert (suite.get("failures"), suite.get("skipped")) == (("1", "0") if strict else ("0", "1"))
        assert "the data cannot tell whether it is more than" in result.summary().replace("\n  ", " ")


def table_of(builds, name, folder, count):
    rows = [row for row in read_csv(builds / "all.csv") if row["source"] == name][:count]
    shutil.copytree(builds / name, folder / name, dirs_exist_ok=True)
    table = folder / f"{name}{count}.csv"
    write_csv(table, [{"image": row["image"], "prompt": row["prompt"]} for row in rows])
    return table


def test_pictures_that_the_run_was_trained_on_are_left_out(run, demo_folder, demo_rows, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(demo_folder / "images", tmp_path / name / "images")
        for place, picture in enumerate(sorted((tmp_path / name / "images").iterdir())):
            picture.rename(picture.with_name(f"renamed{place:03}.png"))  # known by content, whatever it is called
        order = sorted(row["image"] for row in demo_rows)
        renamed = {image: f"images/renamed{place:03}.png" for place, image in enumerate(order)}
        write_csv(tmp_path / name / "d.csv", [row | {"image": renamed[row["image"]]} for row in demo_rows])
    sides = [row["split"] for row in read_csv(run / "predictions.csv")]
    found = rank(RankConfig(run=run, data=[f"{name}={tmp_path / name / 'd.csv'}" for name in ("one", "two")]))
    for one in found.ranking["generators"]:
        assert one["learned"] == len(sides) - sides.count("test")
        assert one["pictures"] == sides.count("test")
    assert found.ranking["generators"][1]["notes"][-1] == "240 pictures are the same files as pictures of one"
    assert "one: 192 pictures that the run was trained on are left out" in found.summary()


def test_a_picture_that_cannot_be_read_is_counted(run, builds, tmp_path):
    shutil.copytree(builds / "old", tmp_path / "old")
    (tmp_path / "old" / "00.png").write_bytes((builds / "old" / "00.png").read_bytes()[:400])
    found = rank(RankConfig(run=run, data=[f"old={tmp_path / 'old'}", *named(builds, "same")], only=["quality"]))
    (pair,) = found.ranking["targets"]["quality"]["differences"]
    assert (pair["scores"]["units"], pair["only_first"], pair["only_second"]) == (PROMPTS - 1, 0, 1)
    assert "old: 1 pictures could not be read, the first: 00.png" in found.summary()


def test_the_command_exits_as_the_gate_says(run, builds, capsys):
    command = ["rank", str(run), *named(builds, "old", "worse"), "--json", "--only", "quality"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--baseline", "old", "--max-drop", "0.1"])
    assert ended.value.code == 3
    assert json.loads(capsys.readouterr().out)["gate"]["verdict"] == "dropped"


@pytest.mark.parametrize("words", ["0 to 5 (adapter)", "1 to 100 (detected)", "-1 to 1 (given)"])
def test_the_scale_that_a_run_recorded_is_read_again(words):
    found = _recorded(words)
    assert str(LabelRange(found.lo, found.hi, words.partition("(")[2][:-1])) == words
