"""The OpenAI images interface."""

from __future__ import annotations

import asyncio
import base64
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from saferedir.runtime.serve.asked import Drawn, UnderWay, picture_bytes
from saferedir.runtime.serve.bodies import ImagesBody
from saferedir.runtime.serve.documented import ANSWERS, STREAMS, Images
from saferedir.runtime.serve.errors import invalid
from saferedir.runtime.serve.replies import for_a_stream, whole
from saferedir.runtime.serve.state import State, caller
from saferedir.runtime.serve.streams import Event, Events, encoded, streamed

router = APIRouter()
Answer = dict[str, Any]


@router.post("/v1/images/generations", response_model=Images, responses=STREAMS | ANSWERS)
async def generate(body: ImagesBody, request: Request) -> Response:
    """Draw `n` pictures of a prompt. With `stream` the answer is a stream of events."""
    state, tenant = await caller(request)
    state.check_model(body.model)
    asked = state.limited(body.asked(), pictures="n", steps="quality")
    if not body.stream:
        if body.partial_images:
            raise invalid("partial_images is for stream", "partial_images")
        return await whole(request, state, tenant, body, asked, partial(_answer, body))
    if body.n != 1:
        raise invalid("n is for one picture where stream is true", "n")
    return streamed(partial(_stream, state, body, for_a_stream(request, state, tenant, asked)))


async def _stream(state: State, body: ImagesBody, request: UnderWay, events: Events) -> None:
    shown = iter(range(body.partial_images))

    def preview(picture: int, latent: Any) -> None:
        events.add(partial(_partial, state, body, next(shown), latent))

    drawn = await state.service.draw(request, gone=events.left.wait, previews=body.partial_images, preview=preview)
    events.add(partial(_completed, body, drawn))


async def _partial(state: State, body: ImagesBody, index: int, latent: Any) -> Event:
    image, data = await encoded(state.service.pipeline, latent, body.output_format, body.output_compression)
    name = "image_generation.partial_image"
    return name, {
        "type": name, "b64_json": data, "partial_image_index": index,
        "created_at": int(time.time()), "background": "opaque", "output_format": body.output_format,
        "quality": body.quality, "size": f"{image.width}x{image.height}",
    }  # fmt: skip


async def _completed(body: ImagesBody, drawn: list[Drawn]) -> Event:
    answer = await asyncio.to_thread(_answer, body, drawn)
    (data,) = answer.pop("data")
    answer["created_at"] = answer.pop("created")
    name = "image_generation.completed"
    return name, {"type": name, **data, **answer}


def _answer(body: ImagesBody, drawn: list[Drawn]) -> Answer:
    height, width = drawn[0].record.height, drawn[0].record.width
    pictures = [picture_bytes(own.image, body.output_format, body.output_compression) for own in drawn]
    return {
        "created": int(time.time()),
        "data": [{"b64_json": base64.b64encode(data).decode()} for data in pictures],
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
