"""The answer to a request for pictures, whole or as a stream, whichever interface it came by."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from saferedir.runtime.serve.asked import Asked, Drawn, UnderWay
from saferedir.runtime.serve.errors import ServiceError, invalid
from saferedir.runtime.serve.state import State
from saferedir.runtime.serve.streams import client_left

KEY_HEADER = "idempotency-key"


async def whole(
    request: Request, state: State, tenant: str, body: BaseModel, asked: Asked, tell: Callable[[list[Drawn]], dict[str, Any]]
) -> Response:
    """What `tell` makes of the pictures. Requests of one `Idempotency-Key` are one, which is drawn to its end whoever leaves.

    Raises:
        ServiceError: the key was of another request. Whatever admitting and drawing raise.
    """

    async def made(keyed: bool) -> bytes:
        admitted = state.admit(request, asked, tenant)
        drawn = await state.service.draw(admitted, gone=None if keyed else partial(client_left, request))
        return await asyncio.to_thread(lambda: json.dumps(tell(drawn)).encode())

    key = request.headers.get(KEY_HEADER)
    if not key:
        return Response(await made(False), media_type="application/json")
    said = f"{request.url.path} {body.model_dump_json()}".encode()
    data = await state.answers.once(tenant, key, said, partial(made, True))
    return Response(data, media_type="application/json")


def no_key_for_streams() -> ServiceError:
    """What has left as a stream cannot be given again."""
    return invalid("Idempotency-Key is for requests without stream", "Idempotency-Key")


def for_a_stream(request: Request, state: State, tenant: str, asked: Asked) -> UnderWay:
    """The request, admitted: what cannot be drawn is refused before a stream begins.

    Raises:
        ServiceError: it has an `Idempotency-Key`. Whatever admitting raises.
    """
    if request.headers.get(KEY_HEADER):
        raise no_key_for_streams()
    return state.admit(request, asked, tenant)
