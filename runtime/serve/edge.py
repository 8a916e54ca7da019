"""Where requests come in: each has a number and a bounded body, and nothing leaves but an answer in the interface's form."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saferedir.runtime.serve.errors import NO_RETRY, ServiceError, too_large

log = logging.getLogger("saferedir")

#: What a body may take to come.
BODY_SECONDS = 30.0


class Edge:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, *, body_bytes: int, answered: Callable[[int, float], None]) -> None:
        """`answered` is told the status and the seconds of each answer."""
        self._app, self._body_bytes, self._answered = app, body_bytes, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, began, statuses = f"req_{secrets.token_hex(12)}", time.perf_counter(), list[int]()
        scope.setdefault("state", {})["number"] = number

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self._app(scope, await self._received(scope, receive), identified)
        except ServiceError as error:
            await _tell(error, scope, receive, identified)
        except Exception:
            log.exception("%s %s %r failed", number, scope["method"], scope["path"])
            if not statuses:
                failed = ServiceError(500, "server_error", "internal_error", "The request failed.", None, NO_RETRY)
                await _tell(failed, scope, receive, identified)
        seconds, status = time.perf_counter() - began, statuses[0] if statuses else 499
        self._answered(status, seconds)
        log.info("%s %s %r %d %.3f s", number, scope["method"], scope["path"], status, seconds)

    async def _received(self, scope: Scope, receive: Receive) -> Receive:
        """What the application receives: the whole body first, then whether the client is still there.

        Raises:
            ServiceError: the body is too large, or slow.
        """
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if stated.isdigit() and int(stated) > self._body_bytes:
            raise too_large(self._body_bytes)
        try:
            body, gone = await asyncio.wait_for(self._body(receive), BODY_SECONDS)
        except TimeoutError:
            message = f"The body did not come within {BODY_SECONDS:g} s."
            raise ServiceError(408, "invalid_request_error", "body_too_slow", message, None, NO_RETRY) from None
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        if gone:
            pending = [{"type": "http.disconnect"}]

        async def received() -> Message:
            return pending.pop(0) if pending else await receive()

        return received

    async def _body(self, receive: Receive) -> tuple[bytes, bool]:
        """The whole body; whether the client left before its end."""
        body = bytearray()
        while True:
            message: dict[str, Any] = dict(await receive())
            if message["type"] == "http.disconnect":
                return bytes(body), True
            body += message.get("body", b"")
            if len(body) > self._body_bytes:
                raise too_large(self._body_bytes)
            if not message.get("more_body"):
                return bytes(body), False


async def _tell(error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
