"""The interface: OpenAI's images, this service's own pictures, and what an operator's tools ask for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from saferedir.engines.errors import SafeRedirError
from saferedir.runtime.serve.bodies import ImagesBody, PicturesBody, check_limits
from saferedir.runtime.serve.errors import NO_RETRY, ServiceError, invalid, told
from saferedir.runtime.serve.keys import Keys
from saferedir.runtime.serve.policies import ANYONE
from saferedir.runtime.serve.service import Asked, Drawn, Service, picture_bytes
from saferedir.runtime.serve.settings import Settings

log = logging.getLogger("saferedir")

#: Answers that are kept for requests that come again with the same key, and for how many seconds.
KEPT, KEPT_SECONDS = 1000, 24 * 3600.0
#: Seconds between looks at the policy's file.
RELOAD_SECONDS = 1.0
Answer = dict[str, Any]


class State:
    """What the application is made of, once it is up."""

    def __init__(self, settings: Settings, service: Service, keys: Keys) -> None:
        self.settings, self.service, self.keys = settings, service, keys
        self.ready = self.draining = False
        self.kept: OrderedDict[tuple[str, str], tuple[str, float, asyncio.Task[Answer]]] = OrderedDict()


def make_app(settings: Settings, open_service: Callable[[Settings], tuple[Service, Keys]]) -> FastAPI:
    """The application. `open_service` is called when it starts, and may take seconds."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.own = None
        starting = asyncio.create_task(_start(app, settings, open_service))
        yield
        await starting
        await _drain(app.state.own)

    app = FastAPI(title="saferedir", lifespan=lifespan, docs_url="/docs", redoc_url=None)
    app.middleware("http")(_identified)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(ServiceError, lambda request, error: _answer(error))  # type: ignore[arg-type, return-value]
    app.add_exception_handler(SafeRedirError, lambda request, error: _answer(told(error)))  # type: ignore[arg-type]

    @app.post("/v1/images/generations")
    async def images(body: ImagesBody, request: Request) -> Response:
        state, tenant = await _admitted(request, body.n)
        _check_model(body.model, state)
        if body.stream:
            return await _stream(state, tenant, body)
        if body.partial_images:
            raise invalid("partial_images is for stream", "partial_images")

        async def draw(gone: Awaitable[object] | None) -> Answer:
            drawn = await state.service.draw(_limited(body.asked(), state), tenant, gone=gone)
            return _images_answer(body, drawn)

        return await _once(state, tenant, request, body.model_dump_json(), draw)

    @app.post("/v1/pictures")
    async def pictures(body: PicturesBody, request: Request) -> Response:
        state, tenant = await _admitted(request, body.pictures)

        async def draw(gone: Awaitable[object] | None) -> Answer:
            drawn = await state.service.draw(_limited(body.asked(), state), tenant, gone=gone)
            return {"created": int(time.time()), "pictures": [_picture(own, body) for own in drawn]}

        return await _once(state, tenant, request, body.model_dump_json(), draw)

    @app.get("/v1/models")
    async def models(request: Request) -> Answer:
        state, _ = await _admitted(request, 0)
        return {"object": "list", "data": [_model(state)]}

    @app.get("/v1/models/{name}")
    async def model(name: str, request: Request) -> Answer:
        state, _ = await _admitted(request, 0)
        _check_model(name, state, status=404)
        return _model(state)

    @app.get("/health")
    async def health() -> Answer:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        state: State | None = request.app.state.own
        if state is None or not state.ready:
            return JSONResponse({"status": "starting"}, 503)
        if state.draining:
            return JSONResponse({"status": "draining"}, 503)
        if state.service.fault is not None:
            return JSONResponse({"status": "fault", "fault": state.service.fault}, 503)
        return JSONResponse({"status": "ready", "policy": state.service.policies.version})

    return app


async def _start(app: FastAPI, settings: Settings, open_service: Callable[[Settings], tuple[Service, Keys]]) -> None:
    """Open everything, and draw a protected picture: only then anything is served."""
    service, keys = await asyncio.to_thread(open_service, settings)
    state = State(settings, service, keys)
    app.state.own = state
    await asyncio.to_thread(lambda: service.pipeline("a picture", num_inference_steps=_fewest(service)))
    state.ready = True
    app.state.reloading = asyncio.create_task(_reload(state))


async def _reload(state: State) -> None:
    while True:
        await asyncio.sleep(RELOAD_SECONDS)
        await asyncio.to_thread(state.service.policies.reload)


async def _drain(state: State | None) -> None:
    """Finish what is under way, as long as may be."""
    if state is None:
        return
    state.draining = True
    until = time.monotonic() + state.settings.drain_seconds
    while state.service.under_way and time.monotonic() < until:
        await asyncio.sleep(0.05)


def _fewest(service: Service) -> int:
    promise = service.pipeline.manifest.safety.promise
    return 1 if promise is None else promise.envelope.steps[0]


async def _admitted(request: Request, pictures: int) -> tuple[State, str]:
    """The state of the service, and whose request it is.

    Raises:
        ServiceError: it is not up, the key is not known, or its rate is exceeded.
    """
    state: State | None = request.app.state.own
    if state is None or not state.ready or state.draining:
        what = "draining" if state is not None and state.draining else "starting"
        raise ServiceError(503, "server_error", what, f"The service is {what}.", None, {"retry-after": "1"})
    if not state.keys.required:
        return state, ANYONE
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    info = state.keys.find(key.strip()) if scheme.lower() == "bearer" else None
    if info is None:
        raise ServiceError(401, "invalid_request_error", "invalid_api_key", "The key is missing or not known.", None, NO_RETRY)
    if wait := state.keys.wait(info, pictures):
        headers = {"retry-after": str(max(1, round(wait)))}
        raise ServiceError(429, "rate_limit_error", "rate_limit_exceeded", f"Try again in {wait:.0f} s.", None, headers)
    return state, info.tenant


def _limited(asked: Asked, state: State) -> Asked:
    limits = state.settings
    check_limits(asked, steps=limits.most_steps, pictures=limits.most_pictures, characters=limits.prompt_characters)
    return asked


async def _once(
    state: State, tenant: str, request: Request, body: str, draw: Callable[[Awaitable[object] | None], Awaitable[Answer]]
) -> Response:
    """The answer. Requests of one `Idempotency-Key` are one, which is drawn to its end whoever leaves."""
    key = request.headers.get("idempotency-key")
    if not key:
        return JSONResponse(await draw(_gone(request)))
    digest = hashlib.sha256(f"{request.url.path} {body}".encode()).hexdigest()
    _forget_old(state)
    if (tenant, key) not in state.kept:
        state.kept[tenant, key] = (digest, time.monotonic(), asyncio.ensure_future(draw(None)))  # type: ignore[assignment]
    stated, _, task = state.kept[tenant, key]
    if stated != digest:
        raise ServiceError(
            409, "invalid_request_error", "idempotency_key_reused", "The key was of another request.", None, NO_RETRY
        )
    try:
        return JSONResponse(await asyncio.shield(task))
    except Exception:
        state.kept.pop((tenant, key), None)  # what failed may be tried again
        raise


def _forget_old(state: State) -> None:
    now = time.monotonic()
    while state.kept and (len(state.kept) >= KEPT or next(iter(state.kept.values()))[1] < now - KEPT_SECONDS):
        state.kept.popitem(last=False)


async def _gone(request: Request) -> None:
    """Ends when the client does."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _images_answer(body: ImagesBody, drawn: list[Drawn]) -> Answer:
    height, width = drawn[0].record.height, drawn[0].record.width
    return {
        "created": int(time.time()),
        "data": [{"b64_json": _encoded(own, body)} for own in drawn],
        "background": "opaque",
        "output_format": body.output_format,
        "quality": body.quality,
        "size": f"{width}x{height}",
        "usage": _usage(drawn),
    }


def _usage(drawn: list[Drawn]) -> Answer:
    """Tokens of the prompt that were read, and denoising steps."""
    read, steps = len(drawn[0].record.tokens), sum(own.record.num_inference_steps for own in drawn)
    details = {"text_tokens": read, "image_tokens": 0}
    return {"input_tokens": read, "input_tokens_details": details, "output_tokens": steps, "total_tokens": read + steps}


def _picture(own: Drawn, body: PicturesBody) -> Answer:
    return {
        "id": own.id, "b64_json": _encoded(own, body), "redirected": own.redirected, "observed": own.observed,
        "record": own.record.to_dict(),
    }  # fmt: skip


def _encoded(own: Drawn, body: ImagesBody | PicturesBody) -> str:
    return base64.b64encode(picture_bytes(own.image, body.output_format, body.output_compression)).decode()


async def _stream(state: State, tenant: str, body: ImagesBody) -> Response:
    """Server-sent events: partial images, then each picture, or an error."""
    if body.n != 1:
        raise invalid("n is for one picture where stream is true", "n")
    asked = _limited(body.asked(), state)
    loop, events, left = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Answer] | None](), asyncio.Event()

    def preview(index: int, latent: Any) -> None:
        loop.call_soon_threadsafe(events.put_nowait, ("latent", {"latent": latent}))

    async def draw() -> None:
        try:
            drawn = await state.service.draw(asked, tenant, gone=left.wait(), previews=body.partial_images, preview=preview)
            answer = _images_answer(body, drawn)
            (data,) = answer.pop("data")
            answer["created_at"] = answer.pop("created")
            event = "image_generation.completed"
            await events.put((event, {"type": event, **data, **answer}))
        except SafeRedirError as error:
            await events.put(("error", told(error).body))
        except Exception:
            log.exception("a stream failed")
            failed = ServiceError(500, "server_error", "internal_error", "The request failed.")
            await events.put(("error", failed.body))
        finally:
            await events.put(None)

    drawing = asyncio.create_task(draw())

    async def sent() -> AsyncIterator[str]:
        shown = 0
        try:
            while (event := await events.get()) is not None:
                name, data = event
                if name == "latent":
                    (image,) = await asyncio.to_thread(state.service.pipeline.decode, data["latent"][None])
                    picture = picture_bytes(image, body.output_format, body.output_compression)
                    name, data = "image_generation.partial_image", _partial(body, picture, shown, image.size)
                    shown += 1
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
        finally:
            left.set()
            await drawing

    return StreamingResponse(sent(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _partial(body: ImagesBody, picture: bytes, index: int, size: tuple[int, int]) -> Answer:
    return {
        "type": "image_generation.partial_image", "b64_json": base64.b64encode(picture).decode(),
        "partial_image_index": index, "created_at": int(time.time()), "background": "opaque",
        "output_format": body.output_format, "quality": body.quality, "size": f"{size[0]}x{size[1]}",
    }  # fmt: skip


def _model(state: State) -> Answer:
    manifest = state.service.pipeline.manifest
    return {"id": manifest.name, "object": "model", "created": 0, "owned_by": "saferedir"}


def _check_model(name: str | None, state: State, status: int = 400) -> None:
    served = state.service.pipeline.manifest.name
    if name is not None and name != served:
        raise ServiceError(
            status, "invalid_request_error", "model_not_found", f"The model {name!r} is not served; expected {served!r}.",
            "model", NO_RETRY,
        )  # fmt: skip


async def _identified(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Every answer has a number that the log has too."""
    number = f"req_{secrets.token_hex(12)}"
    started = time.perf_counter()
    try:
        response = await call_next(request)
    except Exception:
        log.exception("%s %s %s failed", number, request.method, request.url.path)
        response = _answer(ServiceError(500, "server_error", "internal_error", "The request failed.", None, NO_RETRY))
    response.headers["x-request-id"] = number
    seconds = time.perf_counter() - started
    log.info("%s %s %s %d %.3f s", number, request.method, request.url.path, response.status_code, seconds)
    return response


def _answer(error: ServiceError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


async def _not_valid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or None
    if first["type"] == "extra_forbidden":
        return _answer(invalid(f"Unknown parameter: {field!r}.", field, "unknown_parameter"))
    if first["type"] == "json_invalid":
        return _answer(invalid(f"The body is no JSON: {first['msg']}.", None, "invalid_json"))
    return _answer(invalid(f"{field or 'body'}: {first['msg']}", field))


async def _not_found(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    return _answer(ServiceError(error.status_code, "invalid_request_error", "not_found", message, None, NO_RETRY))
