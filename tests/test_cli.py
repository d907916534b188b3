"""The command line as a user and a shell see it: help, spellings, output, exit codes."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import signal
import subprocess
import sys

import pytest

from deltaclip import cli
from deltaclip.cli import command_names, main
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.runs.save_run import TrainedResult
from deltaclip.pipeline.settings import TrainConfig

COMMANDS = command_names()
# Whose stage is not pipeline.NAME.NAME.
STAGES = {
    "extract": "features.extract.extract",
    "inspect": "features.inspect_cache.inspect_cache",
    "import": "features.import_embeddings.import_embeddings",
    "data check": "features.check_data.check_data",
}


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.fixture
def nothing_is_there(monkeypatch):
    """Let commands name files that nobody has made: the stages are not run."""
    monkeypatch.setattr("deltaclip.cli.check_places", lambda settings: None)


@pytest.fixture
def parsed(monkeypatch, nothing_is_there):
    """Settings that `deltaclip train ...` would train with; nothing is trained."""
    found = []

    def record(config):
        found.append(config)
        return TrainedResult(
            run=config.cache,
            metrics={},
            scales={"quality": 0.2, "consistency": 0.2},
            best_epoch={"quality": 1, "consistency": 1},
            fit_seconds=0.0,
            seconds=0.0,
        )

    monkeypatch.setattr("deltaclip.pipeline.train.train", record)

    def parse(*arguments):
        assert run("train", "cache.h5", "--json", *arguments) == 0
        return found[-1]

    return parse


def test_help_names_every_command_whole(capsys):
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        function = STAGES.get(name, name).rpartition(".")[2]
        first = (getattr(cli, function).__doc__ or "").splitlines()[0]
        assert len(first) <= 66
        assert f"  {name:8}  {first}" in lines or " " in name  # a command of a group is in the help of that
    assert "    deltaclip extract demo" in lines
    assert "    deltaclip train cache/demo_tiny.h5" in lines


def test_without_a_command_the_help_is_shown_and_the_exit_code_says_so(capsys):
    assert run("-h") == 0
    shown = capsys.readouterr().out
    assert run() == 2
    assert capsys.readouterr().out == shown


def test_what_every_program_answers(capsys):
    version = importlib.metadata.version("deltaclip")
    for spelling in ("--version", "-V"):
        assert run(spelling) == 0
        assert capsys.readouterr().out == f"deltaclip {version}\n"
    for asked, same in ((["help"], ["--help"]), (["help", "train"], ["train", "-h"]), (["data"], ["data", "--help"])):
        assert run(*same) == 0
        shown = capsys.readouterr().out
        assert run(*asked) == (2 if asked == ["data"] else 0)  # without a command nothing was done
        assert capsys.readouterr().out == shown


PUBLISHED = [
    "epochs=2",
    "batch-size=32",
    "lr=2e-3",
    "w-q=0.4",
    "w-c=0.6",
    "residual-scale-q=0.1",
    "residual_scale_c=0.3",
    "scale=0.25",
    "weight=0.7",
    "weight-decay=1e-3",
    "warmup-ratio=0.1",
    "max_grad_norm=0.5",
    "dropout=0.2",
    "scale-mode=learned",
]


@pytest.mark.parametrize("name", ["train", "sweep", "finetune", "ablate"])
def test_published_spellings_are_taken_where_they_make_sense(name, monkeypatch, *, nothing_is_there):
    found = []

    def record(config):
        found.append(config)
        raise SystemExit(0)

    monkeypatch.setattr(f"deltaclip.pipeline.{name}.{name}", record)
    further = {
        "train": "--freeze-clip --use-explanations --w-exp=0.2 --no-residual-learning --two-branch --refinement",
        "sweep": "--freeze_clip",
        "finetune": "--partial-freeze --use-explanations --w_exp=0.2 --no-residual-learning --two-branch --refinement",
        "ablate": "--freeze-clip --no-partial-freeze",
    }[name]
    assert run(name, "cache.h5", *(f"--{word}" for word in PUBLISHED), *further.split()) == 0
    for word in PUBLISHED:
        option, _, value = word.partition("=")
        taken = getattr(found[0], option.replace("-", "_"))
        assert taken == value or float(taken) == float(value)


def test_what_changes_nothing_is_said(demo_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", str(demo_cache), "--epochs", "1", "--freeze-clip") == 0
    line = "warning: --freeze-clip changes nothing: CLIP is always frozen here"
    assert line in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_on_one_line(name, capsys):
    assert run(*name.split(), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    (example,) = [line for line in lines if f"{line} ".startswith(f"    deltaclip {name} ")]
    assert lines[lines.index(example) - 1] == "  Example:"
    assert lines[0].startswith(f"Usage: deltaclip {name} [OPTIONS]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_understood(name, monkeypatch, capsys, *, nothing_is_there):
    """The example of each command is parsed by the command itself."""
    import shlex

    run(*name.split(), "--help")
    (example,) = [x for x in capsys.readouterr().out.splitlines() if f"{x} ".startswith(f"    deltaclip {name} ")]
    found = []
    stage = f"deltaclip.{STAGES.get(name, f'pipeline.{name}.{name}')}"

    def record(config):
        found.append(config)
        return TrainedResult(
            run=None,
            metrics={},
            scales={"quality": 0.2, "consistency": 0.2},
            best_epoch={"quality": 1, "consistency": 1},
            fit_seconds=0.0,
            seconds=0.0,
        )

    monkeypatch.setattr(stage, record)
    assert run(*shlex.split(example)[1:], "--json") == 0
    assert len(found) == 1


def test_underscores_are_hyphens_and_zero_is_a_value(parsed):
    config = parsed("--residual_scale_q", "0", "--residual-scale-c=0", "--weight_decay", "0", "--no_residual_learning")
    assert config.residual_scale_q == config.residual_scale_c == config.weight_decay == 0
    assert config.residual_learning is False
    assert config.epochs == TrainConfig(cache=config.cache).epochs
    config = parsed("--w_q", "0", "--max_grad_norm=0", "--dropout", "0", "--warmup_ratio", "0", "--seed", "0")
    assert (config.w_q, config.max_grad_norm, config.dropout, config.warmup_ratio, config.seed) == (0, 0, 0, 0, 0)


def test_without_options_the_settings_are_the_defaults(parsed):
    config = parsed()
    assert config == TrainConfig(cache=config.cache)
    assert str(config.cache) == "cache.h5"


def test_only_what_was_given_counts_as_given(parsed):
    assert parsed().given == {"cache"}
    config = parsed("--preset", "small", "--epochs", "20", "--scale=0.2", "--residual-learning")
    assert config.given == {"cache", "preset", "epochs", "scale", "residual_learning"}
    assert config == TrainConfig(cache=config.cache, preset="small")  # all given their defaults


def test_values_with_underscores_arrive_as_they_are(monkeypatch, nothing_is_there):
    found = []

    def record(config):
        found.append(config)
        return TrainedResult(
            run=config.data,
            metrics={},
            scales={"quality": 0.2, "consistency": 0.2},
            best_epoch={"quality": 1, "consistency": 1},
            fit_seconds=0.0,
            seconds=0.0,
        )

    monkeypatch.setattr("deltaclip.features.extract.extract", record)
    assert run("extract", "my_set.csv", "--image_root", "a_b", "--quick-gelu", "--json") == 0
    assert found[0] == ExtractConfig(data="my_set.csv", image_root=found[0].image_root, quick_gelu=True)
    assert str(found[0].image_root) == "a_b"


def test_the_whole_path(demo_cache, demo_folder, *, tmp_path, monkeypatch, capsys):
    """Train, evaluate and predict by hand, as the README says."""
    monkeypatch.chdir(tmp_path)
    assert run("train", str(demo_cache), "--epochs", "2", "--base", "calibrated", "--json") == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["run"] == "runs/demo_residual_frozen"
    recorded = json.loads((tmp_path / trained["run"] / "metrics.json").read_text())
    assert {name: trained[name] for name in recorded} == recorded
    assert run("evaluate", trained["run"], "--json") == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert {name: evaluated[name] for name in recorded} == recorded
    assert run("evaluate", trained["run"]) == 0
    assert "floor: zero-shot cosine" in capsys.readouterr().out
    assert run("predict", trained["run"], str(demo_folder / "demo.csv"), "--out", "scores.csv") == 0
    assert capsys.readouterr().out.splitlines()[0] == "scores.csv: 240 rows"
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 241


def shell(*arguments, **options):
    command = [sys.executable, "-m", "deltaclip", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_exit_codes_reach_the_shell(tmp_path):
    for arguments, code in ((["--help"], 0), ([], 2), (["train", "gone.h5", "--lr", "-1"], 2)):
        with shell(*arguments, cwd=tmp_path) as process:
            _, err = process.communicate()
        assert process.returncode == code
        assert (err == b"") is (code == 0 or not arguments)


def test_ctrl_c_is_one_line_and_130(demo_cache, tmp_path):
    # A test run in the background of a script has Ctrl-C ignored, and its children inherit that.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"cwd": tmp_path, "text": True, "preexec_fn": listen}
    with shell("train", str(demo_cache), "--epochs", "1000000", **options) as process:
        try:
            assert any(line.startswith("bases ") for line in process.stderr)  # the last line before the first epoch
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert err == "deltaclip: interrupted; nothing half-written is left, give the same command again\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    # The summary is printed when the work is done: what happens then has no other place to be caught.
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [sys.executable, "-m", "deltaclip", "data", "check", "demo", "--images", "none"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
    assert done.stderr == "deltaclip: input/output: No space left on device; check the disk and your rights on it\n"
    assert done.returncode == 1


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "2>/dev/full"])
def test_a_program_without_output_does_its_work(demo_cache, tmp_path, *, closed):
    command = f'"$0" -m deltaclip inspect "$1" --merge merged.h5 {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, demo_cache], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert (tmp_path / "merged.h5").exists()


def test_what_the_terminal_cannot_show_ends_nothing(tmp_path):
    (tmp_path / "t.csv").write_text("image,prompt\nkätzchen-\N{CAT FACE}.png,x\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "deltaclip", "data", "check", "t.csv"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert "kätzchen-\\U0001f431.png".encode("latin-1") in done.stdout
    assert done.stderr == b""


def test_an_error_that_nobody_has_foreseen_is_one_line_too(monkeypatch, capsys, nothing_is_there):
    def fail(config):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("deltaclip.pipeline.train.train", fail)
    line = "deltaclip: internal error: ZeroDivisionError: division by zero; "
    line += "give --debug too for the traceback, and report it with that\n"
    assert run("train", "cache.h5") == 1
    assert capsys.readouterr().err == line
    assert run("train", "cache.h5", "--debug") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith(f"ZeroDivisionError: division by zero\n{line}")


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    with shell("train", "--help", cwd=tmp_path) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert err == b""
    assert process.returncode == 1
