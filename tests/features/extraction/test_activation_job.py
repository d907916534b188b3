"""Filling boundary files from real images with the bundled backbone: equal to no file at all, resumed, never mixed."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.base.files import one_writer
from deltaclip.features.backbone.decode_ahead import ImageFile
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.towers import cut_towers
from deltaclip.features.backbone.view_vectors import encoded_batches, make_views
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.views import view_pixels
from deltaclip.features.extraction import activation_job as boundary
from deltaclip.features.extraction.activation_job import Images, boundary_identity, fill_boundary, fill_text_boundary
from deltaclip.features.store.activation_file import BoundaryReader

CUT = 4


@pytest.fixture(scope="module")
def cut(tiny_backbone):
    """Return the bundled backbone and its towers, two thirds frozen."""
    backbone = load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")
    return backbone, *cut_towers(backbone, freeze_layers=CUT, freeze_text_layers=2)


@pytest.fixture(scope="module")
def images(demo_folder):
    """Return 20 images of the demo set."""
    files = sorted((demo_folder / "images").iterdir())[:20]
    return images_of(files, demo_folder)


def images_of(files, root):
    digests = [list(hashlib.sha256(file.read_bytes()).digest()) for file in files]
    return Images(keys=np.array(digests, dtype=np.uint8), files=files, root=root)


def pixels_of(backbone, images, view="center"):
    with torch.no_grad():
        return torch.stack(
            [
                view_pixels(
                    view,
                    Image.open(file).convert("RGB"),
                    key.tobytes(),
                    preprocess=backbone.preprocess,
                    input_size=(96, 96),
                )
                for file, key in zip(images.files, images.keys, strict=True)
            ]
        )


def refused(work):
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


@pytest.mark.parametrize("view", ["center", "flip", "crop-2"])
def test_features_through_the_file_are_those_of_the_whole_model(tmp_path, cut, images, view):
    backbone, image, _ = cut
    filled = fill_boundary(tmp_path / "c.h5", backbone, image, images, view=view)
    assert filled.path == tmp_path / f"c.boundary-image-4-{view}-fp32.h5"
    assert (filled.computed, filled.reused) == (20, 0)
    reader = BoundaryReader.open(filled.path, boundary_identity(backbone, image, view=view, precision="fp32"))
    order = [19, 0, 7]
    with torch.no_grad():
        expected = backbone.model.encode_image(pixels_of(backbone, images, view)[order])
        found = image.from_boundary(reader.read(order))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5  # fp32: the order of sums
    assert fill_boundary(tmp_path / "c.h5", backbone, image, images, view=view).reused == 20


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_texts(tmp_path, cut, precision):
    backbone, _, text = cut
    texts = [f"{count} red circles above a blue square" for count in range(70)] + ["x " * 100]
    filled = fill_text_boundary(tmp_path / "c.h5", backbone, text, texts, precision=precision)
    reader = BoundaryReader.open(filled.path)
    ids = backbone.tokenizer(texts, context_length=backbone.context_length)
    with torch.no_grad():
        expected = backbone.model.encode_text(ids)
        found = text.from_boundary(reader.read(range(71)), ids)
    assert reader.read([0]).dtype == (torch.float32 if precision == "fp32" else torch.float16)
    if precision == "fp32":
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    # a cosine of at least 0.999 with fp32
    assert float(torch.nn.functional.cosine_similarity(found, expected).min()) > 0.999


def test_only_new_images_are_run(tmp_path, cut, images, demo_folder):
    backbone, image, _ = cut
    fill_boundary(tmp_path / "c.h5", backbone, image, images_of(images.files[:12], demo_folder))
    other_order = images_of(images.files[::-1], demo_folder)
    filled = fill_boundary(tmp_path / "c.h5", backbone, image, other_order)
    assert (filled.computed, filled.reused) == (8, 12)
    whole = fill_boundary(tmp_path / "whole.h5", backbone, image, images)
    assert len(BoundaryReader.open(whole.path, keys=images.keys)) == 20
    line = refused(lambda: BoundaryReader.open(filled.path, keys=images.keys))
    assert line.startswith(f"{filled.path}: holds other images or texts, or in another order; ")
    found, expected = (BoundaryReader.open(path).read(range(20)) for path in (filled.path, whole.path))
    torch.testing.assert_close(found.flip(0), expected, rtol=1e-5, atol=1e-5)  # batches differ: the order of sums


def test_another_precision_is_another_file_and_other_weights_are_refused(tmp_path, cut, images):
    backbone, image, _ = cut
    first = fill_boundary(tmp_path / "c.h5", backbone, image, images)
    second = fill_boundary(tmp_path / "c.h5", backbone, image, images, precision="bf16")
    assert {first.path, second.path} == set(tmp_path.iterdir())
    identity = boundary_identity(backbone, image, view="center", precision="fp32")
    other = identity | {"weights_sha256": "other"}
    what = f"was made with another weights_sha256 ({identity['weights_sha256']}, not other)"
    line = f"{what}; remove it, and it is made again"
    assert refused(lambda: BoundaryReader.open(first.path, other)) == f"{first.path}: {line}"


def test_a_second_writer_is_refused(tmp_path, cut, images):
    backbone, image, _ = cut
    path = tmp_path / "c.boundary-image-4-center-fp32.h5"
    with one_writer(path):
        line = refused(lambda: fill_boundary(tmp_path / "c.h5", backbone, image, images))
    assert line == f"{path}: another process is writing this file; wait for it to end or give another --out"


def test_an_image_that_changed_is_named_and_the_others_are_kept(tmp_path, cut, images, demo_folder):
    backbone, image, _ = cut
    keys = images.keys.copy()
    keys[3] = 0
    wrong = Images(keys=keys, files=images.files, root=demo_folder)
    line = refused(lambda: fill_boundary(tmp_path / "c.h5", backbone, image, wrong))
    assert line == (
        f"{images.files[3]}: 1 images could not be read (the first: changed since its content was recorded); "
        "the others are stored: give the same command again, or extract again without it"
    )
    assert fill_boundary(tmp_path / "c.h5", backbone, image, images).computed == 1


def test_a_tower_without_a_part_to_keep(tmp_path, tiny_backbone, images):
    backbone = load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")
    image, text = cut_towers(backbone, freeze_layers=0, freeze_text_layers=4)
    for work in (
        lambda: fill_boundary(tmp_path / "c.h5", backbone, image, images),
        lambda: fill_text_boundary(tmp_path / "c.h5", backbone, text, ["a"]),
    ):
        with pytest.raises(ValueError, match="only a tower that is frozen in part has a boundary to keep"):
            work()


def _fill_in_steps(cache, tiny_backbone, images):
    torch.set_num_threads(1)
    boundary.BATCH = 2
    backbone = load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")
    image, _ = cut_towers(backbone, freeze_layers=CUT, freeze_text_layers=None)
    fill_boundary(cache, backbone, image, images, workers=1)


@pytest.mark.slow  # a process of its own loads torch and the backbone; the writer is killed at every call elsewhere
def test_killed_while_it_fills(tmp_path, cut, tiny_backbone, images):
    backbone, image, _ = cut
    process = multiprocessing.get_context("spawn").Process(
        target=partial(_fill_in_steps, tmp_path / "c.h5", tiny_backbone, images)
    )
    process.start()
    part = tmp_path / "c.boundary-image-4-center-fp32.h5.part"
    while not part.exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    filled = fill_boundary(tmp_path / "c.h5", backbone, image, images)
    assert filled.computed + filled.reused == 20
    whole = fill_boundary(tmp_path / "whole.h5", backbone, image, images)
    found, expected = (BoundaryReader.open(path).read(range(20)) for path in (filled.path, whole.path))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_images_are_decoded_as_the_cache_says(tmp_path, tiny_backbone, images):
    """What the frozen blocks are given is what the embeddings of a `fast` cache were made of, not `exact` pixels."""
    source = find_weights(tiny_backbone, None)
    backbones = {
        decode: load_backbone(source, device="cpu", precision="fp32", decode=decode) for decode in ("exact", "fast")
    }
    towers = {
        decode: cut_towers(backbone, freeze_layers=CUT, freeze_text_layers=2)[0]
        for decode, backbone in backbones.items()
    }
    wanted, found = {}, {}
    for decode, backbone in backbones.items():
        files = [ImageFile(entry, file, None) for entry, file in enumerate(images.files)]
        (batch,) = encoded_batches(
            files,
            make_views(backbone, ["center"], batch_size=20),
            {"center": np.ones(20, dtype=bool)},
            root=None,
            batch_size=20,
            workers=1,
        )
        wanted[decode] = torch.from_numpy(np.asarray(batch.found["center"].vector_BW))
        filled = fill_boundary(tmp_path / f"{decode}.h5", backbone, towers[decode], images)
        with torch.no_grad():
            features = towers[decode].from_boundary(BoundaryReader.open(filled.path).read(range(20)))
        found[decode] = torch.nn.functional.normalize(features, dim=-1)
        torch.testing.assert_close(found[decode], wanted[decode], rtol=1e-4, atol=1e-5)
    assert float((found["exact"] - found["fast"]).abs().max()) > 1e-4
    shutil.copyfile(tmp_path / "exact.boundary-image-4-center-fp32.h5", filled.path)
    assert "was made with another view" in refused(
        lambda: fill_boundary(tmp_path / "fast.h5", backbones["fast"], towers["fast"], images)
    )


def test_another_configuration_of_the_same_weights_is_refused(tmp_path, cut, images):
    backbone, image, _ = cut
    fill_boundary(tmp_path / "c.h5", backbone, image, images)
    other = replace(backbone, facts=backbone.facts | {"config_sha256": "other"})
    assert "was made with another config_sha256" in refused(
        lambda: fill_boundary(tmp_path / "c.h5", other, image, images)
    )
