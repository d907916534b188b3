"""Pictures in memory give the vectors that their files give, and gradients that finite differences give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.differentiable import DifferentiableViews
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.view_vectors import encode_views, make_views
from deltaclip.features.backbone.weights import find_weights
from deltaclip.tests.features.backbone.small_models import as_folder

VIEWS = ["center", "stages", "flip", "tiles", "statistics"]
FAMILIES = ["vit", "resnet", "siglip", "timm convnext"]
MORE = ["coca", "timm vit", "timm efficientnet", "vit, attention pool, patch dropout", "vit, blocks of its own"]


@pytest.fixture(scope="module", params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    return load_backbone(find_weights(as_folder(request.param, folder), None), device="cpu", precision="fp32")


def pictures(width, height, count=2):
    """Smooth pictures with edges, so that resizing matters and overshoots."""
    rng = np.random.default_rng(width * height)
    return [
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BOX)
        for _ in range(count)
    ]


def as_floats(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def from_files(backbone, images):
    views = make_views(backbone, VIEWS, batch_size=8)
    crops = {n: {view.source: view.crops(image) for view in views} for n, image in enumerate(images)}
    found = encode_views(views, crops, {view.name: list(crops) for view in views})
    return {name: vectors.unit_BD for name, vectors in found.items()}


@pytest.mark.parametrize(("width", "height"), [(90, 61), (301, 330)])
def test_the_vectors_are_those_of_files(backbone, width, height):
    images = pictures(width, height)
    expected = from_files(backbone, images)
    found = DifferentiableViews(backbone, VIEWS, rounds=True)(as_floats(images))
    assert list(found) == VIEWS
    for name, vector in found.items():
        # A level of 8 bits is rounded the other way now and then: fixed-point sums there, floats here.
        size = np.linalg.norm(expected[name], axis=1).min()
        assert np.abs(vector.detach().numpy() - expected[name]).max() < 2e-3 * size, name
    smooth = DifferentiableViews(backbone, VIEWS, rounds=False)(as_floats(images))
    assert all((smooth[name] - found[name]).norm(dim=1).max() < 0.05 * found[name].norm(dim=1).min() for name in VIEWS)


def test_gradients_are_those_of_finite_differences(backbone):
    views = DifferentiableViews(backbone, ["center", "stages", "flip", "tiles"], rounds=False)
    generator = torch.Generator().manual_seed(3)
    pixels = (0.2 + 0.6 * as_floats(pictures(70, 64))).requires_grad_()  # nothing overshoots
    weights = {name: torch.randn(vector.shape, generator=generator) for name, vector in views(pixels).items()}

    def value(pixels):
        return sum((vector * weights[name] / weights[name].norm()).sum() for name, vector in views(pixels).items())

    value(pixels).backward()
    direction = pixels.grad / pixels.grad.norm()
    step = 0.02  # of |direction| = 1: single pixels move by some 1e-4
    with torch.no_grad():
        slope = (value(pixels + step * direction) - value(pixels - step * direction)) / (2 * step)
    assert float(slope) == pytest.approx(float(pixels.grad.norm()), rel=0.02)


def test_nothing_flows_through_statistics(backbone):
    views = DifferentiableViews(backbone, ["center", "statistics"], rounds=True)
    pixels = as_floats(pictures(70, 64)).requires_grad_()
    found = views(pixels)
    assert (found["center"].requires_grad, found["statistics"].requires_grad) == (True, False)
    assert views.without_gradient == ("statistics",)


def test_a_transform_that_pads_is_refused(tmp_path):
    folder = tmp_path / "model"
    name = as_folder("vit", folder)
    config = folder / "open_clip_config.json"
    config.write_text(
        config.read_text().replace('"preprocess_cfg": {}', '"preprocess_cfg": {"resize_mode": "longest"}')
    )
    backbone = load_backbone(find_weights(name, None), device="cpu", precision="fp32")
    with pytest.raises(UserError, match="resizes in a way that has no gradient here \\(longest\\)"):
        DifferentiableViews(backbone, ["center"], rounds=True)
