"""What a row costs, from ten thousand to ten million: `python -m benchmarks.scale 10_000 1_000_000 10_000_000`.

A synthetic cache goes through the real writer; labels follow from the vectors by a planted linear model, so that there
is something to learn. Each stage is a process of its own; its memory is the highest that the system saw (`VmHWM`)
less that of the process once its modules were loaded; CPU seconds are those of all its threads. `--dim 768` for wide
vectors; temporary files are removed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measuring import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

ROWS_PER_PROMPT = 8
BLOCK = 16_384
EPOCHS, BATCH = 1, 4096
SHUFFLED_BYTES = 256 << 20  # read by a shuffled pass, here and by memmap


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", type=lambda text: int(text.replace("_", "")))
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where the temporary files go; default the system's")
    parser.add_argument("--stage", choices=STAGES, help="run one stage of one size on --folder, and stop")
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(_measured(options.stage, options.folder, options.rows[0], options.dim)))
        return
    print(f"D = {options.dim}, {EPOCHS} epoch, batch {BATCH}; MB above the loaded modules\n")
    heads = f"{'rows':>12} {'stage':10}{'seconds':>9}{'CPU s':>9}{'rows/s':>12}{'us a row':>10}{'MB':>8}"
    print(f"{heads}{'bytes a row':>13}  note")
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="deltaclip-scale-", dir=options.folder) as folder:
            for stage in STAGES:
                _print(rows, stage, _in_process(stage, Path(folder), rows, options.dim))


def _in_process(stage: str, folder: Path, rows: int, dim: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", str(rows), "--dim", str(dim)]
    command += ["--stage", stage, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _print(rows: int, stage: str, found: dict[str, Any]) -> None:
    seconds, count, size = found["seconds"], found.get("rows", rows), found["bytes"]
    speed = f"{count / seconds:>12,.0f}{seconds / count * 1e6:>10.2f}"
    memory = f"{size / 1e6:>8,.0f}{size / rows:>13,.0f}"
    print(
        f"{rows:>12,} {stage:10}{seconds:>9.2f}{found['cpu']:>9.2f}{speed}{memory}  {found.get('note', '')}", flush=True
    )


def _measured(stage: str, folder: Path, rows: int, dim: int) -> dict[str, Any]:
    work = STAGES[stage](folder, rows, dim)  # imports what it needs
    before, used, started = peak_bytes(), time.process_time(), time.monotonic()
    found = work()
    seconds = time.monotonic() - started
    return {"seconds": seconds, "cpu": time.process_time() - used, "bytes": peak_bytes() - before, **found}


def _write(folder: Path, rows: int, dim: int) -> Callable[[], dict[str, Any]]:
    """Write a cache from a manifest in memory: the plan, the layout, every vector by `put`."""
    from deltaclip.features.store.schema import make_plan
    from deltaclip.features.store.writer import open_writer

    def work() -> dict[str, Any]:
        before, started = peak_bytes(), time.monotonic()
        plan = make_plan(*_manifest(folder, rows, dim))
        planned, peak = time.monotonic() - started, peak_bytes() - before
        facts = {"dim": dim, "precision": "fp16", "backbone": "random", "weights_sha256": "0" * 64}
        request = {"weights_sha256": "0" * 64, "precision": "fp16"}
        writer = open_writer(folder / "cache.h5", plan, request=request, facts=facts)
        for kind, count in (("texts", len(plan.texts)), ("images", plan.num_images)):
            for start in range(0, count, BLOCK):
                entries = np.arange(start, min(start + BLOCK, count))
                vectors = _vectors(kind, entries, dim)
                norms = np.ones(len(entries), dtype=np.float32)
                if kind == "texts":
                    writer.put_tokens(
                        entries, np.zeros(len(entries), dtype=bool), np.zeros(len(entries), dtype=np.uint64)
                    )
                    writer.put("texts", entries, vectors, norms)
                else:
                    writer.put("images", entries, vectors, norms)
        writer.finish(folder / "cache.h5")
        size = (folder / "cache.h5").stat().st_size
        note = f"manifest and plan {planned:.1f} s, {peak / rows:,.0f} bytes a row; file {size / 1e9:.2f} GB"
        return {"note": note}

    return work


def _manifest(folder: Path, rows: int, dim: int) -> tuple[Any, Any]:
    from deltaclip.base.vocabulary import CONSISTENCY, QUALITY
    from deltaclip.features.data.images import ImageContent
    from deltaclip.features.data.manifest import Manifest

    prompts = [f"a synthetic prompt, number {number}" for number in range(-(-rows // ROWS_PER_PROMPT))]
    prompt_N = [prompts[number // ROWS_PER_PROMPT] for number in range(rows)]
    empty = [""] * rows
    manifest = Manifest(
        name="scale",
        path=folder / "scale.csv",
        image_root=folder,
        images=[f"images/{number:08d}.png" for number in range(rows)],
        prompts=prompt_N,
        targets=(QUALITY, CONSISTENCY),
        labels=_labels(rows, dim),
        explanations=empty,
        groups=prompt_N,
        sources=[f"generator {number % 6}" for number in range(rows)],
        splits=empty,
        places=empty,
    )
    keys = np.arange(rows, dtype=np.uint64).view(np.uint8).reshape(rows, 8)
    contents = [ImageContent(bytes(24) + key.tobytes(), "") for key in keys]
    return manifest, contents


def _vectors(kind: str, entries: NDArray[np.int64], dim: int) -> NDArray[np.float32]:
    """Return unit vectors, the same for the same block of entries."""
    seed = (kind == "images", int(entries[0]), dim)
    vectors = np.random.default_rng(seed).standard_normal((len(entries), dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _labels(rows: int, dim: int) -> dict[str, NDArray[np.float64]]:
    """Quality from the image, consistency from image and prompt, by a planted linear model with noise."""
    ways = np.random.default_rng(0).standard_normal((2, dim)).astype(np.float32)
    noise = np.random.default_rng(1)
    of_text = _projected("texts", -(-rows // ROWS_PER_PROMPT), ways[1])[np.arange(rows) // ROWS_PER_PROMPT]
    of_image = _projected("images", rows, ways[0])
    labels = {
        "quality": 1 / (1 + np.exp(-(of_image + 0.5 * noise.standard_normal(rows)))),
        "consistency": 1 / (1 + np.exp(-(of_image + of_text + 0.5 * noise.standard_normal(rows)))),
    }
    return labels | {f"{name}_std": np.full(rows, np.nan) for name in labels}


def _projected(kind: str, count: int, way_D: NDArray[np.float32]) -> NDArray[np.float64]:
    blocks = (np.arange(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))
    return np.concatenate([_vectors(kind, block, len(way_D)) @ way_D for block in blocks]).astype(np.float64)


def _verify(folder: Path, rows: int, dim: int) -> Callable[[], dict[str, Any]]:
    """Do what `inspect --verify` does."""
    from deltaclip.features.inspect_cache import inspect_cache
    from deltaclip.features.settings import InspectConfig

    def work() -> dict[str, Any]:
        result = inspect_cache(InspectConfig(caches=[folder / "cache.h5"], verify=True))
        assert result.exit_code == 0, result.summary()
        return {}

    return work


def _split(folder: Path, rows: int, dim: int) -> Callable[[], dict[str, Any]]:
    """Open the cache and split its rows by groups."""
    from deltaclip.pipeline.rows.cached_rows import load_rows
    from deltaclip.pipeline.rows.split_rows import split_cache

    def work() -> dict[str, Any]:
        split = split_cache(load_rows(folder / "cache.h5", "cpu"), "grouped", fractions="0.7,0.1,0.2", seed=0)
        return {"note": f"train {split.train.size:,}, val {split.val.size:,}, test {split.test.size:,}"}

    return work


def _shuffled(folder: Path, rows: int, dim: int) -> Callable[[], dict[str, Any]]:
    """Read shuffled batches as training gets them: rows checked, vectors in float32, with their labels."""
    from deltaclip.pipeline.rows import cached_rows as module

    def work() -> dict[str, Any]:
        module.MEMORY_BYTES = 0
        batches = module.load_rows(folder / "cache.h5", "cpu").batches(None, batch_size=BATCH)
        started, count, limit = time.monotonic(), 0, _shuffled_rows(rows, dim)
        for batch in batches(1):
            count += batch.num_rows
            if count >= limit:
                break
        return {"rows": count, "seconds": time.monotonic() - started, "note": "opening not counted"}

    return work


def _memmap(folder: Path, rows: int, dim: int) -> Callable[[], dict[str, Any]]:
    """Read the same number of rows, in a random order of all, from arrays that map the file, as one would by hand."""
    import h5py
    import torch

    def work() -> dict[str, Any]:
        maps = []
        with h5py.File(folder / "cache.h5", "r") as file:
            index = np.asarray(file["rows/prompt"])
            for name in ("views/center/embedding", "texts/embedding"):
                place = file[name]
                maps.append(
                    np.memmap(
                        folder / "cache.h5",
                        dtype=place.dtype,
                        mode="r",
                        offset=place.id.get_offset(),
                        shape=place.shape,
                    )
                )
        started, count = time.monotonic(), 0
        order, limit = np.random.default_rng(0).permutation(rows), _shuffled_rows(rows, dim)
        for start in range(0, limit, BATCH):
            chosen = order[start : start + BATCH]
            vectors = [torch.from_numpy(maps[0][chosen]).float(), torch.from_numpy(maps[1][index[chosen]]).float()]
            count += len(vectors[0])
        return {"rows": count, "seconds": time.monotonic() - started, "note": "numpy.memmap, nothing checked"}

    return work


def _shuffled_rows(rows: int, dim: int) -> int:
    return min(rows, SHUFFLED_BYTES // (4 * dim))


def _train(folder: Path, rows: int, dim: int) -> Callable[[], dict[str, Any]]:
    """Train by the command, with its metrics and predictions.csv."""
    from deltaclip.pipeline.settings import TrainConfig
    from deltaclip.pipeline.train import train

    def work() -> dict[str, Any]:
        settings = {"epochs": EPOCHS, "batch_size": BATCH, "device": "cpu", "base": "calibrated"}
        result = train(TrainConfig(cache=folder / "cache.h5", out=folder / "run", **settings))
        test = result.metrics["test"]
        figures = ", ".join(f"{label[0]} {test[label]['srocc']:.3f}" for label in test)
        size = (folder / "run" / "predictions.csv").stat().st_size
        note = f"epoch {result.fit_seconds:.1f} s; test SROCC {figures}; predictions.csv {size / 1e6:,.0f} MB"
        return {"note": note}

    return work


def _evaluate(folder: Path, rows: int, dim: int) -> Callable[[], dict[str, Any]]:
    """Evaluate by the command, on the run's own cache."""
    from deltaclip.pipeline.evaluate import evaluate
    from deltaclip.pipeline.settings import EvaluateConfig

    def work() -> dict[str, Any]:
        found = evaluate(EvaluateConfig(run=folder / "run")).metrics
        trained = json.loads((folder / "run" / "metrics.json").read_text())
        return {"note": "the figures of train" if found == trained else "OTHER FIGURES THAN TRAIN"}

    return work


STAGES: dict[str, Callable[[Path, int, int], Callable[[], dict[str, Any]]]] = {
    "write": _write,
    "verify": _verify,
    "split": _split,
    "shuffled": _shuffled,
    "memmap": _memmap,
    "train": _train,
    "evaluate": _evaluate,
}

if __name__ == "__main__":
    main()
