"""The HTTP interface: what is asked, what is answered, and every error as one sentence.

Knows FastAPI, which comes with the extra `serve`. Must not know models or runs.
"""

from __future__ import annotations

import contextlib
import importlib.resources
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import deltaclip
from deltaclip.pipeline.serving.batcher import QueueFull
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


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Failure, "description": "The request cannot be read."},
    403: {"model": Failure, "description": "Asked by a host name that is not served."},
    408: {"model": Failure, "description": "The request did not arrive in time."},
    413: {"model": Failure, "description": "The request is too large."},
    422: {"model": Failure, "description": "A field is missing, or the image or prompt cannot be used."},
    503: {"model": Failure, "description": "Too much is asked at once: try again later."},
}


def create_app(service: Service, *, run: str) -> FastAPI:
    """Return the application around a service; its threads live as long as the application runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.stop()

    # The interactive pages of FastAPI load scripts from the network, so only the document itself is served.
    app = FastAPI(title="deltaclip", version=deltaclip.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    page = importlib.resources.files("deltaclip.pipeline.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"})

    @app.get("/healthz", responses={503: ERRORS[503]})
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

    @app.post("/score", responses=ERRORS)
    async def score(
        request: Request,
        prompt: Annotated[str, Form(description="What the image was asked to show.")],
        image: Annotated[UploadFile | None, File(description="An image file.")] = None,
        path: Annotated[str | None, Form(description="Instead of an upload: a path under the server's root.")] = None,
    ) -> Scores:
        """Score one image against a prompt."""
        _check_utf8(request, [prompt], [path] if path else [])
        if (image is None) == (path is None):
            raise Refused("give either image, a file, or path, a path under the server's root")
        content = await image.read() if image is not None else str(path)
        (found,) = await service.score([Pair(content, prompt)])
        if isinstance(found, Refused):
            raise found
        return Scores.model_validate(found)

    @app.post("/score/batch", responses=ERRORS)
    async def score_batch(
        request: Request,
        prompts: Annotated[list[str], Form(description="One prompt an image, or a single one for all.")],
        images: Annotated[list[UploadFile] | None, File(description="Image files.")] = None,
        paths: Annotated[list[str] | None, Form(description="Instead of uploads: paths under the root.")] = None,
    ) -> BatchScores:
        """Score several images; one that cannot be read is an error of its own."""
        _check_utf8(request, prompts, paths or [])
        if bool(images) == bool(paths):
            raise Refused("give either images, files, or paths, paths under the server's root")
        given: list[bytes | str] = [await image.read() for image in images or []] + list(paths or [])
        found = await service.score(_pairs(given, prompts, most=service.queue_size))
        results = [Failure(error=str(one)) if isinstance(one, Refused) else Scores.model_validate(one) for one in found]
        return BatchScores(results=results)

    _answer_errors(app)
    return app


def _pairs(images: list[bytes | str], prompts: list[str], *, most: int) -> list[Pair]:
    if len(images) > most:
        raise Refused(f"{len(images)} images are more than the {most} that one request may hold")
    if len(prompts) not in {1, len(images)}:
        raise Refused(f"{len(images)} images but {len(prompts)} prompts: give one an image, or a single one for all")
    texts = prompts * len(images) if len(prompts) == 1 else prompts
    return [Pair(*pair) for pair in zip(images, texts, strict=True)]


def _check_utf8(request: Request, *fields: list[str]) -> None:
    # The parser reads what is not UTF-8 as Latin-1, or with replacement characters, and says nothing.
    if request.headers.get("content-type", "").startswith("multipart/"):
        are_text = all(_stand_in(request.scope["deltaclip.body"], texts) for texts in fields)
    else:
        are_text = not any("\ufffd" in text for texts in fields for text in texts)
    if not are_text:
        raise HTTPException(400, "text fields must be UTF-8")


def _stand_in(body: bytes, texts: list[str]) -> bool:
    """Tell whether texts stand in a body one after the other: one pass over it, however many they are."""
    end = 0
    for content in (text.encode() for text in texts):
        start = body.find(content, end)
        if start < 0:
            return False
        end = start + len(content)
    return True


def _answer_errors(app: FastAPI) -> None:
    def failure(status: int, sentence: str) -> JSONResponse:
        headers = {"retry-after": "1"} if status == 503 else None
        return JSONResponse({"error": sentence}, status, headers)

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> JSONResponse:
        return failure(422, str(error))

    @app.exception_handler(QueueFull)
    async def full(_request: Request, _error: QueueFull) -> JSONResponse:
        return failure(503, "as many images wait as may wait: try again later")

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = str(first["loc"][-1]) if len(first["loc"]) > 1 else "body"
        words = "is missing" if first["type"] == "missing" else "has the wrong type: " + _expected(field)
        return failure(422, f"{field}: {words}")

    @app.exception_handler(HTTPException)
    async def plain(_request: Request, error: HTTPException) -> JSONResponse:
        words = {
            404: "no such address; see /openapi.json",
            405: "another method is needed here; see /openapi.json",
        }
        return failure(error.status_code, words.get(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def defect(_request: Request, _error: Exception) -> JSONResponse:
        return failure(500, "the server failed on this request; its log says why")


def _expected(field: str) -> str:
    return "send a file" if field.startswith("image") else "send a text"
