"""ONNX Runtime on a GPU: everything on one stream, and only a download waits for the device."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from saferedir.engines import Bundle
from saferedir.runtime.backend import Array, Call, DeviceTensor, Tensors
from saferedir.runtime.cuda import CudaStream
from saferedir.runtime.ort import TYPES, OrtBackend

#: A graph's number that says: none.
NO_GRAPH = -1

#: While a graph is captured nothing else in the process may touch the device, whatever its stream.
DEVICE_LOCK = threading.RLock()


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
        return self._enqueued(*self._bound(engine, inputs, outputs, rows), NO_GRAPH)

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
        self._stream.synchronize()  # not under the lock: others may go on
        return values

    def _enqueued(self, session: Any, binding: Any, graph: int) -> Call:
        """A call of what is bound that does not wait for its end, as the CUDA graph of that number."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def call() -> None:
            with self._lock:
                session.run_with_iobinding(binding, options)

        return call

    def _provider_options(self, engine: str) -> dict[str, str]:
        return {**super()._provider_options(engine), "user_compute_stream": str(self._stream.pointer)}


def _row(tensor: DeviceTensor, row: int) -> int:
    """The address of a row."""
    address: int = tensor.data_ptr() + tensor.tensor_size_in_bytes() // tensor.shape()[0] * row
    return address
