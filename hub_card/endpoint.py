"""The endpoint as an ASGI application: `POST /` with JSON, `GET /health`; everything a client can take is bounded."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from .batching import Batcher, QueueFullError

logger = logging.getLogger(__name__)

PATHS = ("/", "/health")


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        body_bytes: of a request's body.
        held_bytes: of all bodies that are being read or wait for their answer.
        body_seconds: until a body is complete.
        waiting: requests that wait.
        batch: requests that are answered together.
        answer_seconds: from a complete body to its answer.
    """

    body_bytes: int = 24 * 2**20
    held_bytes: int = 256 * 2**20
    body_seconds: float = 20
    waiting: int = 64
    batch: int = 16
    answer_seconds: float = 30


def make_app(handler: Any, *, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """
    Args:
        handler: an `EndpointHandler`: called with a request it returns the answer or raises a `ValueError`; its `batch`,
            where it has one, answers several.
        token: what a request must send as `Authorization: Bearer`; `None` lets everybody ask. `/health` needs none.
        limits: what clients may take.

    Answers 200, or `{"error": "…"}` with 400 (the request is wrong), 401 (the token), 404 and 405, 408 (an unfinished body),
    413 (a body too long), 500 (the handler failed; the log says why), or 503 with `Retry-After` (full, or too slow).
    """
    limits = limits or Limits()
    batcher = Batcher(batch_of(handler), max_waiting=limits.waiting, max_batch=limits.batch)
    bodies = Bodies(limits, batcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        answering = asyncio.ensure_future(batcher.run())
        yield
        answering.cancel()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(StarletteHTTPException, refusal)
    app.add_middleware(RequestLog)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/")
    async def answer(request: Request) -> Response:
        check_token(request, token)
        try:
            async with bodies.of(request) as body:
                content = await asyncio.to_thread(parsed, body)
                with anyio.fail_after(limits.answer_seconds):
                    reply = await while_connected(request, batcher.ask(content))
                return Response(await asyncio.to_thread(json.dumps, reply), media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; the log does
        except QueueFullError:
            raise busy("too many requests wait", batcher) from None
        except TimeoutError:
            raise busy(f"no answer within {limits.answer_seconds:g} seconds", batcher) from None
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except HTTPException:
            raise
        except Exception as error:
            logger.error("a request failed", exc_info=error)
            raise HTTPException(500, "the server failed; its log says why") from None

    return app


def batch_of(handler: Any) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """The handler's own `batch`; for one that has none, such as of an older checkpoint, one request after another."""

    def one_by_one(requests: Sequence[Any]) -> list[Any]:
        answers = []
        for request in requests:
            try:
                answers.append(handler(request))
            except Exception as error:
                answers.append(error)
        return answers

    return getattr(handler, "batch", one_by_one)


class Bodies:
    """The bodies of requests, read in chunks and counted until they are answered."""

    def __init__(self, limits: Limits, batcher: Batcher):
        self.limits, self.batcher, self.held = limits, batcher, 0

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytearray]:
        """
        The body of a request.

        Raises:
            HTTPException: 408, 413 or 503 as [`make_app`] says, as soon as it is known.
            ClientDisconnect: the client has left.
        """
        if self.batcher.full:
            raise busy("too many requests wait", self.batcher)
        body = bytearray()
        try:
            self._check_length(
                int(request.headers.get("content-length", 0))
            )  # the server has checked that it is a number
            try:
                with anyio.fail_after(self.limits.body_seconds):
                    async for chunk in request.stream():
                        self._take(body, chunk)
            except TimeoutError:
                message = f"the body did not come within {self.limits.body_seconds:g} seconds"
                raise HTTPException(408, message, {"Connection": "close"}) from None
            yield body
        finally:
            self.held -= len(body)

    def _take(self, body: bytearray, chunk: bytes) -> None:
        self._check_length(len(body) + len(chunk))
        if self.held + len(chunk) > self.limits.held_bytes:
            raise busy("too many bytes wait", self.batcher)
        self.held += len(chunk)
        body += chunk

    def _check_length(self, length: int) -> None:
        if length > self.limits.body_bytes:
            message = f"a body has at most {self.limits.body_bytes} bytes: send fewer or smaller images"
            raise HTTPException(413, message, {"Connection": "close"})


def parsed(body: bytes | bytearray) -> Any:
    """A body as JSON. Raises `ValueError`."""
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("the request's JSON is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from error


async def while_connected(request: Request, answer: Awaitable[Any]) -> Any:
    """The answer, unless its client goes before it is there: then it is cancelled. Raises `ClientDisconnect`."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def check_token(request: Request, token: str | None) -> None:
    """Refuses with 401 a request without the token, in a time that does not depend on how much of it is correct."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if token is None:
        return
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise HTTPException(
            401, "this endpoint needs a token: send Authorization: Bearer …", {"WWW-Authenticate": "Bearer"}
        )


def busy(reason: str, batcher: Batcher) -> HTTPException:
    """503, and when to try again."""
    return HTTPException(503, f"{reason}: try again later", {"Retry-After": str(batcher.retry_after)})


async def refusal(request: Request, error: Any) -> Response:
    """`{"error": "…"}` with the error's status; of an unknown path, what there is."""
    detail = error.detail
    if error.status_code == 404:
        detail = "there are POST / and GET /health"
    elif error.status_code == 405:
        detail = f"{request.url.path} takes {error.headers['Allow']}"
    return JSONResponse({"error": detail}, error.status_code, error.headers)


class RequestLog:
    """A line for each request: its path where there is such a path, status, bytes of its body and time; no contents."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, received, status = time.monotonic(), 0, 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, counted, noted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "(unknown path)"
            milliseconds = 1000 * (time.monotonic() - start)
            logger.info("%s %s %d, %d bytes, %.0f ms", scope["method"], path, status, received, milliseconds)
