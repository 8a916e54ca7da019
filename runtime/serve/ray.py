"""Several machines: replicas of the application under Ray Serve, and a front that loses no request with a replica.

The front gives each request a number and, where it has none, a seed; both go with it to a replica. Where that dies under it,
another draws the same picture again: from the same seed, into the same record, which is written once. Policy file, key file and
audit (PostgreSQL) are shared by all replicas.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextvars import Context
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from saferedir.engines.errors import MissingDependencyError
from saferedir.runtime.serve.answers import Answers
from saferedir.runtime.serve.app import make_app
from saferedir.runtime.serve.errors import ServiceError, too_large
from saferedir.runtime.serve.opening import open_service
from saferedir.runtime.serve.replies import KEY_HEADER, no_key_for_streams
from saferedir.runtime.serve.settings import Settings
from saferedir.runtime.serve.state import REQUEST_HEADER

#: How many replicas a request is given to, one after the other.
ATTEMPTS = 5
#: Requests under way in one replica; its batcher refuses by itself what it cannot draw in time.
ONGOING = 256
DRAWS = ("/v1/images/generations", "/v1/pictures")
#: Status, headers, body.
Answer = tuple[int, list[tuple[str, str]], bytes]


class Replica:
    """One application with engines of its own."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._app = make_app(Settings(**settings), open_service, numbered=True)
        self._life: Any = None

    async def check_health(self) -> None:
        """Ray asks this before it sends requests here, and again and again: it replaces a replica that raises."""
        if self._life is None:
            self._life = self._app.router.lifespan_context(self._app)
            await self._life.__aenter__()
        await asyncio.shield(self._app.state.starting)

    async def answer(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> Answer:
        """The application's answer, whole."""
        status, told, parts = 500, list[tuple[str, str]](), bytearray()
        async for message in self._messages(method, path, headers, body):
            if message["type"] == "http.response.start":
                status = message["status"]
                told = [(name.decode(), value.decode()) for name, value in message["headers"]]
            else:
                parts += message.get("body", b"")
        return status, told, bytes(parts)

    async def stream(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> AsyncIterator[Any]:
        """The same as it comes: status and headers first, then what is sent."""
        async for message in self._messages(method, path, headers, body):
            if message["type"] == "http.response.start":
                yield message["status"], [(name.decode(), value.decode()) for name, value in message["headers"]]
            elif message.get("body"):
                yield message["body"]

    async def _messages(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> AsyncIterator[dict[str, Any]]:
        await self.check_health()
        place, _, query = path.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": place, "raw_path": place.encode(), "query_string": query.encode(), "root_path": "",
            "server": ("replica", 0), "client": None,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        }  # fmt: skip
        sent, given, left = asyncio.Queue[dict[str, Any] | None](), [body], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if given:
                return {"type": "http.request", "body": given.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, sent.put)  # type: ignore[arg-type]
            finally:
                await sent.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            left.set()
            await running


class Front:
    """What clients reach. It computes nothing."""

    def __init__(self, replicas: Any, body_bytes: int) -> None:
        self._replicas, self._body_bytes = replicas, body_bytes
        self._answers = Answers()

    async def __call__(self, request: Request) -> Response:
        headers, path = _forwarded(request), str(request.url.path)
        path += f"?{request.url.query}" if request.url.query else ""
        try:
            sent = await _body(request, self._body_bytes)
            if request.method != "POST" or path not in DRAWS:
                return _response(await self._answer(request.method, path, headers, sent))
            body, streamed = _seeded(sent)
            key = request.headers.get(KEY_HEADER)
            if streamed and key:
                raise no_key_for_streams()
            if streamed:
                return await self._stream(request.method, path, headers, body)
            if not key:
                return _response(await self._answer(request.method, path, headers, body))
            whose = request.headers.get("authorization", "")
            data = await self._answers.once(whose, key, path.encode() + sent, lambda: self._kept(path, headers, body))
            return _response(_unpacked(data))
        except ServiceError as error:
            return JSONResponse(error.body, error.status, error.headers)

    async def _kept(self, path: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
        # Ray cancels what a request has begun when its client leaves, which it knows by the context: this goes on.
        answer = asyncio.create_task(self._answer("POST", path, headers, body), context=Context())
        status, told, data = await answer
        if status != 200:
            raise _NotDrawnError(status, told, data)
        return _packed(status, told, data)

    async def _answer(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> Answer:
        from ray.exceptions import RayActorError

        for _ in range(ATTEMPTS):
            try:
                answer: Answer = await self._replicas.answer.remote(method, path, headers, body)
                return answer
            except RayActorError:  # its replica died: another draws the same
                continue
        raise _lost()

    async def _stream(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> Response:
        from ray.exceptions import RayActorError

        for _ in range(ATTEMPTS):
            parts = self._replicas.options(stream=True).stream.remote(method, path, headers, body)
            try:
                status, told = await parts.__anext__()
            except RayActorError:
                continue
            kept = {name: value for name, value in told if name != "content-length"}
            return StreamingResponse(_rest(parts), status, kept)
        raise _lost()


class _NotDrawnError(ServiceError):
    """An answer that is none, passed on as it was."""

    def __init__(self, status: int, told: list[tuple[str, str]], data: bytes) -> None:
        error = json.loads(data)["error"]
        headers = {name: value for name, value in told if name in ("retry-after", "x-should-retry", "x-request-id")}
        more = {name: value for name, value in error.items() if name not in ("message", "type", "param", "code")}
        super().__init__(status, error["type"], error["code"], error["message"], error["param"], headers, more)


async def _rest(parts: Any) -> AsyncIterator[bytes]:
    from ray.exceptions import RayActorError

    try:
        async for part in parts:
            yield part
    except RayActorError:  # what was sent cannot be taken back
        yield f"event: error\ndata: {json.dumps(_lost().body)}\n\n".encode()


def _lost() -> ServiceError:
    return ServiceError(503, "server_error", "replica_lost", "The replica that drew died.", None, {"retry-after": "1"})


async def _body(request: Request, most: int) -> bytes:
    """
    Raises:
        ServiceError: it is too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large(most)
    return bytes(body)


def _forwarded(request: Request) -> list[tuple[str, str]]:
    """The headers that a replica is to see, and the request's number."""
    hidden = (REQUEST_HEADER, KEY_HEADER, "content-length", "transfer-encoding")
    kept = [(name, value) for name, value in request.headers.items() if name.lower() not in hidden]
    return [*kept, (REQUEST_HEADER, secrets.token_hex(12))]


def _seeded(body: bytes) -> tuple[bytes, bool]:
    """The request with a seed, and whether it asks for a stream. What is no request goes on as it is, to be refused."""
    try:
        asked = json.loads(body)
    except ValueError:
        return body, False
    if not isinstance(asked, dict):
        return body, False
    if asked.get("seed") is None:
        asked["seed"] = secrets.randbits(32)
    return json.dumps(asked).encode(), asked.get("stream") is True


def _packed(status: int, headers: list[tuple[str, str]], data: bytes) -> bytes:
    return json.dumps([status, headers]).encode() + b"\n" + data


def _unpacked(kept: bytes) -> Answer:
    head, _, data = kept.partition(b"\n")
    status, headers = json.loads(head)
    return status, [(name, value) for name, value in headers], data


def _response(answer: Answer) -> Response:
    status, headers, data = answer
    return Response(data, status, {name: value for name, value in headers if name != "content-length"})


def application(settings: Settings, *, replicas: int = 2, gpus: float = 0) -> Any:
    """What `ray.serve.run` takes: the front, and so many replicas of `gpus` each.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingDependencyError(f"several machines need the package {error.name}; install saferedir[ray]") from error
    own = settings.model_dump()
    replica = serve.deployment(
        Replica, num_replicas=replicas, max_ongoing_requests=ONGOING, ray_actor_options={"num_gpus": gpus},
        health_check_period_s=1,
    ).bind(own)  # fmt: skip
    return serve.deployment(Front, num_replicas=1, max_ongoing_requests=10_000).bind(replica, settings.body_bytes)
