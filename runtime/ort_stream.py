"""ONNX Runtime on a GPU: everything on one stream, and only a download waits for the device."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from saferedir.engines import Bundle
from saferedir.runtime.backend import Array, Call, DeviceTensor
from saferedir.runtime.cuda import CudaStream
from saferedir.runtime.ort import OrtBackend

#: A graph's number that says: none.
NO_GRAPH = -1

Tensors = Mapping[str, DeviceTensor]

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

    def download(self, tensor: DeviceTensor) -> Array:
        self._stream.synchronize()
        with self._lock:
            return super().download(tensor)

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors) -> Call:
        return self._enqueued(engine, inputs, outputs, NO_GRAPH)

    def _enqueued(self, engine: str, inputs: Tensors, outputs: Tensors, graph: int) -> Call:
        """A call on exactly these tensors that does not wait for its end, as the CUDA graph of that number."""
        session, binding = self._bound(engine, inputs, outputs)
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def call() -> None:
            with self._lock:
                session.run_with_iobinding(binding, options)

        return call

    def _provider_options(self, engine: str) -> dict[str, str]:
        return {**super()._provider_options(engine), "user_compute_stream": str(self._stream.pointer)}
