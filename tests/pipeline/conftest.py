"""A trained run, and caches of the demo set with other labels that reuse its embeddings."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.extract import extract
from deltaclip.features.scenes.render import render_demo
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train

EPOCHS = 6
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


# deltaclip in two processes that train together on this machine.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "deltaclip"]


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, demo_cache) -> Path:
    """Run directory of heads on calibrated bases, on the demo cache; never written to by a test."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    return train(TrainConfig(cache=demo_cache, out=out, epochs=EPOCHS, base="calibrated")).run


@pytest.fixture(scope="session")
def few_folder(tmp_path_factory) -> Path:
    """Folder with demo.csv and images/: 12 prompts, 4 images each, for what trains towers."""
    folder = tmp_path_factory.mktemp("few") / "set"
    render_demo(folder, seed=1, num_prompts=12, images_per_prompt=4)
    return folder


@pytest.fixture(scope="session")
def few_cache(tmp_path_factory, few_folder, tiny_backbone) -> Path:
    """Return the cache of these few images; never written to by a test."""
    out = tmp_path_factory.mktemp("few_cache") / "few.h5"
    return extract(
        ExtractConfig(data=str(few_folder / "demo.csv"), out=out, backbone=tiny_backbone, views="center")
    ).cache


@pytest.fixture
def train_demo(tmp_path, demo_cache):
    """Train on the demo cache (or another) with some settings, into a new folder; bases are calibrated unless given."""

    def run(**settings):
        out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        return train(TrainConfig(**{"cache": demo_cache, "out": out, "epochs": EPOCHS, **calibrated(settings)}))

    return run


@pytest.fixture(scope="session")
def demo_rows(demo_folder) -> list[dict[str, str]]:
    """Rows of demo.csv."""
    return read_csv(demo_folder / "demo.csv")


@pytest.fixture
def relabelled(tmp_path, *, demo_folder, demo_cache, demo_rows, tiny_backbone):
    """Make a cache of the demo images from changed rows of its manifest; no embedding is computed again."""

    def make(change) -> Path:
        rows = [dict(row) for row in demo_rows]
        rows = change(rows) or rows
        number = len(list(tmp_path.glob("relabelled*.csv")))
        manifest, out = tmp_path / f"relabelled{number}.csv", tmp_path / f"relabelled{number}.h5"
        write_csv(manifest, rows)
        shutil.copyfile(demo_cache, out)
        config = ExtractConfig(
            data=str(manifest), out=out, backbone=tiny_backbone, image_root=demo_folder, views="center"
        )
        result = extract(config)
        assert (result.new_images, result.new_texts) == (0, 0)
        return out

    return make


@pytest.fixture(scope="session")
def colour_table(tmp_path_factory, demo_rows) -> Path:
    """Manifest of the demo images with a third target, `colour`, rated in a column of another name."""
    table = tmp_path_factory.mktemp("colour") / "rated.csv"
    write_csv(table, [row | {"tint": f"{1 + place % 5}"} for place, row in enumerate(demo_rows)])
    return table


@pytest.fixture(scope="session")
def colour_run(colour_table, demo_folder, demo_cache, tiny_backbone) -> Path:
    """Run of three targets, `colour` the third; never written to by a test."""
    cache, out = (colour_table.with_name(name) for name in ("rated.h5", "coloured"))
    shutil.copyfile(demo_cache, cache)
    named = {"target": ["colour=tint:image"], "label_range": ["colour=1,5"]}
    extract(
        ExtractConfig(
            data=str(colour_table), out=cache, backbone=tiny_backbone, image_root=demo_folder, **named, views="center"
        )
    )
    return train(TrainConfig(cache=cache, out=out, epochs=2, base="identity")).run


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory, tiny_backbone) -> str:
    """Name of a backbone like the bundled one, with one number of its weights changed."""
    from safetensors.torch import load_file, save_file

    source = find_weights(tiny_backbone, None)
    folder = tmp_path_factory.mktemp("other_weights")
    shutil.copyfile(source.config, folder / source.config.name)
    tensors = load_file(source.weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 0.25
    save_file(tensors, folder / source.weights.name)
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def browser():
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox of the browser does not start as root, as in a container; it opens our own page alone.
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


def calibrated(settings):
    """Return settings of `train`, with calibrated bases unless others are given: what most tests are not about."""
    return {"base": "calibrated", **settings} if settings.get("residual_learning", True) else settings


def written_again(folder, few_folder, *, sides=None):
    """Return a cache of the few images as other files, under other names and prompts.

    With `sides`, of the images by name, also of these images, on their sides; the others are to be trained on.
    """
    rows, table = read_csv(few_folder / "demo.csv"), []
    (folder / "again").mkdir()
    for place, row in enumerate(rows):
        name = f"again/{len(rows) - place}.png"
        with Image.open(few_folder / row["image"]) as image:
            image.save(folder / name, compress_level=9)
        table.append(row | {"image": name, "prompt": f"thing {place // 4}", "split": "train"})
    if sides is not None:
        shutil.copytree(few_folder / "images", folder / "images")
        table += [row | {"split": sides[row["image"]]} for row in rows]
    write_csv(folder / "again.csv", table)
    config = ExtractConfig(data=str(folder / "again.csv"), out=folder / "again.h5", backbone="tiny", views="center")
    return extract(config).cache


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def numbers(rows, name):
    return np.array([float(row[name] or "nan") for row in rows])


def weights_of(run):
    (path,) = Path(run).glob("*_best.safetensors")
    return load_file(path)


def same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
