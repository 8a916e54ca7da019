"""Answers that are kept: requests of one `Idempotency-Key` are one."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from saferedir.runtime.serve.errors import NO_RETRY, ServiceError

#: How many answers are kept, of how many bytes together, and for how many seconds.
MOST, MOST_BYTES, SECONDS = 2_000, 256_000_000, 24 * 3600.0


@dataclass
class _Kept:
    request: bytes
    began: float
    answer: asyncio.Task[bytes]

    @property
    def size(self) -> int:
        whole = self.answer.done() and not self.answer.cancelled() and self.answer.exception() is None
        return len(self.answer.result()) if whole else 0


class Answers:
    """By tenant and key. What failed is not kept, so that it may be tried again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    async def once(self, tenant: str, key: str, request: bytes, make: Callable[[], Awaitable[bytes]]) -> bytes:
        """The answer to `request`, made by `make` unless it was, or is being, made. It is made to its end whoever leaves.

        Raises:
            ServiceError: the key was of another request. Whatever `make` raises.
        """
        self._forget()
        kept = self._kept.get((tenant, key))
        if kept is None:
            kept = _Kept(request, time.monotonic(), asyncio.ensure_future(make()))
            self._kept[tenant, key] = kept
        if kept.request != request:
            message = "The Idempotency-Key was of another request."
            raise ServiceError(409, "invalid_request_error", "idempotency_key_reused", message, None, NO_RETRY)
        try:
            return await asyncio.shield(kept.answer)
        except BaseException as error:
            if not kept.answer.done():
                raise  # whoever asked has left
            if self._kept.get((tenant, key)) is kept:
                del self._kept[tenant, key]
            if isinstance(error, asyncio.CancelledError):
                message = "The picture was not drawn; ask again."
                raise ServiceError(503, "server_error", "not_drawn", message, None, {"retry-after": "1"}) from None
            raise

    def _forget(self) -> None:
        """The oldest that are too many, too large together, or too old. Those that are being made stay."""
        now, size = time.monotonic(), sum(kept.size for kept in self._kept.values())
        for name, kept in list(self._kept.items()):
            if not kept.answer.done():
                continue
            if len(self._kept) < MOST and size <= MOST_BYTES and kept.began > now - SECONDS:
                break
            size -= kept.size
            del self._kept[name]
