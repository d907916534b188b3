"""Memory of a large cache: that of its windows, not that of its vectors."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from deltaclip.base.vocabulary import CONSISTENCY, QUALITY
from deltaclip.features.data.images import ImageContent
from deltaclip.features.data.manifest import Manifest
from deltaclip.features.store.schema import make_plan
from deltaclip.features.store.writer import open_writer

ROWS, DIM = 24_000, 2048
VECTOR_BYTES = ROWS * DIM * 2

READ = """
import json, re, sys
from pathlib import Path
import torch
from deltaclip.pipeline.rows import cached_rows as module

def peak():
    # Not ru_maxrss, which a new process has from the one that started it.
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

module.MEMORY_BYTES, module.WINDOW_BYTES = int(sys.argv[2]), 8 << 20
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
rows = module.load_rows(Path(sys.argv[1]), "cpu")
count, total = 0, 0.0
for batch in rows.batches(None, batch_size=64)(1):
    count, total = count + batch.num_rows, total + float(batch.label_B["quality"].sum())
print(json.dumps({"bytes": peak() - before, "rows": count, "sum": total, "cosine": float(rows.cosine().sum())}))
"""


@pytest.fixture(scope="module")
def large_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    number, texts = np.arange(ROWS), [f"prompt {row // 8}" for row in range(ROWS)]
    missing = {name: np.full(ROWS, np.nan) for name in ("consistency", "quality_std", "consistency_std")}
    manifest = Manifest(
        name="large",
        path=folder / "large.csv",
        image_root=folder,
        images=[f"{row}.png" for row in range(ROWS)],
        prompts=texts,
        targets=(QUALITY, CONSISTENCY),
        labels=missing | {"quality": number / ROWS},
        explanations=[""] * ROWS,
        groups=texts,
        sources=[""] * ROWS,
        splits=[""] * ROWS,
        places=[""] * ROWS,
    )
    plan = make_plan(manifest, [ImageContent(row.to_bytes(32), "") for row in range(ROWS)])
    facts = {"dim": DIM, "precision": "fp16", "backbone": "test"}
    writer = open_writer(folder / "large.h5", plan, request={"precision": "fp16"}, facts=facts)
    generator = np.random.default_rng(0)
    for kind, count in (("texts", ROWS // 8), ("images", ROWS)):
        for start in range(0, count, 3000):
            vectors = generator.random((3000, DIM), dtype=np.float32)
            writer.put(kind, np.arange(start, start + 3000), vectors, np.ones(3000))
    writer.finish(folder / "large.h5")
    return folder / "large.h5"


@pytest.mark.slow
def test_a_large_cache_takes_the_memory_of_its_windows(large_cache):
    found = []
    for memory_bytes in (0, 1 << 30):
        command = [sys.executable, "-c", READ, str(large_cache), str(memory_bytes)]
        found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    streamed, whole = found
    assert whole["bytes"] > VECTOR_BYTES  # 98 MB: what this test would see if all were read
    assert streamed["bytes"] < VECTOR_BYTES / 2
    assert streamed["rows"] == whole["rows"] == ROWS
    assert streamed["sum"] == pytest.approx(whole["sum"], rel=1e-6)
    assert streamed["cosine"] == whole["cosine"]
