"""The prompt that a picture holds about itself, as the programs that draw pictures write it.

A1111 and its kin write `parameters` into PNG, and the same text into the EXIF comment of JPEG and WebP; ComfyUI writes
the graph of its nodes, InvokeAI an object. Knows these layouts and where files keep notes. Must not decode pictures.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from deltaclip.features.data.images import BROKEN
from deltaclip.features.data.png import SIGNATURE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

A1111, COMFYUI, INVOKEAI = "A1111", "ComfyUI", "InvokeAI"
MAX_NOTE_BYTES = 16 << 20  # unpacked; the graphs of ComfyUI have some hundred kB
NEGATIVE = re.compile(r"(?:^|\n)\s*Negative prompt:")
SETTINGS = re.compile(r"(?:^|\n)\s*Steps: \d+")
EXIF_FOLDER, USER_COMMENT = 0x8769, 0x9286
# Of a node's inputs, those that hold the text of a prompt, and those that lead on to a node which may; best first.
TEXTS = ("text", "text_g", "t5xxl", "clip_l", "prompt", "positive_prompt", "string", "value", "text_l")
WAYS = (*TEXTS, "conditioning", "conditioning_1", "conditioning_to", "positive", "guider", "any_01", "anything")
MAX_NODES = 200  # on one way


class OwnPrompt(NamedTuple):
    """A prompt, and the program that wrote it."""

    prompt: str
    program: str


def own_prompt(file: IO[bytes]) -> OwnPrompt | None:
    """Return the prompt that a picture holds, None where it has none that is understood; its pixels are not looked at.

    Args:
        file: of the picture, at its first byte.
    """
    start = file.read(len(SIGNATURE))
    file.seek(0)
    notes = _notes_of_png(file) if start == SIGNATURE else _notes_of_exif(file)
    for name, text in notes:
        reader = READERS.get(name)
        if reader is not None and (found := reader(text)) is not None and found.prompt:
            return found
    return None


def _of_parameters(text: str) -> OwnPrompt | None:
    """Read the lines of A1111: the prompt, then what it is not to be, then the settings; or an object of others."""
    if text.lstrip().startswith("{"):
        found = _object(text)
        inner = found.get("sui_image_params", found)  # SwarmUI; Fooocus has it on top
        prompt = inner.get("prompt") if isinstance(inner, dict) else None
        return OwnPrompt(prompt.strip(), A1111) if isinstance(prompt, str) else None
    ends = [match.start() for match in (NEGATIVE.search(text), SETTINGS.search(text)) if match]
    if not ends:  # nothing says that it is a prompt
        return None
    return OwnPrompt(text[: min(ends)].strip(), A1111)


def _of_invokeai(text: str) -> OwnPrompt | None:
    prompt = _object(text).get("positive_prompt")
    return OwnPrompt(prompt.strip(), INVOKEAI) if isinstance(prompt, str) else None


def _of_comfyui(text: str) -> OwnPrompt | None:
    """Follow the positive input of the first sampler to the text it comes from.

    Samplers are taken in the order of their numbers; where the way of one ends without a text, the next is tried.
    """
    nodes = _object(text)
    samplers = [node for _, node in sorted(nodes.items(), key=_number) if _leads_to_prompt(node)]
    for node in samplers:
        inputs = node["inputs"]
        way = inputs.get("positive", inputs.get("guider"))
        if (found := _text_behind(way, nodes)) is not None:
            return OwnPrompt(found.strip(), COMFYUI)
    return None


def _number(item: tuple[str, Any]) -> tuple[int, str]:
    digits = item[0].partition(":")[0]
    return (int(digits) if digits.isdecimal() else 1 << 62, item[0])


def _leads_to_prompt(node: Any) -> bool:
    if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
        return False
    is_sampler = "sampler" in str(node.get("class_type", "")).lower()
    return is_sampler and any(isinstance(node["inputs"].get(name), list) for name in ("positive", "guider"))


def _text_behind(way: Any, nodes: dict[str, Any]) -> str | None:
    """Return the first text that a way of `[node, slot]` leads to, depth first."""
    to_visit, seen = [way], set[str]()
    while to_visit and len(seen) < MAX_NODES:
        link = to_visit.pop()
        if not isinstance(link, list) or not link or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        node = nodes.get(str(link[0]))
        inputs = node.get("inputs") if isinstance(node, dict) else None
        if not isinstance(inputs, dict):
            continue
        texts = [inputs[name] for name in TEXTS if isinstance(inputs.get(name), str) and inputs[name].strip()]
        if texts:
            return str(texts[0])
        to_visit += [inputs[name] for name in reversed(WAYS) if isinstance(inputs.get(name), list)]
    return None


def _object(text: str) -> dict[str, Any]:
    try:
        # Programs write NaN for what has not changed, which is Python's JSON alone.
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


READERS: dict[str, Callable[[str], OwnPrompt | None]] = {
    "parameters": _of_parameters,
    "invokeai_metadata": _of_invokeai,
    "prompt": _of_comfyui,
}


# ---- Where files keep notes


def _notes_of_png(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the texts of a PNG with their keywords, before and behind its pixels; broken ones are passed over."""
    file.seek(len(SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            return
        if kind not in {b"tEXt", b"zTXt", b"iTXt"} or length > MAX_NOTE_BYTES:
            file.seek(length + 4, 1)
            continue
        content = file.read(length)
        file.seek(4, 1)
        name, _, value = content.partition(b"\0")
        keyword = name.decode("latin-1").lower()
        if keyword in READERS and (text := _text_of_chunk(kind, value)) is not None:
            yield keyword, text


def _text_of_chunk(kind: bytes, value: bytes) -> str | None:
    if kind == b"tEXt":
        return _decoded(value)
    if kind == b"zTXt":
        return _unpacked(value[1:])
    is_packed = value[:1] == b"\1"
    rest = value[2:].split(b"\0", 2)  # language, translated keyword, text
    if len(rest) < 3:
        return None
    return _unpacked(rest[2]) if is_packed else _decoded(rest[2])


def _unpacked(packed: bytes) -> str | None:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(packed, MAX_NOTE_BYTES)
    except zlib.error:
        return None
    return None if unpacker.unconsumed_tail else _decoded(content)


def _decoded(content: bytes) -> str:
    """Return a text: UTF-8 where it is, which many write although plain chunks are Latin-1."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _notes_of_exif(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield the comment of a JPEG or WebP as `parameters`, and `prompt: {...}` where ComfyUI's savers put it."""
    from deltaclip.features.data import pillow

    try:
        image = pillow.opened(file)
        if image is None or image.format not in {"JPEG", "WEBP", "AVIF"}:
            return
        exif = image.getexif()
        comment = exif.get_ifd(EXIF_FOLDER).get(USER_COMMENT)
        tags = [str(value) for value in exif.values() if isinstance(value, str)]
    except (*BROKEN, Warning):  # notes that cannot be read say nothing
        return
    for tag in tags:
        name, colon, text = tag.partition(":")
        if colon and name.strip().lower() in {"prompt", "parameters"}:
            yield name.strip().lower(), text.strip("\0 ")
    if isinstance(comment, bytes):
        yield "parameters", _comment(comment)
    elif isinstance(comment, str):
        yield "parameters", comment


def _comment(content: bytes) -> str:
    """Return the text of an EXIF comment, whose first eight bytes name its encoding."""
    code, text = content[:8], content[8:]
    if code == b"UNICODE\0":
        # Two bytes a letter, by the standard in the order of the file; programs write either.
        zeros = [text[start : start + 400 : 2].count(0) for start in (0, 1)]
        return text.decode("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", errors="replace").strip("\0\ufeff ")
    if code in {b"ASCII\0\0\0", bytes(8)}:
        return _decoded(text).strip("\0 ")
    return _decoded(content).strip("\0 ")
