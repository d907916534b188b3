"""Decoding for a device, here a CPU by TorchCodec: the pixels of Pillow within two levels, and who decodes what."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.backbone import device_decoding
from deltaclip.features.backbone.device_decoding import (
    DeviceDecoder,
    check_decoder,
    decoding_notes,
    missing_decoder,
    require_decoder,
    upright,
)
from deltaclip.features.backbone.pixels import center_crops, pixels_ahead
from deltaclip.features.backbone.view_vectors import file_opener
from deltaclip.features.data.images import TURNS
from deltaclip.features.data.jpeg import PlainJpeg
from deltaclip.features.data.sources import UnreadableImage
from deltaclip.tests.features.backbone.test_pixels import as_jpeg, make_backbone, picture
from deltaclip.tests.features.data.odd_images import refused_files, usable_files, without_count

needs_torchcodec = pytest.mark.skipif(
    importlib.util.find_spec("torchcodec") is None, reason="TorchCodec is not installed (pip install 'deltaclip[gpu]')"
)


def exif(orientation):
    notes = Image.Exif()
    notes[0x0112] = orientation
    return notes


def files():
    """Plain JPEG files of several sizes, samplings and turns, grey among them, and two that are none."""
    found = [as_jpeg(picture(300, 225, seed=number), subsampling=number) for number in range(3)]
    found += [as_jpeg(picture(225, 300, seed=3), exif=exif(turn)) for turn in range(1, 9)]
    found += [as_jpeg(picture(*size, seed=4)) for size in ((512, 512), (37, 500), (224, 223), (640, 96), (17, 19))]
    found += [
        as_jpeg(picture(300, 225, seed=5).convert("L")),
        as_jpeg(picture(300, 225, seed=6), restart_marker_rows=2),
    ]
    return [*found, usable_files()["la.png"], as_jpeg(picture(300, 225, seed=7), progressive=True)]


def of_host(backbone, contents):
    crops, open_file = center_crops(backbone), file_opener(backbone)
    return torch.cat([crops(open_file(content)) for content in contents])


# Of levels apart. Pillow 13 squeezes a picture the long way first, and SigLIP's preprocessing squeezes them.
MEAN = {"openai": 0.001, "tiny": 0.001, "siglip": 0.08, "bilinear": 0.003}


@needs_torchcodec
@pytest.mark.parametrize("name", MEAN)
def test_within_two_levels_of_exact(name):
    decoder, contents = DeviceDecoder(make_backbone(name, "gpu")), files()
    opened = [decoder.open(content) for content in contents]
    plain = [number for number, each in enumerate(opened) if isinstance(each, PlainJpeg)]
    assert plain == list(range(len(contents) - 2))
    found = decoder.pixels([opened[number] for number in plain])
    expected = of_host(make_backbone(name), [contents[number] for number in plain])
    apart = (found.int() - expected.int()).abs()
    assert (found.dtype, found.shape) == (torch.uint8, expected.shape)
    assert apart.max() <= 2
    assert apart.float().mean() < MEAN[name]
    assert (decoder.on_host, decoder.failed) == (2, 0)
    assert decoding_notes([decoder, decoder, None]) == [
        "images that are no plain JPEG, decoded on the host, as by --decode fast: 2"
    ]


@needs_torchcodec
def test_what_is_decoded_together_changes_nothing(monkeypatch):
    decoder = DeviceDecoder(make_backbone("tiny", "gpu"))
    pictures = [decoder.open(content) for content in files()[:-2]]
    whole = decoder.pixels(pictures)
    monkeypatch.setattr(device_decoding, "PIXELS_AT_ONCE", 100_000)
    assert torch.equal(decoder.pixels(pictures), whole)
    assert torch.equal(torch.cat([decoder.pixels([each]) for each in pictures]), whole)


@needs_torchcodec
def test_what_the_device_does_not_decode_the_host_does(monkeypatch, capsys):
    """A decoder that gives up on grey pictures, and spoils the call for the others as TorchCodec does."""
    decoder, decode = DeviceDecoder(make_backbone("tiny", "gpu")), device_decoding.decode_streams

    def choosy(streams, device):
        found = decode(streams, device)
        if any(len(native) == 1 for native in found):
            raise RuntimeError("Failed to get image info: 3\nand much more")
        return found

    monkeypatch.setattr(device_decoding, "decode_streams", choosy)
    contents = [content for content in files()[:-2] for _ in range(2)]
    found = decoder.pixels([decoder.open(content) for content in contents])
    grey = [number for number, content in enumerate(contents) if content == files()[-4]]
    assert torch.equal(found[grey], of_host(make_backbone("tiny", "fast"), [contents[number] for number in grey]))
    assert (found.int() - of_host(make_backbone("tiny"), contents).int()).abs().max() <= 2
    assert decoder.failed == len(grey) == 2
    said = "--decode gpu: cpu does not decode a picture (Failed to get image info: 3); such are decoded on the host\n"
    assert capsys.readouterr().err == said
    assert decoding_notes([decoder]) == [
        "images that the GPU did not decode (Failed to get image info: 3), decoded on the host, as by --decode fast: 2"
    ]


@needs_torchcodec
def test_a_picture_of_another_size_than_its_file_says_is_not_taken(monkeypatch, capsys):
    decoder, content = DeviceDecoder(make_backbone("tiny", "gpu")), files()[0]
    monkeypatch.setattr(device_decoding, "decode_streams", lambda *_: [torch.zeros(3, 8, 8, dtype=torch.uint8)])
    assert torch.equal(decoder.pixels([decoder.open(content)]), of_host(make_backbone("tiny", "fast"), [content]))
    assert "300 x 225 came as (3, 8, 8)" in capsys.readouterr().err


@needs_torchcodec
def test_a_full_device_is_no_picture_that_it_does_not_decode(monkeypatch):
    decoder = DeviceDecoder(make_backbone("tiny", "gpu"))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_decoding, "decode_streams", full)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.pixels([decoder.open(files()[0])])


def test_refused_files_are_refused_with_the_same_words():
    decoder = DeviceDecoder(make_backbone("tiny", "gpu"))
    for content, reason in refused_files().values():
        if content:  # an empty one is not read at all
            with pytest.raises(UnreadableImage) as caught:
                decoder.open(content)
            assert without_count(str(caught.value)) == reason
    assert decoder.on_host == 0


def test_a_training_takes_the_pixels_of_the_host():
    image = picture(300, 225)
    one, other = (pixels_ahead(make_backbone("tiny", decode))(image) for decode in ("gpu", "fast"))
    assert torch.equal(one, other)
    assert not torch.equal(one, pixels_ahead(make_backbone("tiny"))(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_pillows(orientation):
    image = picture(9, 5)
    expected = image.transpose(TURNS[orientation]) if orientation in TURNS else image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert np.array_equal(upright(pixels, orientation).permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("name", ["wide", "longest"])
def test_what_cannot_be_resized_there_is_refused(name):
    mode = "longest" if name == "longest" else "shortest"
    with pytest.raises(UserError) as caught:
        DeviceDecoder(make_backbone(name, "gpu"))
    assert str(caught.value) == f"--decode gpu: cannot resize as {name} needs ({mode}); give --decode exact"


def test_another_interpolation_is_refused():
    backbone = make_backbone("openai", "gpu")
    resize = backbone.preprocess.transforms[0]
    resize.interpolation = type(resize.interpolation)("nearest")
    for decode in ("fast", "gpu"):
        with pytest.raises(UserError, match="cannot resize as openai needs"):
            center_crops(dataclasses.replace(backbone, decode=decode))


def test_what_lacks_is_named(monkeypatch):
    for decode in ("exact", "fast", "draft"):
        require_decoder(decode, "cpu")
    assert missing_decoder("cpu") == "there is no CUDA GPU"
    for device in ("auto", "cuda", "cuda:1, cuda:2", "cuda:all"):
        check_decoder("gpu", device) if importlib.util.find_spec("torchcodec") else None
    lines = {}
    with pytest.raises(UserError) as lines["auto"]:
        require_decoder("gpu", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError) as lines["cuda"]:
        check_decoder("gpu", "cuda")
    assert missing_decoder("cuda") == "TorchCodec is not installed"
    assert {name: str(caught.value) for name, caught in lines.items()} == {
        "auto": "--decode gpu: there is no CUDA GPU here; give --decode fast",
        "cuda": "--decode gpu: TorchCodec is not installed; pip install 'deltaclip[gpu]', or give --decode fast",
    }


@needs_torchcodec
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_on_which_nothing_is_decoded_is_named():
    with pytest.raises(UserError) as caught:
        require_decoder("gpu", "cuda:0")
    assert str(caught.value).startswith("--decode gpu: TorchCodec does not decode on cuda:0 (")
    assert "\n" not in str(caught.value)
