"""What keeps the code in shape and no linter checks: file sizes, the package list, one function per stage, imports."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deltaclip
from deltaclip import cli
from deltaclip.cli import command_names

ROOT = Path(deltaclip.__file__).parent
CODE = ("base", "features", "pipeline")
COMMANDS = command_names()
# `inspect` is a module of Python's own: the stage of that command has a longer name.
STAGES = {
    name: {"inspect": "inspect_cache", "import": "import_embeddings", "data check": "check_data"}.get(name, name)
    for name in COMMANDS
}
HEAVY = ("numpy", "torch", "h5py", "open_clip", "scipy", "sklearn", "pyarrow", "PIL")
MAX_LINES = 600


def modules():
    """Return every module of ours, tests and benchmarks included."""
    folders = (*CODE, "tests", "benchmarks")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*sorted(ROOT.glob("*.py")), *found]


def name_of(path):
    return str(path.relative_to(ROOT))


def test_a_module_is_read_in_one_sitting():
    lines = {
        name_of(path): len(path.read_text("utf-8").splitlines()) for path in modules() if "tests" not in path.parts
    }
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_a_module_says_what_it_is():
    first = {
        name_of(p): (ast.get_docstring(ast.parse(p.read_text("utf-8"))) or "-").strip().splitlines()[0]
        for p in modules()
    }
    assert {name: line for name, line in first.items() if not line.endswith((".", ":"))} == {}


def test_the_package_list_is_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    assert sorted(listed) == sorted(["deltaclip", *(".".join(("deltaclip", *folder.parts)) for folder in folders)])


def test_every_folder_of_code_is_a_package():
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} has no __init__.py"


def stage_files():
    return [path for folder in ("features", "pipeline") for path in sorted((ROOT / folder).glob("*.py"))]


def test_a_file_beside_the_packages_is_a_stage_with_its_command():
    stages = {path.stem for path in stage_files()} - {"__init__", "settings"}
    assert stages == set(STAGES.values())


@pytest.mark.parametrize("path", [p for p in stage_files() if p.stem in STAGES.values()], ids=name_of)
def test_a_stage_has_one_function_of_its_name_that_takes_settings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (stage,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == path.stem]
    assert [argument.arg for argument in stage.args.args] == ["config"]
    name = f"{path.stem.partition('_')[0].capitalize()}Result"
    if ast.unparse(stage.returns) == "TrainedResult":  # of every stage that ends with a trained run
        tree, name = ast.parse((ROOT / "pipeline/runs/save_run.py").read_text(encoding="utf-8")), "TrainedResult"
    assert ast.unparse(stage.returns) == name
    (result,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    assert {"to_json", "summary"} <= {node.name for node in result.body if isinstance(node, ast.FunctionDef)}


def test_nothing_loads_pickles():
    for path in modules():
        if "tests" not in path.parts:
            text = path.read_text(encoding="utf-8")
            for call in re.findall(r"torch\.load\([^)]*", text):
                assert "weights_only=True" in call, path
            assert "pickle.load" not in text, path


def test_the_project_keeps_to_its_own_words():
    """No module is a drawer for odds and ends."""
    for path in modules():
        assert path.stem not in {"utils", "util", "helpers", "misc", "manager", "common"}, path


@pytest.mark.parametrize(
    "arguments", [[], ["data"], *(name.split() for name in COMMANDS)], ids=lambda a: " ".join(a) or "deltaclip"
)
def test_help_loads_nothing_heavy_and_has_an_example(arguments):
    program = (
        "import json, sys\n"
        "from deltaclip.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", program, *arguments, "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stderr)}
    assert "typer" in loaded
    assert not loaded & set(HEAVY)
    assert "\n  deltaclip " in done.stdout or "\n    deltaclip " in done.stdout


def test_importing_the_package_loads_nothing_heavy():
    program = "import sys, deltaclip; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {*HEAVY, "typer"}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_thin(name):
    body = ast.parse(inspect.getsource(getattr(cli, STAGES[name]))).body[0]
    assert len(body.body) <= 5


def test_the_names_of_tests_hold_no_content(request):
    """Content may hold a time: processes that share the work would then collect tests of different names."""
    names = [item.name for item in request.session.items]
    assert not [name for name in names if "\\x" in name]
