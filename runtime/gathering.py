"""What several threads ask of one engine at the same time is computed in one call."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import CancelledError

Array = npt.NDArray[Any]


class Gathering:
    """Gathers rows for `function`, which maps [B, ...] to [B, ...] with each row by itself, `most` rows a call.

    There is no thread: who comes while nobody computes does so for all that wait by then.
    """

    def __init__(self, function: Callable[[Array], Array], most: int) -> None:
        self._function, self._most = function, most
        self._waiting: deque[tuple[Array, Future[Array]]] = deque()
        self._lock = threading.Lock()
        self._computing = threading.Lock()

    def __call__(self, rows: Sequence[Array] | Array) -> Array:
        """What the function makes of `rows` [B, ...].

        Raises:
            whatever the function raises; it does for all that were in the same call.
        """
        own: list[Future[Array]] = [Future() for _ in rows]
        with self._lock:
            self._waiting.extend(zip(rows, own, strict=True))
        while not all(future.done() for future in own):
            with self._computing:
                if not all(future.done() for future in own):
                    self._compute()
        return np.stack([future.result() for future in own])

    def _compute(self) -> None:
        """One call, of those that have waited longest and others of their shape."""
        with self._lock:
            shape = self._waiting[0][0].shape
            chosen = [item for item in self._waiting if item[0].shape == shape][: self._most]
            taken = {id(future) for _, future in chosen}
            self._waiting = deque(item for item in self._waiting if id(item[1]) not in taken)
        try:
            made = self._function(np.stack([row for row, _ in chosen]))
        except Exception as error:
            for _, future in chosen:
                future.set_exception(error)
            return
        except BaseException:  # of this thread alone: an interruption
            for _, future in chosen:
                future.set_exception(CancelledError("whoever computed for several calls was interrupted"))
            raise
        for (_, future), row in zip(chosen, made, strict=True):
            future.set_result(row)
