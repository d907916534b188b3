"""What systems hide beside files is no part of anything that is opened: `._NAME` of macOS beside each, `.DS_Store`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.weights import TINY, find_weights
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.foreign import read_source
from deltaclip.features.data.images import unprompted
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.push import push
from deltaclip.pipeline.rank import rank
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import PredictConfig, PushConfig, RankConfig, ShareConfig
from deltaclip.pipeline.share import share

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60)


def hide(folder: Path) -> Path:
    """Put beside every file what a copy from macOS leaves, and what its windows write into every folder."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(APPLE_DOUBLE)
    for inside in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        (inside / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return folder


@pytest.fixture
def images(demo_folder) -> list[Path]:
    return sorted((demo_folder / "images").iterdir())[:4]


def test_a_run_and_a_shared_folder(demo_run, tmp_path):
    run = hide(Path(shutil.copytree(demo_run, tmp_path / "run")))
    assert open_run(run).checkpoint.name == "residual_frozen_best.safetensors"
    shared = hide(share(ShareConfig(run=run, out=tmp_path / "shared")).out)
    sent = push(PushConfig(folder=shared, repo="org/name", dry_run=True)).sizes
    assert [name for name in sent if name.startswith(".")] == []
    assert "residual_frozen_best.safetensors" in sent


def test_the_folder_of_a_backbone(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "backbone"))
    (folder / "open_clip_model.safetensors").rename(folder / "weights.safetensors")
    found = find_weights(f"local-dir:{hide(folder)}", None)
    assert (found.weights.name, found.notes) == ("weights.safetensors", ())


def test_tables_of_several_files(tmp_path, images):
    (tmp_path / "data").mkdir()
    for part in range(2):
        cells = [{"bytes": image.read_bytes(), "path": None} for image in images]
        table = pa.table({"image": cells, "prompt": ["a", "b", "c", "d"]})
        pq.write_table(table, tmp_path / "data" / f"train-{part:05}-of-00002.parquet")
    hide(tmp_path)
    for data in (tmp_path, tmp_path / "data" / "*.parquet"):
        assert len(read_manifest(str(data))) == 8


def test_tables_at_an_address():
    fsspec = pytest.importorskip("fsspec")
    there = fsspec.filesystem("memory")
    there.pipe_file("/hidden/a.csv", b"image,prompt\na.png,x\n")
    there.pipe_file("/hidden/._a.csv", APPLE_DOUBLE)
    assert read_manifest("memory://hidden/*.csv", read_labels=False).prompts == ["x"]


def test_embeddings_of_other_programs(tmp_path):
    for kind in ("img_emb", "text_emb", "metadata"):
        (tmp_path / kind).mkdir()
    for kind in ("img_emb", "text_emb"):
        np.save(tmp_path / kind / f"{kind}_0.npy", np.eye(3, 8, dtype=np.float32))
    pq.write_table(
        pa.table({"image_path": ["a", "b", "c"], "caption": ["x"] * 3}), tmp_path / "metadata/metadata_0.parquet"
    )
    assert len(read_source(hide(tmp_path)).images) == 3


def with_junk(folder: Path, images: list[Path]) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        mirrored = Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # which the run was not trained on
        mirrored.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a circle, {number}")
    (folder / "empty.jpg").touch()
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "text.webp").write_text("no picture")
    (folder / "folder.jpg").mkdir()
    return hide(folder)


def test_what_is_no_picture_needs_no_prompt(demo_run, tmp_path, images):
    one, other = (with_junk(tmp_path / name, images[start::2]) for start, name in enumerate(("one", "other")))
    found = predict(PredictConfig(run=demo_run, target=str(one), device="cpu"))
    assert dict(zip(found.columns["image"], found.columns["error"], strict=True)) == {
        "0.png": "",
        "1.png": "",
        "empty.jpg": "empty file",
        "link.png": "no such file: what it links to is not there",
        "text.webp": "not an image in a known format",
    }
    config = RankConfig(run=demo_run, data=[f"a={one}", f"b={other}"], device="cpu")
    assert [(each["pictures"], each["failed"]) for each in rank(config).ranking["generators"]] == [(5, 3), (5, 3)]
    (one / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1\.png: no prompt in 1\.txt, nor in the picture"):
        predict(PredictConfig(run=demo_run, target=str(one), device="cpu"))
    assert unprompted([one / "0.png", one / "empty.jpg"], ["", ""], one) == [0]
