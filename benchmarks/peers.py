"""Other people's tools on the same work: scikit-learn on the same features, clip-retrieval where it installs.

Shown beside our figures, without goals. The plain loop of open_clip's README stands in `benchmarks.extraction`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.measuring import Row, seconds
from benchmarks.models import drawn_jpegs, vit_b_32
from deltaclip.features.backbone.decode_ahead import default_workers
from deltaclip.features.store.reader import FeatureStore

ROWS, DIM, EPOCHS = 3000, 768, 20
FEW, MANY = 64, 320  # images


def measure() -> list[Row]:
    """Return times of scikit-learn's fits for both labels, and clip-retrieval's rate beside ours."""
    return [*_scikit_learn(), *_clip_retrieval()]


def _scikit_learn() -> list[Row]:
    from sklearn.linear_model import RidgeCV
    from sklearn.neural_network import MLPRegressor
    from sklearn.svm import SVR

    rng = np.random.default_rng(0)
    v_ND = rng.standard_normal((ROWS, DIM)).astype(np.float32)
    v_ND /= np.linalg.norm(v_ND, axis=1, keepdims=True)
    labels = [1 / (1 + np.exp(-v_ND @ rng.standard_normal(DIM).astype(np.float32))) for _ in range(2)]
    network = {"hidden_layer_sizes": (128,), "batch_size": 64, "max_iter": EPOCHS, "n_iter_no_change": EPOCHS + 1}
    models = {
        "RidgeCV, 13 strengths": lambda: RidgeCV(alphas=np.logspace(-3, 3, 13)),
        "SVR, radial kernel": lambda: SVR(C=1.0),
        f"MLPRegressor, 128, {EPOCHS} epochs": lambda: MLPRegressor(**network),
    }

    def fit(name: str) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 20 epochs are not convergence, and are not meant to be
            for label in labels:
                models[name]().fit(v_ND, label)

    return [
        Row(
            name=f"scikit-learn {name}: {ROWS:,} rows, D = {DIM}, both labels",
            value=seconds(lambda n=name: fit(n)),
            unit="s",
        )
        for name in models
    ]


def _clip_retrieval() -> list[Row]:
    """Return its rate beside ours on the same files and weights, and how far the embeddings of both agree."""
    name = "clip-retrieval inference, ViT-B-32"
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as place:
        folder = Path(place)
        try:
            command = _installed(folder / "environment")
            few, many = (_seconds_of(command, folder, count) for count in (FEW, MANY))
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no reason given"]
            note = f"does not run on Python 3.{sys.version_info.minor}: {lines[-1][:120]}"
            return [Row(name=name, value=None, unit="images/s", note=note)]
        cosine = _smallest_cosine(folder)
    theirs, ours = ((MANY - FEW) / (long - short) for short, long in zip(few, many, strict=True))
    note = f"whole commands, {MANY} images less {FEW}: what starting takes is left out"
    return [
        Row(name=name, value=theirs, unit="images/s", note=note),
        Row(name="extract, ViT-B-32, the same files and weights", value=ours, unit="images/s", note=note),
        Row(name="extract over clip-retrieval", value=ours / theirs, unit="x"),
        Row(name="extract and clip-retrieval (fp32): smallest cosine", value=cosine, unit=""),
    ]


def _seconds_of(command: list[str], folder: Path, count: int) -> tuple[float, float]:
    """Return how long clip-retrieval and `extract` take for so many files, whole commands."""
    images, weights = folder / f"images{count}", str(vit_b_32().weights)
    images.mkdir()
    for number, content in enumerate(drawn_jpegs(count)):
        (images / f"{number:04}.jpg").write_bytes(content)
    lines = ["image,prompt", *(f"{number:04}.jpg,a picture" for number in range(count))]
    (images / "manifest.csv").write_text("\n".join(lines) + "\n")
    theirs = [*command, "inference", "--input_dataset", str(images), "--output_folder", str(folder / f"theirs{count}")]
    theirs += ["--enable_text", "False", "--batch_size", "64", "--num_prepro_workers", str(default_workers())]
    theirs += ["--clip_model", f"open_clip:ViT-B-32/{weights}"]  # its checkpoint is what follows the first slash
    ours = [sys.executable, "-m", "deltaclip", "extract", str(images / "manifest.csv")]
    ours += ["--out", str(folder / f"ours{count}.h5"), "--backbone", "ViT-B-32", "--pretrained", weights]
    ours += ["--views", "center"]  # what theirs computes
    return seconds(lambda: _run(theirs)), seconds(lambda: _run(ours))


def _installed(environment: Path) -> list[str]:
    """Install clip-retrieval beside this environment and return its command."""
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    uv = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", python]
    pip = uv if importlib.util.find_spec("uv") else [python, "-m", "pip", "install", "-q"]
    _run([*pip, "clip-retrieval", "setuptools<80"])  # its clip-anytorch still needs pkg_resources
    return [str(environment / "bin" / "clip-retrieval")]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)


def _smallest_cosine(folder: Path) -> float:
    """Return the smallest cosine of an image's embeddings in the outputs of both."""
    theirs = folder / f"theirs{MANY}"
    their_ND = np.load(theirs / "img_emb" / "img_emb_0.npy").astype(np.float32)
    paths = pq.read_table(theirs / "metadata" / "metadata_0.parquet")["image_path"].to_pylist()
    with FeatureStore.open(folder / f"ours{MANY}.h5") as store:
        our_ND = store.embeddings("images").astype(np.float32)
    return float((their_ND * our_ND[[int(Path(path).stem) for path in paths]]).sum(axis=1).min())
