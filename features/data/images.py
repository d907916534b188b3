"""Open an image file as people made it, right or refused with a reason; its content address, and a small copy.

The same bytes are the same image, whatever their name. Knows Pillow's modes and limits. Must not know manifests, pages
or CLIP.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from deltaclip.base.progress import Progress
from deltaclip.features.data.jpeg import PlainJpeg, plain_stream
from deltaclip.features.data.jxl import size_of
from deltaclip.features.data.png import SIGNATURE, picture_only
from deltaclip.features.data.sources import UnreadableFile, UnreadableImage, open_source, read_image_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


# ---- Open an image file as people made it: right, or refused with a reason


MAX_PIXELS = 100_000_000  # 300 MB as RGB; larger files are bombs or scans, not generated images
MAX_ASPECT = 100  # CLIP resizes the short side: a longer strip would blow up to gigabytes and lose all but its middle
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
    AttributeError,
    AssertionError,
    BufferError,
    struct.error,
    zlib.error,
)
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of AVIF those that move; of HEIC any may have further pictures.
FTYP_WITH_FRAMES = {b"ftyp" + brand for brand in (b"avis", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis")} | {
    b"ftypmif1",
    b"ftypmsf1",
}
LYING = {5, 6, 7, 8}  # width and height change places


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
    with _refusing():
        image = _look(io.BytesIO(content), header=False, max_pixels=max_pixels).image
        if short_side is not None and image.format in {"JPEG", "MPO"}:  # HEIC would give the preview of a camera
            image.draft(None, (short_side, short_side))
        return _decoded(image)


def open_undecoded(content: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image | PlainJpeg:
    """Return a whole plain JPEG as it is, for another decoder; of every other file what `open_image` gives of it.

    Raises:
        UnreadableImage: as `open_image`, which takes whatever comes back undecoded.
    """
    with _refusing():
        image = _look(io.BytesIO(content), header=False, max_pixels=max_pixels).image
        if image.format == "JPEG" and (stream := plain_stream(content)) is not None:
            return PlainJpeg(stream, image.width, image.height, _orientation(image))
        return _decoded(image)


def decode_plain(jpeg: PlainJpeg) -> Image.Image:
    """Return what `open_image` gives of the file."""
    image = open_image(jpeg.stream)
    turn = TURNS.get(jpeg.orientation)
    return image if turn is None else image.transpose(turn)


def _decoded(image: Any) -> Image.Image:
    from deltaclip.features.data.pillow import as_public, decode

    decode(image)
    return as_public(_to_rgb(_upright(image)))


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise UnreadableFile("not enough memory to decode it") from None
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not Pillow's
            raise UnreadableFile(error.strerror or str(error)) from error
        raise UnreadableImage(f"broken image data ({str(error) or type(error).__name__})") from error


class _Look(NamedTuple):
    image: Any  # of Pillow's, not decoded
    more_frames: bool


def _look(file: IO[bytes], *, header: bool, max_pixels: int = MAX_PIXELS) -> _Look:
    """Identify an image and refuse what its first bytes are reason enough to; the one look that all others go on from.

    Args:
        file: of an image.
        header: read no further than where the pixels start.
        max_pixels: of the file.

    Raises:
        UnreadableImage: see `open_image`.
    """
    from deltaclip.features.data import pillow  # at the first picture: it takes as long to import as Pillow itself

    more_frames, depth = False, None
    if (start := file.read(len(SIGNATURE) + 17)).startswith(SIGNATURE):
        file, more_frames = picture_only(file, header=header)
        depth = start[-1]
    elif pillow.plugin_format(start) == pillow.JPEG_XL:
        size = size_of(file)
        if size is None:
            raise SyntaxError("no size in its header")
        _check_size(*size, max_pixels=max_pixels)
    image = pillow.opened(file)
    if image is None:
        file.seek(0)
        raise UnreadableImage(pillow.unread_words(file.read(pillow.MARK_BYTES)))
    if image.format == "ICO":  # an icon's entry says 16 x 16 of whatever lies in it
        _check_size(*image.ico.getimage(image.size).size, max_pixels=max_pixels)
    _check_size(*image.size, max_pixels=max_pixels)
    _check_range(image)
    _check_transparent_colour(image, depth)
    return _Look(image, more_frames or bool(getattr(image, "is_animated", False)))


def is_image(path: Path, root: Path | None) -> bool:
    """Tell whether a file can be read as an image; `root` as in `read_image_bytes`."""
    try:
        open_image(read_image_bytes(path, root))
    except UnreadableImage:
        return False
    return True


def unprompted(paths: Sequence[Path], prompts: Sequence[str], root: Path | None) -> list[int]:
    """Return the rows that have no prompt and an image that can be scored, as far as a header tells.

    What is no image, or cannot be read, is said to be so: no prompt would help it.
    """
    found = []
    for row in [row for row, prompt in enumerate(prompts) if not prompt]:
        with contextlib.suppress(UnreadableImage):
            read_header(paths[row], root)
            found.append(row)
    return found


def from_memory(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    """Return an image in memory as `open_image` returns it from its file.

    Args:
        image: of any mode, as Pillow opens or makes it; or RGB pixels, (H, W, 3) uint8. One that was opened and not
            decoded yet is read from its file as every file is, whatever switches of Pillow's are set.

    Raises:
        UnreadableImage: as `open_image`; and a decoded PNG's transparent colour, whose scale only the file tells.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if (content := _undecoded(image)) is not None:
        return open_image(content)
    with _refusing():  # Pillow reads the pixels of an opened file here, not before
        _check_size(*image.size)
        _check_range(image)
        if image.format == "PNG" and image.mode in {"L", "RGB"} and image.info.get("transparency") is not None:
            raise UnreadableImage("a PNG with a transparent colour: only its file tells which, so give its path")
        image.load()
        return _to_rgb(_upright(image))


def _undecoded(image: Image.Image) -> bytes | None:
    """Return the file of an opened image that nobody has decoded, gone on in or scaled; None of every other."""
    # Not by its list of tiles, which some readers make when they decode (HEIC, WebP). An icon is decoded when it is
    # opened, and stays read-only until somebody changes it.
    known = vars(image)
    is_decoded = known.get("_im", known.get("im")) is not None and not (image.format == "ICO" and image.readonly)
    if not known.get("fp") or is_decoded or image.tell():
        return None
    with _refusing():
        place = known["fp"].tell()
        known["fp"].seek(0)
        content: bytes = known["fp"].read()
        known["fp"].seek(place)
        is_whole = _look(io.BytesIO(content), header=True).image.size == image.size
    return content if is_whole else None


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
    with open_source(path, root) as file, _refusing():
        image, more_frames = _look(file, header=True)
        width, height = image.size[::-1] if _orientation(image) in LYING else image.size
        return ImageHeader(width, height, more_frames, file.seek(0, io.SEEK_END))


def has_more_frames(content: bytes) -> bool:
    """Tell whether a file holds an animation or several pages, of which `open_image` takes the first.

    What cannot be opened has none: its reason is told when it is decoded. The preview that a camera puts behind a JPEG
    is no second frame.
    """
    if not _may_have_frames(content):
        return False
    try:
        with _refusing():
            return _look(io.BytesIO(content), header=True).more_frames
    except UnreadableImage:
        return False


def _may_have_frames(content: bytes) -> bool:
    # By the first bytes, which costs nothing: hashing looks at every file of a set, and most are JPEG or plain PNG.
    if content.startswith(b"\x89PNG"):
        return b"acTL" in content[: max(0, content.find(b"IDAT"))]  # where an APNG must have it
    if content.startswith(b"RIFF"):
        return content[12:16] == b"VP8X" and len(content) > 20 and bool(content[20] & 2)
    return content.startswith((b"GIF8", b"II", b"MM")) or content[4:12] in FTYP_WITH_FRAMES


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


def _check_transparent_colour(image: Image.Image, depth: int | None) -> None:
    """Bring a PNG's transparent colour to the scale of the pixels: Pillow leaves it in the file's, of `depth` bits."""
    colour: Any = image.info.get("transparency")
    if depth is None or colour is None:
        return
    if image.mode == "L" and depth < 8:
        image.info["transparency"] = colour * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16:  # the pixels come with the upper 8 bits alone
        raise UnreadableImage("a transparent colour among 16-bit RGB pixels cannot be told from its neighbours")


def _upright(image: Image.Image) -> Image.Image:
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return how the camera was held, 1 to 8 by EXIF; 1 where nothing says so that can be read.

    The camera's notes may be damaged where the picture is not: then as it lies, which is what viewers show.
    """
    if image.format == "TIFF":  # Pillow turns these itself while it decodes them
        return 1
    if image.format == "JXL" and not getattr(
        image, "jpeg", False
    ):  # its own header says how it lies, and the decoder turns it
        return 1
    # Not a PNG's own method, which decodes the picture to look for notes behind it.
    notes: Any = super(type(image), image) if image.format == "PNG" else image
    try:
        found = notes.getexif().get(ORIENTATION)
    except (*BROKEN, Warning):  # of a picture in memory Pillow's warnings may be errors here
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


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


# ---- Content addresses of image files: the same bytes are the same image, whatever their name


WORKERS = 8  # reading waits for the disk, hashing releases the interpreter's lock
CHUNK = 256


class ImageContent(NamedTuple):
    """`sha256` of a file's bytes, or None and the `reason` why it cannot be read; whether it has `more_frames`."""

    sha256: bytes | None
    reason: str
    more_frames: bool = False


def hash_images(paths: Sequence[Path], root: Path | None) -> list[ImageContent]:
    """Read and hash files, in order.

    Args:
        paths: image files.
        root: folder that they must lie in once symbolic links are followed; None permits every place.
    """
    found: list[ImageContent] = []
    with (
        Progress(len(paths), "hashing images", unit="files") as progress,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        for start in range(0, len(paths), CHUNK):
            found += pool.map(lambda path: _hash(path, root), paths[start : start + CHUNK])
            progress.advance(len(found) - start)
    return found


def _hash(path: Path, root: Path | None) -> ImageContent:
    try:
        content = read_image_bytes(path, root)
        return ImageContent(hashlib.sha256(content).digest(), "", has_more_frames(content))
    except UnreadableImage as reason:
        return ImageContent(None, str(reason))


# ---- Small copies of images, to stand in a page


WEBP_QUALITY = 72  # 4 to 8 kB at 224 pixels; artefacts of the images themselves stay visible


def thumbnail(content: bytes, side_pixels: int) -> bytes:
    """Return an image file as WebP that fits a square, larger images made smaller and smaller ones left as they are.

    Args:
        content: an image file.
        side_pixels: side of the square, at least 1.

    Raises:
        UnreadableImage: see `open_image`.
    """
    image = open_image(content)
    image.thumbnail((side_pixels, side_pixels), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    image.save(small, "WEBP", quality=WEBP_QUALITY)
    return small.getvalue()
