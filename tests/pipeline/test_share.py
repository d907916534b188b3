"""A shared folder: what is in it, what is not in any byte of it, and that it scores as the run did, elsewhere."""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import deltaclip
from deltaclip.base.errors import UserError
from deltaclip.cli import main
from deltaclip.features.backbone.weights import TINY
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.compare import compare
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.finetune import finetune
from deltaclip.pipeline.model.kernel import STRENGTHS, products
from deltaclip.pipeline.report import report
from deltaclip.pipeline.settings import (
    CompareConfig,
    EvaluateConfig,
    FinetuneConfig,
    ReportConfig,
    ShareConfig,
    TrainConfig,
)
from deltaclip.pipeline.share import share
from deltaclip.pipeline.train import train
from deltaclip.tests.pipeline.conftest import numbers, read_csv, read_json

FILES = ["README.md", "config.json", "example.py", "metrics.json", "residual_frozen_best.safetensors"]
FILES += ["trust.safetensors"]
SCORE = """
import sys
import numpy as np
from deltaclip import Scorer
scorer = Scorer.load(sys.argv[1], device="cpu", backbone=sys.argv[3] if len(sys.argv) > 3 else None)
lines = open(sys.argv[2], encoding="utf-8").read().splitlines()
found = scorer.score(lines[::2], lines[1::2]).scores
trust = [part for end in (found.trust.low, found.trust.high) for part in end.values()] if found.trust else []
print(b"".join(np.ascontiguousarray(one).tobytes() for one in [*map(found.of, found.targets), *trust]).hex())
"""


@pytest.fixture(scope="module")
def kernel_run(tmp_path_factory, demo_folder, demo_cache) -> Path:
    """Return a run with a kernel, on a cache that lies beside it."""
    folder = tmp_path_factory.mktemp("secret_project")
    shutil.copyfile(demo_cache, folder / "internal-study.h5")
    config = TrainConfig(cache=folder / "internal-study.h5", out=folder / "run", epochs=1, base="kernel", view="center")
    return train(config).run


@pytest.fixture(scope="module")
def shared(tmp_path_factory, kernel_run) -> Path:
    """Return what was shared of it."""
    out = tmp_path_factory.mktemp("out") / "scorer"
    done = share(ShareConfig(run=kernel_run, out=out, license="cc-by-4.0", trained_on="drawn scenes"))
    assert json.loads(json.dumps(done.to_json()))["files"] == {name: (out / name).stat().st_size for name in FILES}
    assert "kernels hold the vectors of 192 training rows" in done.summary()
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, demo_folder, demo_rows) -> Path:
    """Return a file of pictures and prompts, a line each."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.txt"
    lines = [line for row in demo_rows[::40] for line in (str(demo_folder / row["image"]), row["prompt"])]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def scores_of(folder, pairs, *more):
    """Return the scores and intervals of a process that has nothing but the folder, to the bit."""
    command = [sys.executable, "-c", SCORE, str(folder), str(pairs), *more]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder.parent).stdout


def test_it_has_these_files_and_no_others(shared):
    assert sorted(path.name for path in shared.iterdir()) == FILES


def words_of(run, rows, demo_folder):
    """Return what no byte may tell: by what it is."""
    origin = subprocess.run(
        ["git", "remote", "-v"], check=False, cwd=Path(deltaclip.__file__).parent, capture_output=True, text=True
    )
    found = {
        "prompts": {row["prompt"] for row in rows},
        "images": {Path(row["image"]).name for row in rows} | {row["image"] for row in rows},
        "ratings": {f"{row['quality']},{row['consistency']}" for row in rows},
        "sources": {row["source"] for row in rows},
        "paths": {str(run.parent), run.parent.name, "internal-study", str(demo_folder), str(Path.home()) + "/"},
        "machine": {name for name in (platform.node(),) if len(name) > 4},  # shorter ones stand in bytes by chance
        "user": {f"/{getpass.getuser()}/"},
        "remote": {word for word in origin.stdout.split() if "/" in word},
    }
    assert all(found[name] for name in ("prompts", "images", "ratings", "sources", "paths"))
    return found


def test_no_byte_of_it_tells_what_it_should_not(shared, kernel_run, demo_rows, *, demo_folder):
    content = {path.name: path.read_bytes() for path in shared.iterdir()}
    own = {path.name: path.read_bytes() for path in kernel_run.iterdir()}
    for what, words in words_of(kernel_run, demo_rows, demo_folder).items():
        for word in filter(None, words):
            for spelling in (word, json.dumps(word)[1:-1]):
                for encoding in ("utf-8", "utf-16-le"):
                    found = [name for name, text in content.items() if spelling.encode(encoding) in text]
                    assert not found, (what, word, found)
        if what in ("prompts", "images", "sources", "paths"):  # the search finds what is there
            assert any(word.encode() in text for text in own.values() for word in words), what
    tensors = b"".join(text for name, text in content.items() if name.endswith(".safetensors"))
    for label in ("quality", "consistency"):
        for dtype in ("<f2", "<f4", "<f8"):
            label_N = numbers(demo_rows, label).astype(dtype)
            assert not any(label_N[row : row + 4].tobytes() in tensors for row in range(0, len(label_N) - 3, 3))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_scores_as_the_run_did_to_the_bit_in_a_process_without_run_and_cache(shared, kernel_run, pairs, *, tmp_path):
    of_run = scores_of(kernel_run, pairs)
    alone = tmp_path / "there"
    shutil.copytree(shared, alone)
    hidden = kernel_run.parent.with_name("hidden")
    kernel_run.parent.rename(hidden)
    try:
        assert scores_of(alone, pairs) == of_run
    finally:
        hidden.rename(kernel_run.parent)
    assert len(of_run) > 100


def test_what_the_card_says_of_ratings_is_so(shared, kernel_run, demo_rows):
    """Ratings of the rows that a kernel holds can be computed back: a reader has to know it."""
    tensors = load_file(shared / "residual_frozen_best.safetensors")
    own = {name.rpartition(".")[2]: one for name, one in tensors.items() if name.startswith("quality_head.fitted.")}
    k_LL = products("kernel", own["points_LP"], own["points_LP"])
    said_L = k_LL @ own["beta_L"].double() + own["intercept"].double()
    strengths = [float(strength) for strength in STRENGTHS["kernel"]]
    guesses = [(said_L + strength * own["beta_L"].double()).numpy() for strength in strengths]
    sides = [row["split"] for row in read_csv(kernel_run / "predictions.csv")]
    label_N = np.sort(numbers(demo_rows, "quality")[[side != "test" for side in sides]])
    assert len(label_N) == len(said_L)
    assert min(float(np.abs(np.sort(guess) - label_N).max()) for guess in guesses) < 1e-3
    card = (shared / "README.md").read_text(encoding="utf-8")
    assert "their ratings can be computed back" in card


def test_the_card_is_one_that_the_hub_reads(shared):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(shared / "README.md")
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("cc-by-4.0", "deltaclip", "scorer")
    metrics = read_json(shared / "metrics.json")
    found = {(one.task_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found["quality", "spearmanr"] == pytest.approx(metrics["test"]["quality"]["srocc"], abs=5e-5)
    assert found["consistency", "pearsonr"] == pytest.approx(metrics["test"]["consistency"]["plcc"], abs=5e-5)
    assert {one.dataset_name for one in card.data.eval_results} == {"drawn scenes"}
    for words in ("168 rows to learn from", "no image", "verdict", "width", "unlike", "`cc-by-4.0`", "drawn scenes"):
        assert words in card.text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_runs(shared, tmp_path):
    done = subprocess.run(
        [sys.executable, str(shared / "example.py")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["quality", "consistency"]
    assert all(0 <= float(line.split()[1]) <= 1 for line in done.stdout.splitlines())


def test_what_needs_the_rows_says_that_they_were_left_out(shared, demo_cache, *, tmp_path, few_cache):
    line = f"{shared}: was shared without the rows that it was trained on; give the run that it was made from"
    calls = [
        lambda: evaluate(EvaluateConfig(run=shared)),
        lambda: report(ReportConfig(runs=[shared], out=tmp_path / "page.html")),
        lambda: compare(CompareConfig(runs=[shared, shared])),
        lambda: share(ShareConfig(run=shared, out=tmp_path / "again")),
        lambda: finetune(FinetuneConfig(cache=few_cache, init_heads=shared, epochs=1)),
    ]
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        assert str(caught.value) == line
    found = evaluate(EvaluateConfig(run=shared, cache=demo_cache)).metrics
    assert found["split"]["rows"] == {"train": 0, "val": 0, "test": 240}
    assert found["split"]["note"].startswith("whether the run was trained on rows of this cache is not known")


def test_the_name_of_the_data_is_a_line():
    with pytest.raises(UserError) as caught:
        ShareConfig(run=Path("r"), out=Path("o"), trained_on="two\nlines")
    assert str(caught.value) == "--trained-on: is no line of text; give one line, or leave it out"


def test_repeats_and_an_unnamed_set_have_a_card_too(demo_cache, tmp_path):
    config = TrainConfig(cache=demo_cache, out=tmp_path / "run", epochs=1, base="calibrated", repeats=2)
    out = share(ShareConfig(run=train(config).run, out=tmp_path / "out")).out
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "None was given" in card
    assert "not named" in card
    assert " ± " in card
    assert "kernels hold" not in card


def test_a_machine_that_a_text_would_name_is_refused(kernel_run, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "residual_frozen")  # as a text of it has
    with pytest.raises(UserError) as caught:
        share(ShareConfig(run=kernel_run, out=tmp_path / "out"))
    assert "would tell 'residual_frozen'" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def of_local(tmp_path_factory, few_folder) -> tuple[Path, Path]:
    """Return what was shared of a run whose backbone is a folder of its own, and that folder."""
    folder = tmp_path_factory.mktemp("local")
    shutil.copytree(TINY, folder / "our-clip")
    backbone = f"local-dir:{folder / 'our-clip'}"
    cache = extract(
        ExtractConfig(data=str(few_folder / "demo.csv"), out=folder / "few.h5", backbone=backbone, views="center")
    ).cache
    run = train(TrainConfig(cache=cache, out=folder / "run", epochs=1, base="calibrated")).run
    return share(ShareConfig(run=run, out=folder / "out")).out, folder / "our-clip"


def test_a_backbone_of_a_folder_is_known_by_its_weights(of_local):
    out, backbone = of_local
    told = read_json(out / "config.json")["backbone"]
    assert told["backbone"] == "local-dir:our-clip"
    with pytest.raises(UserError) as caught:
        Scorer.load(out)
    line = f"{out}: needs its backbone local-dir:our-clip, weights of SHA-256 {told['weights_sha256']}"
    assert str(caught.value) == f"{line}; fetch it and give --backbone local-dir:PATH"
    assert Scorer.load(out, backbone=f"local-dir:{backbone}").labels == ("quality", "consistency")
    assert not [path.name for path in out.iterdir() if str(backbone.parent).encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_take_it_as_a_run(shared, demo_folder, pairs, *, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture, prompt = pairs.read_text(encoding="utf-8").splitlines()[:2]
    calls = [
        ["predict", str(shared), picture, "--prompt", prompt, "--json"],
        ["predict", str(shared), str(demo_folder / "demo.csv"), "--out", "scores.csv"],
        ["rank", str(shared), f"a={demo_folder / 'demo.csv'}", f"b={demo_folder / 'demo.csv'}"],
    ]
    if importlib.util.find_spec("onnxruntime"):
        calls.append(["export", str(shared), "--part", "heads", "--out", "heads.onnx"])
    for call in calls:
        with pytest.raises(SystemExit) as ended:
            main(call)
        assert ended.value.code == 0, call
    assert len(read_csv(tmp_path / "scores.csv")) == 240
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    command = [sys.executable, "-m", "deltaclip", "serve", str(shared), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = ""
        for line in process.stdout:
            said += line
            if "http://" in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tuned_backbone_goes_along(few_cache, pairs, tmp_path):
    run = finetune(FinetuneConfig(cache=few_cache, out=tmp_path / "run", epochs=1, freeze_layers=3)).run
    out = share(ShareConfig(run=run, out=tmp_path / "out")).out
    assert scores_of(out, pairs) == scores_of(run, pairs)
    assert "weights that were tuned may remember" in (out / "README.md").read_text(encoding="utf-8")
    text = b"".join(path.read_bytes() for path in out.iterdir())
    assert os.fsencode(tmp_path) not in text
