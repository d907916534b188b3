"""Every stage on a pretended GPU: no mixed devices, the CPU's numbers, few waits and launches a step.

Each in a process of its own: a backend of torch's stays for good.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deltaclip.tests.pretended_stages import FAMILIES, STAGES, TUNINGS, of_families

# The pretended device computes with the CPU's kernels in the CPU's order, so what differs is a path that a GPU takes
# and a CPU does not: float32 sums in another order, of numbers of about 1.
TOLERANCE = 1e-5
# The most that a step may wait, on the thread that trains. Extraction waits for the vectors of each view, and once for
# three constants. timm's Eva makes its positions on the host in each pass: a twin keeps them, the model does not.
WAITS = {"extract": 5, "train": 0, "sweep": 0, "predict": 1} | dict.fromkeys(TUNINGS, 0)
OF_LIBRARY = {("eva", "predict"): 1}
# Launches of a step, a few above what they are.
LAUNCHES = {"vit": 310, "resnet": 345, "timm convnext": 385, "siglip": 540, "coca": 355, "eva": 940}

DEVICE = """
import json, warnings
from deltaclip.tests import pretended_gpu as gpu
gpu.install()
import torch
here, there = torch.ones(3, device=gpu.DEVICE), torch.ones(3)
said = {}
def refused(name, work):
    try:
        work()
        said[name] = "nothing"
    except (RuntimeError, TypeError) as error:
        said[name] = str(error).split("!")[0][:60]
refused("add", lambda: here + there)
refused("index", lambda: there[torch.zeros(1, dtype=torch.int64, device=gpu.DEVICE)])
refused("numpy", here.numpy)
gpu.MEMORY.largest_bytes = 1000
refused("memory", lambda: torch.zeros(1000, device=gpu.DEVICE))
gpu.MEMORY.largest_bytes = None
pinned = torch.empty(3, pin_memory=True)
with gpu.recorded() as counted:
    moved = pinned.to(gpu.DEVICE, non_blocking=True)
    there.to(gpu.DEVICE), (here + moved).cpu(), here.sum().item(), torch.tensor(1.0, device=gpu.DEVICE)
    moved = pinned.to(gpu.DEVICE, non_blocking=True)
    pinned.fill_(2.0)
    try:
        moved.cpu()
    except AssertionError as error:
        said["reuse"] = str(error).split("[")[0].strip()
from deltaclip.base.transfers import Leaving, Sender
odd = [torch.arange(5), torch.tensor(2.5), torch.ones(2, 3, 4).half()[:, :2], torch.ones(3) > 0, torch.empty(0, 3)]
with gpu.recorded() as sending:
    sent = Sender(torch.device(gpu.DEVICE)).send(odd).here()
    leaving = Leaving(sent)
assert all(a.device.type == gpu.NAME and a.shape == b.shape and a.dtype == b.dtype for a, b in zip(sent, odd))
sent[0].zero_()
assert all(torch.equal(a, b) for a, b in zip(leaving.there(), odd))
said["sending"] = sending.copies, sending.waits.total()
said["waits"] = sorted(what for what, _ in counted.waits)
said["launches"] = counted.launches["aten::add"], counted.copies
print(json.dumps(said))
"""

FIT = """
import json
from deltaclip.tests import pretended_gpu as gpu
gpu.install()
import torch
from deltaclip.pipeline.loop.batches import memory_batches
from deltaclip.pipeline.loop.epochs import FitPlan, seeded
from deltaclip.pipeline.loop.head_learner import _HeadLearner, fit
from deltaclip.pipeline.model.heads import HeadSpec, build_heads
from deltaclip.pipeline.model.losses import weighted_loss

def losses(device):
    draw = torch.Generator().manual_seed(0)
    v, t = (torch.nn.functional.normalize(torch.randn(40, 8, generator=draw), dim=1).to(device) for _ in "vt")
    labels = {name: torch.rand(40, generator=draw).to(device) for name in ("quality", "consistency")}
    with seeded(3):
        heads = build_heads(HeadSpec(dim=8, dropout=0.1)).to(device)
        batches = memory_batches(v, t, labels, batch_size=8)
        objective = weighted_loss(weights={"quality": 0.5, "consistency": 0.5})
        found = fit(heads, batches, objective=objective, plan=FitPlan(epochs=3))
    return [row.train_loss for row in found.history]

steps, step = [], _HeadLearner.step
def counted(*given):
    with gpu.recorded() as record:
        loss = step(*given)
    steps.append((record.launches.total(), record.waits.total()))
    return loss
_HeadLearner.step = counted
print(json.dumps([losses(gpu.DEVICE), losses("cpu"), max(steps)]))
"""


FULL = """
import json, tempfile
from pathlib import Path
from deltaclip.tests import pretended_gpu as gpu
gpu.install()
from deltaclip.tests.pretended_stages import Bench
with tempfile.TemporaryDirectory() as folder:
    bench = Bench("vit", Path(folder))
    # Of 10 tokens a row the widest layer makes 10 kB, so 14 rows do not fit; weights of up to 66 kB do.
    found = [bench.out_of_memory(80_000, batch_size=14), bench.out_of_memory(80_000, batch_size=14, checkpointing=True)]
    print(json.dumps(found))
"""


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_it_refuses_and_counts_what_cuda_does():
    said = run(DEVICE)
    assert said["add"].startswith("Expected all tensors to be on the same device")
    assert said["index"].startswith("indices should be") or said["index"].startswith("Expected all tensors")
    assert said["numpy"] != "nothing"
    assert said["memory"].startswith("CUDA out of memory")
    assert said["reuse"] == "pinned memory changed under a copy"
    assert said["waits"] == ["device to host", "host to device, pageable", "item()", "torch.tensor(device=)"]
    assert said["launches"] == [1, 3]
    assert said["sending"] == [1, 0]


@pytest.mark.slow
def test_a_full_gpu_is_one_line_with_the_number_that_fits():
    line = "--batch-size: the memory of cudaish:0 does not hold a pass of 14 rows; "
    line += "give --batch-size 7 --accumulate 2: a pass fits, a step sees as many rows"
    assert run(FULL) == [f"{line}, or add --checkpointing", line]


@pytest.mark.slow
def test_heads_train_there_as_on_the_cpu():
    """The one that is fast: no tower, no file."""
    there, here, (launches, waits) = run(FIT)
    assert there == pytest.approx(here, abs=TOLERANCE)
    assert waits == 0
    assert launches < 130


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_runs_there_as_on_the_cpu(family):
    """Extract, train, sweep, finetune in all modes, resume (bit for bit) and predict."""
    found = {each["stage"]: each for each in of_families([family])}
    assert list(found) == list(STAGES)
    apart = {stage: max(each["apart"].values()) for stage, each in found.items()}
    assert max(apart.values()) < TOLERANCE, apart
    waits = {stage: (each["waits"], each["where"]) for stage, each in found.items() if "waits" in each}
    most = {stage: WAITS[stage] + OF_LIBRARY.get((family, stage), 0) for stage in waits}
    assert not {stage: waited for stage, waited in waits.items() if waited[0] > most[stage]}
    assert found["finetune"]["launches"] <= LAUNCHES[family]
    assert found["train"]["launches"] <= 120
    assert found["sweep"]["launches"] <= 270
    assert all(found[stage]["copies"] <= 1 for stage in TUNINGS)
