"""Views as vectors: `center` is open_clip's own, the others are recomputed here image by image."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import hflip, normalize, to_tensor

from deltaclip.features.backbone.decode_ahead import ImageFile
from deltaclip.features.backbone.encode import encode_images
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.view_vectors import encode_views, encoded_batches, make_views, opener_of
from deltaclip.features.backbone.weights import find_weights
from deltaclip.features.data.views import RECIPES, tile_corners

NAMES = ("center", "flip", "tiles")


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return load_backbone(find_weights(tiny_backbone, None), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def side(backbone):
    return backbone.facts["preprocessing"]["size"][0]


@pytest.fixture(scope="module")
def images(side):
    generator = np.random.default_rng(0)
    sizes = [
        (side, side),
        (2 * side, 2 * side + 3),
        (side - 5, side + 1),
        (20, 31),
        (side, 7 * side),
        (5 * side, 4 * side),
    ]
    small = [generator.integers(0, 256, (9, 11, 3), dtype=np.uint8) for _ in sizes]
    return [Image.fromarray(part).resize(size[::-1], 3) for part, size in zip(small, sizes, strict=True)]


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    found = []
    for number, image in enumerate(images):
        path = folder / f"{number}.png"
        image.save(path)
        found.append(ImageFile(10 + number, path, hashlib.sha256(path.read_bytes()).digest()))
    return found


def raw(backbone, pixels_B3HW):
    """open_clip's own output in float64."""
    with torch.inference_mode():
        return backbone.model.encode_image(pixels_B3HW).double().numpy()


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def expected(backbone, image, name, side):
    """Vector and length of a view of one image, by torchvision and one forward pass a crop."""
    if name == "center":
        vector = raw(backbone, backbone.preprocess(image)[None])[0]
        return unit(vector), np.linalg.norm(vector)
    if name == "flip":
        vector = raw(backbone, hflip(backbone.preprocess(image))[None])[0]
        return unit(vector), np.linalg.norm(vector)
    if min(image.size) < side:
        scale = side / min(image.size)
        image = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    tops, lefts = tile_corners(image.height, image.width, side, side)
    crops = [image.crop((left, top, left + side, top + side)) for top in tops for left in lefts]
    cfg = backbone.facts["preprocessing"]
    vectors = [raw(backbone, normalize(to_tensor(crop), cfg["mean"], cfg["std"])[None])[0] for crop in crops]
    return unit(np.stack(vectors)).mean(axis=0), np.mean(np.linalg.norm(vectors, axis=1))


def encode(backbone, files, wanted, *, names=NAMES, batch_size=64):
    """Encode `wanted`: entries by view, or entries of which every view is wanted."""
    by_view = wanted if isinstance(wanted, dict) else dict.fromkeys(names, wanted)
    masks = {name: np.isin(np.arange(20), list(entries)) for name, entries in by_view.items()}
    views = make_views(backbone, names, batch_size=batch_size)
    return list(encoded_batches(files, views, masks, root=None, batch_size=batch_size, workers=2))


@pytest.mark.parametrize("batch_size", [1, 4, 6, 64])
def test_vectors(backbone, images, files, *, side, batch_size):
    everything = {file.entry for file in files}
    batches = encode(backbone, files, everything, batch_size=batch_size)
    assert [batch.num_images for batch in batches] == [min(batch_size, 6 - start) for start in range(0, 6, batch_size)]
    for name in NAMES:
        found = [batch.found[name] for batch in batches]
        assert [entry for part in found for entry in part.entries] == sorted(everything)
        vectors, norms = (np.concatenate([part[place] for part in found]) for place in (1, 2))
        wanted = [expected(backbone, image, name, side) for image in images]
        # float32 sums in another order: 1e-5 of a unit vector
        np.testing.assert_allclose(vectors, np.stack([vector for vector, _ in wanted]), atol=1e-5)
        np.testing.assert_allclose(norms, [norm for _, norm in wanted], rtol=1e-5)
        assert vectors.dtype == norms.dtype == np.float32
    lengths = np.linalg.norm(np.concatenate([batch.found["tiles"].vector_BW for batch in batches]), axis=1)
    assert lengths[0] == pytest.approx(1, abs=1e-6)  # one tile agrees with itself
    assert (lengths[[1, 4, 5]] < 0.9999).all()


def test_center_is_what_it_was_before_views_bit_for_bit(backbone, images, files):
    (batch,) = encode(backbone, files, {file.entry for file in files}, names=(*NAMES, "stages"))
    before = encode_images(backbone, torch.stack([backbone.preprocess(image) for image in images]))
    np.testing.assert_array_equal(batch.found["center"].vector_BW, before.unit_BD)
    np.testing.assert_array_equal(batch.found["center"].norm_B, before.norm_B)


def test_the_tile_of_an_image_of_the_models_size_is_its_center(backbone, files):
    (batch,) = encode(backbone, files[:1], {10})
    for place in (1, 2):
        np.testing.assert_array_equal(batch.found["tiles"][place], batch.found["center"][place])


def test_a_view_is_computed_for_those_that_want_it(backbone, files):
    wanted = {"center": {10, 12}, "flip": {11, 12}, "tiles": {13, 15}}
    first, second = encode(backbone, [file for file in files if file.entry != 14], wanted, batch_size=3)
    assert {name: part.entries for name, part in first.found.items()} == {"center": [10, 12], "flip": [11, 12]}
    assert {name: part.entries for name, part in second.found.items()} == {"tiles": [13, 15]}
    assert (first.num_images, second.num_images) == (3, 2)


def test_an_image_is_prepared_once_for_views_of_one_source(backbone, files, monkeypatch):
    calls = []
    counted = backbone.preprocess

    def preprocess(image):
        calls.append(image.size)
        return counted(image)

    monkeypatch.setitem(backbone.__dict__, "preprocess", preprocess)
    encode(backbone, files, {file.entry for file in files}, names=("center", "flip", "stages"))
    assert len(calls) == len(files)


def passes(work):
    """How often the patches were cut and how many products of batches were made while `work` ran, and its result."""
    with torch.profiler.profile() as profiler:
        found = work()
    counts = {event.key: event.count for event in profiler.key_averages()}
    return counts["aten::convolution"], counts.get("aten::bmm", 0), found


def test_center_and_stages_take_one_forward_pass(backbone, images):
    center, stages = make_views(backbone, ("center", "stages"), batch_size=64)
    crops = {entry: {"center": center.crops(image)} for entry, image in enumerate(images)}

    def run(views, **entries_of):
        return lambda: encode_views(views, crops, entries_of)

    everything = list(crops)
    one, products, together = passes(run([center, stages], center=everything, stages=everything))
    _, products_alone, alone = passes(run([center], center=everything))
    means = run([stages], stages=everything)()
    assert (one, products) == (1, products_alone)
    for name, single in (("center", alone), ("stages", means)):
        for place in (0, 1):
            np.testing.assert_array_equal(together[name][place], single[name][place])
    # Of images that lack one view or the other, each view is made of its own.
    two, _, apart = passes(run([center, stages], center=everything, stages=everything[1:]))
    assert two == 2
    np.testing.assert_array_equal(apart["center"].unit_BD, alone["center"].unit_BD)
    # float32 sums in another order: 1e-5 of the largest mean
    room = 1e-5 * np.abs(means["stages"].unit_BD).max()
    np.testing.assert_allclose(apart["stages"].unit_BD, means["stages"].unit_BD[1:], atol=room)


def test_views_say_what_they_are(backbone):
    views = make_views(backbone, NAMES, batch_size=4)
    assert [(view.name, view.width, view.recipe) for view in views] == [
        (name, backbone.dim, RECIPES[name]) for name in NAMES
    ]


def test_each_backbone_gets_what_its_own_way_decodes(tiny_backbone, side):
    """A JPEG file that one cache has decoded at a quarter of its size is whole for the backbone of another."""
    weights, content = find_weights(tiny_backbone, None), io.BytesIO()
    Image.effect_noise((8 * side, 8 * side), 80).convert("RGB").save(content, "JPEG")
    ways = {
        decode: load_backbone(weights, device="cpu", precision="fp32", decode=decode) for decode in ("draft", "exact")
    }
    views = {decode: make_views(each, ["center"], batch_size=2) for decode, each in ways.items()}
    alone = {decode: views[decode][0].open_file(content.getvalue()) for decode in ways}
    assert alone["draft"].width < alone["exact"].width == 8 * side
    for order in (("draft", "exact"), ("exact", "draft")):
        opened = opener_of([ways[each] for each in order], [views[each] for each in order])(content.getvalue())
        assert [picture.size for picture in opened] == [alone[each].size for each in order]
    shared = opener_of([ways["draft"]] * 2, [views["draft"]] * 2)(content.getvalue(), max_pixels=1 << 24)
    assert shared.size == alone["draft"].size
