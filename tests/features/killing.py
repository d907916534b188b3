"""Extractions that are killed at random moments: nothing may be lost, doubled or refused."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import h5py
import numpy as np

from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import DONE
from deltaclip.features.store.verify import find_problems

HEADER = ["image", "prompt", "quality", "consistency", "explanation", "source"]


def read_rows(folder):
    with (folder / "demo.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(folder, rows):
    with (folder / "demo.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(rows)


def content(path):
    """Every dataset and attribute of a cache."""
    found = {}
    with h5py.File(path, "r") as file:
        found["/"] = dict(file.attrs)

        def add(name, entry):
            found[name] = dict(entry.attrs)
            if isinstance(entry, h5py.Dataset):
                found[f"{name} values"] = (entry.dtype, entry.shape, entry[()].tolist())

        file.visititems(add)
    return json.dumps(found, default=str)


# Imports once, then forks a fresh process for every extraction; `delay` seconds later that one is killed.
SERVER = """
import json, os, resource, signal, sys, time
from pathlib import Path
import h5py, open_clip, torch
from deltaclip import cli
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
import deltaclip.features.backbone.precision

def work(values):
    result = extract(ExtractConfig(**values | {"out": Path(values["out"])}))
    print(json.dumps(["done", result.new_images, result.new_texts]), flush=True)
    os._exit(0)

def command(arguments, limit_bytes, errors):
    sys.dont_write_bytecode = True  # Python 3.11 keeps a .pyc that the limit has cut, and every later import fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as end:
        os._exit(end.code)

for line in sys.stdin:
    job, delay = json.loads(line)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        command(*job) if isinstance(job, list) else work(job)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(json.dumps(["ended", status, time.monotonic() - started]), flush=True)
"""


class Server:
    """Runs extractions in processes of their own, killed on demand."""

    def __init__(self):
        command = [sys.executable, "-W", "error", "-c", SERVER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, job, delay=None):
        """Return the counts of what was done (None if killed), the exit status and the seconds it took."""
        self.process.stdin.write(json.dumps([job, delay]) + "\n")
        self.process.stdin.flush()
        result = None
        while True:
            word, *rest = json.loads(self.process.stdout.readline())
            if word == "ended":
                return result, rest[0], rest[1]
            result = rest


def progress(path):
    """Return the bytes of every vector that a cache, finished or not, counts as done, by view and content."""
    if not path.exists():
        return {}
    with FeatureStore.open(path, unfinished=True) as store:
        keys = [key.tobytes() for key in store.keys("images")]
        return {
            (name, keys[entry]): store.group("images", name)["embedding"][entry].tobytes()
            for name in store.view_names()
            for entry in np.flatnonzero(store.status(name) == DONE)
        }


@dataclass
class Tally:
    """`kills` that hit a running extraction, runs that `finished`, and kills by what they left."""

    kills: int = 0
    finished: int = 0
    left_nothing: int = 0
    left_part: int = 0
    left_whole: int = 0


def kill_often(server, data, tmp_path, tiny_backbone, *, kills, seed, views="center"):
    """Kill extractions at random moments until `kills` have hit a running one; check what each one leaves.

    What counts as done after a kill must be what an uninterrupted run computes, bit for bit, and must stay; the next
    run must go on from it and compute the rest, no more; the finished file must be that of an uninterrupted run, byte
    for byte.
    """
    # Batches of two make many moments; some images cannot be read, so that batches are of both kinds.
    values = {"data": str(data), "backbone": tiny_backbone, "precision": "fp32", "batch_size": 2}
    values |= {"views": views}
    reference = tmp_path / "reference.h5"
    _, status, seconds = server.run(values | {"out": str(reference)})
    assert status == 0
    wanted, finished = reference.read_bytes(), progress(reference)
    assert len(finished) == 116 * len(views.split(","))
    out, part = tmp_path / "c.h5", tmp_path / "c.h5.part"
    moments, held, tally = random.Random(seed), {}, Tally()
    while tally.kills < kills or held:
        # Mostly while vectors are written; now and then in any other moment, the layout and the rename among them.
        spread = (0.02, 1.1) if moments.random() < 0.3 else (0.2, 0.55)
        delay = moments.uniform(*spread) * seconds if tally.kills < kills else None
        result, status, _ = server.run(values | {"out": str(out)}, delay)
        if status == 0:
            lacking = {key for _, key in finished.keys() - held.keys()}
            assert result[0] == len(lacking)  # what was there is not computed again
            assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.h5", "reference.h5"]
            tally.finished += 1
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL
            tally.kills += 1
        if out.exists():  # finished, or killed between the rename and the exit
            assert out.read_bytes() == wanted
            tally.left_whole += status != 0
            out.unlink()
            held = {}
            continue
        now = progress(part)
        assert held.items() <= now.items()
        assert all(finished[key] == vector for key, vector in now.items())
        assert not part.exists() or find_problems(part) == []
        tally.left_part += part.exists()
        tally.left_nothing += not part.exists()
        held = now
    return tally


def make_kill_set(demo_folder, folder):
    """Write the first 120 rows of the demo set, four of whose images cannot be read, and return the folder."""
    rows = read_rows(demo_folder)[:120]
    shutil.copytree(demo_folder / "images", folder / "images")
    write_rows(folder, rows)
    for number in (3, 40, 41, 77):
        (folder / rows[number]["image"]).write_text(f"no image {number}")
    return folder
