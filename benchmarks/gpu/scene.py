"""What the parts of `benchmarks.gpu` share: figures, pictures, models, and fine-tunings that are watched.

Knows the stages that compute, and of a training its one loop (`run_epochs`). Must not know what a part asks for.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import functools
import json
import statistics
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu.figures import as_line
from benchmarks.models import drawn_jpegs, drawn_prompts
from deltaclip.features.backbone.decode_ahead import default_workers
from deltaclip.features.extract import ExtractResult, extract
from deltaclip.features.settings import ExtractConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import TracebackType

    from deltaclip.pipeline.loop.epochs import Saves

ROWS_PER_PROMPT = 4


# ---- Where a part runs, and what it prints


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a part runs: its name, a folder that all parts share, and whether it only tries itself on the CPU."""

    part: str
    folder: Path
    dry: bool

    @property
    def device(self) -> str:
        """Where it computes."""
        return "cpu" if self.dry else "cuda"

    def figure(self, name: str, value: Any, unit: str = "", **limit: float | None) -> None:
        """Print a figure."""
        print(as_line(self.part, name, value, unit, **limit), flush=True)

    def speed(self, name: str, value: float, unit: str, **limit: float | None) -> None:
        """Print a figure of time; in a dry run nothing is asked of it, as a CPU's speed is no GPU's."""
        self.figure(name, value, unit, **({} if self.dry else limit))

    def timed(self, call: Callable[[], object], *, times: int = 10) -> float:
        """Return the median seconds of a call, the GPU's work included, after some to warm up."""
        taken = []
        for _ in range(2 if self.dry else times + 3):
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1 if self.dry else 3 :])

    def new_run(self, name: str) -> Path:
        """Return a place for a run that is not taken."""
        taken = len(list((self.folder / "runs").glob("*"))) if (self.folder / "runs").exists() else 0
        return self.folder / "runs" / f"{self.part}{taken}-{name}"


class Check:
    """Turns an error inside the block into a figure that is not met: a GPU is lent for minutes, the others go on."""

    def __init__(self, scene: Scene, what: str) -> None:
        self.scene, self.what = scene, what

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        """Print what was raised, but for an end that was asked for."""
        if not isinstance(error, Exception):
            return False
        with (self.scene.folder / f"{self.scene.part}.errors").open("a") as file:
            traceback.print_exception(error, limit=-6, file=file)
        words = (str(error).splitlines() or [""])[0][:200]
        self.scene.figure(f"{self.what}: {type(error).__name__}: {words}", 1, "errors", most=0)
        return True


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def apart(a: Any, b: Any) -> float:
    """Return the largest relative difference of two sequences of numbers."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return float(np.max(np.abs(a - b) / np.maximum(np.abs(a), 1e-9)))


def losses_of(run: Path) -> list[float]:
    """Return the training loss of each epoch."""
    with (run / "history.csv").open(newline="") as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file)]


# ---- Pictures and models


def pictures(scene: Scene, count: int, *, side: int) -> Path:
    """Draw so many JPEG files, unless they are there; return a table of them, with labels of chance."""
    folder = scene.folder / f"pictures{side}"
    folder.mkdir(exist_ok=True)

    def draw(number: int) -> None:
        file = folder / f"{number}.jpg"
        if not file.exists():
            (content,) = drawn_jpegs(1, side=side, seed=number)
            file.write_bytes(content)

    with ThreadPoolExecutor(default_workers()) as pool:
        list(pool.map(draw, range(count)))
    prompts, rng = drawn_prompts(-(-count // ROWS_PER_PROMPT)), np.random.default_rng(0)
    path = folder / f"first{count}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", "quality", "consistency"])
        for number in range(count):
            labels = (f"{value:.3f}" for value in rng.random(2))
            writer.writerow([f"{number}.jpg", prompts[number // ROWS_PER_PROMPT], *labels])
    return path


@dataclass(frozen=True)
class Shape:
    """What a CLIP of two transformers costs, in operations (2 a multiply-add); three quarters of its blocks freeze."""

    vision: dict[str, int]
    text: dict[str, int]

    @property
    def frozen(self) -> int:
        """Blocks of the image tower that are frozen."""
        return 3 * self.vision["layers"] // 4

    @property
    def image_flops(self) -> float:
        """Operations of the image tower's forward pass, an image."""
        vision = self.vision
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        cutting = 2 * patches * 3 * vision["patch_size"] ** 2 * vision["width"]
        return vision["layers"] * _block_flops(vision["width"], patches + 1) + cutting

    @property
    def frozen_flops(self) -> float:
        """Operations of the image tower's frozen blocks, an image."""
        return self.image_flops * self.frozen / self.vision["layers"]

    def step_flops(self, *, all_trains: bool, boundary_cache: bool) -> float:
        """Operations of a training step, a row: three times the blocks that train, once those that only run."""
        text = self.text
        block = _block_flops(text["width"], text["context_length"])
        if all_trains:
            return 3 * (self.image_flops + text["layers"] * block)
        trained = 3 * (self.image_flops - self.frozen_flops) + 3 * max(0, text["layers"] - self.frozen) * block
        return trained if boundary_cache else trained + self.frozen_flops


def _block_flops(width: int, tokens: int) -> float:
    """Operations of a transformer's block: those of its 12 D^2 weights, and attention."""
    return 24 * width * width * tokens + 4 * tokens * tokens * width


SMALL = {  # of the dry run
    "embed_dim": 32,
    "vision_cfg": {"layers": 4, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 4},
}


@functools.cache
def model(scene: Scene, name: str) -> tuple[str, Shape]:
    """Return a model of open_clip's by its name, with random weights, as `--backbone` takes it, and its shape."""
    import open_clip
    from safetensors.torch import save_file

    config = SMALL if name == "small" else open_clip.get_model_config(name)
    folder = scene.folder / name
    if not folder.exists():
        torch.manual_seed(0)
        with torch.device(scene.device):
            tensors = open_clip.CLIP(**config).state_dict()
        folder.mkdir()
        save_file({key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{folder}", Shape(config["vision_cfg"], config["text_cfg"])


WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def extracted(scene: Scene, out: str, data: Path, backbone: str, **settings: Any) -> ExtractResult:
    """Extract a cache anew into the shared folder."""
    path = scene.folder / f"{out}.h5"
    path.unlink(missing_ok=True)
    given = {"device": scene.device, "views": "center", "label_range": ["0,1"]} | settings
    return extract(ExtractConfig(data=str(data), out=path, backbone=backbone, **given))


# ---- Fine-tunings that are watched


class BrokenOffError(Exception):
    """A training was broken off on purpose."""


@dataclass
class Watch:
    """What fine-tunings took, in seconds with the GPU's work: each epoch's steps, each validation, save and filling.

    `around` is entered before the steps of each epoch and left behind them; `steps` and `rows` count those of all.
    """

    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    stop_after: int | None = None
    steps: int = 0
    rows: int = 0
    spent: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))

    def timed(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its seconds noted."""

        def noted(*given: Any, **options: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            try:
                return call(*given, **options)
            finally:
                synchronize()
                self.spent[what].append(time.perf_counter() - started)

        return noted

    def look_at(self, learner: Any, saves: Saves | None) -> None:
        """Watch a learner's epochs, and its saves."""
        open_now, began = contextlib.ExitStack(), list[float]()
        start, step, validated = learner.start_epoch, learner.step, self.timed("validate", learner.validated)

        def start_epoch(fraction: float) -> None:
            start(fraction)
            synchronize()
            open_now.enter_context(self.around())
            began.append(time.perf_counter())

        def one_step(parts: Any, lr_factor: float) -> Any:
            self.steps, self.rows = self.steps + 1, self.rows + sum(len(part) for part in parts)
            return step(parts, lr_factor)

        def end_epoch() -> Any:
            if began:
                synchronize()
                self.spent["epoch"].append(time.perf_counter() - began.pop())
                open_now.close()
            return validated()

        learner.start_epoch, learner.step, learner.validated = start_epoch, one_step, end_epoch
        if saves is not None:
            saves.file.save = self.timed("save", saves.file.save)  # type: ignore[method-assign]


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[Watch]:
    """Watch all fine-tunings inside the block; one of `stop_after` epochs is broken off behind them."""
    from deltaclip.pipeline.loop import tower_learner
    from deltaclip.pipeline.training import tower_inputs

    real, fill = tower_learner.run_epochs, tower_inputs.fill_boundary

    def run_epochs(learner: Any, batches: Any, *, on_epoch: Callable[[int], None], **more: Any) -> int:
        def told(epoch: int) -> None:
            on_epoch(epoch)
            if epoch == watch.stop_after:
                raise BrokenOffError

        watch.look_at(learner, more["saves"])
        return real(learner, batches, on_epoch=told, **more)

    tower_learner.run_epochs, tower_inputs.fill_boundary = run_epochs, watch.timed("fill", fill)  # type: ignore[assignment]
    try:
        yield watch
    finally:
        tower_learner.run_epochs, tower_inputs.fill_boundary = real, fill
