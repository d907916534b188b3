"""Every stage that computes, of a family of towers, on the pretended GPU and on the CPU: what it counts, how far apart.

    python -m deltaclip.tests.pretended_stages vit "timm convnext" --table

The small models have a few blocks, so fewer launches than those that people use; the waits are the same. Each family is
a process of its own, as torch keeps a backend for good.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FAMILIES = ("vit", "resnet", "timm convnext", "siglip", "coca", "eva")
ROWS = 24
SETTINGS = {"batch_size": 5, "fractions": "0.6,0.2,0.2", "epochs": 2}
TUNED = SETTINGS | {"precision": "fp32", "dropout": 0.0, "lr": 1e-4, "freeze_layers": 2, "freeze_text_layers": 1}
TUNINGS = {
    "finetune": {},
    "finetune, cache in its file": {},  # with no room for it on the device
    "finetune, no boundary cache": {"boundary_cache": False},
    "finetune, checkpointing": {"checkpointing": True},
    "finetune, accumulation": {"accumulate": 2},
    "finetune, nothing frozen": {"freeze_layers": 0, "freeze_text_layers": 0},
    "finetune, views": {"augment": "views", "crops": 1},
}
STAGES = ("extract", "train", "sweep", *TUNINGS, "resume", "predict")


class StoppedError(Exception):
    """Ends a training as a kill would."""


# ---- One family in this process


class Bench:
    """A family's model and pictures, and what its stages gave: a line of figures each."""

    def __init__(self, family, folder):
        from deltaclip.features.scenes.render import render_demo
        from deltaclip.tests.features.backbone.small_models import as_folder
        from deltaclip.tests.pipeline.conftest import read_csv, write_csv

        self.family, self.folder = family, folder
        self.backbone = as_folder(family, folder / "model")
        render_demo(folder / "set", seed=1, num_prompts=12, images_per_prompt=2)
        write_csv(folder / "rows.csv", read_csv(folder / "set" / "demo.csv")[:ROWS])
        self.caches = {}

    def cache(self, device):
        """The cache that a device has extracted."""
        from deltaclip.features.extract import extract
        from deltaclip.features.settings import ExtractConfig

        if device not in self.caches:
            self.caches[device] = extract(
                ExtractConfig(
                    data=str(self.folder / "rows.csv"),
                    image_root=self.folder / "set",
                    out=self.folder / f"{short(device)}.h5",
                    backbone=self.backbone,
                    device=device,
                    precision="fp32",
                    views="center,stages",
                    batch_size=8,
                )
            ).cache
        return self.caches[device]

    def run(self, stage, device):
        """Run a stage; return the numbers that it gave, and what each of its steps counted."""
        kind = stage.partition(",")[0]
        return getattr(self, f"_{kind}")(stage, device)

    def _extract(self, _stage, device):
        from deltaclip.pipeline.rows.cached_rows import load_rows

        with per_call("deltaclip.features.backbone.view_vectors") as steps:
            cache = self.cache(device)
        rows = load_rows(cache, "cpu", in_memory=True)
        return {"v": rows.v_ID, "t": rows.t_TD}, steps

    def _train(self, _stage, device):
        from deltaclip.pipeline.settings import TrainConfig
        from deltaclip.pipeline.train import train

        with steps_of_the_loop() as steps:
            settings = SETTINGS | {"base": "calibrated", "dropout": 0.0}
            run = train(
                TrainConfig(cache=self.cache(device), out=self._out("train", device), device=device, **settings)
            )
        return self._learned(run.run), steps

    def _sweep(self, _stage, device):
        from deltaclip.pipeline.settings import SweepConfig
        from deltaclip.pipeline.sweep import sweep

        with steps_of_the_loop() as steps:
            settings = SETTINGS | {"dropout": "0", "lr": "1e-3,3e-4", "scale": "0.1,0.2,0.3,0.4", "base": "calibrated"}
            settings |= {"precision": "fp32"}
            run = sweep(
                SweepConfig(cache=self.cache(device), out=self._out("sweep", device), device=device, **settings)
            )
        return self._learned(run.run), steps

    def _finetune(self, stage, device):
        from deltaclip.tests.pretended_gpu import MEMORY

        MEMORY.free_bytes = 0 if stage.endswith("in its file") else 1 << 40
        with steps_of_the_loop() as steps:
            run = self._tuned(self._out(stage, device), device, **TUNINGS[stage])
        return self._learned(run), steps

    def _resume(self, _stage, device):
        """Broken off after three steps and gone on with, against unbroken: the same bits."""
        from deltaclip.pipeline.loop.epochs import _Loop
        from deltaclip.pipeline.runs.folder import open_run

        whole = self._tuned(self._out("whole", device), device)
        real, count = _Loop.tell, iter(range(1, 1000))

        def tell(loop, steps):
            real(loop, steps)
            if next(count) == 3:
                raise StoppedError

        out = self._out("resumed", device)
        _Loop.tell = tell
        try:
            with contextlib.suppress(StoppedError):
                self._tuned(out, device, save_minutes=1e-9)
        finally:
            _Loop.tell = real
        assert not out.exists()
        resumed = self._tuned(out, device, save_minutes=1e-9)
        first, second = (open_run(run).tuned_tensors() for run in (whole, resumed))
        differ = [name for name in first if not first[name].equal(second[name])]
        assert not differ, f"{len(differ)} of {len(first)} tensors differ"
        return self._learned(resumed), []

    def out_of_memory(self, largest_bytes, **settings):
        """What a fine-tuning says whose passes meet the end of the memory, once it has begun."""
        from deltaclip.base.errors import MachineError
        from deltaclip.pipeline.loop.epochs import _Loop
        from deltaclip.tests.pretended_gpu import DEVICE, MEMORY

        real = _Loop.run_epoch

        def run_epoch(loop):
            MEMORY.largest_bytes = largest_bytes
            real(loop)

        _Loop.run_epoch = run_epoch
        try:
            self._tuned(self._out("full", DEVICE), DEVICE, **settings)
        except MachineError as error:
            return str(error)
        finally:
            _Loop.run_epoch, MEMORY.largest_bytes = real, None

    def _predict(self, _stage, device):
        from deltaclip.pipeline.api.scorer import Scorer
        from deltaclip.tests.pipeline.conftest import read_csv

        run = self._tuned(self.folder / "of_cpu", "cpu") if not (self.folder / "of_cpu").exists() else None
        rows = read_csv(self.folder / "rows.csv")
        images, prompts = [self.folder / "set" / row["image"] for row in rows], [row["prompt"] for row in rows]
        scorer = Scorer.load(run or self.folder / "of_cpu", device=device)
        with per_call("deltaclip.pipeline.api.scorer") as steps:
            scorer.score(images, prompts)
            found = scorer.score(images, prompts).scores
        return {name: found.of(name) for name in ("quality", "consistency")}, steps

    def _tuned(self, out, device, **settings):
        from deltaclip.pipeline.finetune import finetune
        from deltaclip.pipeline.settings import FinetuneConfig

        given = TUNED | {"cache": self.cache("cpu"), "out": out, "device": device} | settings
        return finetune(FinetuneConfig(**given)).run

    def _out(self, stage, device):
        return self.folder / "runs" / f"{stage.replace(', ', '-').replace(' ', '_')}_{short(device)}"

    def _learned(self, run):
        from deltaclip.tests.pipeline.conftest import numbers, read_csv

        history = read_csv(run / "history.csv")
        return {
            "losses": numbers(history, "train_loss"),
            "scores": numbers(read_csv(run / "predictions.csv"), "quality"),
        }


def short(device):
    return device.partition(":")[0]


@contextlib.contextmanager
def per_call(module, name="encode_views"):
    """Count each call of a function that a module of the project has, but for the first: it makes what all share."""
    import importlib

    from deltaclip.tests.pretended_gpu import recorded

    steps, where = [], importlib.import_module(module)
    real = getattr(where, name)

    def counted(*given, **options):
        with recorded(alone=True) as record:
            out = real(*given, **options)
        steps.append(record)
        return out

    setattr(where, name, counted)
    try:
        yield steps
        del steps[:1]
    finally:
        setattr(where, name, real)


@contextlib.contextmanager
def steps_of_the_loop():
    """Count each step but the first of an epoch: from one to the next, the drawing of its batch included."""
    from deltaclip.pipeline.loop.epochs import _Loop
    from deltaclip.tests.pretended_gpu import recorded

    steps, open_now = [], contextlib.ExitStack()
    run_epoch, tell = _Loop.run_epoch, _Loop.tell

    def told(loop, count):
        open_now.close()
        tell(loop, count)
        steps.append(open_now.enter_context(recorded()))

    def ran(loop):
        run_epoch(loop)
        open_now.close()
        steps.pop()  # from the last step to the end of the epoch

    _Loop.run_epoch, _Loop.tell = ran, told
    try:
        yield steps
    finally:
        open_now.close()
        _Loop.run_epoch, _Loop.tell = run_epoch, tell


def figures(family, stage, bench):
    """What a stage counted on the pretended GPU, and how far its numbers are from the CPU's."""
    import numpy as np

    from deltaclip.tests.pretended_gpu import DEVICE

    found, steps = bench.run(stage, DEVICE)
    expected, _ = bench.run(stage, "cpu")
    apart = {
        name: float(np.abs(np.asarray(found[name], float) - np.asarray(expected[name], float)).max()) for name in found
    }
    about = {"family": family, "stage": stage, "apart": apart}
    if not steps:
        return about
    most = max(steps, key=lambda step: (step.waits.total(), step.launches.total()))
    return about | {
        "launches": most.launches.total(),
        "waits": most.waits.total(),
        "elsewhere": most.elsewhere.total(),
        "copies": most.copies,
        "where": [f"{count} {what}, {place}" for (what, place), count in (most.waits + most.elsewhere).most_common()],
        "operations": dict(most.launches.most_common(15)),
    }


def run_family(family, stages):
    """Run stages of one family in this process, a line of JSON each."""
    from deltaclip.tests import pretended_gpu

    pretended_gpu.install()  # before anything of the project has loaded a model
    with tempfile.TemporaryDirectory(prefix="pretended-") as folder:
        os.environ["DELTACLIP_CACHE"] = f"{folder}/cache"
        bench = Bench(family, Path(folder))
        for stage in stages:
            print(json.dumps(figures(family, stage, bench)), flush=True)


# ---- Several families, a process each


def of_families(families, stages=STAGES):
    """The figures of families, each measured in a process of its own.

    Raises:
        subprocess.CalledProcessError: a stage failed; its words have been printed.
    """
    for family in families:
        command = [sys.executable, "-m", "deltaclip.tests.pretended_stages", family, "--here"]
        for stage in stages:
            command += ["--stage", stage]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
        done.check_returncode()


def table(found):
    """Lines of Markdown: stages down, families across; launches / waits of a step."""
    families = list(dict.fromkeys(each["family"] for each in found))
    cells = {(each["stage"], each["family"]): each for each in found if "waits" in each}
    yield f"| launches / waits | {' | '.join(families)} |"
    yield f"|---|{'---|' * len(families)}"
    for stage in dict.fromkeys(each["stage"] for each in found if "waits" in each):
        shown = [cells[stage, family] for family in families]
        words = [f"{each['launches']:,} / {each['waits']}" for each in shown]
        yield f"| {stage} | {' | '.join(words)} |"


def main():
    """Measure, and print lines of JSON or a table."""
    parser = argparse.ArgumentParser(prog="pretended_stages", description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process, one family")
    options = parser.parse_args()
    stages = options.stage or STAGES
    if options.here:
        run_family(options.families[0], stages)
    else:
        found = of_families(options.families, stages)
        for line in table(list(found)) if options.table else map(json.dumps, found):
            print(line, flush=True)


if __name__ == "__main__":
    main()
