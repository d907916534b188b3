"""The HTTP interface: what is asked, what is answered, every error as one sentence, limits, and the process around it.

Limits of size, time, number of requests and host names are one layer around the application. Knows FastAPI, the ASGI
protocol and uvicorn, which come with the extra `serve`. Must not know models or runs.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import importlib.resources
import json
import logging
import re
import socket
import sys
import traceback
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, create_model
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

import deltaclip
from deltaclip.pipeline.serving.forms import (
    MULTIPART,
    URL_ENCODED,
    Field,
    Form,
    FormRefused,
    form_document,
    read_form,
)
from deltaclip.pipeline.serving.service import Pair, QueueFull, Refused, Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


# ---- The HTTP interface: what is asked, what is answered, and every error as one sentence


# The page is one file: nothing from elsewhere, not even from this server but for the scores.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def scores_model(names: Sequence[str]) -> type[BaseModel]:
    """Return the model of an answer: the columns of a table of scores, and whether the prompt was cut."""
    fields: dict[str, Any] = {name: (str if name == "flag" else float | None, ...) for name in names}
    return create_model(
        "Scores",
        __doc__="Scores in [0, 1] with their parts and the ends of their intervals; null where the run has none. "
        "`flag` says what is unlike the images that the run was trained on, and is empty where nothing is.",
        **fields,
        prompt_truncated=(bool, ...),
    )


class Failure(BaseModel):
    """What is wrong, in one sentence."""

    error: str


class Health(BaseModel):
    """The server answers; `waiting` images stand before the model, `scored` went through it in `batches`.

    `labels` are the targets that it scores, and `needs_prompt` those of them that see the prompt.
    """

    status: str
    run: str
    labels: list[str]
    needs_prompt: list[str]
    waiting: int
    scored: int
    batches: int


def _failure(description: str) -> dict[str, Any]:
    return {"model": Failure, "description": description}


# What any address may answer.
ERRORS: dict[int | str, dict[str, Any]] = {
    400: _failure("The request cannot be read."),
    403: _failure("Asked by a host name that is not served."),
    408: _failure("The request did not arrive in time."),
    413: _failure("The request is too large."),
    500: _failure("The server failed; its log says why."),
    503: _failure("Too much is asked at once: try again later."),
}
FORM_ERRORS = ERRORS | {
    415: _failure("The request is no form."),
    422: _failure("A field is missing, unknown or given twice, or the image, path or prompt cannot be used."),
}


def create_app(service: Service, *, run: str) -> FastAPI:
    """Return the application around a service; its threads live as long as the application runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.stop()

    # The interactive pages of FastAPI load scripts from the network, so only the document itself is served.
    app = FastAPI(
        title="deltaclip",
        version=deltaclip.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    page = importlib.resources.files("deltaclip.pipeline.serving").joinpath("page.html").read_text(encoding="utf-8")
    scorer = service.scorer
    prompted = [name for name in scorer.labels if name not in scorer.of_image]
    scored = scores_model(service.columns)
    answers = create_model(
        "BatchScores",
        __doc__="One entry a pair, in order: its scores, or its error. `unlike` counts those that are unlike the "
        "training, null where nobody can tell, and `trust` says in lines what is to be known of all together.",
        results=(list[scored | Failure], ...),  # type: ignore[valid-type]
        unlike=(int | None, ...),
        trust=(list[str], ...),
    )
    one = [
        Field("prompt", "What the image was asked to show.", required=bool(prompted)),
        Field("image", "An image file.", is_file=True),
        Field("path", "Instead of an upload: a path under the server's root."),
    ]
    several = [
        Field("prompts", "One prompt an image, or a single one for all.", many=True, required=bool(prompted)),
        Field("images", "Image files.", is_file=True, many=True),
        Field("paths", "Instead of uploads: paths under the server's root.", many=True),
    ]

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"})

    @app.get("/healthz", operation_id="health", responses=ERRORS)
    async def healthz() -> Health:
        """Tell that the server answers."""
        batcher = service.batcher
        return Health(
            status="ok",
            run=run,
            labels=list(scorer.labels),
            needs_prompt=prompted,
            waiting=batcher.num_waiting,
            scored=batcher.num_scored,
            batches=batcher.num_batches,
        )

    @app.post(
        "/score",
        operation_id="score",
        response_model=scored,
        responses=FORM_ERRORS,
        openapi_extra={"requestBody": form_document(one)},
    )
    async def score(request: Request) -> BaseModel:
        """Score one image against a prompt."""
        form = read_form(request.headers.get("content-type", ""), await request.body(), one)
        images = _images(form, "image", "path", words="image, a file, or path, a path")
        (found,) = await service.score(_pairs(images, form.texts["prompt"], most=1))
        if isinstance(found, Refused):
            raise found
        return scored.model_validate(found.values)

    @app.post(
        "/score/batch",
        operation_id="score_batch",
        response_model=answers,
        responses=FORM_ERRORS,
        openapi_extra={"requestBody": form_document(several)},
    )
    async def score_batch(request: Request) -> BaseModel:
        """Score several images; one that cannot be read is an error of its own."""
        form = read_form(request.headers.get("content-type", ""), await request.body(), several)
        images = _images(form, "images", "paths", words="images, files, or paths, paths")
        found = await service.score(_pairs(images, form.texts["prompts"], most=service.queue_size))
        results = [
            Failure(error=str(each)) if isinstance(each, Refused) else scored.model_validate(each.values)
            for each in found
        ]
        together = service.together(found)
        return answers(results=results, unlike=together.unlike, trust=together.lines)

    _answer_errors(app)
    return app


def _images(form: Form, uploads: str, paths: str, *, words: str) -> list[bytes | str]:
    if bool(form.files[uploads]) == bool(form.texts[paths]):
        raise Refused(f"give either {words} under the server's root")
    return [*form.files[uploads], *form.texts[paths]]


def _pairs(images: list[bytes | str], prompts: list[str], *, most: int) -> list[Pair]:
    if len(images) > most:
        raise Refused(f"{len(images)} images are more than the {most} that one request may hold")
    if len(prompts) not in {0, 1, len(images)}:
        raise Refused(f"{len(images)} images but {len(prompts)} prompts: give one an image, or a single one for all")
    texts = prompts if len(prompts) == len(images) else [prompts[0] if prompts else None] * len(images)
    return [Pair(*pair) for pair in zip(images, texts, strict=True)]


def _answer_errors(app: FastAPI) -> None:
    def failure(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
        retry = {"retry-after": "1"} if status == 503 else {}
        return JSONResponse({"error": sentence}, status, {**(headers or {}), **retry})

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> JSONResponse:
        return failure(422, str(error))

    @app.exception_handler(FormRefused)
    async def no_form(_request: Request, error: FormRefused) -> JSONResponse:
        headers = {"accept-post": f"{MULTIPART}, {URL_ENCODED}"} if error.status == 415 else {}
        return failure(error.status, str(error), headers)

    @app.exception_handler(QueueFull)
    async def full(_request: Request, _error: QueueFull) -> JSONResponse:
        return failure(503, "as many images wait as may wait: try again later")

    @app.exception_handler(HTTPException)
    async def plain(_request: Request, error: HTTPException) -> JSONResponse:
        words = {
            404: "no such address; see /openapi.json",
            405: "another method is needed here; see /openapi.json",
        }
        headers = dict(error.headers or {})
        if "GET" in headers.get("Allow", ""):
            headers["Allow"] = "GET, HEAD"  # the second is answered as the first, see the layer of limits
        return failure(error.status_code, words.get(error.status_code, str(error.detail)), headers)

    @app.exception_handler(Exception)
    async def defect(_request: Request, _error: Exception) -> JSONResponse:
        return failure(500, "the server failed on this request; its log says why")


# ---- Limits of an HTTP service, as one layer around the application: size, time, number of requests, host names


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


# ---- The process around the application: address, connections, a graceful end


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
