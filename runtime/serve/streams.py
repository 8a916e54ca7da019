"""Server-sent events of a request: progress, partial images, pictures, or an error; and a client that leaves."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from PIL.Image import Image

from saferedir.engines.errors import SafeRedirError
from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.serve.asked import picture_bytes
from saferedir.runtime.serve.errors import ServiceError, told

log = logging.getLogger("saferedir")

#: Its name, and its data.
Event = tuple[str, dict[str, Any]]
#: Makes an event when it is its turn to be sent.
Maker = Callable[[], Awaitable[Event]]
#: Tasks that are under way: the event loop alone would let them be collected.
_DRAWING = set[asyncio.Task[None]]()


class Events:
    """Those of one request, in the order in which they were added; from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting = asyncio.Queue[Maker | None]()
        #: Ends when the client has left.
        self.left = asyncio.Event()

    def add(self, make: Maker) -> None:
        """Send what `make` makes, after all before it."""
        self._loop.call_soon_threadsafe(self._waiting.put_nowait, make)

    def end(self) -> None:
        """Nothing follows."""
        self._loop.call_soon_threadsafe(self._waiting.put_nowait, None)

    async def each(self) -> AsyncIterator[Event]:
        while (make := await self._waiting.get()) is not None:
            try:
                yield await make()
            except SafeRedirError as error:  # of a preview
                yield "error", told(error).body
                return


def streamed(draw: Callable[[Events], Awaitable[None]]) -> StreamingResponse:
    """The events that `draw` adds, and at last the error that it raises."""
    events = Events()

    async def drawn() -> None:
        try:
            await draw(events)
        except SafeRedirError as error:
            events.add(_made(("error", told(error).body)))
        except Exception:
            log.exception("a stream failed")
            events.add(_made(("error", ServiceError(500, "server_error", "internal_error", "The request failed.").body)))
        finally:
            events.end()

    drawing = asyncio.create_task(drawn())
    _DRAWING.add(drawing)
    drawing.add_done_callback(_DRAWING.discard)

    async def sent() -> AsyncIterator[str]:
        try:
            async for name, data in events.each():
                yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
        finally:
            events.left.set()
            await drawing

    return StreamingResponse(sent(), media_type="text/event-stream", headers={"cache-control": "no-store"})


async def encoded(pipeline: Pipeline, latent: Any, kind: str, compression: int | None) -> tuple[Image, str]:
    """A picture in progress, and its bytes in base64."""
    (image,) = await asyncio.to_thread(pipeline.decode, latent[None])
    data = await asyncio.to_thread(picture_bytes, image, kind, compression)
    return image, base64.b64encode(data).decode()


def _made(event: Event) -> Maker:
    async def make() -> Event:
        return event

    return make


async def client_left(request: Request) -> None:
    """Ends when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
