"""The chunks of a PNG that its picture is made of, without the notes that stand between them.

A workflow of megabytes, a broken colour profile or a wrong checksum of a comment is no fault of the picture. Knows the
PNG format (W3C Recommendation, third edition). Must not know Pillow.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import IO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of the chunks that a reader may leave out (small first letter): what changes the colours, and how the picture lies.
TRANSPARENCY, EXIF, ANIMATION = b"tRNS", b"eXIf", b"acTL"
NOTES = {b"tEXt", b"zTXt", b"iTXt"}
# Older programs write there how the picture lies; Pillow reads it from both.
LIE_NOTES = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
MAX_NOTE_BYTES = 1 << 20  # packed or not; one that is larger was not written by a camera


class PngPicture(NamedTuple):
    """A PNG with nothing but its first picture, and whether the file has more."""

    file: IO[bytes]
    more_frames: bool


def picture_only(file: IO[bytes], *, header: bool) -> PngPicture:
    """Return what the picture of a PNG is made of.

    Args:
        file: at any place; starts with the signature.
        header: stop where the pixels start.

    Raises:
        SyntaxError: the checksum of a chunk that the picture needs is wrong.
    """
    size_bytes, more_frames = file.seek(0, os.SEEK_END), False
    file.seek(len(SIGNATURE))
    parts = [SIGNATURE]
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if header and kind == b"IDAT":
            parts.append(head)
            break
        if not _may_matter(kind):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        whole = length + 4 <= size_bytes - file.tell()
        body = file.read(length + 4 if whole else -1)
        if kind == ANIMATION:
            more_frames = length >= 4 and int.from_bytes(body[:4]) > 1
        elif _belongs(kind, body, whole=whole):
            parts += [head, body]
        if kind == b"IEND" or not whole:
            break
    return PngPicture(io.BytesIO(b"".join(parts)), more_frames)


def _may_matter(kind: bytes) -> bool:
    return kind[:1].isupper() or kind in {TRANSPARENCY, EXIF, ANIMATION} or kind in NOTES


def _belongs(kind: bytes, body: bytes, *, whole: bool) -> bool:
    needed = kind[:1].isupper() or kind == TRANSPARENCY
    if whole and zlib.crc32(memoryview(body)[:-4], zlib.crc32(kind)) != int.from_bytes(body[-4:]):
        if needed and kind != b"IEND":
            raise SyntaxError(f"wrong checksum of PNG chunk {kind.decode('latin-1')}")
        return needed
    return needed or (whole and (kind == EXIF or _tells_how_it_lies(kind, body[:-4])))


def _tells_how_it_lies(kind: bytes, note: bytes) -> bool:
    if not note.startswith(LIE_NOTES) or len(note) > MAX_NOTE_BYTES:
        return False
    packed = note.partition(b"\0")[2]
    if kind != b"zTXt":  # of the other two only an iTXt may be packed, which it says first, and XMP never is
        return kind == b"tEXt" or packed[:1] == b"\0"
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed[1:], MAX_NOTE_BYTES)
    except zlib.error:
        return False
    return packed[:1] == b"\0" and not unpacking.unconsumed_tail
