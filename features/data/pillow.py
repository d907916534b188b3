"""Pillow for reading alone: a second copy of its Python modules, whose switches nobody else reaches.

Pillow keeps its switches (`LOAD_TRUNCATED_IMAGES`, `MAX_IMAGE_PIXELS`, `MAX_TEXT_CHUNK`, its readers) in its modules:
whatever another library sets there would decide what is read here, and setting them back around each picture would race
with its threads. The copy has its own; the compiled part, which decodes, is shared. Knows Pillow's
package. Must not know what is done with a picture.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from typing import IO, TYPE_CHECKING, Any

import PIL
from PIL import Image

if TYPE_CHECKING:
    from types import ModuleType

NAME = "_deltaclip_pillow"
COMPILED = ("_imaging", "_webp", "_avif")
# Format -> its module; Pillow knows forty more, some of which start other programs (EPS) or have rarely met hostile
# files. TGA comes last: its files have no mark, so its reader is asked where nobody else knows a file.
FORMATS = {
    "PNG": "PngImagePlugin",
    "JPEG": "JpegImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "AVIF": "AvifImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "PPM": "PpmImagePlugin",
    "ICO": "IcoImagePlugin",
    "TGA": "TgaImagePlugin",
}
# Formats that plug-ins of Pillow read, by words: where their mark stands, the mark, module, class, name to install.
JPEG_XL = "JPEG XL image"
PLUGINS = {
    "HEIC image": (4, re.compile(rb"ftyp(hei|hev|mif1|msf1)"), "pillow_heif", "HeifImageFile", "pillow-heif"),
    JPEG_XL: (0, re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "pillow_jxl", "JXLImageFile", "pillow-jxl-plugin"),
}
# Of one family with HEIC and videos: each file names the members of it that it is.
AVIF = re.compile(rb"....ftyp.{0,48}avi[fs]", re.DOTALL)
MARK_BYTES = 64  # that tell all formats apart
OF_PILLOW_BYTES = 16  # that Pillow gives to the functions which know a format by its start


class _Quiet:
    """Takes the place of `warnings` in the copy: the filters of the process would turn some into errors."""

    @staticmethod
    def warn(*_args: object, **_options: object) -> None:
        """Say nothing: what Pillow warns of is the size, which has a limit here, and odd notes beside the pixels."""


def _copied() -> dict[str, tuple[Any, Any]]:
    spec = importlib.util.spec_from_file_location(NAME, PIL.__file__, submodule_search_locations=list(PIL.__path__))
    assert spec is not None, "Pillow is a package in a folder"
    assert spec.loader is not None, "and no namespace"
    package = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    for name in COMPILED:
        compiled = _imported(f"PIL.{name}")
        if compiled is not None:  # Pillow can be built without them
            sys.modules[f"{NAME}.{name}"] = compiled
            setattr(package, name, compiled)
    core: Any = importlib.import_module(f"{NAME}.Image")
    for plugin in FORMATS.values():
        _imported(f"{NAME}.{plugin}")  # AVIF has come with Pillow 11.3
    core.MAX_IMAGE_PIXELS = None  # the limits of `images` are the ones that refuse
    jpeg: Any = sys.modules[f"{NAME}.JpegImagePlugin"]
    # Pillow's own entry goes on to the pictures that a camera puts behind the first, and fails where those are broken.
    core.register_open("JPEG", jpeg.JpegImageFile, core.OPEN["JPEG"][1])
    # Of the notes in a JPEG only those that say how it lies are looked at: broken others would fail the picture.
    jpeg.JpegImageFile._read_dpi_from_exif = lambda _image: None
    for mark in (*range(0xFFE0, 0xFFF0), 0xFFFE):
        if mark != 0xFFE1:
            jpeg.MARKER[mark] = (*jpeg.MARKER[mark][:2], jpeg.Skip)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{NAME}.") and hasattr(module, "warnings"):
            module.warnings = _Quiet  # type: ignore[attr-defined]
    return {name: core.OPEN[name] for name in FORMATS if name in core.OPEN}


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


# Made when this module is imported: Python lets one thread do that, and the others wait.
_READERS = _copied()


def format_of(start: bytes) -> str | None:
    """Return the format that a file's first 16 bytes are the mark of, or None; TGA has no mark."""
    for name, (_, accepts) in _READERS.items():
        # A text instead of True says that this Pillow was built without the format.
        if accepts is not None and accepts(start[:MARK_BYTES]) is True:
            return name
    return None


def plugin_format(start: bytes) -> str | None:
    """Return the words for a format that a plug-in reads, which a file's first 64 bytes are the mark of, or None."""
    if AVIF.match(start):
        return None
    return next((words for words, (place, mark, *_) in PLUGINS.items() if mark.match(start, place)), None)


def lacking(words: str) -> str:
    """Return what to install to read a format of `PLUGINS`, '' where it is there, and of every other."""
    _, _, module, _, name = PLUGINS.get(words, (0, None, "PIL", "", ""))
    return f"read with {name}: pip install 'deltaclip[formats]'" if importlib.util.find_spec(module) is None else ""


def unread_words(start: bytes) -> str:
    """Say why no format knows a picture, by the first 64 bytes of its file."""
    if AVIF.match(start):
        return "an AVIF image, which this Pillow does not read: pip install -U pillow"
    words = plugin_format(start)
    return f"a {words}, {lacking(words)}" if words and lacking(words) else "not an image in a known format"


def opened(file: IO[bytes]) -> Any:
    """Return the picture of a file, not decoded yet, or None where no format knows it.

    Raises:
        Exception: what Pillow's readers raise on broken files; `images.BROKEN` lists it.
    """
    file.seek(0)
    start = file.read(MARK_BYTES)
    file.seek(0)
    name = format_of(start[:OF_PILLOW_BYTES])
    if name is not None:
        return _READERS[name][0](file, "")
    if (words := plugin_format(start)) is not None:
        return None if lacking(words) else _of_plugin(words, file)
    try:
        return _READERS["TGA"][0](file, "")
    except (SyntaxError, ValueError):  # not one either: anything may have been given
        return None


def _of_plugin(words: str, file: IO[bytes]) -> Any:
    # Imported when the first such picture is met. That of JPEG XL enters itself into everybody's Pillow.
    _, _, module, kind, _ = PLUGINS[words]
    found = importlib.import_module(module)
    found = found if hasattr(found, kind) else importlib.import_module(f"{module}.JpegXLImagePlugin")
    try:
        return getattr(found, kind)(file, "")
    except (Warning, Image.DecompressionBombError) as error:  # of a process whose filters make errors of warnings
        raise SyntaxError(str(error)) from error


def decode(image: Any) -> None:
    """Decode a picture; one that is cut is refused, whatever switch of Pillow a plug-in looks at."""
    if (heic := getattr(image, "_heif_file", None)) is not None:
        assert heic[image.tell()].data, "raises where the data is cut, which its `load` may pass over"
    image.load()


def as_public(image: Any) -> Image.Image:
    """Return a picture of the copy as one of the Pillow that everybody has; the pixels are shared."""
    return Image.Image()._new(image.im)


def cut(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Return the part (left, top, right, bottom) of a picture; what `crop` gives whatever `MAX_IMAGE_PIXELS` says."""
    image.load()
    return image._new(image.im.crop(box))
