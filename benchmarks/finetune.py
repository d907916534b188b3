"""Epochs of fine-tuning ViT-B-32 with 9 of 12 blocks frozen: with the boundary cache, without it, and a plain loop.

The plain loop opens each image when its turn comes, tokenises each prompt, and runs both towers from end to end for
every row. It is free of the frozen-backbone trap, as all runs here are but one: frozen blocks run without gradients on
twins of the towers, whose attention folds batch and tokens into one matrix product (features/backbone/twins.py).
open_clip's own towers with frozen weights in training, which walk into the trap, are a row of their own and count for
nothing. `python -m benchmarks.finetune --rows 96 --rounds 3` measures this alone.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import Row, at_most, seconds
from benchmarks.models import drawn_jpegs, drawn_prompts, vit_b_32
from deltaclip.base.device import choose_device, choose_precision
from deltaclip.features.backbone.decode_ahead import default_workers
from deltaclip.features.backbone.load import Backbone, load_backbone
from deltaclip.features.backbone.precision import autocast_type
from deltaclip.features.backbone.towers import CutTower, cut_towers
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.loop.epochs import StateFile
from deltaclip.pipeline.loop.tower_learner import TunePlan, tune
from deltaclip.pipeline.model.heads import HeadSpec, build_heads
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.scores import Batch, run_heads
from deltaclip.pipeline.rows.cached_rows import CacheRows, load_rows
from deltaclip.pipeline.runs.run_backbone import image_files
from deltaclip.pipeline.training.processes import Processes
from deltaclip.pipeline.training.tower_inputs import SideMaker
from deltaclip.pipeline.training.tower_model import SideBatches, TunedModel, unit

FROZEN, BLOCKS, BATCH = 9, 12, 32
ROWS, ROUNDS, ROWS_PER_PROMPT = 64, 3, 2
GOAL = 1.25
WEIGHTS = {"quality": 0.5, "consistency": 0.5}
PLAN = TunePlan(epochs=1, lr=1e-6, head_lr=1e-6)


def measure(rows: int = ROWS, rounds: int = ROUNDS) -> list[Row]:
    """Return times of an epoch over `rows` images, the median of `rounds` in turns, and their ratios."""
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as folder:
        scene = _Scene.of(Path(folder), rows)
        fill_s = seconds(lambda: scene.model(boundary_cache=True))
        works = {
            "with": _epoch(scene, boundary_cache=True),
            "without": _epoch(scene, boundary_cache=False),
            "plain": _plain_epoch(scene),
            "whole": _whole_epoch(scene),
            "trapped": _trapped_epoch(scene),
        }
        for work in works.values():
            work()  # warm
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(seconds(work))
    took = {name: statistics.median(found) for name, found in times.items()}
    share = (BLOCKS - FROZEN) / BLOCKS
    floor = 3 * (BLOCKS - FROZEN) / (FROZEN + 3 * (BLOCKS - FROZEN))
    words = {
        "with": "epoch with the boundary cache",
        "without": "epoch without it: frozen part from pixels in every step",
        "plain": "epoch of a plain loop over files, trap avoided",
        "whole": "forward and backward of everything, images in memory",
        "trapped": "open_clip with frozen weights in training (trapped; counts for nothing)",
    }
    about = f"{rows} images, batch {BATCH}, {scene.precision}, {scene.device}"
    return [
        *saving(),
        *(Row(name=words[name], value=rows / took[name], unit="images/s", note=about) for name in works),
        Row(name="filling the boundary cache, once", value=rows / fill_s, unit="images/s"),
        Row(
            name="epoch with the cache over without",
            value=took["with"] / took["without"],
            unit="x",
            note=f"floor {floor:.2f}: 3(L-N) over L+2(L-N) block passes",
        ),
        Row(name="plain loop over an epoch with the cache", value=took["plain"] / took["with"], unit="x"),
        at_most(
            GOAL,
            name="partial freeze: time of an epoch over the trainable share",
            value=took["with"] / (share * took["whole"]),
            unit="x",
            note=f"share {share:.2f} of forward and backward",
        ),
    ]


def saving(count: int = 16, rounds: int = 5) -> list[Row]:
    """Return what a save of a state of `count` tensors of 4 MB takes, the medians of `rounds`, in seconds a GB."""
    state = {f"tensor{number}": torch.randn(1 << 20) for number in range(count)}
    size_gb = sum(tensor.nbytes for tensor in state.values()) / 1e9
    waiting, writing = [], []
    with tempfile.TemporaryDirectory(prefix="deltaclip-bench-") as folder:
        file = StateFile(Path(folder) / "state.safetensors")
        for _ in range(rounds):
            waiting.append(seconds(lambda: file.save(state, {})))
            writing.append(waiting[-1] + seconds(file.wait))
    return [
        Row(name="saving the state: the training waits", value=statistics.median(waiting) / size_gb, unit="s a GB"),
        Row(name="saving the state: until it is written", value=statistics.median(writing) / size_gb, unit="s a GB"),
    ]


@dataclass(frozen=True)
class _Scene:
    """Images on disk with their cache, and how everything is computed."""

    cache: Path
    rows: CacheRows
    device: str
    precision: str

    @classmethod
    def of(cls, folder: Path, count: int) -> _Scene:
        (folder / "images").mkdir()
        prompts, rng = drawn_prompts(-(-count // ROWS_PER_PROMPT)), np.random.default_rng(0)
        with (folder / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "prompt", "quality", "consistency"])
            for number, content in enumerate(drawn_jpegs(count)):
                name = f"images/{number}.jpg"
                (folder / name).write_bytes(content)
                writer.writerow([name, prompts[number // ROWS_PER_PROMPT], *(f"{x:.3f}" for x in rng.random(2))])
        source, device = vit_b_32(), choose_device("auto")
        cache = extract(
            ExtractConfig(
                data=str(folder / "rows.csv"),
                out=folder / "rows.h5",
                backbone="ViT-B-32",
                pretrained=source.pretrained,
                label_range=["0,1"],
                views="center",
            )
        ).cache
        rows = load_rows(cache, "cpu", in_memory=True)
        return cls(cache, rows, device, choose_precision("auto", device))

    @property
    def autocast(self) -> torch.dtype | None:
        return None if self.precision == "fp32" else autocast_type(self.precision)  # type: ignore[arg-type]

    def towers(self) -> tuple[Backbone, CutTower, CutTower]:
        backbone = load_backbone(vit_b_32(), device=self.device, precision="fp32")
        return (backbone, *cut_towers(backbone, freeze_layers=FROZEN, freeze_text_layers=FROZEN))

    def model(self, *, boundary_cache: bool) -> TunedModel:
        backbone, image, text = self.towers()
        sides = SideMaker(
            backbone=backbone,
            rows=self.rows,
            files=image_files(self.rows, None, allow_outside=False),
            processes=Processes(),
            boundary_cache=boundary_cache,
            augment="none",
            crops=0,
            precision=self.precision,  # type: ignore[arg-type]
            workers=default_workers(),
            seed=0,
        )
        heads = build_heads(HeadSpec(dim=self.rows.dim)).to(self.device)
        return TunedModel(
            heads,
            sides.image(image),
            sides.text(text),
            objective=weighted_loss(weights=WEIGHTS),
            processes=Processes(),
            autocast=self.autocast,
        )


def _epoch(scene: _Scene, *, boundary_cache: bool) -> Callable[[], object]:
    """Return an epoch of the stage's own loop."""
    model, rows = scene.model(boundary_cache=boundary_cache), scene.rows
    steps = SideBatches(
        memory=rows.batches(None, batch_size=BATCH),  # type: ignore[arg-type]
        image_N=rows.rows.image,
        prompt_N=rows.rows.prompt,
        image=model.image,
        text=model.text,
        device=torch.device(scene.device),
        parts=1,
        processes=Processes(),
        by_row=True,
    )
    return lambda: tune(model, steps, plan=PLAN)


def _plain_epoch(scene: _Scene) -> Callable[[], object]:
    """Return an epoch as a person writes it, but for the towers' twins, which keep it out of the trap."""
    backbone, image, text = scene.towers()

    def embed(pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v = image.from_boundary(image.to_boundary(pixels))
        return v, text.from_boundary(text.to_boundary(ids), ids)

    parameters = [*image.named_trainable().values(), *text.named_trainable().values()]
    return _loop(scene, backbone, embed, parameters, decode=True)


def _whole_epoch(scene: _Scene) -> Callable[[], object]:
    """Return forward and backward of all blocks, on pixels and tokens that lie in memory."""
    backbone = load_backbone(vit_b_32(), device=scene.device, precision="fp32")
    return _loop(scene, backbone, _of_model(backbone), list(backbone.model.parameters()), decode=False)


def _trapped_epoch(scene: _Scene) -> Callable[[], object]:
    """Return the same of open_clip's own towers with 9 blocks frozen by `requires_grad`, in training mode."""
    backbone, image, text = scene.towers()
    backbone.model.train()
    parameters = [*image.named_trainable().values(), *text.named_trainable().values()]
    return _loop(scene, backbone, _of_model(backbone), parameters, decode=False)


Embed = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _of_model(backbone: Backbone) -> Embed:
    model = backbone.model
    return lambda pixels, ids: (model.encode_image(pixels), model.encode_text(ids))  # type: ignore[operator]


def _loop(
    scene: _Scene, backbone: Backbone, embed: Embed, parameters: list[torch.nn.Parameter], *, decode: bool
) -> Callable[[], object]:
    rows = scene.rows
    heads = build_heads(HeadSpec(dim=rows.dim)).to(scene.device)
    optimizer = torch.optim.AdamW([*parameters, *heads.parameters()], lr=1e-6, fused=True)
    paths = [scene.cache.parent / str(name) for name in rows.rows.text["file"]]
    prompts = [str(prompt) for prompt in rows.rows.text["prompt"]]
    labels = {name: torch.from_numpy(rows.label(name)).to(scene.device) for name in WEIGHTS}
    objective = weighted_loss(weights=WEIGHTS)

    def read(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        opened = [backbone.preprocess(Image.open(paths[number]).convert("RGB")) for number in numbers]
        ids = backbone.tokenizer([prompts[number] for number in numbers])
        return torch.stack(opened).to(scene.device), ids.to(scene.device)

    batches = [list(range(start, min(start + BATCH, len(paths)))) for start in range(0, len(paths), BATCH)]
    kept = None if decode else [read(numbers) for numbers in batches]
    mode = torch.device(scene.device).type

    def epoch() -> None:
        for place, numbers in enumerate(batches):
            pixels, ids = read(numbers) if kept is None else kept[place]
            with torch.autocast(mode, scene.autocast or torch.bfloat16, enabled=scene.autocast is not None):
                v, t = embed(pixels, ids)
            batch = Batch(unit(v), unit(t), {name: label[numbers] for name, label in labels.items()})
            objective(run_heads(heads, batch), batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.finetune", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="images of an epoch")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="epochs of each kind, in turns")
    options = parser.parse_args()
    for row in measure(options.rows, options.rounds):
        print(row.line())


if __name__ == "__main__":
    main()
