"""Forms as requests carry them: named fields, each a text or a file. One function a rule, whatever the address.

Knows the two encodings of a form. Must not know images, prompts or scores.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from deltaclip.base.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

MULTIPART, URL_ENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
# Both words are understood: `format` by generators of clients, `contentMediaType` by what reads JSON Schema alone.
FILE_SCHEMA = {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"}


class FormRefused(Exception):  # noqa: N818 - an answer
    """Why a form is not taken, in one sentence, and the status that says so."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status = status
        super().__init__(sentence)


class Field(NamedTuple):
    """One field of a form; `many` may be given several times."""

    name: str
    about: str
    is_file: bool = False
    many: bool = False
    required: bool = False

    def schema(self) -> dict[str, Any]:
        """Return it as JSON Schema."""
        value = dict(FILE_SCHEMA) if self.is_file else {"type": "string", "minLength": 1}
        found = {"type": "array", "items": value, "minItems": 1} if self.many else value
        return {**found, "description": self.about}


class Form(NamedTuple):
    """The values of a form by field, in the order in which they came; a field that was not given has none."""

    texts: dict[str, list[str]]
    files: dict[str, list[bytes]]


@dataclass
class _Part:
    name: bytes = b""
    file_name: bytes | None = None
    content: bytearray = field(default_factory=bytearray)


def form_document(fields: Sequence[Field]) -> dict[str, Any]:
    """Return the request body of a form, as OpenAPI describes it."""
    schema = {
        "type": "object",
        "properties": {each.name: each.schema() for each in fields},
        "required": [each.name for each in fields if each.required],
        "additionalProperties": False,
    }
    about = f"Texts are UTF-8. A form without files may come as {URL_ENCODED}."
    return {"description": about, "required": True, "content": {MULTIPART: {"schema": schema}}}


def read_form(content_type: str, body: bytes, fields: Sequence[Field]) -> Form:
    """Return the fields of a form.

    Raises:
        FormRefused: another media type (415); a form that cannot be read, or a text that is not UTF-8 (400); a field
            that is not known, is missing, comes twice, or is a file in place of a text or the reverse (422).
    """
    known = {each.name: each for each in fields}
    found = Form({each.name: [] for each in fields}, {each.name: [] for each in fields})
    for part in _parts(content_type, body):
        name = _text(part.name)
        if name not in known:
            raise FormRefused(422, f"{name}: no such field; {did_you_mean(name, known)}")
        if part.file_name == b"" and not part.content:
            continue  # how a browser sends a file field in which none was chosen
        _check_kind(known[name], part)
        if known[name].is_file:
            found.files[name].append(bytes(part.content))
        else:
            found.texts[name].append(_text(part.content))
    for each in fields:
        _check_count(each, len(found.files[each.name]) + len(found.texts[each.name]))
    return found


def _check_kind(wanted: Field, part: _Part) -> None:
    # Some clients give a file no name; no image is UTF-8.
    is_file = part.file_name is not None or (wanted.is_file and not _is_text(part.content))
    if wanted.is_file != is_file:
        expected = "send a file" if wanted.is_file else "send a text"
        raise FormRefused(422, f"{wanted.name}: has the wrong type: {expected}")


def _is_text(content: bytes | bytearray) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _check_count(wanted: Field, count: int) -> None:
    if not count and wanted.required:
        raise FormRefused(422, f"{wanted.name}: is missing")
    if count > 1 and not wanted.many:
        raise FormRefused(422, f"{wanted.name}: is given {count} times; give it once")


def _text(content: bytes | bytearray) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise FormRefused(400, "text fields must be UTF-8") from None


def _parts(content_type: str, body: bytes) -> list[_Part]:
    media, options = parse_options_header(content_type)
    kind = media.decode("latin-1").strip().lower()
    if kind == MULTIPART:
        return _multipart(body, options.get(b"boundary", b""))
    if kind == URL_ENCODED:
        return _url_encoded(body)
    raise FormRefused(415, f"content-type: {kind or 'none'} is not taken; send a form, {MULTIPART}")


def _url_encoded(body: bytes) -> list[_Part]:
    pairs = (pair.replace(b"+", b" ").partition(b"=") for pair in body.split(b"&") if pair)
    unquote = urllib.parse.unquote_to_bytes
    return [_Part(unquote(name), None, bytearray(unquote(value))) for name, _, value in pairs]


def _multipart(body: bytes, boundary: bytes) -> list[_Part]:
    parts: list[_Part] = []
    header = (bytearray(), bytearray())
    ended = False

    def begin() -> None:
        parts.append(_Part())

    def header_end() -> None:
        name, value = (bytes(each) for each in header)
        if name.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            parts[-1].name, parts[-1].file_name = options.get(b"name", b""), options.get(b"filename")
        for each in header:
            each.clear()

    def end() -> None:
        nonlocal ended
        ended = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": lambda data, start, stop: header[0].extend(data[start:stop]),
                "on_header_value": lambda data, start, stop: header[1].extend(data[start:stop]),
                "on_header_end": header_end,
                "on_part_data": lambda data, start, stop: parts[-1].content.extend(data[start:stop]),
                "on_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise FormRefused(400, f"the form cannot be read ({error})") from error
    if not ended:
        raise FormRefused(400, "the form cannot be read: its last boundary is missing")
    if any(not part.name for part in parts):
        raise FormRefused(400, "the form cannot be read: a part has no name")
    return parts
