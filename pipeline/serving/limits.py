"""Limits of an HTTP service, as one layer around the application: size, time, number of requests, host names.

Knows the ASGI protocol. Must not know what is served.
"""

from __future__ import annotations

import asyncio
import collections
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_PORT = re.compile(r":\d*$")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all together, may take; `hosts` are the names it may be asked by, None any."""

    request_bytes: int
    body_s: float
    answer_s: float
    num_requests: int
    hosts: frozenset[str] | None


class _Refusal(Exception):  # noqa: N818 - an answer
    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence
        super().__init__(sentence)


class Limited:
    """An ASGI application within limits; what is beyond them is answered in JSON, `{"error": SENTENCE}`."""

    def __init__(self, app: App, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.num_running = 0
        self.answered: collections.Counter[int] = collections.Counter()  # by status

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                self.answered[message["status"]] += 1
            await send(message)

        self.num_running += 1
        try:
            self._check_head(scope)
            # Read whole before anything is parsed: its size is known to be small, and a slow client holds nothing else.
            body = await self._read(receive)
            # HEAD is GET without a body, which the server leaves out.
            asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            async with asyncio.timeout(self.limits.answer_s):
                await self.app(asked, _replay(body, receive), watched)
        except _Refusal as refusal:
            await refuse(watched, refusal.status, refusal.sentence)
        except TimeoutError:
            if not started:
                await refuse(watched, 503, f"no answer within {self.limits.answer_s:g} s: try again later")
        finally:
            self.num_running -= 1

    def _check_head(self, scope: MutableMapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        if self.num_running > self.limits.num_requests and scope["path"] != "/healthz":
            raise _Refusal(503, f"{self.limits.num_requests} requests are being answered: try again later")
        # A page elsewhere whose name has come to mean this machine (DNS rebinding) asks by its own name.
        host = _PORT.sub("", headers.get(b"host", b"").decode("latin-1")).strip("[]").lower()
        if self.limits.hosts is not None and host not in self.limits.hosts:
            raise _Refusal(403, f"host {host!r} is not served: ask by {' or '.join(sorted(self.limits.hosts))}")
        declared = headers.get(b"content-length", b"0")
        if len(declared) > 15 or not declared.isdigit() or int(declared) > self.limits.request_bytes:
            raise self._too_large()

    def _too_large(self) -> _Refusal:
        return _Refusal(413, f"the request is over {self.limits.request_bytes / 1e6:g} MB")

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Refusal(400, "the request ended early")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.request_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise _Refusal(408, f"the request did not arrive within {self.limits.body_s:g} s") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def refuse(send: Send, status: int, sentence: str) -> None:
    """Answer a request with a status and why, and end the connection."""
    content = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    headers += [(b"connection", b"close"), *([(b"retry-after", b"1")] if status == 503 else [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
