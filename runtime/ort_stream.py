"""ONNX Runtime on a GPU: everything on one stream, and only a download waits for the device."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np

from saferedir.engines import Bundle
from saferedir.runtime.backend import Array, Call, DeviceTensor, Tensors
from saferedir.runtime.cuda import CudaStream
from saferedir.runtime.ort import TYPES, Bound, OrtBackend

#: A graph's number that says: none.
NO_GRAPH = -1

#: While a graph is captured nothing else in the process may touch the device, whatever its stream.
DEVICE_LOCK = threading.RLock()
#: A graph is captured by one of its first calls.
FIRST_CALLS = 3


class _Waiters:
    """Threads that wait for the device without the lock. A capture waits until there are none: waiting would end it."""

    def __init__(self) -> None:
        self._count, self._changed = 0, threading.Condition()

    def enter(self) -> None:
        with self._changed:
            self._count += 1

    def leave(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def none_left(self) -> None:
        """Wait until there are none; the caller holds the device's lock, so that none comes."""
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0)


WAITERS = _Waiters()


class OrtStreamBackend(OrtBackend):
    """Everything that touches the device holds the process's lock, but for waiting."""

    def __init__(self, bundle: Bundle, provider: str, *, threads: int | None = None) -> None:
        super().__init__(bundle, provider, threads=threads)
        self._lock = DEVICE_LOCK
        self._stream = CudaStream(provider)

    def upload(self, array: Array) -> DeviceTensor:
        with self._lock:
            return super().upload(array)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        with self._lock:
            return super().empty(shape, dtype)

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        return self._enqueued(self._bound(engine, inputs, outputs, rows), NO_GRAPH)

    def write(self, tensor: DeviceTensor, row: int, values: Array) -> None:
        values = np.ascontiguousarray(values)
        with self._lock:
            self._stream.upload(_row(tensor, row), values.ctypes.data, values.nbytes)

    def move(self, tensor: DeviceTensor, target: int, source: int) -> None:
        with self._lock:
            self._stream.copy(_row(tensor, target), _row(tensor, source), _row(tensor, 1) - _row(tensor, 0))

    def read(self, tensor: DeviceTensor, row: int = 0, rows: int | None = None) -> Array:
        count, *shape = tensor.shape()
        values = np.empty((count - row if rows is None else rows, *shape), TYPES[tensor.data_type()])
        with self._lock:
            self._stream.download(values.ctypes.data, _row(tensor, row), values.nbytes)
            WAITERS.enter()
        try:
            self._stream.synchronize()  # not under the lock: others may go on
        finally:
            WAITERS.leave()
        return values

    def _enqueued(self, bound: Bound, graph: int) -> Call:
        """A call of what is bound that does not wait for its end, as the CUDA graph of that number."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        calls = itertools.count()

        def call() -> None:
            with self._lock:
                if graph != NO_GRAPH and next(calls) < FIRST_CALLS:
                    WAITERS.none_left()
                bound.run(options)

        return call

    def _provider_options(self, engine: str) -> dict[str, str]:
        return {**super()._provider_options(engine), "user_compute_stream": str(self._stream.pointer)}


def _row(tensor: DeviceTensor, row: int) -> int:
    """The address of a row."""
    address: int = tensor.data_ptr() + tensor.tensor_size_in_bytes() // tensor.shape()[0] * row
    return address
