"""Our interfaces as programs of others use them: clients made from the document of `serve`, readers of an export."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from deltaclip.features.inspect_cache import inspect_cache
from deltaclip.features.settings import InspectConfig
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.tests.pipeline.test_serve import command

pytestmark = pytest.mark.slow
WANTED = Path(__file__).parent.parent / "data" / "strangers.txt"
CASES = (
    "--phases",
    "coverage,fuzzing",
    "--max-examples",
    "5",
    "--max-time",
    "20",
    "--seed",
    "1",
    "--generation-database",
    "none",
)
CLIENT = """
import json, sys
from io import BytesIO
from pathlib import Path

from client import Client
from client.api.default import health, score, score_batch
from client.models import BatchScores, Failure, ScoreBatchBody, ScoreBody, Scores
from client.types import File

address, *pictures = sys.argv[1:]
contents = [Path(picture).read_bytes() for picture in pictures]
with Client(base_url=address) as client:
    assert health.sync(client=client).status == "ok"
    named = score.sync(client=client, body=ScoreBody("a red circle", File(BytesIO(contents[0]), "a.png", "image/png")))
    nameless = score.sync(client=client, body=ScoreBody("a red circle", File(BytesIO(contents[0]))))
    assert isinstance(named, Scores) and named == nameless, nameless
    files = [File(BytesIO(content), "a.png") for content in [*contents, b"no image"]]
    batch = score_batch.sync(client=client, body=ScoreBatchBody(prompts=["a red circle"], images=files))
    assert isinstance(batch, BatchScores)
    by_path = score.sync(client=client, body=ScoreBody("a red circle", path=Path(pictures[0]).name))
    assert by_path == named, by_path
    refused = score.sync_detailed(client=client, body=ScoreBody("", path="none.png"))
    assert isinstance(refused.parsed, Failure) and refused.status_code == 422
print(json.dumps([named.to_dict(), batch.to_dict(), refused.parsed.error]))
"""
READER = """
import json, sys
import numpy as np
from embedding_reader import EmbeddingReader

folder, kind = sys.argv[1:]
reader = EmbeddingReader(
    embeddings_folder=f"{folder}/{kind}", metadata_folder=f"{folder}/metadata", file_format="parquet_npy",
    meta_columns=["image_path", "caption"],
)
parts = list(reader(batch_size=100, start=0, end=reader.count, show_progress=False))
np.save(f"{folder}/read.npy", np.concatenate([vectors for vectors, _ in parts]))
print(json.dumps([row for _, meta in parts for row in meta[["image_path", "caption"]].values.tolist()]))
"""


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Return the folder of programs of an environment that holds others' programs, in releases of their own."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        pytest.skip(f"no {uv}, which makes the environment of other programs; make installs it")
    folder = tmp_path_factory.mktemp("strangers") / "venv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", "-r", WANTED],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"the programs of {WANTED.name} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, demo_folder, demo_rows):
    root = tmp_path_factory.mktemp("root")
    return [Path(shutil.copy(demo_folder / row["image"], root / f"{n}.png")) for n, row in enumerate(demo_rows[:2])]


@pytest.fixture(scope="module")
def address(demo_run, pictures):
    """Return the address of a server of its own process."""
    process = command(demo_run, "--device", "cpu", "--root", str(pictures[0].parent))
    with contextlib.ExitStack() as ending:
        ending.callback(process.communicate)
        ending.callback(process.terminate)
        yield re.search(r"http://\S+", process.stderr.readline())[0]


def run(*words, cwd=None):
    done = subprocess.run([str(word) for word in words], check=False, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_a_generated_client_uploads_pictures_and_gets_their_scores(strangers, address, pictures, *, demo_run, tmp_path):
    with urllib.request.urlopen(f"{address}/openapi.json") as answer:  # noqa: S310 - our own server
        (tmp_path / "openapi.json").write_bytes(answer.read())
    made = ("--path", tmp_path / "openapi.json", "--output-path", tmp_path / "client", "--meta", "none")
    run(strangers / "openapi-python-client", "generate", *made)
    (tmp_path / "ours.py").write_text(CLIENT, encoding="utf-8")
    one, batch, refused = json.loads(run(strangers / "python", "ours.py", address, *pictures, cwd=tmp_path))
    expected = Scorer.load(demo_run, device="cpu").score(pictures, "a red circle")
    assert [one["quality"], one["consistency"]] == pytest.approx(
        [float(expected.q[0]), float(expected.c[0])], abs=5e-3
    )  # bf16
    assert [each.get("quality") for each in batch["results"]] == [
        pytest.approx(float(q), abs=5e-3) for q in expected.q
    ] + [None]
    assert batch["results"][2] == {"error": "image: not an image in a known format"}
    assert refused == "prompt: is empty"


def test_what_schemathesis_makes_up_is_answered_as_the_document_says(strangers, address):
    # Left out: that all that fits the document is accepted, for what it makes up is no image; and that nothing else is,
    # for a number in place of a text, or a text in place of a list of one, looks the same in a form.
    checks = "positive_data_acceptance,negative_data_rejection"
    said = run(strangers / "schemathesis", "run", f"{address}/openapi.json", *CASES, "--exclude-checks", checks)
    assert int(re.search(r"(\d[\d,]*) generated", said)[1].replace(",", "")) > 100
    with urllib.request.urlopen(f"{address}/healthz") as answer:  # noqa: S310 - our own server
        assert json.load(answer)["waiting"] == 0


@pytest.mark.parametrize(("kind", "name"), [("img_emb", "images"), ("text_emb", "texts")])
def test_embedding_reader_reads_an_export(strangers, demo_cache, tmp_path, *, kind, name):
    inspect_cache(InspectConfig(caches=[demo_cache], export=tmp_path / "theirs"))
    inspect_cache(InspectConfig(caches=[demo_cache], export=tmp_path / "plain", export_format="npy"))
    (tmp_path / "read.py").write_text(READER, encoding="utf-8")
    rows = json.loads(run(strangers / "python", tmp_path / "read.py", tmp_path / "theirs", kind))
    found, expected = np.load(tmp_path / "theirs" / "read.npy"), np.load(tmp_path / "plain" / f"{name}.npy")
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-3  # it holds float16
    table = (tmp_path / "plain" / "table.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(rows) == len(table)
    assert all(image in line and caption in line for (image, caption), line in zip(rows, table, strict=True))
