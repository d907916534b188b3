"""The HTTP interface: what is asked, what is answered, and every error as one sentence.

Knows FastAPI, which comes with the extra `serve`. Must not know models or runs.
"""

from __future__ import annotations

import contextlib
import importlib.resources
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import deltaclip
from deltaclip.pipeline.serving.batcher import QueueFull
from deltaclip.pipeline.serving.forms import MULTIPART, URL_ENCODED, Field, Form, FormRefused, form_document, read_form
from deltaclip.pipeline.serving.service import Pair, Refused, Service

# The page is one file: nothing from elsewhere, not even from this server but for the scores.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Scores(BaseModel):
    """Scores in [0, 1] with their parts; null where the run has none."""

    q: float | None
    c: float | None
    q_base: float | None
    c_base: float | None
    q_delta: float | None
    c_delta: float | None
    prompt_truncated: bool


class Failure(BaseModel):
    """What is wrong, in one sentence."""

    error: str


class BatchScores(BaseModel):
    """One entry a pair, in order: its scores, or its error."""

    results: list[Scores | Failure]


class Health(BaseModel):
    """The server answers; `waiting` images stand before the model, `scored` went through it in `batches`."""

    status: str
    run: str
    labels: list[str]
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
    needed = service.scorer.needs_prompts
    one = [
        Field("prompt", "What the image was asked to show.", required=needed),
        Field("image", "An image file.", is_file=True),
        Field("path", "Instead of an upload: a path under the server's root."),
    ]
    several = [
        Field("prompts", "One prompt an image, or a single one for all.", many=True, required=needed),
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
            labels=list(service.scorer.labels),
            waiting=batcher.num_waiting,
            scored=batcher.num_scored,
            batches=batcher.num_batches,
        )

    @app.post("/score", operation_id="score", responses=FORM_ERRORS, openapi_extra={"requestBody": form_document(one)})
    async def score(request: Request) -> Scores:
        """Score one image against a prompt."""
        form = read_form(request.headers.get("content-type", ""), await request.body(), one)
        images = _images(form, "image", "path", words="image, a file, or path, a path")
        (found,) = await service.score(_pairs(images, form.texts["prompt"], most=1))
        if isinstance(found, Refused):
            raise found
        return Scores.model_validate(found)

    @app.post(
        "/score/batch",
        operation_id="score_batch",
        responses=FORM_ERRORS,
        openapi_extra={"requestBody": form_document(several)},
    )
    async def score_batch(request: Request) -> BatchScores:
        """Score several images; one that cannot be read is an error of its own."""
        form = read_form(request.headers.get("content-type", ""), await request.body(), several)
        images = _images(form, "images", "paths", words="images, files, or paths, paths")
        found = await service.score(_pairs(images, form.texts["prompts"], most=service.queue_size))
        results = [
            Failure(error=str(each)) if isinstance(each, Refused) else Scores.model_validate(each) for each in found
        ]
        return BatchScores(results=results)

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
            headers["Allow"] = "GET, HEAD"  # the second is answered as the first, see `limits`
        return failure(error.status_code, words.get(error.status_code, str(error.detail)), headers)

    @app.exception_handler(Exception)
    async def defect(_request: Request, _error: Exception) -> JSONResponse:
        return failure(500, "the server failed on this request; its log says why")
