"""The process around the application: address, connections, a graceful end.

Knows uvicorn, which comes with the extra `serve`. Must not know what is served.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltaclip.base.errors import UserError
from deltaclip.pipeline.serving.limits import refuse

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

HEAD_S = 10  # for the head of a request, from the connection or the answer before
IDLE_S = 5  # a connection stays open after an answer
STOP_S = 10  # what is being answered may take as long after the signal to end
MAX_CONNECTIONS = 512  # below the usual limit of 1,024 open files


class _Connection(H11Protocol):
    """A connection that is closed where the head of a request does not come: uvicorn itself waits for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in JSON too."""
        content = json.dumps({"error": msg.strip().rstrip(".")}).encode()
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(content), content)
        )
        self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_S, transport.close)

    def data_received(self, data: bytes) -> None:
        self.app = _full if len(self.connections) > MAX_CONNECTIONS else self.config.loaded_app
        super().data_received(data)
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif waiting and self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)


async def _full(_scope: Any, _receive: Any, send: Any) -> None:
    await refuse(send, 503, f"{MAX_CONNECTIONS} connections are open: try again later")


class _Server(uvicorn.Server):
    """Says when it is ready, and ends without raising the signal again: a stop that was asked for is no failure."""

    on_ready: Callable[[], None]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self.on_ready()


class _OneLine(logging.Formatter):
    """An error of a library as one line of ours, with the place that it came from."""

    def format(self, record: logging.LogRecord) -> str:
        line = next(iter(record.getMessage().strip().splitlines()), record.name)
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            reason = next(iter(str(error).splitlines()), "")
            frames = traceback.extract_tb(error.__traceback__)
            where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
            line = f"{line}: {type(error).__name__}: {reason}{where}"
        return f"deltaclip: {line}"


@contextlib.contextmanager
def one_line_log() -> Iterator[None]:
    """Say each error that a library logs in one line, and nothing of what it logs below that.

    Clients cause warnings at will: what they send wrongly is answered to them.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR)
    handler.setFormatter(_OneLine())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; port 0 takes a free one.

    Raises:
        UserError: the address is taken, not this machine's or not allowed.
    """
    with contextlib.ExitStack() as on_error:
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = on_error.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            message = f"cannot be listened on ({error.strerror})"
            remedy = "give another --port, or 0 for a free one"
            raise UserError(message, place=f"{host}:{port}", remedy=remedy) from error
        on_error.pop_all()
    return bound


def make_server(app: Any, *, on_ready: Callable[[], None]) -> uvicorn.Server:
    """Return a server of an ASGI application, whose `run(sockets=[bound])` ends at SIGINT, SIGTERM or `should_exit`.

    Requests that are being answered are answered first.
    """
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=STOP_S,
    )
    server = _Server(config)
    server.on_ready = on_ready
    return server
