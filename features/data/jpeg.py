"""A JPEG that another decoder than Pillow's may be given: whole, plain, and found so without decoding it.

What passes here, `images.open_image` takes: whatever the other decoder makes of damage that only decoding would show,
no file is read that would be refused, and one that it refuses can be read by Pillow. Knows the format (ITU-T T.81).
Must not know Pillow, decoders or devices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

# Baseline frames alone (SOF0): nvJPEG's engines take no others, and a progressive one is decoded by the processor that
# feeds the model, one after the other, where decoding threads do it side by side.
START, END, FRAME, SCAN = b"\xff\xd8", b"\xff\xd9", 0xC0, 0xDA
QUANTISERS, CODES, INTERVAL, ADOBE = 0xDB, 0xC4, 0xDD, 0xEE
NOTES = {*range(0xE0, 0xF0), 0xFE}
# How often luma is sampled for one of chroma: 4:4:4, 4:2:2, 4:2:0. Of 4:4:0 and 4:1:1 few files exist, and decoders
# of one library differ in how they enlarge its chroma.
SAMPLING = {0x11, 0x21, 0x22}
MIN_SIDE, MAX_SIDE = 16, 16_384  # of a whole unit of coding; that engines take


@dataclass(frozen=True)
class PlainJpeg:
    """A whole plain JPEG, not decoded.

    `stream` is what a decoder needs of the file and nothing else: no notes, so that none turns or colours it by them;
    `width` and `height` are of the picture as it lies there, `orientation` is 1 to 8 by EXIF.
    """

    stream: bytes
    width: int
    height: int
    orientation: int


def plain_stream(content: bytes) -> bytes | None:
    """Return what a decoder needs of a file, None unless that is a whole JPEG on whose pixels decoders agree.

    That is: baseline, 8 bits; grey or YCbCr in 4:4:4, 4:2:2 or 4:2:0; 16 to 16,384 pixels a side; one scan, all tables
    it needs, in it no marker but restarts, in their order and number, and its end. Bytes behind the end are left out.
    """
    if content[:2] != START:
        return None
    header, place, kept = _Header(), 2, [START]
    while place + 4 <= len(content) and content[place] == 0xFF:
        kind, end = content[place + 1], place + 2 + int.from_bytes(content[place + 2 : place + 4])
        body = content[place + 4 : end]
        if len(body) != end - place - 4 or not header.takes(kind, body):
            return None
        if kind not in NOTES:
            kept.append(content[place:end])
        place = end
        if kind == SCAN:
            scan = _scan(content, place, header)
            return None if scan is None else b"".join([*kept, scan, END])
    return None


def _scan(content: bytes, start: int, header: _Header) -> bytes | None:
    """Return what is coded from `start` to the end of the picture, None where something else stands in it."""
    coded = np.frombuffer(content, dtype=np.uint8)[start:]
    # Behind each of these bytes stands a zero, where it is one of the data, or what makes it a marker.
    places = np.flatnonzero(coded[:-1] == 0xFF)
    markers = places[coded[places + 1] != 0]
    restarts = header.restarts()
    found = coded[markers[: len(restarts) + 1] + 1].tolist()
    return content[start : start + int(markers[len(restarts)])] if found == [*restarts, END[1]] else None


@dataclass
class _Header:
    """What the segments before the scan have said so far."""

    width: int = 0
    height: int = 0
    components: dict[int, int] = field(default_factory=dict)  # each with its table of quantisers
    sampling: int = 0x11  # of the first
    interval: int = 0
    quantisers: set[int] = field(default_factory=set)
    codes: set[int] = field(default_factory=set)
    transform: int = 1

    def takes(self, kind: int, body: bytes) -> bool:
        """Note a segment, and tell whether a plain picture has such a one."""
        if kind in NOTES:
            if kind == ADOBE and body.startswith(b"Adobe") and len(body) >= 12:
                self.transform = body[11]
            return True
        readers: dict[int, Callable[[bytes], bool]] = {
            QUANTISERS: self._quantisers,
            FRAME: self._frame,
            CODES: self._codes,
            INTERVAL: self._interval,
            SCAN: self._all_there,
        }
        return kind in readers and readers[kind](body)

    def restarts(self) -> list[int]:
        """Return the markers that stand in the scan, their second bytes."""
        if not self.interval:
            return []
        across, down = 8 * (self.sampling >> 4), 8 * (self.sampling & 15)
        units = -(-self.width // across) * -(-self.height // down)
        return [0xD0 + number % 8 for number in range(-(-units // self.interval) - 1)]

    def _quantisers(self, body: bytes) -> bool:
        tables = {body[start] for start in range(0, len(body), 65)}
        self.quantisers |= tables
        return bool(body) and len(body) % 65 == 0 and max(tables) <= 3  # more: 16 bits

    def _codes(self, body: bytes) -> bool:
        tables = _code_tables(body)
        self.codes |= tables or set()
        return tables is not None

    def _interval(self, body: bytes) -> bool:
        self.interval = int.from_bytes(body)
        return len(body) == 2

    def _frame(self, body: bytes) -> bool:
        if self.components or len(body) not in {9, 15} or body[0] != 8 or body[5] != (len(body) - 6) // 3:
            return False
        self.height, self.width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
        parts = [body[start : start + 3] for start in range(6, len(body), 3)]
        self.components, self.sampling = {part[0]: part[2] for part in parts}, parts[0][1]
        sides_fit = all(MIN_SIDE <= side <= MAX_SIDE for side in (self.width, self.height))
        if len(parts) == 1:
            return sides_fit and self.sampling == 0x11
        # These numbers say YCbCr; some of RGB call them by letters.
        is_colour = list(self.components) == [1, 2, 3] and {part[1] for part in parts[1:]} == {0x11}
        return sides_fit and is_colour and self.sampling in SAMPLING

    def _all_there(self, body: bytes) -> bool:
        count = len(self.components)
        if not count or len(body) != 4 + 2 * count or body[0] != count or body[-3:] != b"\0\x3f\0":
            return False
        codes = {number for pair in body[2 : 1 + 2 * count : 2] for number in (pair >> 4, 0x10 | pair & 15)}
        is_ours = list(body[1 : 1 + 2 * count : 2]) == list(self.components)
        has_tables = codes <= self.codes and set(self.components.values()) <= self.quantisers
        return is_ours and has_tables and (count == 1 or self.transform == 1)


@functools.lru_cache(maxsize=256)
def _code_tables(body: bytes) -> frozenset[int] | None:
    """Return the numbers of tables of Huffman codes, DC from 0x00, AC from 0x10; None where one is none.

    Cached, as most encoders write the tables that the standard has as an example.
    """
    found, place = set(), 0
    while place < len(body):
        number, counts = body[place], body[place + 1 : place + 17]
        symbols = body[place + 17 : place + 17 + sum(counts)]
        # Of a baseline picture: two tables of each kind; differences have up to 11 bits, others up to 10.
        if number not in {0x00, 0x01, 0x10, 0x11} or len(counts) < 16 or len(symbols) < sum(counts) or not symbols:
            return None
        too_long = any(each > 11 for each in symbols) if number < 0x10 else any(each & 15 > 10 for each in symbols)
        if too_long or not _is_code(counts):
            return None
        found.add(number)
        place += 17 + len(symbols)
    return frozenset(found) if found else None


def _is_code(counts: bytes) -> bool:
    """Tell whether there are so many codes of 1 to 16 bits, none the start of another and none all ones."""
    code = 0
    for bits, count in enumerate(counts, start=1):
        code += count
        if code >= 1 << bits:
            return False
        code *= 2
    return True
