"""`--json` of every command: standard output is one JSON object and nothing else, whatever is said beside it."""

from __future__ import annotations

import json
import shlex

import pytest

from deltaclip.cli import command_names
from deltaclip.features.data.adapters.demo import demo_folder
from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.scenes.render import render_demo
from deltaclip.features.settings import InspectConfig
from deltaclip.tests.test_cli import run

# Command -> arguments with {fixtures} in them, and a key that its answer has.
COMMANDS = {
    "extract": ("{few_folder}/demo.csv --out again.h5", "new_images"),
    "data check": ("{few_folder}/demo.csv", "errors"),
    "train": ("{few_cache} --epochs 1", "test"),
    "sweep": ("{few_cache} --epochs 1 --lr 1e-3,2e-3", "test"),
    "finetune": ("{few_cache} --epochs 1 --freeze-layers 5", "test"),
    "ablate": ("{few_cache} --epochs 1 --repeats 1", "variants"),
    "evaluate": ("{demo_run}", "test"),
    "compare": ("{demo_run} {demo_run}", "labels"),
    "predict": ("{demo_run} {few_folder}/images --prompt x", "rows"),
    "report": ("{demo_run} --out page.html", "page"),
    "export": ("{demo_run} --part heads --out heads.onnx", "largest_difference"),
    "rank": ("{demo_run} a={few_folder}/demo.csv b={few_folder}/demo.csv", "generators"),
    "share": ("{demo_run} shared", "files"),
    "demo": ("", "page"),
    "inspect": ("{few_cache} --verify", "damaged"),
    "import": ("{exported} --out in.h5 --backbone tiny --precision fp32", "cache"),
}
# Ends with a signal: tests/pipeline/test_serve.py; need a server: tests/pipeline/test_hub.py.
ELSEWHERE = {"serve", "push", "pull"}


@pytest.fixture(scope="session")
def exported(tmp_path_factory, few_cache):
    """Embeddings of the few images, written for other programs."""
    folder = tmp_path_factory.mktemp("exported") / "few"
    inspect_cache(InspectConfig(caches=[few_cache], export=folder))
    return folder


def no_json(word):
    pytest.fail(f"{word} is no JSON")


def test_every_command_is_here():
    assert {*COMMANDS, *ELSEWHERE} == set(command_names())


LONG = ("export", "demo")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=pytest.mark.slow) if each in LONG else each for each in COMMANDS]
)
def test_stdout_is_one_json_object(name, request, *, tmp_path, monkeypatch, capfd):
    words, key = COMMANDS[name]
    fixtures = {one: request.getfixturevalue(one) for one in ("few_folder", "few_cache", "demo_run", "exported")}
    monkeypatch.chdir(tmp_path)
    if name == "demo":  # a smaller set where the real one would be drawn
        monkeypatch.setenv("DELTACLIP_CACHE", str(tmp_path / "user_cache"))
        render_demo(demo_folder(), seed=0, num_prompts=12, images_per_prompt=3)
    capfd.readouterr()
    assert run(*name.split(), *shlex.split(words.format(**fixtures)), "--json") == 0
    found = json.loads(capfd.readouterr().out, parse_constant=no_json)
    assert key in found


def test_scores_that_a_run_does_not_have_are_null(train_demo, few_folder, capfd):
    direct = train_demo(residual_learning=False, epochs=1).run
    capfd.readouterr()
    assert run("predict", str(direct), str(few_folder / "demo.csv"), "--json") == 0
    rows = json.loads(capfd.readouterr().out, parse_constant=no_json)["rows"]
    assert rows[0]["quality"] is not None
    assert rows[0]["quality_base"] is None
