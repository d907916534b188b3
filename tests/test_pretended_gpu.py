"""Every stage on a pretended GPU: no mixed devices, the CPU's numbers, few waits and launches a step.

Each in a process of its own: a backend of torch's stays for good.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deltaclip.tests.features.backbone.test_device_decoding import exif, needs_torchcodec
from deltaclip.tests.features.backbone.test_pixels import as_jpeg, picture
from deltaclip.tests.features.data.odd_images import refused_files, usable_files
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


DECODED = """
import json, os, signal, sys
from pathlib import Path
from deltaclip.tests import pretended_gpu as gpu
gpu.install()
import numpy as np
from deltaclip.base.errors import UserError
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.writer import StoreWriter
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train
from deltaclip.tests.pretended_stages import per_call

folder, backbone = Path(sys.argv[1]), sys.argv[2]

def made(name, device, decode, views="center,flip,statistics", **more):
    return extract(ExtractConfig(data=str(folder / "set"), out=folder / f"{name}.h5", backbone=backbone, device=device,
                                 precision="fp32", decode=decode, batch_size=8, views=views, **more))

def vectors(name):
    with FeatureStore.open(folder / f"{name}.h5") as store:
        done = np.flatnonzero(store.status() == 1)
        return {view: store.group("images", view)["embedding"][done].astype(np.float64)
                for view in ("center", "flip", "statistics")}

def apart(one, other):
    return {view: float(np.abs(one[view] - other[view]).max()) for view in one}

said, put = {}, StoreWriter.put_images
pid = os.fork()  # before anything computes: threads of OpenMP do not survive it
if pid == 0:
    count = iter(range(9))
    def put_and_die(writer, *given):
        put(writer, *given)
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    StoreWriter.put_images = put_and_die
    made("killed", gpu.DEVICE, "gpu")
said["killed"] = os.waitpid(pid, 0)[1]
with per_call("deltaclip.features.backbone.view_vectors") as steps:
    whole = made("whole", gpu.DEVICE, "gpu")
said["waits"] = [dict(waits=step.waits.total(), decoded=sum(step.waits[key] for key in step.waits if "jpeg" in key[0]))
                 for step in steps]
said["notes"], said["failed"] = whole.notes, whole.failed
said["identity"] = [whole.facts["versions"].get("torchcodec") is not None]
fast = made("fast", "cpu", "fast")
said["same failures"] = fast.failed == whole.failed
said["fast"] = apart(vectors("whole"), vectors("fast"))
rest = made("killed", gpu.DEVICE, "gpu")
said["rest"] = [rest.new_images, whole.new_images]
said["resumed"] = apart(vectors("whole"), vectors("killed"))
made("grown", gpu.DEVICE, "gpu", views="center,statistics")
made("grown", gpu.DEVICE, "gpu")
said["grown"] = apart(vectors("whole"), vectors("grown"))
gpu.DECODER.widest = 250
narrow = made("narrow", gpu.DEVICE, "gpu")
gpu.DECODER.widest = None
said["fallen back"] = [apart(vectors("whole"), vectors("narrow")), [each for each in narrow.notes if "GPU" in each]]
with open(folder / "set" / "rows.csv", "w") as file:
    file.write("image,quality\\n" + "".join(f"p{number:02}.jpg,0.{number:02}\\n" for number in range(12)))
cache = extract(ExtractConfig(data=str(folder / "set" / "rows.csv"), out=folder / "rows.h5", backbone=backbone,
                              device=gpu.DEVICE, precision="fp32", decode="gpu", views="center")).cache
learned = train(TrainConfig(cache=cache, out=folder / "run", epochs=1, base="identity", device="cpu")).run
pictures = [folder / "set" / f"p{number:02}.jpg" for number in range(12)]
scorers = [Scorer.load(learned, device=device) for device in (gpu.DEVICE, "cpu")]
there, here = (scorer.score(pictures).q.astype(float) for scorer in scorers)
said["scores"] = [float(np.abs(there - here).max()), float(there.std())]
opened = scorers[0].open_file(pictures[0].read_bytes())
said["scorer"] = [type(opened).__name__, scorers[1].open_file(pictures[0].read_bytes()).mode]
for name, device, decode in (("whole", "cpu", "fast"), ("fast", gpu.DEVICE, "gpu"), ("other", "cpu", "gpu")):
    try:
        made(name, device, decode)
    except UserError as error:
        said[f"{decode} for {name}"] = str(error)
print(json.dumps(said))
"""


def run(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
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


@pytest.fixture(scope="module")
def mixed_set(tmp_path_factory):
    """Plain JPEG files of two sizes, turned ones and a grey one among them, other kinds, and files that are refused."""
    folder = tmp_path_factory.mktemp("decoded")
    (folder / "set").mkdir()
    files = {f"p{number:02}.jpg": as_jpeg(picture(300 - 60 * (number % 2), 200, seed=number)) for number in range(12)}
    files |= {f"t{turn}.jpg": as_jpeg(picture(300, 200, seed=20 + turn), exif=exif(turn)) for turn in range(1, 9)}
    files |= {"grey.jpg": as_jpeg(picture(300, 200, seed=40).convert("L")), "cut.jpg": files["p00.jpg"][:-900]}
    files |= {"damaged.jpg": files["p01.jpg"][:4000] + bytes(60) + files["p01.jpg"][4060:]}
    files |= usable_files() | {name: content for name, (content, _) in refused_files().items()}
    for name, content in files.items():
        (folder / "set" / name).write_bytes(content)
    return folder


@pytest.mark.slow
@needs_torchcodec
def test_pictures_are_decoded_there(mixed_set, tiny_backbone):
    """Mixed files, those that are cut or damaged among them; killed and gone on with; a decoder that gives up."""
    said = run(DECODED, str(mixed_set), tiny_backbone)
    assert {name for name, _ in said["failed"]} == {"cut.jpg", *refused_files()}
    assert said["same failures"]
    assert said["identity"] == [True]
    # Levels of two ways to resize in 8 bits; statistics are of the host's pixels.
    assert said["fast"]["statistics"] == 0
    assert said["fast"]["center"] < 2e-4
    assert said["fast"]["flip"] < 2e-4
    assert said["notes"][-1] == "images that are no plain JPEG, decoded on the host, as by --decode fast: 27"
    # The two forward passes of a batch, and its pictures, decoded together.
    assert max(each["decoded"] for each in said["waits"]) == 1
    assert max(each["waits"] for each in said["waits"]) <= 3
    assert said["scorer"] == ["PlainJpeg", "RGB"]
    assert said["scores"][0] < 1e-4
    assert said["scores"][1] > 1e-6
    assert said["killed"] == 9
    assert 0 < said["rest"][0] < said["rest"][1]
    assert max(said["resumed"].values()) < 1e-5
    assert max(said["grown"].values()) < 1e-5
    apart, notes = said["fallen back"]
    assert apart["center"] < 2e-4
    reason = "pretended: wider than 250"
    assert notes == [f"images that the GPU did not decode ({reason}), decoded on the host, as by --decode fast: 15"]
    assert "was made by another backbone: decode gpu there, fast here" in said["fast for whole"]
    assert "was made by another backbone: decode fast there, gpu here" in said["gpu for fast"]
    assert (
        said["gpu for other"]
        == "--decode gpu: needs a CUDA GPU, not --device cpu; give --decode fast, or --device cuda"
    )


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
