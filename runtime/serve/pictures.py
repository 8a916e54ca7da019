"""This service's own interface: all that the runtime draws by, with the safety record in the answer."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from saferedir.runtime.serve.asked import Drawn, Progress, UnderWay, picture_bytes
from saferedir.runtime.serve.bodies import PicturesBody
from saferedir.runtime.serve.documented import ANSWERS, STREAMS, Pictures
from saferedir.runtime.serve.errors import invalid
from saferedir.runtime.serve.replies import for_a_stream, whole
from saferedir.runtime.serve.state import State, caller
from saferedir.runtime.serve.streams import Event, Events, encoded, streamed

router = APIRouter()


@router.post("/v1/pictures", response_model=Pictures, responses=STREAMS | ANSWERS)
async def draw(body: PicturesBody, request: Request) -> Response:
    """Draw pictures of a prompt. With `stream` the answer is events: scores after every step, previews, the pictures."""
    state, tenant = await caller(request)
    asked = state.limited(body.asked())
    if not body.stream:
        if body.previews:
            raise invalid("previews is for stream", "previews")
        return await whole(request, state, tenant, body, asked, partial(_answer, body))
    return streamed(partial(stream, state, body, for_a_stream(request, state, tenant, asked)))


async def stream(state: State, body: PicturesBody, request: UnderWay, events: Events) -> None:
    """Add the events of a request that was admitted."""

    def progress(step: Progress) -> None:
        events.add(partial(_progress, step))

    def preview(picture: int, latent: Any) -> None:
        events.add(partial(_preview, state, body, picture, latent))

    drawn = await state.service.draw(request, gone=events.left.wait, progress=progress, previews=body.previews, preview=preview)
    events.add(partial(_completed, body, drawn))


async def _progress(step: Progress) -> Event:
    return "progress", {"type": "progress", **asdict(step)}


async def _preview(state: State, body: PicturesBody, picture: int, latent: Any) -> Event:
    _, data = await encoded(state.service.pipeline, latent, body.output_format, body.output_compression)
    return "preview", {"type": "preview", "picture": picture, "b64_json": data}


async def _completed(body: PicturesBody, drawn: list[Drawn]) -> Event:
    return "completed", {"type": "completed", **await asyncio.to_thread(_answer, body, drawn)}


def _answer(body: PicturesBody, drawn: list[Drawn]) -> dict[str, Any]:
    return {"created": int(time.time()), "pictures": [_picture(body, own) for own in drawn]}


def _picture(body: PicturesBody, own: Drawn) -> dict[str, Any]:
    data = picture_bytes(own.image, body.output_format, body.output_compression)
    return {
        "id": own.id,
        "b64_json": base64.b64encode(data).decode(),
        "redirected": own.redirected,
        "observed": own.observed,
        "record": own.record.to_dict(),
    }
