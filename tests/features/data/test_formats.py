"""HEIC, JPEG XL and AVIF: read where their plug-ins are installed, else named with what to install; real files."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile, features

from deltaclip.features.check_data import check_data
from deltaclip.features.data import pillow
from deltaclip.features.data.adapters import open_data
from deltaclip.features.data.images import UnreadableImage, has_more_frames, open_image
from deltaclip.features.data.jxl import size_of
from deltaclip.features.data.listing import list_folder
from deltaclip.features.extract import extract
from deltaclip.features.settings import CheckConfig, ExtractConfig
from deltaclip.tests.features.data.odd_images import encoded, picture

heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (extra formats)")
pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed (extra formats)")
if not features.check("avif"):
    pytest.skip("this Pillow was built without AVIF", allow_module_level=True)

KINDS = {"HEIF": "HEIC image", "JXL": "JPEG XL image", "AVIF": "AVIF image"}
INSTALL = {
    "HEIF": "read with pillow-heif: pip install 'deltaclip[formats]'",
    "JXL": "read with pillow-jxl-plugin: pip install 'deltaclip[formats]'",
}


@pytest.fixture(autouse=True, scope="module")
def _writers():
    heif.register_heif_opener()


def write(kind, image=None, **options):
    return encoded(image or Image.fromarray(picture()), kind, **{"quality": 90} | options)


@pytest.fixture(params=["HEIF", "JXL"])
def lacking(request, monkeypatch):
    """Return a format whose plug-in is not installed."""
    words = KINDS[request.param]
    place, mark, _, *rest = pillow.PLUGINS[words]
    monkeypatch.setitem(pillow.PLUGINS, words, (place, mark, "no_such_module", *rest))
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_pixels(kind):
    image = open_image(write(kind))
    assert (image.mode, image.size, type(image)) == ("RGB", (40, 30), Image.Image)
    assert np.abs(np.asarray(image).astype(int) - picture()).max() <= 20  # lossy, in smaller chroma


@pytest.mark.parametrize("kind", ["HEIF", "JXL"])
@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "I;16"])
def test_modes(kind, mode):
    source = Image.fromarray(picture()).convert("I;16" if mode == "I;16" else mode)
    assert open_image(write(kind, source)).mode == "RGB"


@pytest.mark.parametrize("kind", KINDS)
def test_orientation_is_what_viewers_show(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    size = open_image(write(kind, exif=exif.tobytes())).size
    assert size == ((40, 30) if kind == "JXL" else (30, 40))  # whose own header says it, as its standard has it


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_refused_whatever_the_switches(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = write(kind, Image.effect_noise((60, 50), 60).convert("RGB"))
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(UnreadableImage, match="broken image data"):
            open_image(content[: int(share * len(content))])


@pytest.mark.parametrize("in_boxes", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (256, 256), (264, 8), (1023, 77), (96, 80), (640, 480), (1920, 1080)])
def test_size_of_jpeg_xl(size, in_boxes):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" if in_boxes else None
    content = write("JXL", Image.new("RGB", size, "red"), effort=1, use_container=in_boxes, exif=exif)
    assert content.startswith(b"\xff\x0a") != in_boxes
    assert size_of(io.BytesIO(content)) == size


def test_a_bomb_of_jpeg_xl_is_refused_before_it_is_decoded():
    # Not small, 30 bits of height - 1, then the ratio 1:1.
    height = 30_000
    bits = 0 | 3 << 1 | (height - 1) << 3 | 1 << 33
    with pytest.raises(UnreadableImage, match=r"^30000 x 30000 is over 100 million pixels$"):
        open_image(b"\xff\x0a" + bits.to_bytes(16, "little"))
    with pytest.raises(UnreadableImage, match="broken image data"):
        open_image(b"\xff\x0a")


def test_several_pictures_in_one_file():
    several = heif.HeifFile()
    for colour in ("red", "blue"):
        several.add_from_pillow(Image.new("RGB", (24, 18), colour))
    target = io.BytesIO()
    several.save(target)
    assert has_more_frames(target.getvalue())
    assert open_image(target.getvalue()).getpixel((9, 9))[0] > 200
    assert not has_more_frames(write("HEIF"))


def test_folder_table_archive_and_column_by_content(tmp_path, tiny_backbone):
    """Whatever the names say."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number, kind in enumerate(KINDS):
        (folder / f"{number}.bin").write_bytes(write(kind))
    assert len(list_folder(folder).images) == 3
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(folder, arcname="")
    cells = [path.read_bytes() for path in sorted(folder.iterdir())]
    pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
    for data in (folder, tmp_path / "t.tar", tmp_path / "t.parquet"):
        made = {"out": tmp_path / "c.h5", "backbone": tiny_backbone, "views": "center", "precision": "fp32"}
        done = extract(ExtractConfig(data=str(data), **made))
        assert (done.images, done.failed) == (3, [])
    assert check_data(CheckConfig(data=str(folder))).images["readable"] == 3


def test_without_its_plugin_a_row_says_what_to_install(lacking, tmp_path, tiny_backbone):
    (tmp_path / "a.png").write_bytes(write(lacking))
    (tmp_path / "b.png").write_bytes(encoded(Image.fromarray(picture())))
    (tmp_path / "t.csv").write_text("image,prompt\na.png,x\nb.png,y\n")
    done = extract(
        ExtractConfig(data=str(tmp_path / "t.csv"), out=tmp_path / "c.h5", backbone=tiny_backbone, views="center")
    )
    assert done.failed == [("a.png", f"a {KINDS[lacking]}, {INSTALL[lacking]}")]
    column = pa.table({"image": [write(lacking), write(lacking)]})
    pq.write_table(column, tmp_path / "t.parquet")
    found = check_data(CheckConfig(data=str(tmp_path / "t.parquet")))
    said = [finding.message for finding in found.findings if finding.check == "unreadable_image"]
    assert said == [f"2 rows have an image that cannot be read: a {KINDS[lacking]}, {INSTALL[lacking]}"]


def test_without_its_plugin_a_folder_counts_it(lacking, tmp_path):
    for name in ("a", "b.heic"):
        (tmp_path / name).write_bytes(write(lacking))
    (tmp_path / "c.png").write_bytes(encoded(Image.fromarray(picture())))
    assert open_data(str(tmp_path)).said[-1] == f"left out: 2 {KINDS[lacking]}s ({INSTALL[lacking]})"


def test_a_pillow_without_avif_is_named(monkeypatch):
    monkeypatch.delitem(pillow._READERS, "AVIF")
    with pytest.raises(UnreadableImage) as caught:
        open_image(write("AVIF"))
    assert str(caught.value) == "an AVIF image, which this Pillow does not read: pip install -U pillow"


def test_plugins_are_imported_when_such_a_picture_is_met():
    code = (
        "import io, sys; from PIL import Image; from deltaclip.features.data.images import open_image\n"
        "b = io.BytesIO(); Image.new('RGB', (9, 9)).save(b, 'PNG'); open_image(b.getvalue())\n"
        "assert not {'pillow_heif', 'pillow_jxl', 'fsspec', 'aiohttp'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
