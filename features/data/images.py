"""Open an image file as people made it: right, or refused with a reason.

Knows Pillow's modes and limits. Must not know manifests or CLIP.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAX_PIXELS = 100_000_000  # 300 MB as RGB; larger files are bombs or scans, not generated images
MAX_ASPECT = 100  # CLIP resizes the short side: a longer strip would blow up to gigabytes and lose all but its middle
# Pillow knows forty more, some of which start other programs (EPS) or have rarely met hostile files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO")
# What Pillow's decoders raise on broken data, found by flipping bytes of 230,000 files.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
)


class UnreadableImage(Exception):  # noqa: N818 - a reason to list, not an error to stop at
    """Why a file cannot be used as an image; `str()` is the reason without the file's name."""


class UnreadableFile(UnreadableImage):
    """The bytes could not be had now; says nothing of what they are, so that another run may fare better."""


def read_image_bytes(path: Path, root: Path | None) -> bytes:
    """Return the bytes of an image file.

    Args:
        path: the file.
        root: folder that it must lie in once symbolic links are followed; None permits every place.

    Raises:
        UnreadableFile: no such file, no right to read it, empty, or outside the root.
    """
    try:
        refuse_outside_links(path, root)
        content = path.read_bytes()
    except FileNotFoundError:
        raise UnreadableFile("no such file") from None
    except OSError as error:
        raise UnreadableFile(error.strerror or str(error)) from error
    if not content:
        raise UnreadableFile("empty file")
    return content


def refuse_outside_links(path: Path, root: Path | None) -> None:
    """Refuse a file that does not lie in the root once symbolic links are followed.

    Raises:
        UnreadableFile: it lies elsewhere.
        FileNotFoundError: there is no such file.
    """
    if root is not None and not path.resolve(strict=True).is_relative_to(root.resolve()):
        raise UnreadableFile("links to a file outside the image root")


def open_image(content: bytes, *, short_side: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB, 8 bits: upright (EXIF), first frame, transparency over white, colour profiles ignored.

    Profiles are ignored because CLIP's own preprocessing ignores them; `docs/images.md` has every such decision.

    Args:
        content: bytes of the file.
        short_side: where given, a JPEG may come at 1/2, 1/4 or 1/8 of its size, if both sides keep this length.
        max_pixels: of the file, at most 100 million.

    Raises:
        UnreadableImage: not an image, truncated, over `max_pixels`, a strip longer than 100:1, pixels
            without a known range (float, 32 bits), or a transparent colour that cannot be told from others.
    """
    try:
        image = _opened(io.BytesIO(content))
        _check_size(*image.size, max_pixels=max_pixels)
        _check_range(image)
        _check_transparent_colour(image, content)
        if short_side is not None:
            image.draft(None, (short_side, short_side))
        image.load()
        _check_size(*image.size, max_pixels=max_pixels)  # an icon's entry says 16 x 16 of whatever lies in it
        return _to_rgb(_upright(image))
    except UnidentifiedImageError:
        raise UnreadableImage("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"over {MAX_PIXELS // 1_000_000} million pixels") from None
    except BROKEN as error:
        raise UnreadableImage(f"broken image data ({error})") from error


def is_image(path: Path, root: Path | None) -> bool:
    """Tell whether a file can be read as an image; `root` as in `read_image_bytes`."""
    try:
        open_image(read_image_bytes(path, root))
    except UnreadableImage:
        return False
    return True


def from_memory(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    """Return an image in memory as `open_image` returns it from its file.

    Args:
        image: of any mode, as Pillow opens or makes it; or RGB pixels, (H, W, 3) uint8.

    Raises:
        UnreadableImage: as `open_image`; and a PNG's transparent colour, whose scale only the file tells.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    try:
        _check_size(*image.size)
        _check_range(image)
        if image.format == "PNG" and image.mode in {"L", "RGB"} and image.info.get("transparency") is not None:
            raise UnreadableImage("a PNG with a transparent colour: only its file tells which, so give its path")
        return _to_rgb(_upright(image))
    except BROKEN as error:  # Pillow reads the pixels of an opened file here, not before
        raise UnreadableImage(f"broken image data ({error})") from error


class ImageHeader(NamedTuple):
    """What the first bytes of an image file say of it."""

    width: int
    height: int
    more_frames: bool
    size_bytes: int


def read_header(path: Path, root: Path | None) -> ImageHeader:
    """Look at an image without decoding it: its size, its frames, and whether it is one that `open_image` takes.

    Args:
        path: the file.
        root: folder that it must lie in once symbolic links are followed; None permits every place.

    Raises:
        UnreadableImage: as `read_image_bytes` and `open_image`, as far as a header tells.
    """
    try:
        refuse_outside_links(path, root)
        size_bytes = path.stat().st_size
        if not size_bytes:
            raise UnreadableFile("empty file")
        with path.open("rb") as file:
            image = _opened(file)
            _check_size(*image.size)
            _check_range(image)
            return ImageHeader(*image.size, bool(getattr(image, "is_animated", False)), size_bytes)
    except FileNotFoundError:
        raise UnreadableFile("no such file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UnreadableFile(error.strerror or str(error)) from error
    except UnidentifiedImageError:
        raise UnreadableImage("not an image in a known format") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"over {MAX_PIXELS // 1_000_000} million pixels") from None
    except BROKEN as error:
        raise UnreadableImage(f"broken image data ({error})") from error


def has_more_frames(content: bytes) -> bool:
    """Tell whether a file holds an animation or several pages, of which `open_image` takes the first.

    What cannot be opened has none: its reason is told when it is decoded. The preview that a camera puts behind a JPEG
    is no second frame.
    """
    if not _may_have_frames(content):
        return False
    try:
        return bool(getattr(_opened(io.BytesIO(content)), "is_animated", False))
    except (*BROKEN, Image.DecompressionBombError):
        return False


def _may_have_frames(content: bytes) -> bool:
    # By the first bytes, which costs nothing: hashing looks at every file of a set, and most are JPEG or plain PNG.
    if content.startswith(b"\x89PNG"):
        return b"acTL" in content[: max(0, content.find(b"IDAT"))]  # where an APNG must have it
    if content.startswith(b"RIFF"):
        return content[12:16] == b"VP8X" and len(content) > 20 and bool(content[20] & 2)
    return content.startswith((b"GIF8", b"II", b"MM")) or content[4:12] == b"ftypavis"


def _opened(file: IO[bytes]) -> Image.Image:
    # Pillow warns of sizes (our limit is the one that refuses) and of odd metadata. The filter stays:
    # catch_warnings swaps state of the whole process, and this runs in many threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return Image.open(file, formats=_formats())


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(width: int, height: int, *, max_pixels: int = MAX_PIXELS) -> None:
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} is over {max_pixels / 1e6:g} million pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(f"{width} x {height} is a strip longer than {MAX_ASPECT}:1")


def _check_range(image: Image.Image) -> None:
    # Pillow opens 16-bit grey as I;16 or, from PNG and PPM in some releases, as I; every other I holds 32 bits.
    if image.mode == "F":
        raise UnreadableImage("float pixels have no known range")
    if image.mode == "I" and image.format not in {"PNG", "PPM"}:
        raise UnreadableImage("32-bit pixels have no known range")


def _check_transparent_colour(image: Image.Image, content: bytes) -> None:
    """Bring a PNG's transparent colour to the scale of the pixels: Pillow leaves it in the file's."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None:
        return
    depth = content[24]
    if image.mode == "L" and depth < 8:
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16:  # the pixels come with the upper 8 bits alone
        raise UnreadableImage("a transparent colour among 16-bit RGB pixels cannot be told from its neighbours")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except BROKEN:  # the camera's notes are damaged, the picture is not: as it lies, which is what viewers show
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a channel: Pillow's own conversion would clip instead of scale
        levels = np.asarray(image, dtype=np.float64)
        scaled = (levels * (255.0 / 65535.0)).round().clip(0, 255)
        scaled[levels == image.info.get("transparency", -1)] = 255
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")  # what a viewer shows; plain conversion would show hidden colours
        return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
