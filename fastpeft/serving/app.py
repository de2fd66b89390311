"""The engine over HTTP. Every answer but /metrics is JSON; an error is {"error": "where: expected, got"}.

    POST /generate   {"adapter", "prompt" or "messages", "max_new_tokens", "temperature", "top_p", "seed", "return_tokens"}
    POST /classify   {"adapter", "text", "text_pair"}
    GET  /adapters   what is served; GET /health; GET /metrics (Prometheus)

400 malformed JSON; 404 an adapter or path that is not there; 413 a body over max_body; 422 what is wrong in a request, among it
a prompt that is too long; 429 a full queue; 500 a batch that failed; 503 while shutting down. A client that hangs up is counted
as 499, and its row ends.
"""

import asyncio
import contextlib
import secrets
import sys
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastpeft.serving import engine as engines
from fastpeft.serving.batcher import Closed, QueueFull
from fastpeft.serving.engine import Engine, UnknownAdapter
from fastpeft.serving.metrics import CONTENT_TYPE, Metrics
from fastpeft.serving.writing import Sampling
from fastpeft.training.record import CAUSAL_LM, CLASSIFICATION

HUNG_UP = 499
PATHS = ("/generate", "/classify", "/adapters", "/health", "/metrics")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    adapter: str
    """A name from /adapters, "__base__" for the base model."""


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class GenerateBody(_Body):
    """What /generate takes; temperature 0 is greedy, and a seed repeats a text. max_new_tokens: 64, or fewer by the limit.

    return_tokens: the answer has the ids of its tokens too, which its text alone does not always give back
    """

    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    return_tokens: bool = False


class ClassifyBody(_Body):
    """What /classify takes."""

    text: str
    text_pair: str | None = None


def make_app(engine: Engine, *, max_body: int = 1 << 20) -> ASGIApp:
    """The application. max_body: bytes of a request's body. The engine is closed when the server shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="fastpeft", docs_url=None, redoc_url=None, lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        malformed = first["type"] == "json_invalid"
        where = "body" if malformed else ".".join(str(part) for part in first["loc"])
        said = first["ctx"]["error"] if malformed else f"{first['msg']}, got {str(first.get('input'))[:100]!r}"
        return _error(400 if malformed else 422, f"{where}: {'expected JSON, got: ' if malformed else ''}{said}")

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}; there is {PATHS}")

    @app.post("/generate")
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Text after a prompt."""
        _require(engine, CAUSAL_LM)
        if (body.prompt is None) == (body.messages is None):
            return _error(422, "generate: expected either prompt or messages, got neither or both")
        prompt: Any = body.prompt if body.messages is None else [turn.model_dump() for turn in body.messages]

        def prepare() -> engines.Request:
            seed = secrets.randbits(53) if body.seed is None else body.seed  # 53: a JSON number holds it in any client
            usual = min(Sampling.max_new_tokens, engine.limits.max_new_tokens)
            most = usual if body.max_new_tokens is None else body.max_new_tokens
            sampling = Sampling(max_new_tokens=most, temperature=body.temperature, top_p=body.top_p, seed=seed)
            return engine.generation(body.adapter, prompt, sampling, return_tokens=body.return_tokens)

        return await _answer(engine, request, prepare)

    @app.post("/classify")
    async def classify(body: ClassifyBody, request: Request) -> Response:
        """The class of a text."""
        _require(engine, CLASSIFICATION)
        return await _answer(engine, request, lambda: engine.classification(body.adapter, body.text, body.text_pair))

    @app.get("/adapters")
    async def adapters() -> dict[str, Any]:
        """What is served, and which adapters share batches."""
        served = [engine.served[name].describe() for name in sorted(engine.served)]
        return {"model": engine.source, "task": engine.task, "adapters": served}

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503."""
        alive = engine.batcher.alive
        state = {"status": "ok" if alive else "shutting down", "waiting": engine.batcher.depth}
        return JSONResponse(state, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE)

    return Counted(LimitedBody(app, max_body), engine.metrics)


async def _answer(engine: Engine, request: Request, prepare: Any) -> Response:
    """Prepare a request off the event loop, wait for its batch, and let go of it if the client hangs up."""
    try:
        job = await run_in_threadpool(prepare)
        engine.submit(job)
    except UnknownAdapter as error:
        return _error(404, str(error))
    except QueueFull as error:
        return _error(429, f"queue: {error}", {"Retry-After": "1"})
    except Closed as error:
        return _error(503, str(error))
    except ValueError as error:
        return _error(422, str(error))
    waiting = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            engine.metrics.abandoned.inc()
            return Response(status_code=HUNG_UP)
        error = waiting.exception()
        if error is not None:
            print(f"error: a batch of {job.adapter!r} failed: {type(error).__name__}: {error}", file=sys.stderr)
            return _error(500, f"{type(error).__name__} while computing; the server goes on")
        return JSONResponse({"adapter": job.adapter, **waiting.result()})
    finally:  # also when the server cancels this
        gone.cancel()
        job.abandon()


async def _hang_up(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _require(engine: Engine, task: str) -> None:
    if engine.task != task:
        raise HTTPException(404, f"expected a model for {task}, this one is for {engine.task}")


def _error(code: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, code, headers)


class LimitedBody:
    """Reads a request's body, at most `most` bytes of it, before the application runs; 413 for more."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() else 0
        body = b""
        more = size <= self.most
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            size = max(size, len(body))
            more = message.get("more_body", False) and size <= self.most
        if size > self.most:
            refused = _error(
                413, f"body: expected at most {self.most} bytes, got {size} or more", {"Connection": "close"}
            )
            await refused(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


class Counted:
    """Counts requests, their codes and their time; 499 for one that ends without an answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, code = time.perf_counter(), HUNG_UP

        async def note(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.answered(path, code, time.perf_counter() - began)
