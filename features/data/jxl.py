"""What the first bytes of a JPEG XL file say of its size, so that a bomb is refused before it is decoded.

Its reader decodes while it opens. Knows the boxes and the size header of ISO/IEC 18181. Must not know Pillow.
"""

from __future__ import annotations

from typing import IO, NamedTuple

CODESTREAM = b"\xff\x0a"
# Width of a picture by its height, for each number of the header but 0, which gives the width itself.
RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
SIZE_BITS = (9, 13, 18, 30)
HEADER_BYTES = 16


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int


def size_of(file: IO[bytes]) -> Size | None:
    """Return the size that a file says it has, None where that is broken; leaves the file at its first byte."""
    file.seek(0)
    start = file.read(HEADER_BYTES)
    if not start.startswith(CODESTREAM):
        start = _in_boxes(file)
    file.seek(0)
    return _read_size(start[2:]) if start.startswith(CODESTREAM) else None


def _in_boxes(file: IO[bytes]) -> bytes:
    """Return the beginning of the codestream, which lies in a box of its own or in the first of several."""
    place = 0
    while True:
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return b""
        size, kind, header = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, header = int.from_bytes(head[8:16], "big"), 16
        if kind in {b"jxlc", b"jxlp"}:
            file.seek(place + header + (4 if kind == b"jxlp" else 0))
            return file.read(HEADER_BYTES)
        if size < header:  # 0 says that it goes to the end
            return b""
        place += size


def _read_size(content: bytes) -> Size | None:
    bits, place = int.from_bytes(content, "little"), 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return bits >> (place - count) & ((1 << count) - 1)

    def side(*, is_small: int) -> int:
        return 8 * (take(5) + 1) if is_small else take(SIZE_BITS[take(2)]) + 1

    is_small = take(1)
    height = side(is_small=is_small)
    ratio = take(3)
    if ratio:
        across, down = RATIOS[ratio - 1]
        width = height * across // down
    else:
        width = side(is_small=is_small)
    return Size(width, height) if place <= 8 * len(content) else None
