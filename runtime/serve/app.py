"""The application: its life, its endpoints, and how it tells errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from saferedir.engines.errors import CancelledError, SafeRedirError
from saferedir.runtime.serve import images, page, pictures
from saferedir.runtime.serve.documented import ANSWERS, Model, Models, Status
from saferedir.runtime.serve.edge import Edge
from saferedir.runtime.serve.errors import NO_RETRY, ServiceError, invalid, told
from saferedir.runtime.serve.keys import Keys
from saferedir.runtime.serve.service import Service
from saferedir.runtime.serve.settings import Settings
from saferedir.runtime.serve.state import State, caller, state_of

log = logging.getLogger("saferedir")

#: Status -> code, where the framework itself answers.
CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed"}


def make_app(
    settings: Settings, open_service: Callable[[Settings], tuple[Service, Keys]], *, numbered: bool = False,
    on_start: Callable[[State | None], None] = lambda state: None,
) -> FastAPI:  # fmt: skip
    """The application. `open_service` is called when it starts, and may take seconds.

    `on_start` is called after it, with None where it failed. `numbered`: a front gives requests their numbers.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.own = None
        app.state.starting = asyncio.create_task(_start(app, settings, open_service, numbered))
        app.state.starting.add_done_callback(lambda task: on_start(app.state.own))
        yield
        await app.state.starting
        await app.state.own.drain()
        app.state.watching.cancel()
        await asyncio.to_thread(app.state.own.service.close)

    app = FastAPI(title="saferedir", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Edge, body_bytes=settings.body_bytes, answered=lambda status, seconds: _count(app, status, seconds))
    for kind, handler in (
        (RequestValidationError, _not_valid), (HTTPException, _http_error), (ServiceError, _told), (SafeRedirError, _failed),
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)
    app.include_router(images.router)
    app.include_router(pictures.router)
    if settings.page:
        app.include_router(page.router)

    @app.get("/v1/models", response_model=Models, responses=ANSWERS)
    async def models(request: Request) -> dict[str, Any]:
        """What is served."""
        state, _ = await caller(request)
        return {"object": "list", "data": [_model(state)]}

    @app.get("/v1/models/{name}", response_model=Model, responses=ANSWERS)
    async def model(name: str, request: Request) -> dict[str, Any]:
        """One model, if it is served."""
        state, _ = await caller(request)
        state.check_model(name, status=404)
        return _model(state)

    @app.get("/health", response_model=Status)
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "alive"}

    @app.get("/ready", response_model=Status, responses={503: {"model": Status}})
    async def ready() -> Response:
        """Whether requests should be sent here: a protected picture was drawn, and the safety has been sound since."""
        state: State | None = app.state.own
        trouble = "starting" if state is None else state.trouble
        return JSONResponse({"status": trouble or "ready"}, 503 if trouble else 200)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 503: ANSWERS[503]})
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        return Response(
            state_of(request, draining=True).service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return app


async def _start(
    app: FastAPI, settings: Settings, open_service: Callable[[Settings], tuple[Service, Keys]], numbered: bool
) -> None:
    try:
        service, keys = await asyncio.to_thread(open_service, settings)
        await asyncio.to_thread(service.prepare)
    except Exception as error:
        log.critical("the service cannot start: %s", error, exc_info=not isinstance(error, SafeRedirError))
        raise
    app.state.own = State(settings, service, keys, numbered=numbered)
    app.state.watching = asyncio.create_task(app.state.own.watch())


def _count(app: FastAPI, status: int, seconds: float) -> None:
    if (state := app.state.own) is not None:
        state.service.metrics.requests.labels(str(status)).inc()
        state.service.metrics.request_seconds.observe(seconds)


def _model(state: State) -> dict[str, Any]:
    return {"id": state.model, "object": "model", "created": 0, "owned_by": "saferedir"}


def _answer(error: ServiceError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _answer(error)


def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, SafeRedirError)
    if isinstance(error, CancelledError):
        state_of(request)  # which says so if the service has stopped it
    return _answer(told(error))


def _not_valid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or None
    if first["type"] == "extra_forbidden":
        return _answer(invalid(f"Unknown parameter: {field!r}.", field, "unknown_parameter"))
    if first["type"] == "json_invalid":
        return _answer(invalid(f"The body is no JSON: {first['msg']}.", None, "invalid_json"))
    return _answer(invalid(f"{field or 'body'}: {first['msg']}", field))


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    headers = {**NO_RETRY, **(error.headers or {})}
    return _answer(ServiceError(error.status_code, "invalid_request_error", code, str(error.detail), None, headers))
