"""How near a GPU comes to what it could do: extraction, fine-tuning, heads, and the ceilings themselves.

Floors are shares of arithmetic: operations of a model by its shape over the measured rate of large matrix products in
bf16, of which eager PyTorch with fused attention should reach `EAGER`, and what all processors decode.
"""

from __future__ import annotations

import importlib.util
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.caches import random_cache
from benchmarks.gpu import decoding
from benchmarks.gpu.scene import (
    Check,
    Scene,
    Shape,
    Watch,
    apart,
    extracted,
    losses_of,
    model,
    pictures,
    synchronize,
    watched,
)
from benchmarks.machine import decode_rate, gflops
from deltaclip.pipeline.finetune import finetune as run_finetune
from deltaclip.pipeline.settings import FinetuneConfig, SweepConfig, TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

EAGER = 0.35
MODELS = {"ViT-L-14": 2000, "ViT-B-32": 4000}  # images that each is fine-tuned on
TUNINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "ViT-L-14": ({"batch_size": 32}, {"batch_size": 128}, {"batch_size": 128, "checkpointing": True}),
    "ViT-B-32": (
        {"batch_size": 32},
        {"batch_size": 256},
        {"batch_size": 256, "boundary_cache": False},
        {"batch_size": 256, "freeze_layers": 0},
    ),
    "small": ({"batch_size": 8}, {"batch_size": 8, "freeze_layers": 0}),
}
GRID = {"lr": "5e-4,1e-3,2e-3,5e-3", "dropout": "0,0.1,0.2,0.3", "loss": "mse,huber", "seed": "1,2"}  # 64 settings
GOAL_SWEEP = 20.0  # times 64 single trainings


def _models(scene: Scene) -> dict[str, int]:
    return {"small": 24} if scene.dry else MODELS


def _products(scene: Scene, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the operations a second of matrix products."""
    return 1e9 * (gflops(dtype, 256) if scene.dry else gflops(dtype))


def _side(scene: Scene) -> int:
    return 128 if scene.dry else 512


# ---- extract


def extract(scene: Scene) -> None:
    """Measure the forward pass alone, then extraction from files against it and against decoding."""
    for name, count in reversed(_models(scene).items()):
        backbone, shape = model(scene, name)
        forward = EAGER * _products(scene) / shape.image_flops
        with Check(scene, f"{name}: forward"):
            _forward(scene, name, backbone, floor=forward)
        table = pictures(scene, 2 * count, side=_side(scene))
        # Of the GPU's own decoder there is nothing to be seen on a CPU, where it is refused.
        on_gpu = [] if scene.dry or importlib.util.find_spec("torchcodec") is None else ["gpu"]
        for decode in ("exact", "fast", *on_gpu):
            with Check(scene, f"{name}: extract --decode {decode}"):
                done = extracted(scene, f"extract-{name}", table, backbone, precision="bf16", decode=decode)
                rate, floor = done.images_per_s or 0.0, 0.7 * min(forward, decode_rate())
                scene.speed(f"{name}: extract --decode {decode}", rate, "images/s", floor=floor)
                how = f"batches of {done.batch_size}, {done.workers} threads, bottleneck {done.bottleneck}"
                scene.figure(f"{name}: extract --decode {decode}, whole command; {how}", done.seconds, "s")


def _forward(scene: Scene, name: str, backbone: str, *, floor: float) -> None:
    """Measure the image tower alone on 8-bit pixels that lie in memory, copies included."""
    from deltaclip.features.backbone.encode import encode_images
    from deltaclip.features.backbone.load import load_backbone
    from deltaclip.features.backbone.pixels import input_size
    from deltaclip.features.backbone.weights import find_weights

    loaded = load_backbone(find_weights(backbone, None), device=scene.device, precision="bf16")
    size = 8 if scene.dry else 256
    pixels = torch.randint(0, 255, (size, 3, *input_size(loaded)), dtype=torch.uint8)
    pixels = pixels if scene.dry else pixels.pin_memory()
    seconds = scene.timed(lambda: encode_images(loaded, pixels))
    scene.speed(f"{name}: forward alone, batch {size}, bf16", size / seconds, "images/s", floor=floor)


# ---- finetune


def finetune(scene: Scene) -> None:
    """Measure rows a second, three quarters of the blocks frozen; filling, saving, validation, memory, kernels."""
    for name, count in _models(scene).items():
        backbone, shape = model(scene, name)
        table = pictures(scene, count, side=_side(scene))
        with Check(scene, f"{name}: cache"):
            extracted(scene, f"tune-{name}", table, backbone, precision="bf16")
        for settings in TUNINGS[name]:
            words = ", ".join(f"{key}={value}" for key, value in settings.items())
            with Check(scene, f"{name}, {words}"):
                _tune(scene, f"{name}, {words}", _config(scene, name, shape, **settings), shape)
        with Check(scene, f"{name}: kernels"):
            _kernels(scene, name, shape)


def compiled(scene: Scene) -> None:
    """Measure what `--compile` takes and gives at the default batch, where launches count most."""
    name, count = ("small", 24) if scene.dry else ("ViT-B-32", 1000)
    backbone, shape = model(scene, name)
    table = pictures(scene, count, side=_side(scene))
    with Check(scene, f"{name}: cache"):
        extracted(scene, f"compile-{name}", table, backbone, precision="bf16")
    cache = scene.folder / f"compile-{name}.h5"
    epoch, command, losses = (dict[bool, Any]() for _ in range(3))
    for on in (False, True):
        with Check(scene, f"{name}: compile={on}"), watched(Watch()) as watch:
            settings = {"cache": cache, "compile": on, "dropout": 0.0, "epochs": 3}
            settings |= {"batch_size": 8} if scene.dry else {}
            result = run_finetune(_config(scene, name, shape, **settings))
            epoch[on], command[on], losses[on] = watch.spent["epoch"][-1], result.seconds, losses_of(result.run)
    if len(losses) == 2:
        scene.speed(f"{name}: an epoch plain over compiled", epoch[False] / epoch[True], "x", floor=1.0)
        scene.figure(f"{name}: what compiling adds to the command", command[True] - command[False], "s")
        difference = apart(losses[False], losses[True])
        scene.figure(f"{name}: losses of both, bf16", difference, "relative", most=2e-2)


def _config(scene: Scene, name: str, shape: Shape, **settings: Any) -> FinetuneConfig:
    given: dict[str, Any] = {"cache": scene.folder / f"tune-{name}.h5", "out": scene.new_run(name), "epochs": 2}
    given |= {"freeze_layers": shape.frozen, "precision": "bf16", "device": scene.device, "save_minutes": 0.0}
    return FinetuneConfig(**(given | settings))


def _tune(scene: Scene, what: str, config: FinetuneConfig, shape: Shape) -> None:
    """Fine-tune two epochs; the second is the figure, the first has warmed up."""
    if not scene.dry:
        torch.cuda.reset_peak_memory_stats()
    with watched(Watch()) as watch:
        result = run_finetune(config)
    epoch, save = watch.spent["epoch"][-1], watch.spent["save"][-1]
    step = shape.step_flops(all_trains=config.trains_all, boundary_cache=config.boundary_cache)
    floor = 0.5 * EAGER * _products(scene) / step
    if config.trains_all or not config.boundary_cache:
        floor = min(floor, 0.5 * decode_rate())
    scene.speed(f"{what}: rows in an epoch", watch.rows / config.epochs / epoch, "rows/s", floor=floor)
    scene.speed(f"{what}: the training waits for a save, of both", save / (epoch + save), "share", most=0.1)
    scene.figure(f"{what}: a validation", watch.spent["validate"][-1], "s")
    scene.figure(f"{what}: all of the command", result.seconds, "s")
    if not scene.dry:
        scene.figure(f"{what}: memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if watch.spent["fill"]:
        _filling(scene, what, config.cache, shape, seconds=watch.spent["fill"][0])


def _filling(scene: Scene, what: str, cache: Path, shape: Shape, *, seconds: float) -> None:
    if seconds < 0.5 and not scene.dry:  # the file was there
        return
    floor = 0.5 * min(EAGER * _products(scene) / shape.frozen_flops, decode_rate())
    scene.speed(f"{what}: filling the boundary cache", _num_images(cache) / seconds, "images/s", floor=floor)


def _num_images(cache: Path) -> int:
    from deltaclip.features.store.shards import open_cache

    with open_cache(cache) as store:
        return len(store.status())


def _kernels(scene: Scene, name: str, shape: Shape) -> None:
    """Measure the share of an epoch in which a kernel runs, at the default batch; the profiler slows the host."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU if scene.dry else ProfilerActivity.CUDA])
    with watched(Watch(around=lambda: profiler)) as watch:
        run_finetune(_config(scene, name, shape, epochs=1, batch_size=8 if scene.dry else 32))
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0 or scene.dry]
    busy = sum(event.self_device_time_total for event in events) / 1e6 / watch.spent["epoch"][0]
    scene.speed(f"{name}: an epoch with a kernel running, under the profiler", busy, "share", floor=0.8)
    scene.figure(f"{name}: kernels and copies", sum(event.count for event in events) / watch.steps, "a step")


# ---- heads


def heads(scene: Scene) -> None:
    """Time heads and a sweep of 64 on cached embeddings: no slower than the CPU beside it, far from 64 fits."""
    from deltaclip.pipeline.sweep import sweep
    from deltaclip.pipeline.train import train
    from deltaclip.pipeline.training.sweep_grid import sweep_settings

    rows, dim, epochs = (200, 32, 1) if scene.dry else (3000, 768, 10)
    cache = random_cache(scene.folder / "random.h5", rows=rows, dim=dim)
    took: dict[str, float] = {}
    shared: dict[str, Any] = {"cache": cache, "epochs": epochs, "base": "calibrated"}
    grid: dict[str, Any] = GRID | ({"dropout": "0", "seed": "1"} if scene.dry else {})
    for on, device in (("cpu", "cpu"), ("gpu", scene.device)):
        with Check(scene, f"train on {device}"):
            for _ in range(2):  # the first warms up
                done = train(TrainConfig(**shared, device=device, out=scene.new_run("train")))
            took[f"train {on}"] = done.fit_seconds
        with Check(scene, f"sweep on {device}"):
            swept = sweep(SweepConfig(**shared, **grid, device=device, out=scene.new_run("sweep")))
            took[f"sweep {on}"] = swept.fit_seconds
    for what, seconds in took.items():
        scene.figure(f"{what}: fit, {rows:,} rows, D = {dim}, {epochs} epochs", seconds, "s")
    if len(took) == 4:
        for what in ("train", "sweep"):
            scene.speed(f"{what}: cpu over gpu", took[f"{what} cpu"] / took[f"{what} gpu"], "x", floor=1.0)
        count = len(sweep_settings(SweepConfig(**shared, **grid)))
        ratio = count * took["train gpu"] / took["sweep gpu"]
        scene.speed(f"{count} trainings over a sweep of {count}, on the GPU", ratio, "x", floor=GOAL_SWEEP)


# ---- ceilings


def ceilings(scene: Scene) -> None:
    """Measure what the machine gives: products, copies, launches, checksums, decoding."""
    from deltaclip.features.store.integrity import row_checksums

    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        scene.figure(f"matrix products, {name}", _products(scene, dtype) / 1e12, "TFLOP/s")
    matmul, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    scene.figure("fp32 rounded to TF32", f"products {matmul}, convolutions {convolutions}")
    _copies(scene)
    small, times = torch.zeros(8, device=scene.device), 200 if scene.dry else 2000
    synchronize()
    started = time.perf_counter()
    for _ in range(times):
        small.add_(1)
    scene.figure("a small operation: Python and launch", (time.perf_counter() - started) / times * 1e6, "us")
    synchronize()
    rows = np.random.default_rng(0).integers(0, 255, (64, 65_536 if scene.dry else 526_336), dtype=np.uint8)
    scene.figure("checksums, one thread", rows.nbytes / scene.timed(lambda: row_checksums(rows)) / 1e9, "GB/s")
    scene.figure("JPEG 512 decoded and resized, all processors", decode_rate(), "images/s")
    with Check(scene, "decoding by TorchCodec"):
        decoding.measure(scene)


def _copies(scene: Scene) -> None:
    size = (1 if scene.dry else 256) << 20
    host, there = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device=scene.device)
    kinds = {"pageable": host} if scene.dry else {"pageable": host, "pinned": host.pin_memory()}
    for kind, memory in kinds.items():
        to_device = scene.timed(lambda m=memory: there.copy_(m, non_blocking=True))
        to_host = scene.timed(lambda m=memory: m.copy_(there, non_blocking=True))
        scene.figure(f"copy to the device, {kind}", size / to_device / 1e9, "GB/s")
        scene.figure(f"copy to the host, {kind}", size / to_host / 1e9, "GB/s")
