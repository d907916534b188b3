"""Whether a GPU gives a CPU's numbers, and whether a training that was broken off ends as one that was not.

Small models of several families of towers, with random weights: convolutional ones too, whose weights lie
channels-last. Tolerances: a transformer in fp32 differs by the order of sums; convolutions are rounded to TF32, torch's
default; a training repeats bit for bit but for atomics in backward passes, so a resumed one may be ten times as far off
as the same one twice.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu.scene import BrokenOffError, Check, Scene, Watch, apart, extracted, losses_of, pictures, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILIES = ("vit", "resnet", "timm convnext", "siglip", "coca", "eva")
DRY_FAMILIES = ("vit", "resnet")
CONVOLUTIONS = ("resnet", "timm convnext")
SETTINGS = {"epochs": 3, "batch_size": 16, "lr": 1e-4, "freeze_layers": 2, "freeze_text_layers": 1, "save_minutes": 0.0}
# What must not change a training, or by its rounding alone; None: how much is only shown.
VARIANTS: tuple[tuple[str, float | None, dict[str, Any]], ...] = (
    ("without the boundary cache", 1e-3, {"boundary_cache": False}),
    ("checkpointing", 1e-3, {"checkpointing": True}),
    ("8 rows twice for 16", 1e-3, {"batch_size": 8, "accumulate": 2}),
    ("bf16", None, {"precision": "bf16"}),
)
HEADS: tuple[dict[str, Any], ...] = (
    {},
    {"loss": "fidelity", "scale_mode": "learned"},
    {"residual_learning": False, "two_branch": True},
)


def measure(scene: Scene) -> None:
    """Resuming of every family first, then everything against the CPU, then several processes."""
    rigs = [Rig.of(scene, family) for family in (DRY_FAMILIES if scene.dry else FAMILIES)]
    made = []
    for rig in rigs:
        with Check(scene, f"{rig.family}: cache"):
            rig.fill("cpu", "fp32")
            made.append(rig)
    for rig in made:
        with Check(scene, f"{rig.family}: resuming"):
            _resuming(rig, "fp32")
    for rig in made[:1] if scene.dry else made:
        with Check(scene, f"{rig.family}: embeddings"):
            _embeddings(rig)
        with Check(scene, f"{rig.family}: losses"):
            _tuning(rig, variants=rig in made[:3])
    for rig in made[:1]:
        with Check(scene, f"{rig.family}: heads"):
            _heads(rig)
        with Check(scene, f"{rig.family}: waits"):
            _waits(rig)
        with Check(scene, f"{rig.family}: two processes"):
            _two_processes(rig)
    if not scene.dry:
        for rig in made[:3]:
            with Check(scene, f"{rig.family}: resuming, fp16"):
                _resuming(rig, "fp16")


@dataclass(frozen=True)
class Rig:
    """A family's model and pictures."""

    scene: Scene
    family: str
    backbone: str
    data: Path

    @classmethod
    def of(cls, scene: Scene, family: str) -> Rig:
        """Make both."""
        from deltaclip.tests.features.backbone.small_models import as_folder

        backbone = as_folder(family, scene.folder / family.replace(" ", "-"))
        return cls(scene, family, backbone, pictures(scene, 24 if scene.dry else 160, side=160))

    def place(self, device: str, precision: str) -> str:
        """Return the name of a cache."""
        words = f"{self.family}-{device}-{precision}"
        return "".join(letter if letter.isalnum() else "-" for letter in words)

    def fill(self, device: str, precision: str, **settings: Any) -> Path:
        """Extract a cache on a device."""
        given = {"device": device, "precision": precision} | settings
        return extracted(self.scene, self.place(device, precision), self.data, self.backbone, **given).cache

    @property
    def cache(self) -> Path:
        """That of the CPU, in fp32."""
        return self.scene.folder / f"{self.place('cpu', 'fp32')}.h5"

    def tune(self, what: str, **settings: Any) -> Path:
        """Fine-tune, and return the run."""
        from deltaclip.pipeline.finetune import finetune
        from deltaclip.pipeline.settings import FinetuneConfig

        given = {"cache": self.cache, "out": self.scene.new_run(what), "device": self.scene.device, "precision": "fp32"}
        return finetune(FinetuneConfig(**(SETTINGS | given | settings))).run


def weights_apart(one: Path, other: Path) -> float:
    """Return the largest difference of a tuned weight, of its tensor's largest: losses alone can hide it."""
    from deltaclip.pipeline.runs.folder import open_run

    a, b = (open_run(run).tuned_tensors() for run in (one, other))
    return max(
        float((a[name].float() - b[name].float()).abs().max()) / (float(a[name].abs().max()) or 1.0) for name in a
    )


def _resuming(rig: Rig, precision: str) -> None:
    """Compare a training with the same again, and with one that ended after two of three epochs; dropout is on."""
    whole, again = (rig.tune(name, precision=precision) for name in ("whole", "again"))
    repeats = weights_apart(whole, again)
    name = f"{rig.family}: the same fine-tuning again, {precision}"
    on_gpu = not rig.scene.dry
    # Atomics in backward passes may change the last bits on a GPU; on a CPU nothing may.
    rig.scene.figure(f"{name}, weights", repeats, "relative", most=1e-3 if on_gpu else 0.0)
    out = rig.scene.new_run("resumed")
    with watched(Watch(stop_after=2)), contextlib.suppress(BrokenOffError):
        rig.tune("", precision=precision, out=out)
    resumed, name = (
        rig.tune("", precision=precision, out=out),
        f"{rig.family}: resumed after 2 of 3 epochs, {precision}",
    )
    rig.scene.figure(f"{name}, weights", weights_apart(whole, resumed), "relative", most=10 * repeats)
    difference = apart(losses_of(whole), losses_of(resumed))
    rig.scene.figure(f"{name}, losses", difference, "relative", most=10 * apart(losses_of(whole), losses_of(again)))


def _vectors(cache: Path) -> dict[str, np.ndarray]:
    from deltaclip.pipeline.rows.cached_rows import load_rows

    rows = load_rows(cache, "cpu", in_memory=True)
    assert rows.v_ID is not None
    assert rows.t_TD is not None
    return {"images": rows.v_ID.float().numpy(), "texts": rows.t_TD.float().numpy()}


def _embeddings(rig: Rig) -> None:
    """Embeddings in every number format against the CPU's in fp32; two replicas on one device, and every GPU."""
    scene, expected = rig.scene, _vectors(rig.cache)
    most = 1e-3 if rig.family in CONVOLUTIONS else 2e-5
    formats = ("bf16",) if scene.dry else ("fp32", "bf16", "fp16")
    for precision in formats:
        found = _vectors(rig.fill(scene.device, precision))
        for kind, vectors in found.items():
            what = f"{rig.family}: {kind}, {precision} on {scene.device} against fp32 on cpu"
            cosine = (vectors * expected[kind]).sum(1) / np.linalg.norm(vectors, axis=1)
            # Half formats are coarser than what random weights of a ResNet, whose vectors are alike, can bear.
            scene.figure(f"{what}, least cosine", float(cosine.min()), floor=0.99)
            if precision == "fp32":
                difference = float(np.abs(vectors - expected[kind]).max())
                scene.figure(f"{what}, largest difference", difference, most=most)
    several = ["cpu,cpu"] if scene.dry else ["cuda:0,cuda:0", *["cuda:all"] * (torch.cuda.device_count() > 1)]
    for devices in several:
        found = _vectors(rig.fill(devices, "fp32", batch_size=8))
        difference = float(np.abs(found["images"] - expected["images"]).max())
        scene.figure(f"{rig.family}: images, {devices} against cpu, largest difference", difference, most=most)


def _tuning(rig: Rig, *, variants: bool) -> None:
    """Losses without dropout against the CPU's; variants; scores of the run on both devices and as it wrote them."""
    from deltaclip.pipeline.api.scorer import Scorer

    scene = rig.scene
    run = rig.tune("device", dropout=0.0)
    if not scene.dry:
        # Without the boundary cache: that holds what the GPU has computed.
        on_cpu = rig.tune("cpu", device="cpu", dropout=0.0, boundary_cache=False)
        most = 2e-2 if rig.family in CONVOLUTIONS else 2e-3
        name = f"{rig.family}: losses of fine-tuning against cpu, fp32"
        scene.figure(name, apart(losses_of(on_cpu), losses_of(run)), "relative", most=most)
    for what, limit, settings in VARIANTS if variants else ():
        with Check(scene, f"{rig.family}: {what}"):
            found = rig.tune(what.replace(" ", "-"), dropout=0.0, **settings)
            scene.figure(
                f"{rig.family}: {what}, losses", apart(losses_of(run), losses_of(found)), "relative", most=limit
            )
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:64]
    images, prompts = [rig.data.parent / row["image"] for row in rows], [row["prompt"] for row in rows]
    most = 2e-3 if rig.family in CONVOLUTIONS else 1e-4
    written = np.array([float(row["quality"]) for row in rows])
    for device in dict.fromkeys((scene.device, "cpu")):
        found = Scorer.load(run, device=device).score(images, prompts).scores.of("quality")
        difference = float(np.abs(np.asarray(found) - written).max())
        scene.figure(f"{rig.family}: scores on {device} against the run's own", difference, most=most)


def _heads(rig: Rig) -> None:
    """Heads on cached embeddings, against the CPU's."""
    from deltaclip.pipeline.settings import TrainConfig
    from deltaclip.pipeline.train import train

    for settings in HEADS[:1] if rig.scene.dry else HEADS:
        words = ", ".join(f"{name}={value}" for name, value in settings.items()) or "as it is"
        with Check(rig.scene, f"{rig.family}: train, {words}"):
            found = []
            for device in ("cpu", rig.scene.device):
                given = {"cache": rig.cache, "out": rig.scene.new_run("train"), "device": device, "view": "center"}
                config = TrainConfig(**(given | {"epochs": 3, "dropout": 0.0} | settings))
                found.append(losses_of(train(config).run))
            rig.scene.figure(f"{rig.family}: train, {words}, losses against cpu", apart(*found), "relative", most=1e-3)


def _waits(rig: Rig) -> None:
    """Count what makes the host wait between first and last step of an epoch: torch tells of a real GPU alone."""
    seen: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        set_mode = (lambda _: None) if rig.scene.dry else torch.cuda.set_sync_debug_mode
        set_mode("warn")  # says itself, outside, that it is a prototype
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            set_mode("default")
        for each in caught:
            if "called a synchronizing" in str(each.message):
                seen[f"{Path(each.filename).name}:{each.lineno}"] += 1

    with watched(Watch(around=counted)) as watch:
        rig.tune("waits", precision="bf16")
    count = sum(seen.values()) / watch.steps
    rig.scene.figure(f"{rig.family}: waits for the GPU, fine-tuning", count, "a step", most=1.0)
    for where, times in seen.most_common(10):
        rig.scene.figure(f"{rig.family}: waits at {where}", times / watch.steps, "a step")


def _two_processes(rig: Rig) -> None:
    """Two processes under torchrun against one, the same batch; a GPU for each."""
    scene = rig.scene
    if not scene.dry and torch.cuda.device_count() < 2:
        scene.figure(f"{rig.family}: two processes", "not measured: needs two GPUs")
        return
    want, out = rig.tune("one", dropout=0.0, epochs=2), scene.new_run("two")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deltaclip"]
    line += ["finetune", str(rig.cache), "--out", str(out), "--dropout", "0", "--precision", "fp32", "--epochs", "2"]
    for name in ("batch_size", "lr", "freeze_layers", "freeze_text_layers"):
        line += [f"--{name.replace('_', '-')}", str(SETTINGS[name])]
    done = subprocess.run(
        [*line, "--device", "cpu" if scene.dry else "auto"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no words")
    difference = apart(losses_of(want), losses_of(out))
    scene.figure(f"{rig.family}: two processes, losses", difference, "relative", most=2e-3)
    scene.figure(f"{rig.family}: two processes, weights", weights_apart(want, out), "relative", most=2e-3)
