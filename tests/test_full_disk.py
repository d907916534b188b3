"""A disk that is full, a name that was taken meanwhile: what was computed is kept, and the last line says where."""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys

import pytest

from deltaclip.base.errors import MachineError
from deltaclip.base.files import check_place, keep_result, publish_new, whole_folder

LIMIT_BYTES = 1 << 10  # of any file that a command writes: less than a run, a cache or a comparison has
# A full disk, for one process: every write beyond the limit fails as it would there.
limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))


def command(*arguments, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-m", "deltaclip", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory, demo_cache, demo_folder):
    folder = tmp_path_factory.mktemp("made")
    done = command("train", demo_cache, "--epochs", "1", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return {"run": folder / "run", "cache": demo_cache, "data": demo_folder / "demo.csv"}


WRITING = """
extract {data} --out c.h5
train {cache} --epochs 1 --out r
sweep {cache} --epochs 1 --out r
finetune {cache} --epochs 1 --out r
ablate {cache} --epochs 1 --repeats 2 --out r
report {run} --out page.html
predict {run} {data} --out s.csv
export {run} --part heads --out m.onnx
evaluate {run} --out m.json
compare {run} {run} --out c.json
inspect {cache} --merge m.h5
inspect {cache} --export out
demo --out here
""".strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("line", WRITING, ids=lambda line: line.partition(" {")[0])
def test_every_command_that_writes_ends_in_one_line_on_a_full_disk(line, made, tmp_path):
    done = command(*line.format(**made).split(), cwd=tmp_path, preexec_fn=limited)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert last.startswith("deltaclip: ")
    assert "File too large" in last or "GB are free" in last
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith((".part", ".safetensors"))
    ]


@pytest.mark.slow
def test_a_run_that_the_disk_refuses_is_one_line(made, tmp_path):
    done = command("train", made["cache"], "--epochs", "1", "--out", "r", cwd=tmp_path, preexec_fn=limited)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "deltaclip: r: File too large; check the disk and your rights on it"
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_kept_elsewhere_where_its_disk_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").touch()

    def write(path):
        with whole_folder(path) as growing:
            (growing.work / "a").write_text("result")
        return growing.path

    assert keep_result(tmp_path / "run", write) == tmp_path / "run"
    with pytest.raises(MachineError) as caught:
        keep_result(tmp_path / "file" / "run", write)
    (kept,) = (tmp_path / "elsewhere").iterdir()
    assert (kept / "run" / "a").read_text() == "result"
    assert str(caught.value).endswith(f"what was computed is in {kept / 'run'}: move it to where there is room")
    (kept / "run" / "a").unlink()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OSError) as nowhere:
        keep_result(tmp_path / "file" / "run", write)
    assert nowhere.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("name", ["run", "run.v1", "scores.csv"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_took_a_name_keeps_it(tmp_path, capsys, *, name, kind):
    for number, expected in enumerate((name, None, None), start=1):
        temporary = tmp_path / "temporary"
        temporary.mkdir() if kind == "folder" else temporary.write_text(str(number))
        stem, suffix = (name, "") if kind == "folder" else (name.partition(".")[0], name[len(name.partition(".")[0]) :])
        wanted = expected or f"{stem}-{number}{suffix}"
        assert publish_new(temporary, tmp_path / name).name == wanted
        assert not temporary.exists()
        said = capsys.readouterr().err
        line = f"{tmp_path / name}: was made by somebody else meanwhile; the result is {tmp_path / wanted}\n"
        assert said == ("" if expected else line)


@pytest.mark.slow
def test_two_trainings_of_one_name_both_stay(made, tmp_path):
    """Both find the name free, and train; whoever ends last takes the next one, and says so."""
    line = [sys.executable, "-m", "deltaclip", "train", str(made["cache"]), "--epochs", "2", "--out", "r", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert sorted(json.loads(out)["run"] for out, _ in ended) == ["r", "r-2"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["r", "r-2"]
    said = [line for _, err in ended for line in err.splitlines() if "meanwhile" in line]
    assert said == ["r: was made by somebody else meanwhile; the result is r-2"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_rights_is_found_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MachineError):
        check_place(tmp_path / "run")
