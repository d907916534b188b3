"""Other people's tools on the same work: scikit-learn on the same features, clip-retrieval where it installs.

Shown beside our figures, without goals.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

from benchmarks.measuring import Row, seconds

ROWS, DIM, EPOCHS = 3000, 768, 20


def measure() -> list[Row]:
    """Return times of scikit-learn's fits for both labels, and whether clip-retrieval can be measured here."""
    return [*_scikit_learn(), _clip_retrieval()]


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


def _clip_retrieval() -> Row:
    name = "clip-retrieval inference, ViT-B-32"
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "install", "-q", "clip-retrieval"]
        done = subprocess.run([*pip, "--dry-run"], check=False, capture_output=True, text=True, timeout=600)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1][:120] if done.stderr.strip() else "no reason given"
        return Row(
            name=name,
            value=None,
            unit="images/s",
            note=f"does not install on Python 3.{sys.version_info.minor}: {reason}",
        )
    # It takes model names only and fetches their weights, which a machine without network cannot.
    return Row(name=name, value=None, unit="images/s", note="installs, but needs weights from the network")
