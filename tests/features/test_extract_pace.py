"""Extraction at speed: other ways to decode never mix, replicas and measured batches change nothing in a cache."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.decode_ahead import default_workers
from deltaclip.features.extract import extract
from deltaclip.features.extraction import cache_job as encoder
from deltaclip.features.extraction import pace
from deltaclip.features.settings import ExtractConfig
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.settings import TrainConfig
from deltaclip.pipeline.train import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write 30 JPEG files of 300 x 200, larger than the model's input, of 10 prompts, with labels."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    with (folder / "set.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", "quality", "consistency"])
        for number in range(30):
            coarse = Image.fromarray(rng.integers(0, 256, (5, 8, 3), dtype=np.uint8))
            coarse.resize((300, 200), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
            writer.writerow([f"{number}.jpg", f"picture {number % 10}", number / 30, 1 - number / 30])
    return folder


def run(folder, out, tiny_backbone, **options):
    values = {
        "data": str(folder / "set.csv"),
        "out": out,
        "backbone": tiny_backbone,
        "precision": "fp32",
        "views": "center",
    }
    return extract(ExtractConfig(**values | options))


def vectors(path):
    with FeatureStore.open(path) as store:
        return store.embeddings("images")


def test_ways_to_decode_are_close_and_never_mix(photos, tmp_path, tiny_backbone):
    for decode in ("exact", "fast", "draft"):
        run(photos, tmp_path / f"{decode}.h5", tiny_backbone, decode=decode)
    exact = vectors(tmp_path / "exact.h5")
    for decode, least in (("fast", 0.999), ("draft", 0.99)):
        cosines = (exact * vectors(tmp_path / f"{decode}.h5")).sum(axis=1)
        assert least < cosines.min() < 1 - 1e-7
        with pytest.raises(UserError) as caught:
            run(photos, tmp_path / "exact.h5", tiny_backbone, decode=decode)
        line = f"was made by another backbone: decode exact there, {decode} here"
        assert str(caught.value).startswith(f"{tmp_path}/exact.h5: {line};")
    with FeatureStore.open(tmp_path / "exact.h5") as store:
        assert "decode" not in store.header["request"]  # as in every cache from before there was a choice
    assert run(photos, tmp_path / "fast.h5", tiny_backbone, decode="fast").new_images == 0


def test_a_run_scores_as_its_cache_was_decoded(photos, tmp_path, tiny_backbone):
    cache = run(photos, tmp_path / "fast.h5", tiny_backbone, decode="fast").cache
    train(TrainConfig(cache=cache, out=tmp_path / "run", epochs=1, base="identity"))
    scorer = Scorer.load(tmp_path / "run")
    assert scorer.backbone.decode == "fast"
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = scorer.score([photos / row["image"] for row in rows], [row["prompt"] for row in rows])
    np.testing.assert_allclose(found.q, [float(row["q"]) for row in rows], atol=2e-6)


def test_a_run_of_a_gpu_scores_without_one_and_says_how(photos, tmp_path, tiny_backbone, capsys):
    """Of a cache that was decoded `fast`, said to be of a GPU: without one these are its pixels."""
    cache = run(photos, tmp_path / "fast.h5", tiny_backbone, decode="fast").cache
    folder = train(TrainConfig(cache=cache, out=tmp_path / "run", epochs=1, base="identity")).run
    pictures, prompts = [sorted(photos.glob("*.jpg"))[0]] * 2, ["a red circle", "two blue squares"]
    expected = Scorer.load(folder, device="cpu").score(pictures, prompts)
    config = json.loads((folder / "config.json").read_text())
    config["request"]["decode"] = "gpu"
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    found = Scorer.load(folder, device="cpu").score(pictures, prompts)
    line = "--decode gpu, as the cache was made: there is no CUDA GPU, so pictures are decoded as by --decode fast"
    assert capsys.readouterr().err.splitlines() == [line]
    np.testing.assert_array_equal(found.q, expected.q)
    assert Scorer.load(folder, device="cpu").open_file(pictures[0].read_bytes()).mode == "RGB"


@pytest.mark.parametrize("views", ["tiles", "stages", "statistics"])
def test_draft_is_refused_where_a_view_needs_the_whole(photos, tmp_path, tiny_backbone, views):
    with pytest.raises(UserError) as caught:
        run(photos, tmp_path / "c.h5", tiny_backbone, decode="draft", views=views)
    assert str(caught.value) == (
        f"--decode: draft reads JPEG files at a reduced size, and view {views} needs more; "
        "give --decode fast or exact, or leave out the view"
    )


@pytest.mark.slow
def test_replicas_give_the_same_cache(photos, tmp_path, tiny_backbone):
    one = run(photos, tmp_path / "one.h5", tiny_backbone, batch_size=4, views="flip,tiles")
    two = run(photos, tmp_path / "two.h5", tiny_backbone, batch_size=4, views="flip,tiles", device="cpu,cpu")
    assert one.cache.read_bytes() == two.cache.read_bytes()
    assert two.new_images == 30


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("cpu,gpu", "--device: 'gpu' is no device; give auto, cpu, cuda or cuda:N"),
        (
            "cpu,meta",
            "--device: 'cpu,meta' mixes kinds of devices, whose embeddings differ; give cpu, cuda:all or GPUs alone",
        ),
    ],
)
def test_devices_that_cannot_be(photos, tmp_path, device, line):
    with pytest.raises(UserError) as caught:
        run(photos, tmp_path / "c.h5", "tiny", device=device)
    assert str(caught.value) == line


def test_stages_and_bottleneck_are_told(photos, tmp_path, tiny_backbone):
    result = run(photos, tmp_path / "c.h5", tiny_backbone, batch_size=8, workers=2)
    shown = result.to_json()
    assert list(shown["stages"]) == ["read", "decode", "forward", "write"]
    assert all(0 <= share <= 1 for share in shown["stages"].values())
    assert min(shown["stages"]["decode"], shown["stages"]["forward"]) > 0
    assert (shown["batch_size"], shown["workers"], shown["bottleneck"]) == (8, 2, result.bottleneck)
    words = pace.share_words(result.stages)
    line = f"stages: {words} (bottleneck: {result.bottleneck}; batches of 8, 2 decoding threads)"
    assert line in result.summary().splitlines()
    again = run(photos, tmp_path / "c.h5", tiny_backbone)
    assert (again.stages, again.bottleneck) == ({}, None)
    assert "stages:" not in again.summary()


@pytest.mark.slow
def test_a_measured_batch_is_kept_by_the_cache(photos, tmp_path, tiny_backbone, monkeypatch):
    monkeypatch.setattr(encoder, "MIN_IMAGES", 30)
    monkeypatch.setattr(encoder, "fastest_batch", lambda _encode, pixels, *, on_gpu: 5 if len(pixels) == 16 else 0)
    run(photos, tmp_path / "c.h5", tiny_backbone)
    assert run(photos, tmp_path / "plain.h5", tiny_backbone, batch_size=5).batch_size == 5
    np.testing.assert_array_equal(vectors(tmp_path / "c.h5"), vectors(tmp_path / "plain.h5"))
    with FeatureStore.open(tmp_path / "c.h5") as store:
        assert store.facts["batch_size"] == 5
    monkeypatch.setattr(encoder, "fastest_batch", lambda *_, **__: 7)  # not asked again
    added = run(photos, tmp_path / "c.h5", tiny_backbone, views="flip")
    assert (added.new_images, added.batch_size) == (30, 5)


def test_few_images_are_not_measured(photos, tmp_path, tiny_backbone):
    result = run(photos, tmp_path / "c.h5", tiny_backbone)
    assert result.batch_size == pace.DEFAULT_BATCH
    assert "batch_size" not in result.facts


@pytest.mark.slow
def test_threads_follow_the_first_batches(photos, tmp_path, tiny_backbone, monkeypatch):
    asked = []

    def needed(busy_s, *, lanes, processors):
        asked.append((sorted(busy_s), lanes, processors >= 1))
        return 3

    assert run(photos, tmp_path / "cpu.h5", tiny_backbone, batch_size=1).workers == default_workers()
    monkeypatch.setattr(encoder, "is_fed_by_processors", lambda device: device == "cpu")  # as if it were a GPU
    monkeypatch.setattr(encoder, "needed_workers", needed)
    result = run(photos, tmp_path / "c.h5", tiny_backbone, batch_size=1)
    assert result.workers == 3
    assert asked == [(["decode", "forward", "read"], 1, True)]
    plain = run(photos, tmp_path / "plain.h5", tiny_backbone, batch_size=1, workers=1)
    assert (plain.workers, len(asked)) == (1, 1)
    assert plain.cache.read_bytes() == result.cache.read_bytes()
